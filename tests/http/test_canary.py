"""Canaries on a real daemon: the timetable, what ends it, changes meanwhile, restarts."""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mlpd.client import Client
from mlpd.core.errors import DeadlineExceededError, InternalError, InvalidRequestError
from mlpd.daemon import canaries
from tests.http import edge as edges

LOOK_US = 5_000_000
ARMS = [{"name": "old", "model": "risk@1", "weight": 3}, {"name": "new", "model": "risk@2"}]
CANARY = {
    "arm": "new",
    "steps": [{"share": share, "for": "10s", "rows": 5} for share in (0.25, 0.5, 1.0)],
    "guard": {"rows": 5},
}
ROUTE = {"service": "risk", "arms": ARMS, "canary": CANARY}
ROWS = [{"user": f"u{i}", "age": 0.5} for i in range(60)]


@pytest.fixture(scope="module", autouse=True)
def no_looks_of_its_own() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(canaries, "LOOK_S", 3600.0)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("canary") / "data"


@pytest.fixture(scope="module")
def edge(folder: Path) -> Iterator[Any]:
    """A daemon with two versions of a model; each test has routes of its own."""
    with edges.serve(folder) as running:
        edges.fill(running)
        edges.train_another(running)
        yield running


@pytest.fixture(autouse=True)
def routes_of_its_own(edge: Any) -> Iterator[None]:
    """A look is at all routes: those of other tests are gone."""
    with Client(edge.url) as client:
        known = {route["name"] for route in client.routes.list()["routes"]}
        yield
        for name in {route["name"] for route in client.routes.list()["routes"]} - known:
            client.routes.delete(name)


def look(edge: Any, times: int = 1) -> None:
    for _ in range(times):
        done = asyncio.run_coroutine_threadsafe(edge.daemon.canaries.look(LOOK_US), edge.loop)
        done.result(10)


def arms_of(client: Client, name: str) -> dict[str, str | None]:
    """Ask for all rows; the arm of each, None where the default score answered."""
    answer = client.predict(name, ROWS)["predictions"]
    return {row["user"]: found.get("arm") for row, found in zip(ROWS, answer, strict=True)}


def weights(route: dict[str, Any]) -> dict[str, float]:
    return {arm["name"]: arm["weight"] for arm in route["arms"]}


def test_shares_grow_by_the_timetable_and_nobody_goes_back(edge: Any) -> None:
    with Client(edge.url, by="carol") as client:
        first = client.routes.put("grows", ROUTE)
        assert weights(first) == {"old": 0.75, "new": 0.25}
        assert (first["trial"]["model"], first["trial"]["step"]) == ("risk@2", 1)
        assert edge.daemon.status()["canaries"]["grows"]["share"] == 0.25
        before: set[str] = set()
        for share in (0.25, 0.5, 1.0):
            assert client.routes.get("grows")["trial"]["share"] == share
            now = {user for user, arm in arms_of(client, "grows").items() if arm == "new"}
            assert before <= now
            before = now
            look(edge)
            shown = client.routes.get("grows")["trial"]
            assert (shown["share"], shown["waits_for"], shown["served_s"]) == (share, "time", 5.0)
            assert shown["rows"] == len(now) >= 5
            look(edge)
        done = client.routes.get("grows")
        assert (done["canary"], done["trial"]["state"]) == (None, "finished")
        assert weights(done) == {"old": 0.0, "new": 1.0}
        assert len(before) == len(ROWS)
        history = client.routes.history("grows")["versions"]
        assert [entry["by"] for entry in history] == [
            "canary: finished, the last step is over",
            *("canary: step 3 of 3", "canary: step 2 of 3", "carol"),
        ]
        assert history[1]["changes"] == [
            {"path": "arms.new.weight", "from": 0.5, "to": 1.0},
            {"path": "arms.old.weight", "from": 0.5, "to": 0.0},
        ]
        look(edge, 3)
        assert client.routes.get("grows") == done


