"""Definitions, models, routes, experiments, runs: changed over HTTP, with their histories."""

from typing import Any

import pytest

from mlpd.client import Client
from mlpd.core.errors import ConflictError, InvalidRequestError, NotFoundError

SERVED = {"service": "risk", "arms": [{"model": "risk@champion"}]}


def test_definitions_are_planned_then_applied(fresh: Any) -> None:
    with Client(fresh.url) as client:
        running = client.definitions()
        document = running["document"]
        assert running["version"] == 1
        assert client.plan(document) == {
            "version": 1,
            "changes": {},
            "backfill": {},
            "pinned": [],
            "cost": {},
        }
        entities = {**document["entities"], "shop": {"keys": {"shop": "int64"}}}
        changed = {**document, "entities": entities}
        assert client.plan(changed)["changes"]["entities"]["added"] == ["shop"]
        assert client.definitions() == running
        assert client.apply(changed, expected_version=1)["version"] == 2
        with pytest.raises(ConflictError, match="version 2, not 1") as caught:
            client.apply(document, expected_version=1)
        assert caught.value.code == "definitions_changed"
        with pytest.raises(InvalidRequestError, match="unknown"):
            client.plan({"format": 1, "nonsense": {}})


def test_a_run_can_be_watched_and_cancelled(fresh: Any) -> None:
    with Client(fresh.url, by="alice") as client:
        run = client.runs.start("risk", deploy="none")
        assert (run["state"], run["trigger"], run["deploy"]) == ("queued", "alice", "none")
        ended = client.runs.wait(run["run_id"], timeout_s=50)
        assert (ended["state"], ended["error"]["code"]) == ("failed", "no_rows")
        with pytest.raises(ConflictError) as caught:
            client.runs.cancel(run["run_id"])
        assert caught.value.code == "run_finished"
        assert client.runs.list(limit=1)["runs"][0]["run_id"] == run["run_id"]
        assert isinstance(client.runs.log(run["run_id"]), str)
        assert [job["name"] for job in client.runs.jobs()["jobs"]] == ["risk"]


def test_a_failed_run_is_retried_as_a_new_one(fresh: Any) -> None:
    with Client(fresh.url, by="alice") as client:
        failed = client.runs.wait(client.runs.start("risk", deploy="none")["run_id"], timeout_s=50)
        again = client.runs.retry(failed["run_id"])
        assert again["run_id"] != failed["run_id"]
        assert (again["job"], again["deploy"], again["state"]) == ("risk", "none", "queued")
        assert again["trigger"] == f"alice, retry of {failed['run_id']}"
        assert client.runs.wait(again["run_id"], timeout_s=50)["error"]["code"] == "no_rows"
        assert client.runs.get(failed["run_id"]) == failed
        with pytest.raises(NotFoundError):
            client.runs.retry("nothing")


def test_a_run_that_did_not_fail_is_not_retried(edge: Any) -> None:
    with Client(edge.url) as client, pytest.raises(ConflictError) as refused:
        client.runs.retry(edge.run_id)
    assert refused.value.code == "run_not_failed"


def test_aliases_move_with_a_history_and_routes_follow(edge: Any) -> None:
    with Client(edge.url, by="bob") as client:
        client.models.move_alias("risk", "candidate", 1, expected=0, why="to try it")
        with pytest.raises(ConflictError) as caught:
            client.models.move_alias("risk", "candidate", 1, expected=0)
        assert caught.value.code == "alias_moved"
        client.routes.put("trial", {"service": "risk", "arms": [{"model": "risk@candidate"}]})
        assert client.routes.get("trial")["serving"] == {"risk": "risk@1"}
        client.routes.delete("trial")
        event = client.models.history("risk", alias="candidate")["events"][0]
        assert (event["by"], event["why"], event["to"]) == ("bob", "to try it", 1)
        assert client.models.delete_alias("risk", "candidate")["version"] is None
        with pytest.raises(ConflictError) as caught:
            client.models.roll_back("risk", "champion")
        assert caught.value.code == "nothing_to_roll_back_to"
        with pytest.raises(NotFoundError):
            client.models.version("risk", "candidate")
        version = client.models.version("risk")
        assert version["version"]["number"] == 1
        assert version["lineage"]["service"] == "risk"
        assert set(version["report"]["evaluation"]) == {"train", "valid", "test"}


def test_routes_change_by_version_and_roll_back(edge: Any) -> None:
    with Client(edge.url, by="carol") as client:
        first = client.routes.put("checkout", SERVED, expected=0)
        assert first["version"] == 1
        second = client.routes.put("checkout", {**first, "fallback": 0.1}, expected=1)
        assert (second["version"], second["fallback"]) == (2, 0.1)
        with pytest.raises(ConflictError) as caught:
            client.routes.put("checkout", SERVED, expected=1)
        assert caught.value.code == "route_changed"
        assert client.routes.roll_back("checkout", 1)["fallback"] is None
        history = client.routes.history("checkout")["versions"]
        assert [entry["version"] for entry in history] == [3, 2, 1]
        assert history[1]["by"] == "carol"
        assert history[1]["changes"] == [{"path": "fallback", "from": None, "to": 0.1}]
        with pytest.raises(NotFoundError):
            client.routes.roll_back("checkout", 9)
        with pytest.raises(NotFoundError):
            client.routes.put("checkout", {"service": "risk", "arms": [{"model": "risk@none"}]})
        assert client.routes.get("checkout")["version"] == 3
        assert client.routes.delete("checkout") == {"deleted": "checkout"}
        with pytest.raises(NotFoundError):
            client.predict("checkout", [])


def test_an_experiment_is_made_served_and_read(edge: Any) -> None:
    spec = {
        "unit": "user",
        "arms": {"control": 1.0, "treatment": 1.0},
        "metrics": [{"name": "label"}],
        "planned_units": 100,
    }
    with Client(edge.url) as client:
        client.experiments.put("colours", spec)
        arms = [{"name": n, "model": "risk@1"} for n in ("control", "treatment")]
        client.routes.put("coloured", {"service": "risk", "arms": arms, "experiment": "colours"})
        answer = client.predict("coloured", [{"user": str(i), "age": 1.0} for i in range(50)])
        served = {p["arm"] for p in answer["predictions"]}
        assert served == {"control", "treatment"}
        rows = [{"user": str(i), "age": float(i % 7)} for i in range(300)]  # served in slices
        many = client.predict("coloured", rows)["predictions"]
        few = [
            row
            for start in range(0, 300, 50)
            for row in client.predict("coloured", rows[start : start + 50])["predictions"]
        ]
        assert [(r["arm"], r["score"]) for r in many] == [(r["arm"], r["score"]) for r in few]
        assert len(client.experiments.get("colours")["phases"]) == 1
        changed = {**spec, "arms": {"control": 1.0, "treatment": 3.0}}
        assert len(client.experiments.put("colours", changed)["phases"]) == 2
        with pytest.raises(ConflictError) as caught:
            client.experiments.put("colours", {**spec, "unit": "age"})
        assert caught.value.code == "experiment_fixed"
        assert "colours" in client.experiments.list()["experiments"]
        client.routes.delete("coloured")
