"""Jobs, runs, models, routes, experiments and monitoring, on one filled daemon.

Tests leave routes and aliases of the model `risk` as they found them.
"""

import json
from collections.abc import Callable
from typing import Any

import pytest
from click.testing import Result

Mlpd = Callable[..., Result]


def read(run: Mlpd, *arguments: object) -> Any:
    done = run(*arguments, "--json")
    assert (done.exit_code, done.stderr) == (0, ""), done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="session")
def run_id(mlpd: Mlpd) -> str:
    """The run that registered the champion: the first of all."""
    runs = read(mlpd, "runs", "list")["runs"]
    return next(str(run["run_id"]) for run in runs if run["state"] == "succeeded")


def test_a_job_is_listed_and_its_run_has_succeeded(mlpd: Mlpd, run_id: str) -> None:
    assert "bought" in mlpd("jobs", "list").stdout
    assert read(mlpd, "jobs", "list")["jobs"][0]["name"] == "risk"
    shown = mlpd("runs", "show", run_id).stdout
    assert "succeeded" in shown
    assert "rows bit-equal to LightGBM" in shown
    assert "auc" in shown
    assert "risk@1" in mlpd("runs", "list").stdout
    assert read(mlpd, "runs", "log", run_id)["run_id"] == run_id
    assert mlpd("runs", "log", run_id).exit_code == 0


def test_following_a_run_that_ended_returns_at_once(mlpd: Mlpd, run_id: str) -> None:
    assert mlpd("runs", "show", run_id, "--follow").exit_code == 0


def test_a_cancelled_run_gives_exit_code_1_to_those_who_follow(mlpd: Mlpd) -> None:
    started = read(mlpd, "jobs", "run", "risk", "--deploy", "none")
    assert started["state"] in ("queued", "running")
    assert mlpd("runs", "cancel", started["run_id"]).exit_code == 0
    done = mlpd("runs", "show", started["run_id"], "--follow")
    assert done.exit_code == 1
    assert "[run_cancelled]" in done.stderr
    again = read(mlpd, "runs", "retry", started["run_id"])
    assert again["trigger"].endswith(f"retry of {started['run_id']}")
    assert mlpd("runs", "cancel", again["run_id"]).exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["jobs", "run", "nothing"], "unknown_job"),
        (["runs", "show", "nothing"], "unknown_run"),
        (["runs", "log", "nothing"], "unknown_run"),
        (["runs", "cancel", "nothing"], "unknown_run"),
        (["runs", "retry", "nothing"], "unknown_run"),
        (["models", "show", "nothing"], "unknown_model"),
        (["models", "show", "risk@99"], "unknown_version"),
        (["models", "show", "risk@nobody"], "unknown_alias"),
        (["models", "history", "nothing"], "unknown_model"),
        (["models", "alias", "risk", "champion", "99"], "unknown_version"),
        (["models", "alias", "risk", "champion", "1", "--expected", "7"], "alias_moved"),
        (["models", "rollback", "risk", "nobody"], "nothing_to_roll_back_to"),
        (["routes", "show", "nothing"], "unknown_route"),
        (["routes", "history", "nothing"], "unknown_route"),
        (["routes", "rollback", "risk", "99"], "unknown_route_version"),
        (["routes", "delete", "nothing", "--yes"], "unknown_route"),
        (["routes", "set", "x", "--service", "risk", "--arm", "risk@99"], "unknown_version"),
        (["routes", "set", "x", "--service", "no", "--arm", "risk@1"], "unknown_service"),
        (["routes", "set", "x", "--service", "risk", "--arm", "risk"], "invalid_model_ref"),
        (["experiments", "show", "nothing"], "unknown_experiment"),
        (["experiments", "weights", "nothing", "a=1"], "unknown_experiment"),
        (["drift", "nothing"], "unknown_model"),
        (["drift", "risk", "--start", "yesterday"], "invalid_time"),
        (["performance", "nothing"], "unknown_model"),
    ],
)
def test_what_is_not_there_is_named(mlpd: Mlpd, arguments: list[str], code: str) -> None:
    done = mlpd(*arguments)
    assert done.exit_code == 1
    assert f"[{code}]" in done.stderr
    assert done.stdout == ""


def test_a_model_its_versions_and_its_history(mlpd: Mlpd) -> None:
    assert "champion -> 1" in mlpd("models", "list").stdout
    assert read(mlpd, "models", "list")["models"][0]["aliases"] == {"champion": 1}
    assert "champion" in mlpd("models", "show", "risk").stdout
    version = mlpd("models", "show", "risk@champion").stdout
    assert "risk@1" in version
    assert "Test metrics" in version
    assert "model.onnx" in version
    assert read(mlpd, "models", "show", "risk@1")["lineage"]["job"] == "risk"
    assert "version 1 registered" in mlpd("models", "history", "risk").stdout


def test_an_alias_is_set_moved_nowhere_and_taken_away(mlpd: Mlpd) -> None:
    assert mlpd("models", "alias", "risk", "old", "1", "--why", "try").stdout == (
        "risk@old points to version 1\n"
    )
    assert mlpd("models", "alias", "risk", "old", "--remove").exit_code == 2
    assert mlpd("models", "alias", "risk", "old").exit_code == 2
    done = mlpd("models", "alias", "risk", "old", "--remove", "--yes")
    assert done.stdout == "risk@old points nowhere (before: 1)\n"
    history = mlpd("models", "history", "risk", "--alias", "old").stdout
    assert "alias old set to 1" in history
    assert "(command line): try" in history
    assert "alias old taken from 1" in history


