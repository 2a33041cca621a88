"""Both clients, call by call: the same requests, the same answers, the same errors."""

import asyncio
import inspect
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import polars as pl
import pytest

from mlpd import Entity
from mlpd.client import AsyncClient, Client
from mlpd.client.operations import (
    Alerts,
    Cluster,
    Events,
    Experiments,
    Models,
    Operations,
    Routes,
    Runs,
)
from mlpd.core.errors import (
    ConflictError,
    MlpdError,
    NotFoundError,
    OverloadedError,
    UnavailableError,
)
from mlpd.core.media import MSGPACK, PARQUET
from mlpd.http.api import describe_routes

ROWS = [{"user": "a"}]
CALLS: dict[str, Callable[[Any], Any]] = {
    "POST /v1/events/clicks": lambda c: c.events.send("clicks", ROWS),
    "GET /v1/events/clicks": lambda c: c.events.page("clicks"),
    "GET /v1/events/visits": lambda c: c.events.page_frame("visits"),
    "POST /v1/events": lambda c: c.events.send_many({"clicks": ROWS, "x": {"a": [1]}}),
    "POST /v1/features/read": lambda c: c.read_features("risk", entities=ROWS),
    "POST /v1/features/history": lambda c: c.history("risk", spine=ROWS),
    "POST /v1/predict/risk": lambda c: c.predict("risk", ROWS),
    "GET /v1/predictions": lambda c: c.predictions(route="risk", limit=5),
    "POST /v1/feedback": lambda c: c.feedback([{"prediction_id": "x", "label": 1}]),
    "GET /v1/definitions": lambda c: c.definitions(),
    "POST /v1/definitions/plan": lambda c: c.plan({"format": 1}),
    "POST /v1/definitions/apply": lambda c: c.apply({"format": 1}, expected_version=0),
    "GET /v1/models": lambda c: c.models.list(),
    "GET /v1/models/risk": lambda c: c.models.get("risk"),
    "GET /v1/models/risk/versions/champion": lambda c: c.models.version("risk"),
    "GET /v1/models/risk/history": lambda c: c.models.history("risk"),
    "PUT /v1/models/risk/aliases/a": lambda c: c.models.move_alias("risk", "a", 1),
    "DELETE /v1/models/risk/aliases/a": lambda c: c.models.delete_alias("risk", "a"),
    "POST /v1/models/risk/aliases/a/rollback": lambda c: c.models.roll_back("risk", "a"),
    "POST /v1/models/risk/versions": lambda c: c.models.register("risk", b"onnx", golden={"a": 1}),
    "POST /v1/registry/archives": lambda c: c.models.adopt(b"tar"),
    "POST /v1/models/risk/versions/1/reproduce": lambda c: c.models.reproduce("risk", 1),
    "GET /v1/models/risk/versions/1/pictures/roc": lambda c: c.models.picture("risk", 1, "roc"),
    "GET /v1/models/risk/versions/1/archive": lambda c: c.models.archive("risk", 1),
    "GET /v1/models/risk/versions/1/diff": lambda c: c.models.diff("risk", 1),
    "PUT /v1/models/risk/versions/1/signature": lambda c: c.models.sign(
        "risk", 1, key="ab", signature="cd"
    ),
    "PUT /v1/models/risk/loaded": lambda c: c.models.load("risk"),
    "PUT /v1/models/risk/aliases/a/protection": lambda c: c.models.protect("risk", "a"),
    "PUT /v1/models/risk/versions/1/state": lambda c: c.models.set_state("risk", 1, "archived"),
    "PUT /v1/models/risk/versions/1/pin": lambda c: c.models.pin("risk", 1),
    "POST /v1/registry/collect": lambda c: c.models.collect(keep=3),
    "GET /v1/routes": lambda c: c.routes.list(),
    "GET /v1/routes/risk": lambda c: c.routes.get("risk"),
    "PUT /v1/routes/risk": lambda c: c.routes.put("risk", {"arms": []}),
    "DELETE /v1/routes/risk": lambda c: c.routes.delete("risk"),
    "GET /v1/routes/risk/history": lambda c: c.routes.history("risk"),
    "POST /v1/routes/risk/rollback": lambda c: c.routes.roll_back("risk", 1),
    "GET /v1/experiments": lambda c: c.experiments.list(),
    "GET /v1/experiments/e": lambda c: c.experiments.get("e"),
    "PUT /v1/experiments/e": lambda c: c.experiments.put("e", {"unit": "user"}),
    "POST /v1/experiments/e/end": lambda c: c.experiments.end("e", "a", why="it won"),
    "GET /v1/experiments/e/history": lambda c: c.experiments.history("e"),
    "GET /v1/experiments/e/timeline": lambda c: c.experiments.timeline("e"),
    "GET /v1/experiments/e/picture": lambda c: c.experiments.picture("e", metric="m"),
    "POST /v1/experiments/e/outcomes": lambda c: c.experiments.send_outcomes("e", [{"unit": "u"}]),
    "GET /v1/jobs": lambda c: c.runs.jobs(),
    "GET /v1/runs": lambda c: c.runs.list(),
    "POST /v1/runs": lambda c: c.runs.start("risk"),
    "GET /v1/runs/r": lambda c: c.runs.get("r"),
    "POST /v1/runs/r/cancel": lambda c: c.runs.cancel("r"),
    "POST /v1/runs/r/retry": lambda c: c.runs.retry("r"),
    "GET /v1/runs/r/pictures/roc": lambda c: c.runs.picture("r", "roc"),
    "GET /v1/runs/r/log": lambda c: c.runs.log("r"),
    "GET /v1/drift/risk": lambda c: c.drift("risk"),
    "GET /v1/drift/risk/features/age": lambda c: c.drift_picture("risk", "age", count=3),
    "POST /v1/drift/risk/check": lambda c: c.check_drift("risk", count=3),
    "GET /v1/performance/risk": lambda c: c.performance("risk"),
    "GET /v1/performance/risk/analysis": lambda c: c.analysis("risk", by="user"),
    "GET /v1/features/stats/spend": lambda c: c.feature_stats("spend", kind="view", entities=5),
    "GET /v1/freshness": lambda c: c.freshness(),
    "GET /v1/quality": lambda c: c.quality(),
    "GET /v1/shadows": lambda c: c.shadows(),
    "GET /v1/consistency": lambda c: c.consistency(),
    "GET /v1/alerts": lambda c: c.alerts.list(),
    "POST /v1/alerts/silences": lambda c: c.alerts.silence({"model": "a"}, lasts="2h"),
    "DELETE /v1/alerts/silences/s": lambda c: c.alerts.unsilence("s"),
    "POST /v1/alerts/test": lambda c: c.alerts.test(sink="log"),
    "GET /v1/cluster/map": lambda c: c.cluster.map(),
    "PUT /v1/cluster/map": lambda c: c.cluster.put_map({"epoch": 1}, shard="a", expected=0),
    "GET /v1/cluster/routing": lambda c: c.cluster.routing(),
    "POST /v1/cluster/cells": lambda c: c.cluster.cells(
        [{"columns": ["user"], "values": [["a"]]}], service="person"
    ),
    "POST /v1/cluster/changes": lambda c: c.cluster.changes("0f", "b", 3, wait_s=1.0),
    "GET /v1/registry/blobs/sha256:ab": lambda c: c.cluster.blob("sha256:ab"),
    "GET /v1/cluster/events/clicks": lambda c: c.cluster.home_events(
        "clicks", definitions="ab", epoch=0
    ),
    "POST /v1/cluster/parts": lambda c: c.cluster.part("performance", model="risk"),
    "POST /v1/cluster/stops": lambda c: c.cluster.stop_arm(
        "e", "b", guardrail="errors", reason="too many"
    ),
    "GET /v1/cluster/moves": lambda c: c.cluster.moves(),
    "POST /v1/cluster/moves/survey": lambda c: c.cluster.survey("0-9"),
    "POST /v1/cluster/moves/digest": lambda c: c.cluster.digest("0-9", at=1),
    "POST /v1/cluster/moves/leaving": lambda c: c.cluster.leave("pause", "m"),
    "POST /v1/cluster/moves/history": lambda c: c.cluster.history("m", 3),
    "POST /v1/cluster/moves/predictions": lambda c: c.cluster.predictions("m", "62"),
    "POST /v1/cluster/moves/arriving": lambda c: c.cluster.arrive("seal", "m", through=3),
    "POST /v1/cluster/moves/import": lambda c: c.cluster.take("m", b"chunk"),
    "GET /v1/cluster/replica": lambda c: c.cluster.role(),
    "POST /v1/cluster/replica/feed": lambda c: c.cluster.feed("00" * 32, follower="http://f:1"),
    "POST /v1/cluster/replica/snapshots": lambda c: c.cluster.snapshot(),
    "DELETE /v1/cluster/replica/snapshots/5": lambda c: c.cluster.forget_snapshot("5"),
    "POST /v1/cluster/replica/file": lambda c: c.cluster.file("segments/x", 3, snapshot="5"),
    "POST /v1/cluster/replica/role": lambda c: c.cluster.step_role("resume", token="t"),
    "POST /v1/backup": lambda c: c.backup("/backups/one", copy=True),
    "POST /v1/erase": lambda c: c.erase("user", [{"user": "a"}]),
    "GET /v1/erase": lambda c: c.erasures(),
    "GET /v1/erase/one": lambda c: c.erasure("one"),
    "POST /v1/fsck": lambda c: c.fsck(),
    "POST /v1/consistency/run": lambda c: c.run_consistency(limit=5),
    "GET /v1/status": lambda c: c.status(),
    "GET /metrics": lambda c: c.metrics(),
    "GET /readyz": lambda c: c.wait_ready(),
}
WITHOUT_A_CALL = {"/healthz", "/openapi.json", "/docs", "/docs/{page:.+}"}