def test_a_step_waits_for_its_rows(edge: Any) -> None:
    with Client(edge.url) as client:
        client.routes.put("waits", ROUTE)
        look(edge, 4)
        shown = client.routes.get("waits")["trial"]
        assert (shown["step"], shown["waits_for"], shown["rows"]) == (1, "rows", 0)
        arms_of(client, "waits")
        look(edge)
        assert client.routes.get("waits")["trial"]["step"] == 2


@pytest.mark.parametrize(("on_failure", "left"), [("rollback", 0.0), ("stop", 0.25)])
def test_an_arm_that_fails_is_taken_out_or_left(
    edge: Any, monkeypatch: pytest.MonkeyPatch, on_failure: str, left: float
) -> None:
    def fail(_: Any) -> Any:
        raise InternalError("out of order")

    name = f"fails-{on_failure}"
    canary = {**CANARY, "on_failure": on_failure}
    with Client(edge.url) as client:
        client.routes.put(name, {**ROUTE, "canary": canary, "fallback": 0.5})
        before = edge.daemon.canaries.ended
        monkeypatch.setattr(edge.daemon.models.find("risk", 2).session, "run", fail)
        failed = list(arms_of(client, name).values()).count(None)
        assert failed >= 5
        look(edge)
        route = client.routes.get(name)
        state = {"rollback": "rolled_back", "stop": "stopped"}[on_failure]
        assert route["trial"]["state"] == state
        assert route["trial"]["why"] == f"{failed} of {failed} rows failed; 1.00% may"
        assert route["canary"] is None
        assert weights(route)["new"] == left
        assert edge.daemon.canaries.ended[state] == before[state] + 1
        assert f'mlpd_canaries_ended_total{{state="{state}"}}' in (
            edge.call("GET", "/metrics")[1].decode()
        )
        if on_failure == "rollback":
            assert weights(route)["old"] == 3.0
            assert set(arms_of(client, name).values()) == {"old"}