def test_a_route_is_made_shown_changed_rolled_back_and_removed(mlpd: Mlpd) -> None:
    made = read(mlpd, "routes", "set", "other", "--service", "risk", "--arm", "risk@1")
    assert (made["version"], made["serving"]) == (1, {"risk": "risk@1"})
    arms = ("--arm", "a=risk@champion:1", "--arm", "b=risk@1:3", "--fallback", "0.5")
    changed = mlpd(*("routes", "set", "other", "--service", "risk", "--shadow", "risk@1"), *arms)
    assert "75.0%" in changed.stdout
    assert "other" in mlpd("routes", "list").stdout
    history = mlpd("routes", "history", "other").stdout
    assert "+ fallback: 0.5" in history
    assert "- arms.risk.model: risk@1" in history
    assert read(mlpd, "routes", "rollback", "other", "1")["arms"] == made["arms"]
    stale = mlpd("routes", "set", "other", "--service", "risk", "--arm", "risk@1", "--expected", 1)
    assert "[route_changed]" in stale.stderr
    assert mlpd("routes", "delete", "other").exit_code == 2
    assert read(mlpd, "routes", "delete", "other", "--yes") == {"deleted": "other"}
    assert [route["name"] for route in read(mlpd, "routes", "list")["routes"]] == ["risk"]


def test_a_route_shown_as_json_is_a_route_to_set(mlpd: Mlpd) -> None:
    shown = mlpd("routes", "show", "risk", "--json").stdout
    copied = mlpd("routes", "set", "copy", "--file", "-", "--json", input=shown)
    assert json.loads(copied.stdout)["arms"] == json.loads(shown)["arms"]
    assert mlpd("routes", "delete", "copy", "--yes").exit_code == 0


@pytest.mark.parametrize(
    "options",
    [[], ["--service", "risk"], ["--service", "risk", "--arm", "risk@1:heavy"], ["--arm", "x"]],
)
def test_half_a_route_is_wrong_usage(mlpd: Mlpd, options: list[str]) -> None:
    assert mlpd("routes", "set", "x", *options).exit_code == 2


@pytest.mark.parametrize("text", ["{", "[]"])
def test_a_file_that_is_no_route_is_refused(mlpd: Mlpd, text: str) -> None:
    done = mlpd("routes", "set", "x", "--file", "-", input=text)
    assert "[malformed_body]" in done.stderr


def test_shadows_are_shown_once_they_scored(mlpd: Mlpd) -> None:
    assert mlpd("routes", "shadows").exit_code == 0
    assert read(mlpd, "routes", "shadows") == {"shadows": []}


def test_an_experiment_is_created_shown_and_reweighted(mlpd: Mlpd) -> None:
    created = mlpd(
        *("experiments", "create", "try", "--unit", "user", "--planned-units", "1000"),
        *("--arm", "control=1", "--arm", "treatment=1", "--metric", "squared_error:mean:lower"),
    )
    assert created.exit_code == 0, created.stderr
    assert "treatment - control" in created.stdout
    assert "insufficient" in created.stdout
    changed = read(mlpd, "experiments", "weights", "try", "treatment=3")
    assert changed["spec"]["arms"] == {"control": 1.0, "treatment": 3.0}
    assert len(changed["phases"]) == 2
    assert [phase["phase"] for phase in changed["phases"]] == [1, 2]
    assert [phase["phase"] for phase in changed["result"]["phases"]] == [1, 2]
    shown = mlpd("experiments", "show", "try").stdout
    assert "Phase 2, since" in shown
    assert "in phase 2, control has 0 of 100 units" in shown
    assert "hase 0" not in shown
    assert "try" in mlpd("experiments", "list").stdout
    wrong = mlpd("experiments", "weights", "try", "teatment=3")
    assert "has no arm 'teatment'; it has control, treatment" in wrong.stderr
    assert mlpd("experiments", "weights", "try", "control").exit_code == 2
    assert mlpd("experiments", "create", "more", "--unit", "user").exit_code == 2
    again = json.dumps(changed["spec"] | {"unit": "age"})
    fixed = mlpd("experiments", "create", "try", "--file", "-", input=again)
    assert "[experiment_fixed]" in fixed.stderr


def test_drift_shows_what_moved_and_hides_what_did_not(mlpd: Mlpd) -> None:
    report = read(mlpd, "drift", "risk")
    (window,) = report["windows"]
    assert window["rows"] == 300
    shown = mlpd("drift", "risk").stdout
    assert "risk@1 against training" in shown
    assert "profile.amount" in shown  # it is stale now, which it never was in training
    assert "\nage " not in shown
    assert "\nage " in mlpd("drift", "risk", "--all").stdout
    assert mlpd("drift", "risk", "--end", "2013-01-01T00:00:00Z").stdout.endswith(
        "Nothing was served in this time.\n"
    )


def test_performance_by_period(mlpd: Mlpd) -> None:
    for by, length in (("all", 3), ("month", 7), ("day", 10)):
        header, row = mlpd("performance", "risk", "--by", by).stdout.splitlines()
        assert header.split()[:4] == ["period", "route", "arm", "version"]
        assert len(row.split()[0]) == length
        assert row.split()[4:6] == ["300", "100.0%"]


def test_what_was_served_equals_the_log(mlpd: Mlpd) -> None:
    audited = mlpd("consistency", "--run")
    assert audited.exit_code == 0
    assert "match" in audited.stdout
    last = read(mlpd, "consistency")
    assert (last["rows_compared"], last["mismatches"]) == (300, 0)
    assert read(mlpd, "consistency", "--limit", "10")["rows_compared"] == 10


def test_status_at_one_glance(mlpd: Mlpd, url: str) -> None:
    shown = mlpd("status").stdout
    assert f"at {url}" in shown
    assert "300 logged" in shown
    assert read(mlpd, "status")["models"] == ["risk"]