def in_async(url: str, act: Callable[[AsyncClient], Any]) -> Any:
    async def run() -> Any:
        async with AsyncClient(url, timeout_s=10) as client:
            return await act(client)

    return asyncio.run(run())


def without_noise(called: dict[str, Any]) -> dict[str, Any]:
    """A call without what the transports add and what is drawn at random."""
    noise = {"host", "accept-encoding", "user-agent", "content-length", "idempotency-key"}
    headers = {k.lower(): v for k, v in called["headers"].items() if k.lower() not in noise}
    return {**called, "headers": headers}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("unix", [False, True], ids=["tcp", "unix"])
def test_both_clients_send_the_same(stub: Any, name: str, unix: bool) -> None:
    url = stub.socket_url if unix else stub.url
    with Client(url) as client:
        first = CALLS[name](client)
    assert in_async(url, CALLS[name]) == first
    by_sync, by_async = map(without_noise, stub.calls)
    assert by_sync == by_async
    assert f"{by_sync['method']} {by_sync['path']}" == name


def test_every_route_has_a_call() -> None:
    patterns = {
        f"{route.method} {re.sub('{[^}]*}', '[^/]+', route.path)}"
        for route in describe_routes()
        if not route.path.startswith("/v2") and route.path not in WITHOUT_A_CALL
    }
    for pattern in patterns:
        assert any(re.fullmatch(pattern, name) for name in CALLS), pattern
    for name in CALLS:
        assert any(re.fullmatch(pattern, name) for pattern in patterns), name