def test_rows_that_come_too_late_count_as_failed(
    edge: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def late(*_: Any, **__: Any) -> Any:
        raise DeadlineExceededError("too late")

    with Client(edge.url) as client:
        client.routes.put("late", ROUTE)
        monkeypatch.setattr(edge.daemon.models.find("risk", 2).__class__, "predict", late)
        with pytest.raises(DeadlineExceededError):
            client.predict("late", ROWS)
        shown = client.routes.get("late")["trial"]
        assert shown["rows_failed"] + shown["rows_of_others_failed"] > 0


def test_every_failed_arm_is_told_though_the_request_fails_at_the_first(
    edge: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: Any) -> Any:
        raise InternalError("out of order")

    with Client(edge.url) as client:
        client.routes.put("both", ROUTE)
        for number in (1, 2):
            session = edge.daemon.models.find("risk", number).session
            monkeypatch.setattr(session, "run", fail)
        with pytest.raises(InternalError):
            client.predict("both", ROWS)
        shown = client.routes.get("both")["trial"]
        assert shown["rows_failed"] > 0
        assert shown["rows_failed"] + shown["rows_of_others_failed"] == len(ROWS)


def test_a_canary_that_cannot_be_moved_holds_up_no_other(
    edge: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store = edge.daemon.routes._store
    put = store.put

    async def refuse(old: Any, spec: Any, trial: Any, by: str) -> Any:
        if spec.name == "a-stuck":
            raise OSError("no space left")
        return await put(old, spec, trial, by)

    with Client(edge.url) as client:
        for name in ("a-stuck", "b-goes-on"):  # looked at in this order
            client.routes.put(name, ROUTE)
            arms_of(client, name)
        monkeypatch.setattr(store, "put", refuse)
        look(edge, 3)
        assert client.routes.get("a-stuck")["trial"]["step"] == 1
        assert client.routes.get("b-goes-on")["trial"]["step"] == 2
        assert sum("a-stuck" in record.message for record in caplog.records) == 1
        monkeypatch.undo()
        look(edge)
        assert client.routes.get("a-stuck")["trial"]["step"] == 2


def test_a_change_beside_the_canary_leaves_it_at_its_step(edge: Any) -> None:
    with Client(edge.url) as client:
        client.routes.put("beside", ROUTE)
        arms_of(client, "beside")
        look(edge, 2)
        route = client.routes.get("beside")
        assert route["trial"]["step"] == 2
        changed = client.routes.put("beside", {**route, "fallback": 0.1})
        assert (changed["trial"]["step"], weights(changed)) == (2, {"old": 0.5, "new": 0.5})
        given = client.routes.put("beside", {**ROUTE, "fallback": 0.2})
        assert (given["trial"]["step"], weights(given)) == (2, {"old": 0.5, "new": 0.5})
        other = {**CANARY, "guard": {"rows": 6}}
        anew = client.routes.put("beside", {**ROUTE, "canary": other})
        assert (anew["trial"]["step"], weights(anew)) == (1, {"old": 0.75, "new": 0.25})
        ended = client.routes.put("beside", {**ROUTE, "canary": None})
        assert (ended["trial"]["state"], weights(ended)) == ("stopped", {"old": 3.0, "new": 1.0})


def test_rolling_back_brings_weights_and_no_canary(edge: Any) -> None:
    with Client(edge.url) as client:
        plain = client.routes.put("back", {**ROUTE, "canary": None})
        client.routes.put("back", ROUTE)
        arms_of(client, "back")
        look(edge, 2)
        assert client.routes.get("back")["version"] == 3
        half = client.routes.roll_back("back", 3)
        assert (half["canary"], weights(half)) == (None, {"old": 0.5, "new": 0.5})
        assert half["trial"]["why"] == "the route was changed"
        first = client.routes.roll_back("back", 1)
        assert weights(first) == weights(plain)
        look(edge, 4)
        assert client.routes.get("back") == first


def test_another_version_behind_the_arm_begins_anew(edge: Any) -> None:
    with Client(edge.url) as client:
        client.models.move_alias("risk", "candidate", 2)
        arms = [ARMS[0], {"name": "new", "model": "risk@candidate"}]
        client.routes.put("moved", {**ROUTE, "arms": arms})
        arms_of(client, "moved")
        look(edge, 2)
        assert client.routes.get("moved")["trial"]["step"] == 2
        client.models.move_alias("risk", "candidate", 1)
        look(edge)
        route = client.routes.get("moved")
        assert (route["trial"]["model"], route["trial"]["step"]) == ("risk@1", 1)
        assert weights(route)["new"] == 0.25
        by = client.routes.history("moved")["versions"][0]["by"]
        assert by == "canary: begins anew, new serves risk@1 now"
        client.routes.delete("moved")
        look(edge)
        assert "moved" not in edge.daemon.status()["canaries"]


def test_a_canary_that_makes_no_sense_changes_nothing(edge: Any) -> None:
    with Client(edge.url) as client:
        before = client.routes.put("keeps", {**ROUTE, "canary": None})
        alone = [{**ARMS[0], "weight": 0}, ARMS[1]]
        for wrong in ({"canary": {**CANARY, "arm": "third"}}, {"arms": alone}):
            with pytest.raises(InvalidRequestError):
                client.routes.put("keeps", {**ROUTE, **wrong})
        assert client.routes.get("keeps") == before
        assert set(arms_of(client, "keeps")) == {row["user"] for row in ROWS}


def test_a_canary_goes_on_after_a_restart(tmp_path: Path) -> None:
    with edges.serve(tmp_path / "data") as first, Client(first.url) as client:
        edges.fill(first)
        arms = [ARMS[0], {"name": "new", "model": "risk@champion"}]
        client.routes.put("kept", {**ROUTE, "arms": arms})
        arms_of(client, "kept")
        look(first, 2)
        arms_of(client, "kept")
        look(first)
        before = client.routes.get("kept")
        assert before["trial"]["rows"] > 0
    with edges.serve(tmp_path / "data") as again, Client(again.url) as client:
        assert client.routes.get("kept") == before
        look(again)
        assert client.routes.get("kept")["trial"]["step"] == 3
