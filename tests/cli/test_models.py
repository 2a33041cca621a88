"""Jobs, runs, models, routes, experiments and monitoring, on one filled daemon.

Tests leave routes and aliases of the model `risk` as they found them.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from click.testing import Result
from onnx import TensorProto, helper

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
    assert "No job runs by the clock." in mlpd("jobs", "next").stdout
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


def test_a_version_is_trained_again_and_compared(
    mlpd: Mlpd, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = mlpd("models", "reproduce", "risk@1")
    assert done.exit_code == 0, done.stderr
    assert "reproduced" in done.stdout
    assert "DIFFERENT" not in done.stdout
    found = read(mlpd, "models", "reproduce", "risk@1")
    assert {"events and labels", "trees", "golden rows"} <= {c["what"] for c in found["checks"]}
    found["verdict"], found["cpu_flags"] = "different", ["avx9000"]
    found["checks"][-1].update(found=3, same=False)
    found["packages"] = [{"name": "lightgbm", "from": "3.3.2", "to": "4.7.0"}]
    monkeypatch.setattr("mlpd.client.operations.Models.reproduce", lambda *_: found)
    done = mlpd("models", "reproduce", "risk@1")
    assert done.exit_code == 1
    for told in ("DIFFERENT", "lightgbm", "3.3.2", "avx9000"):
        assert told in done.stdout
    assert mlpd("models", "reproduce", "risk").exit_code == 2


def test_runs_are_compared_by_their_versions(mlpd: Mlpd, run_id: str) -> None:
    same = mlpd("runs", "diff", run_id, run_id)
    assert (same.exit_code, "They are the same." in same.stdout) == (0, True)
    found = read(mlpd, "runs", "diff", run_id, run_id)
    assert (found["from"], found["to"], found["same"]) == ("risk@1", "risk@1", True)
    nothing = mlpd("runs", "diff", run_id, "nothing")
    assert (nothing.exit_code, "unknown run" in nothing.stderr) == (1, True)


def test_a_log_is_followed_to_the_end_of_its_run(
    mlpd: Mlpd, run_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = read(mlpd, "runs", "log", run_id)["log"]
    assert mlpd("runs", "log", run_id, "--follow").stdout == whole
    # As one grows, and loses its beginning once it is long.
    texts = iter(["", "one\n", "one\ntwo\n", "ne\ntwo\nthree\n", "ne\ntwo\nthree\n"])
    states = iter(["queued", "running", "running", "running", "succeeded"])
    monkeypatch.setattr("mlpd.client.operations.Runs.log", lambda *_: next(texts))
    monkeypatch.setattr("mlpd.client.operations.Runs.get", lambda *_: {"state": next(states)})
    monkeypatch.setattr("mlpd.cli.runs.LOG_POLL_S", 0.0)
    monkeypatch.setattr("mlpd.cli.runs.LOG_OVERLAP_CHARS", 4)
    assert mlpd("runs", "log", run_id, "-f").stdout == "one\ntwo\nthree\n"


def test_metrics_are_shown_with_their_bounds_folds_and_trials(
    mlpd: Mlpd, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = read(mlpd, "models", "show", "risk@1")
    area = found["report"]["evaluation"]["test"]["metrics"]["auc"]
    shown = mlpd("models", "show", "risk@1").stdout
    assert f"{area['low']:.4g}" in shown
    part = {"rows": 30, "metrics": {"auc": None, "recall": {"value": 0.625}}}
    found["report"]["evaluation"]["test"]["slices"]["(class)"] = {"0": part}
    spread = {"mean": 0.71, "deviation": None, "least": 0.71, "largest": 0.71}
    found["report"]["cross_validation"] = {
        "window": "rolling",
        "folds": [{}],
        "metrics": {"auc": spread},
    }
    trials = [{"state": "pruned"}, {"state": "complete"}]
    loss = {"metrics": {"log_loss": {"value": 0.6543}}, "ece": 0.0765}
    found["report"]["calibration"] = {"method": "isotonic", "before": loss, "after": loss}
    found["report"]["search"] = {"trials": trials, "best": 1, "params": {"num_leaves": 17}}
    monkeypatch.setattr("mlpd.client.operations.Models.version", lambda *_: found)
    shown = mlpd("models", "show", "risk@1").stdout
    calibration = "Calibration, isotonic", "0.6543", "0.0765"
    for told in (
        *calibration,
        "0.625",
        "1 folds by time, rolling",
        "2, 1 of them given up",
        "num_leaves",
        "17",
    ):
        assert told in shown


def test_pictures_are_written_as_files(mlpd: Mlpd, run_id: str, tmp_path: Path) -> None:
    folder = tmp_path / "new" / "pictures"
    assert "importance" in mlpd("models", "pictures", "risk@champion", "--to", folder).stdout
    files = sorted(path.name for path in folder.iterdir())
    kinds = ["calibration", "contributions", "importance", "learning", "roc"]
    assert files == [f"risk-1-{kind}.svg" for kind in kinds]
    found = read(mlpd, "runs", "pictures", run_id, "--to", tmp_path)
    assert found["version"] == "risk@1"
    for picture in found["pictures"]:
        path = Path(picture["path"])
        assert path.read_text() == (folder / path.name).read_text()
        assert path.stat().st_size == picture["size_bytes"]


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
    arms += ("--fallback-model", "risk@champion~1", "--fallback-model", "risk@1")
    changed = mlpd(*("routes", "set", "other", "--service", "risk", "--shadow", "risk@1"), *arms)
    assert "75.0%" in changed.stdout
    assert "other" in mlpd("routes", "list").stdout
    history = mlpd("routes", "history", "other").stdout
    assert "+ fallback: 0.5" in history
    assert "+ fallback_models: " in history
    assert "risk@champion~1" in history
    assert "- arms.risk.model: risk@1" in history
    assert read(mlpd, "routes", "rollback", "other", "1")["arms"] == made["arms"]
    stale = mlpd("routes", "set", "other", "--service", "risk", "--arm", "risk@1", "--expected", 1)
    assert "[route_changed]" in stale.stderr
    assert mlpd("routes", "delete", "other").exit_code == 2
    assert read(mlpd, "routes", "delete", "other", "--yes") == {"deleted": "other"}
    assert [route["name"] for route in read(mlpd, "routes", "list")["routes"]] == ["risk"]


def test_a_canary_is_made_and_shown(mlpd: Mlpd) -> None:
    options = ("--service", "risk", "--arm", "a=risk@1", "--arm", "b=risk@champion")
    timetable = ("--canary", "b", "--step", "5%:10m:100", "--step", "1:1h")
    guards = ("--guard", "slower=2", "--guard", "rows=30", "--guard", "failed_share=off")
    made = read(
        *(mlpd, "routes", "set", "careful", *options, *timetable, *guards),
        *("--on-failure", "stop"),
    )
    assert made["canary"] == {
        "arm": "b",
        "steps": [
            {"share": 0.05, "for": "10m", "rows": 100},
            {"share": 1.0, "for": "1h", "rows": 30},
        ],
        "guard": {"rows": 30, "failed_share": None, "slower": 2.0, "score_shift": None},
        "on_failure": "stop",
    }
    shown = mlpd("routes", "show", "careful").stdout
    assert "1 of 2, 5.00% of the rows" in shown
    assert "risk@1 as b" in shown
    assert "canary, step 1 of 2" in mlpd("routes", "list").stdout
    assert "1 of 2" in mlpd("status").stdout
    mlpd("routes", "set", "careful", *options)
    assert "stopped: the route was changed" in mlpd("routes", "show", "careful").stdout
    assert mlpd("routes", "delete", "careful", "--yes").exit_code == 0


@pytest.mark.parametrize(
    "options",
    [
        ["--step", "5%:10m"],
        ["--guard", "rows=5"],
        ["--on-failure", "stop"],
        ["--canary", "b", "--step", "much:10m"],
        ["--canary", "b", "--step", "5%:10m:many"],
        ["--canary", "b", "--step", "5%:10m", "--guard", "slower=very"],
    ],
)
def test_half_a_canary_is_wrong_usage(mlpd: Mlpd, options: list[str]) -> None:
    arms = ("--arm", "a=risk@1", "--arm", "b=risk@champion")
    assert mlpd("routes", "set", "x", "--service", "risk", *arms, *options).exit_code == 2


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
    refused = mlpd(
        *("experiments", "outcomes", "try"),
        '{"unit": "nobody", "id": "1", "values": {"squared_error": 1}}',
    )
    assert refused.exit_code == 1
    assert "0 stored" in refused.stdout
    assert "unknown_unit" in refused.stdout
    assert mlpd("experiments", "outcomes", "try", "{").exit_code == 2
    assert mlpd("experiments", "outcomes", "try").exit_code == 2
    happened = mlpd("experiments", "history", "try").stdout
    assert "control=1, treatment=3" in happened
    assert [e["action"] for e in read(mlpd, "experiments", "history", "try")["events"]] == [
        *("weights", "created")
    ]
    none = mlpd("experiments", "picture", "try", "--out", "lift.svg")
    assert "[unknown_comparison]" in none.stderr
    wrong = mlpd("experiments", "weights", "try", "teatment=3")
    assert "has no arm 'teatment'; it has control, treatment" in wrong.stderr
    assert mlpd("experiments", "weights", "try", "control").exit_code == 2
    assert mlpd("experiments", "create", "more", "--unit", "user").exit_code == 2
    rails = ("--guardrail", "errors", "--guardrail", "latency=50", "--guardrail", "label=0.1")
    guarded = read(
        *(mlpd, "experiments", "create", "guarded", "--unit", "user", "--planned-units", 9),
        *("--arm", "a=1", "--arm", "b=1", "--metric", "label", "--promote", "0.02", *rails),
    )["spec"]
    assert [(g["on"], g.get("limit_ms"), g["margin"]) for g in guarded["guardrails"]] == [
        ("errors", None, 0.0),
        ("latency", 50.0, 0.0),
        ("metric", None, 0.1),
    ]
    assert guarded["promotion"] == {"margin": 0.02}
    bad = ("experiments", "create", "bad", "--unit", "user", "--planned-units", 9, "--arm", "a=1")
    assert mlpd(*bad, "--metric", "label", "--guardrail", "errors=many").exit_code == 2
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
    before = mlpd("drift", "risk", "--end", "2013-01-01T00:00:00Z").stdout
    assert "\nNothing was served in this time.\n" in before


def test_drift_pictures_references_and_checks(mlpd: Mlpd, tmp_path: Path) -> None:
    shown = mlpd("drift", "risk", "--all", "--svg", str(tmp_path / "pictures")).stdout
    assert "over time" in shown
    assert any(bar in shown for bar in "▁▂▃▄▅▆▇█")
    pictures = {path.name for path in (tmp_path / "pictures").iterdir()}
    assert {"age.svg", "score.svg"} <= pictures
    assert "reference</tspan>" in (tmp_path / "pictures" / "age.svg").read_text()
    rolling = read(mlpd, "drift", "risk", "--reference", "rolling", "--count", "1")
    assert (rolling["reference"], rolling["windows"][0]["state"]) == ("rolling", "insufficient")
    assert mlpd("drift", "risk", "--reference", "previous").exit_code == 1
    assert "Features together" in mlpd("drift", "risk", "--check").stdout


def test_performance_by_period(mlpd: Mlpd) -> None:
    for by, length in (("all", 3), ("month", 7), ("day", 10)):
        header, row = mlpd("performance", "risk", "--by", by).stdout.splitlines()
        assert header.split()[:4] == ["period", "route", "arm", "version"]
        assert len(row.split()[0]) == length
        assert row.split()[4:6] == ["300", "100.0%"]


def test_performance_analysed(mlpd: Mlpd) -> None:
    (version,) = read(mlpd, "performance", "risk", "--analysis")["versions"]
    assert (version["predictions"], version["calibrated"]) == (300, True)
    shown = mlpd("performance", "risk", "--analysis").stdout
    assert "risk@1" in shown
    assert "Estimated from the scores alone: blind to concept drift." in shown
    assert "fewer than 100 labels of mature days" in shown or "held-out rows since" in shown
    sliced = mlpd("performance", "risk", "--slice", "user").stdout
    assert "\na " in sliced
    assert "labels  mature" not in sliced
    assert mlpd("performance", "risk", "--end", "2013-01-01T00:00:00Z").stdout.endswith(
        "Nothing was predicted in this time.\n"
    )
    assert mlpd("performance", "risk", "--slice", "colour").exit_code == 1


def test_what_was_served_equals_the_log(mlpd: Mlpd) -> None:
    audited = mlpd("consistency", "--run")
    assert audited.exit_code == 0
    assert "match" in audited.stdout
    last = read(mlpd, "consistency")
    assert (last["rows_compared"], last["mismatches"]) == (300, 0)
    assert read(mlpd, "consistency", "--limit", "10")["rows_compared"] == 10


def test_served_rows_are_exported(mlpd: Mlpd, tmp_path: Path) -> None:
    whole = read(mlpd, "predictions", "export", tmp_path / "all.parquet")
    assert whole["rows"] > 0
    found = pl.read_parquet(tmp_path / "all.parquet")
    assert len(found) == whole["rows"]
    assert {"prediction_id", "vector", "request", "label"} <= set(found.columns)
    assert "position" not in found.columns
    lines = mlpd("predictions", "export", "-", "--route", "risk").stdout.splitlines()
    routed = found.filter(pl.col("route") == "risk")
    assert [json.loads(line)["prediction_id"] for line in lines] == [*routed["prediction_id"]]
    none = read(mlpd, "predictions", "export", tmp_path / "n.csv", "--end", "2001-01-01T00:00:00Z")
    assert none["rows"] == 0
    assert (tmp_path / "n.csv").read_text().startswith("served_time,time,prediction_id,")
    assert mlpd("predictions", "export", "-", "--json").exit_code == 2


def test_status_at_one_glance(mlpd: Mlpd, url: str) -> None:
    shown = mlpd("status").stdout
    assert f"at {url}" in shown
    assert "300 logged" in shown
    assert read(mlpd, "status")["models"] == ["risk"]


@pytest.fixture
def onnx_file(tmp_path: Path) -> Path:
    """y = 2 x for x [n, 3]."""
    graph = helper.make_graph(
        [helper.make_node("Add", ["x", "x"], ["y"])],
        "double",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 3])],
    )
    opsets = [helper.make_opsetid("", 17)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=8, producer_name="a hand")
    path = tmp_path / "double.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def test_a_users_model_is_registered_served_kept_exported_and_deleted(
    empty: Mlpd, onnx_file: Path, tmp_path: Path
) -> None:
    x = {"name": "x", "datatype": "FP32", "shape": [1, 3], "data": [1, 2, 3]}
    y = {"name": "y", "datatype": "FP32", "shape": [1, 3], "data": [2, 4, 6]}
    golden = tmp_path / "rows.json"
    golden.write_text(json.dumps({"inputs": [x], "outputs": [y]}))
    done = empty("models", "register", "double", onnx_file)
    assert "double@1" in done.stdout
    answer = read(empty, "models", "register", "double", onnx_file, "--golden", golden)
    assert answer["version"]["number"] == 2
    shown = empty("models", "show", "double@2").stdout
    assert "a hand" in shown
    assert "golden.json" in shown
    changed = empty("models", "diff", "double@1", "double@2").stdout
    assert changed == "double@1 -> double@2\n\nFiles that differ: golden.json\n"
    assert empty("models", "pin", "double@2").stdout == "double@2 is ready, pinned\n"
    assert "pinned" in empty("models", "show", "double").stdout
    assert "version 2 pinned" in empty("models", "history", "double").stdout
    assert "[version_pinned]" in empty("models", "delete", "double@2", "--yes").stderr
    assert empty("models", "unpin", "double@2").stdout == "double@2 is ready\n"
    assert empty("models", "state", "double@1", "archived").stdout == "double@1 is archived\n"

    assert empty("models", "alias", "double", "champion", "2").exit_code == 0
    loaded = empty("models", "load", "double").stdout
    assert loaded == "double answers at /v2/models/double/infer\n"
    assert "[version_in_use]" in empty("models", "delete", "double@2", "--yes").stderr
    assert empty("models", "unload", "double").stdout == "double isn't kept loaded\n"
    assert empty("models", "protect", "double").stdout == "double@champion is protected\n"
    assert "Protected: champion" in empty("models", "show", "double").stdout
    assert empty("models", "state", "double@1", "ready").exit_code == 0
    assert "[alias_protected]" in empty("models", "alias", "double", "champion", "1").stderr
    assert empty("models", "alias", "double", "champion", "1", "--force").exit_code == 0
    assert "moved by force from 2 to 1" in empty("models", "history", "double").stdout
    assert empty("models", "protect", "double", "--off").stdout == "double@champion moves freely\n"

    archive = tmp_path / "double.tar"
    assert "double@champion is in" in empty("models", "export", "double@champion", archive).stdout
    assert archive.stat().st_size > 4096
    assert empty("models", "delete", "double@2").exit_code == 2  # nobody to ask
    assert empty("models", "delete", "double@2", "--yes").stdout == "double@2 is deleted\n"
    assert read(empty, "models", "import", archive)["version"]["number"] == 1
    assert "Nothing was changed" in empty("models", "gc", "--grace", "1us").stdout
    assert "removed" in empty("models", "gc", "--grace", "1us", "--delete").stdout
    left = read(empty, "models", "gc", "--grace", "1us")
    assert (left["blobs"], left["waiting_blobs"]) == (0, 0)


def test_a_version_is_signed_with_a_key_that_stays_here(
    empty: Mlpd, onnx_file: Path, tmp_path: Path
) -> None:
    assert empty("models", "register", "signed", onnx_file).exit_code == 0
    key = tmp_path / "team.key"
    assert "public key" in empty("models", "keygen", key).stdout
    assert empty("models", "keygen", key).exit_code == 1  # it is there already
    made = read(empty, "models", "sign", "signed@1", "--key", key, "--why", "looked at")
    assert "signed by" in empty("models", "show", "signed@1").stdout
    history = empty("models", "history", "signed").stdout
    assert f"version 1 signed by {made['key'][:12]}" in history
    assert "looked at" in history
    assert "[invalid_key]" in empty("models", "sign", "signed@1", "--key", onnx_file).stderr


def test_a_version_goes_elsewhere_and_is_compared_there(
    mlpd: Mlpd, empty: Mlpd, onnx_file: Path, tmp_path: Path
) -> None:
    archive = tmp_path / "risk.tar"
    assert mlpd("models", "export", "risk@champion", archive).exit_code == 0
    assert "risk@1" in empty("models", "import", archive).stdout
    assert empty("models", "register", "double", onnx_file).exit_code == 0
    across = empty("models", "diff", "double@1", "risk@1").stdout
    for part in ("Metrics", "Features", "+ ", "- ", "min_data_in_leaf", "Made from", "Packages"):
        assert part in across
    assert read(empty, "models", "diff", "risk@1", "double@1")["trees"] is None
    assert empty("models", "diff", "risk@1").exit_code == 1  # there is no champion
    assert mlpd("models", "diff", "risk@1").stdout == ("risk@1 -> risk@1\n\nThey are the same.\n")


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        (["register", "double", "nothing.onnx"], 2),
        (["state", "double", "archived"], 2),
        (["pin", "double@"], 2),
        (["state", "double@1", "deleted"], 2),
        (["gc", "--keep", "0"], 2),
        (["gc", "--grace", "soon"], 1),
        (["export", "nobody@1", "x.tar"], 1),
        (["load", "nobody"], 1),
    ],
)
def test_what_makes_no_sense_is_refused(
    mlpd: Mlpd, arguments: list[str], status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = mlpd("models", *arguments)
    assert (done.exit_code, done.stdout) == (status, "")
    assert list(tmp_path.iterdir()) == []


def test_golden_rows_that_are_no_json_are_wrong_usage(
    mlpd: Mlpd, onnx_file: Path, tmp_path: Path
) -> None:
    for text in ("{", "[]"):
        (tmp_path / "rows.json").write_text(text)
        done = mlpd("models", "register", "d", onnx_file, "--golden", tmp_path / "rows.json")
        assert done.exit_code == 2