def test_every_operation_is_called_above() -> None:
    source = inspect.getsource(inspect.getmodule(test_every_route_has_a_call) or object)
    groups = {"alerts": Alerts, "events": Events, "models": Models, "routes": Routes, "runs": Runs}
    groups |= {"experiments": Experiments, "cluster": Cluster}
    names = [f"{g}.{n}" for g, cls in groups.items() for n in vars(cls) if n[0] != "_"]
    names += [n for n in vars(Operations) if n[0] != "_" and n not in ("send", "drive")]
    for name in names:
        assert f"{name}(" in source, name


@pytest.mark.parametrize("kind", ["sync", "async"])
class TestBoth:
    def act(self, kind: str, url: str, act: Callable[[Any], Any], **options: Any) -> Any:
        if kind == "sync":
            with Client(url, **options) as client:
                return act(client)

        async def run() -> Any:
            async with AsyncClient(url, **options) as client:
                return await act(client)

        return asyncio.run(run())

    def test_a_repeatable_call_is_retried(
        self, kind: str, stub: Any, overloaded: MlpdError
    ) -> None:
        stub.failures = [overloaded, overloaded]
        self.act(kind, stub.url, lambda c: c.events.send("clicks", ROWS))
        keys = [call["headers"]["Idempotency-Key"] for call in stub.calls]
        assert len(keys) == 3
        assert len(set(keys)) == 1

    def test_a_prediction_is_only_if_it_was_refused_unexecuted(
        self, kind: str, stub: Any, overloaded: MlpdError
    ) -> None:
        stub.failures = [overloaded]
        self.act(kind, stub.url, lambda c: c.predict("risk", ROWS))
        assert len(stub.calls) == 2
        stub.failures = [UnavailableError("stopping", code="not_ready")]
        with pytest.raises(UnavailableError):
            self.act(kind, stub.url, lambda c: c.predict("risk", ROWS))
        assert len(stub.calls) == 3

    def test_a_deadline_is_for_all_attempts(
        self, kind: str, stub: Any, overloaded: MlpdError
    ) -> None:
        stub.failures = [overloaded, overloaded]
        self.act(kind, stub.url, lambda c: c.predict("risk", ROWS, deadline_s=20.0))
        first, second, third = [float(call["headers"]["x-deadline-ms"]) for call in stub.calls]
        assert first == 20_000.0
        assert first - 10.0 >= second >= third + 10.0
        stub.calls.clear()
        stub.failures = [overloaded]
        with pytest.raises(OverloadedError):  # it would come after the deadline
            self.act(kind, stub.url, lambda c: c.predict("risk", ROWS, deadline_s=0.005))
        assert len(stub.calls) == 1

    def test_rows_to_predict_come_in_every_form(self, kind: str, stub: Any) -> None:
        columns = {"user": ["a", "b"], "age": [0.5, 1.5]}
        forms: list[Any] = [
            columns,
            {"user": np.array(["a", "b"]), "age": np.array([0.5, 1.5])},
            pl.DataFrame(columns),
            [{"user": "a", "age": 0.5}, {"user": "b", "age": 1.5}],
            [{"user": "a", "age": np.float64(0.5)}, {"user": np.str_("b"), "age": 1.5}],
        ]
        for form in forms:
            self.act(kind, stub.url, lambda c, form=form: c.predict("risk", form))
        sent = [call["body"]["rows"] for call in stub.calls]
        assert sent[:3] == [columns] * 3
        assert sent[3:] == [forms[3]] * 2

    def test_errors_keep_class_code_hint_and_details(self, kind: str, stub: Any) -> None:
        stub.failures = [
            ConflictError("moved", code="route_changed", hint="look", details={"version": 2})
        ]
        with pytest.raises(ConflictError, match="moved") as caught:
            self.act(kind, stub.url, lambda c: c.routes.put("risk", {"arms": []}))
        error = caught.value
        assert (error.code, error.hint, error.details) == ("route_changed", "look", {"version": 2})

    def test_deadlines_travel_with_predictions(self, kind: str, stub: Any) -> None:
        self.act(kind, stub.url, lambda c: c.predict("risk", ROWS, deadline_s=0.05))
        self.act(kind, stub.url, lambda c: c.predict("risk", ROWS), deadline_s=0.5)
        sent = [call["headers"]["x-deadline-ms"] for call in stub.calls]
        assert list(map(float, sent)) == [50.0, 500.0]

    def test_a_slow_daemon_is_left_in_time_but_not_in_long_calls(
        self, kind: str, stub: Any
    ) -> None:
        stub.delay_s = 0.5
        with pytest.raises(UnavailableError) as caught:
            self.act(kind, stub.url, lambda c: c.status(), timeout_s=0.1)
        assert caught.value.code == "timeout"
        assert self.act(kind, stub.url, lambda c: c.run_consistency(), timeout_s=0.1)

    def test_files_go_up_and_answers_become_files(
        self, kind: str, stub: Any, tmp_path: Path
    ) -> None:
        spine, out = tmp_path / "spine.parquet", tmp_path / "out.msgpack"
        spine.write_bytes(bytes(3_000_000))
        told: list[tuple[str, int, int]] = []

        def save(client: Any) -> Any:
            return client.save_history(
                out, "risk", spine=spine, closed="left", on_progress=lambda *a: told.append(a)
            )

        found = self.act(kind, stub.url, save)
        answer = msgpack.unpackb(out.read_bytes())
        assert answer == {"method": "POST", "path": "/v1/features/history"}
        size = out.stat().st_size
        assert found == {"path": str(out), "rows": 0, "size_bytes": size}
        assert told[-1] == ("received", size, size)
        if kind == "sync":
            assert told[-2] == ("sent", 3_000_000, 3_000_000)
        (call,) = stub.calls
        assert call["query"] == {"service": "risk", "closed": "left"}
        assert call["headers"]["Content-Type"] == PARQUET
        assert call["headers"]["Accept"] == MSGPACK
        assert call["headers"]["Content-Length"] == "3000000"

    def test_nothing_is_left_of_an_answer_that_is_none(
        self, kind: str, stub: Any, tmp_path: Path
    ) -> None:
        def save(to: Path | str, spine: Any = ROWS) -> Any:
            return self.act(kind, stub.url, lambda c: c.save_history(to, "risk", spine=spine))

        stub.failures = [ConflictError("stale", code="stale_feature")]
        with pytest.raises(ConflictError):
            save(tmp_path / "out.parquet")
        for to, spine, code in (
            (tmp_path / "missing" / "out.parquet", ROWS, "unwritable_file"),
            (tmp_path / "out.xlsx", ROWS, "unknown_format"),
            (tmp_path / "out.json", tmp_path / "spine.csv", "unknown_format"),
            (tmp_path / "out.json", tmp_path / "spine.parquet", "unreadable_file"),
        ):
            with pytest.raises(MlpdError) as caught:
                save(to, spine)
            assert caught.value.code == code
        assert not [path for path in tmp_path.iterdir() if path.is_file()]

    def test_nobody_there(self, kind: str) -> None:
        with pytest.raises(UnavailableError) as caught:
            self.act(kind, "http://127.0.0.1:1", lambda c: c.status(), timeout_s=2)
        assert caught.value.code == "unreachable"

    def test_waiting_for_a_run_tells_its_progress(self, kind: str, stub: Any) -> None:
        def run(state: str, step: str) -> dict[str, Any]:
            return {"run_id": "r", "state": state, "progress": {"step": step}}

        stub.runs = [
            *(run("queued", ""), run("running", "join"), run("running", "join")),
            *(run("running", "train"), run("succeeded", "done")),
        ]
        seen: list[tuple[str, str]] = []
        ended = self.act(
            kind,
            stub.url,
            lambda c: c.runs.wait(
                "r",
                on_progress=lambda run: seen.append((run["state"], run["progress"]["step"])),
                poll_s=0.001,
            ),
        )
        assert ended["state"] == "succeeded"
        assert seen == [
            *(("queued", ""), ("running", "join"), ("running", "train")),
            ("succeeded", "done"),
        ]

    def test_waiting_for_a_run_ends(self, kind: str, stub: Any) -> None:
        stub.runs = [{"run_id": "r", "state": "running", "progress": {}}] * 1000
        with pytest.raises(UnavailableError, match="still running") as caught:
            self.act(kind, stub.url, lambda c: c.runs.wait("r", timeout_s=0.05, poll_s=0.01))
        assert caught.value.code == "timeout"

    def test_waiting_until_ready(self, kind: str, stub: Any) -> None:
        stub.failures = [UnavailableError("starting", code="not_ready")] * 3
        self.act(kind, stub.url, lambda c: c.wait_ready(poll_s=0.001))
        assert len(stub.calls) == 4
        stub.failures = [NotFoundError("what is this?")]
        with pytest.raises(NotFoundError):
            self.act(kind, stub.url, lambda c: c.wait_ready(poll_s=0.001))

    def test_what_a_route_shows_can_be_put_back(self, kind: str, stub: Any) -> None:
        shown = {"name": "r", "version": 3, "serving": {}, "error": None, "service": "risk"}
        self.act(kind, stub.url, lambda c: c.routes.put("r", {**shown, "arms": []}, expected=3))
        assert stub.calls[0]["body"] == {"service": "risk", "arms": [], "expected": 3}


def test_connections_are_kept_and_replaced_when_stale(stub: Any) -> None:
    with Client(stub.url) as client:
        client.status()
        (connection,) = client._idle
        client.status()
        assert list(client._idle) == [connection]
        connection.close()
        client._idle.clear()
        client.predict("risk", ROWS)
        assert connection not in client._idle


def test_threads_share_a_client(stub: Any) -> None:
    def work(n: int) -> set[str]:
        return {client.routes.get(f"r{n}")["path"] for _ in range(20)}

    with Client(stub.url) as client, ThreadPoolExecutor(8) as threads:
        assert list(threads.map(work, range(8))) == [{f"/v1/routes/r{n}"} for n in range(8)]
    assert len(stub.calls) == 160


def test_definitions_may_be_given_as_objects(stub: Any) -> None:
    with Client(stub.url) as client:
        client.plan([Entity("user"), "not a definition"])
    assert stub.calls[0]["body"]["document"]["entities"] == {"user": {"keys": {"user": "string"}}}


def test_who_changes_something_is_said(stub: Any) -> None:
    with Client(stub.url, by="alice") as client:
        client.routes.delete("r")
    in_async(stub.url, lambda c: c.routes.delete("r"))
    assert [call["headers"]["x-mlpd-by"] for call in stub.calls] == ["alice", "python client"]
