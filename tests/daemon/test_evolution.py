"""Views that change under models: a pinned model keeps reading its version while it is held."""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgpack
import pytest

from mlpd.client import Client
from mlpd.core.definitions import (
    Aggregate,
    Entity,
    FeatureService,
    FeatureView,
    Job,
    Source,
    Spine,
    WindowView,
    build_document,
)
from mlpd.core.errors import (
    ConflictError,
    DefinitionError,
    InternalError,
    MlpdError,
    NotFoundError,
)
from mlpd.core.time import system_clock
from mlpd.daemon.app import Daemon
from mlpd.daemon.cost_child import SAMPLE_ROWS
from mlpd.daemon.dropped import read_marks
from mlpd.daemon.fsck import check_stopped
from mlpd.daemon.pins import Pins
from mlpd.daemon.read import given_columns
from mlpd.features.catalog import Catalog
from mlpd.registry.records import Cause
from mlpd.storage.environment import Environment
from mlpd.storage.files import DataDirectory
from mlpd.storage.tables import Table
from tests.conftest import until
from tests.daemon.quick import send_clicks, train

DEADLINE_S = 40.0
SCHEMA = {"user": "string", "amount": "float64", "bought": "int64", "shown_at": "timestamp"}
ROW = {"user": "a", "amount": 1.5}
MAIN = {"name": "main", "model": "quick@champion"}


def document(
    window: str = "1h", *, schema: dict[str, str] = SCHEMA, factor: int = 1, rounds: int = 3
) -> dict[str, Any]:
    """Return definitions whose views, and so whose service, are of another version per window."""
    user = Entity("user")
    clicks = Source("clicks", timestamp="at", schema=schema)
    spend = WindowView(
        "spend", user, clicks, [window], [Aggregate.count(), Aggregate.sum("amount")]
    )
    last = FeatureView("last", user, clicks, ["amount"])
    source = f"def scaled(x):\n    return x * {factor}.0"
    scaled = {"source": source, "inputs": [["x", "last.amount"]], "output": "float64"}
    risk = FeatureService("risk", [spend, last], request={"amount": "float64"})
    job = Job(
        *("quick", risk, Spine(clicks, time="shown_at")),
        label="bought",
        params={"min_data_in_leaf": 5},
        num_boost_round=rounds,
        early_stopping_rounds=rounds,
    )
    found = build_document([user, clicks, spend, last, risk, job])
    found["transforms"] = {"scaled": scaled}
    found["services"]["risk"]["features"].append("scaled")
    return found


def without_models(window: str) -> dict[str, Any]:
    """Return definitions of the source and another service; `risk` is gone."""
    found = document(window)
    return {**found, "services": {}, "jobs": {}}


async def click(daemon: Daemon, n: int = 1) -> None:
    """Store clicks of user `a`, of an amount of 2, that happened just now."""
    now = daemon.clock()
    await send_clicks(
        daemon, {"at": [now - i for i in range(n)], "user": ["a"] * n, "amount": [2.0] * n}
    )


async def train_as(daemon: Daemon, alias: str = "champion") -> int:
    """Train a version of the model, give it an alias, return its number."""
    run = await train(daemon)
    assert run.result is not None
    number: int = run.result["version"]
    await daemon.registry.move_alias("quick", alias, number, Cause("test"), expected="any")
    return number


async def serve(daemon: Daemon, **arms: str) -> None:
    """Make route `quick` of arms by alias."""
    named = [{"name": name, "model": f"quick@{alias}"} for name, alias in arms.items()]
    await daemon.routes.put("quick", {"service": "risk", "arms": named}, by="test")


async def apply(daemon: Daemon, wanted: dict[str, Any]) -> Any:
    """Apply as the API does: routes follow."""
    plan = await daemon.definitions.apply(wanted)
    await daemon.routes.refresh()
    return plan


async def predict(daemon: Daemon, arm: str | None = None) -> dict[str, Any]:
    """Return the features that a prediction was made of."""
    answer = await daemon.predict.predict("quick", [ROW], include=("features",), arm=arm)
    found: dict[str, Any] = answer["predictions"][0]["features"]
    return found


@pytest.fixture(autouse=True)
def released_when_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """The daemon itself would release every 5 s, at a moment that no test knows."""
    monkeypatch.setattr("mlpd.daemon.definitions.RELEASE_S", 3600.0)


@pytest.fixture
async def served(daemon: Daemon, click_columns: Any) -> Daemon:
    """A daemon whose route serves a model that was trained on windows of 1 h."""
    await daemon.definitions.apply(document())
    await send_clicks(daemon, click_columns)
    await train_as(daemon)
    await serve(daemon, main="champion")
    return daemon


def rows_of(daemon: Daemon, view: str, catalog: Catalog) -> int:
    """Return how many rows a view of `catalog` has."""
    view_id = catalog.views[view].view_id
    with daemon.environment.snapshot() as snapshot:
        keys = [key for key, _ in snapshot.scan(Table.ONLINE)]
    return sum(int.from_bytes(key[2:6], "big") == view_id for key in keys)


async def check(daemon: Daemon, predictions: int) -> None:
    """Every prediction equals its recomputation from the log."""
    found = await daemon.audit.run()
    assert (found["rows_compared"], found["mismatches"], found["unavailable"]) == (
        predictions,
        0,
        0,
    )


async def test_a_pinned_model_keeps_reading_its_version(served: Daemon) -> None:
    await click(served, 3)
    assert (await predict(served))["spend.count_1h"] == 3
    planned = await served.definitions.plan(document("2h", factor=3))
    (pinned,) = planned.pinned
    assert (pinned.service, pinned.views) == ("risk", ("spend",))
    assert pinned.by == ("quick@champion", "route quick")
    assert planned.backfill == {"spend": 1003}
    done = await apply(served, document("2h", factor=3))
    assert done.pinned == planned.pinned
    await click(served)
    assert await predict(served) == {
        "spend.count_1h": 4,
        "spend.amount_sum_1h": 8.0,
        "last.amount": 2.0,
        "scaled": 2.0,
        "amount": 1.5,
    }
    closure = served.read.closure("risk")
    columns = served.read.read(closure, given_columns(closure, [ROW])).frame.columns
    assert {name: column.to_list()[0] for name, column in columns.items()} == {
        "spend.count_2h": 4,
        "spend.amount_sum_2h": 8.0,
        "last.amount": 2.0,
        "scaled": 6.0,
        "amount": 1.5,
    }
    await check(served, 2)


async def test_both_versions_equal_a_replay_after_a_restart(
    open_daemon: Any, click_columns: Any
) -> None:
    async with open_daemon() as daemon:
        await daemon.definitions.apply(document())
        await send_clicks(daemon, click_columns)
        await train_as(daemon)
        await serve(daemon, main="champion")
        await apply(daemon, document("2h"))
        await click(daemon, 3)
        assert (await predict(daemon))["spend.count_1h"] == 3
        directory, clock = daemon.paths.root, daemon.clock
    report = await asyncio.to_thread(check_stopped, directory, clock, deep=True)
    assert report["problems"] == []
    assert report["checked"]["online"]["of_former_views"] == 0
    assert report["checked"]["replay"]["different"] == 0
    async with open_daemon() as daemon:
        await click(daemon)
        assert (await predict(daemon))["spend.count_1h"] == 4
        await check(daemon, 2)


async def test_arms_of_one_route_read_a_version_each(served: Daemon) -> None:
    await click(served, 2)
    await apply(served, document("2h", factor=3))
    await train_as(served, "challenger")
    await serve(served, old="champion", new="challenger")
    await click(served)
    old, new = await predict(served, "old"), await predict(served, "new")
    assert (old["spend.count_1h"], old["scaled"]) == (3, 2.0)
    assert (new["spend.count_2h"], new["scaled"]) == (3, 6.0)
    shadowed = {
        "service": "risk",
        "arms": [{"name": "old", "model": "quick@champion"}],
        "shadows": ["quick@challenger"],
    }
    await served.routes.put("quick", shadowed, by="test")
    rows = [{"user": name, "amount": 0.5} for name in ("a", "b", "never")]
    await served.predict.predict("quick", rows)
    await until(lambda: sum(pair.n for pair in served.shadows.statistics().values()) == 3)
    await check(served, 5)


async def test_what_nothing_pins_any_more_goes(served: Daemon) -> None:
    before = served.state.catalog
    assert rows_of(served, "spend", before) == 3
    await apply(served, document("2h"))
    assert await served.definitions.release() == []
    await served.routes.delete("quick", by="test")
    assert await served.definitions.release() == []  # the alias still holds it
    await served.registry.move_alias("quick", "champion", None, Cause("test"), expected="any")
    assert await served.definitions.release() == [before.closures["risk"].hash]
    assert await served.definitions.release() == []
    assert served.state.catalog.key == (2, 1)
    await until(lambda: rows_of(served, "spend", before) == 0)
    assert rows_of(served, "last", before) == 3  # both versions have this view
    await served.registry.move_alias("quick", "champion", 1, Cause("test"), expected="any")
    with pytest.raises(ConflictError) as refused:
        await serve(served, main="champion")
    assert refused.value.code == "service_mismatch"


async def test_a_route_that_lost_its_version_holds_up_no_other(served: Daemon) -> None:
    """Its alias moves to a model whose version isn't there: it goes on, and so do the others."""
    await click(served)
    await apply(served, document("2h"))
    await train_as(served)  # version 2 becomes champion
    await served.routes.refresh()
    assert (await predict(served))["spend.count_2h"] == 1
    assert len(await served.definitions.release()) == 1
    await served.registry.move_alias("quick", "champion", 1, Cause("test"), expected="any")
    await served.routes.refresh()
    assert "doesn't run any more" in served.routes.get("quick")["error"]
    other = {"service": "risk", "arms": [{"name": "main", "model": "quick@2"}]}
    await served.routes.put("other", other, by="test")
    answer = await served.predict.predict("other", [ROW], include=("features",))
    assert answer["predictions"][0]["features"]["spend.count_2h"] == 1
    assert (await predict(served))["spend.count_2h"] == 1


async def test_a_release_happens_by_itself_and_is_on_disk(
    open_daemon: Any, click_columns: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlpd.daemon.definitions.RELEASE_S", 0.01)
    async with open_daemon() as daemon:
        await daemon.definitions.apply(document())
        await send_clicks(daemon, click_columns)
        await train_as(daemon)
        await apply(daemon, document("2h"))
        assert len(daemon.state.catalog.pinned) == 1
        await daemon.registry.move_alias("quick", "champion", None, Cause("test"), expected="any")
        await until(lambda: not daemon.state.catalog.pinned)
    async with open_daemon() as daemon:
        assert (daemon.state.catalog.key, daemon.state.catalog.pinned) == ((2, 1), {})
        done = await apply(daemon, document("3h"))
        assert (done.version, daemon.state.catalog.key) == (3, (3, 0))
        directory, clock = daemon.paths.root, daemon.clock
    report = await asyncio.to_thread(check_stopped, directory, clock, deep=True)
    assert report["problems"] == []


async def test_former_definitions_come_back_at_once(served: Daemon) -> None:
    await click(served, 2)
    before = served.state.catalog
    await apply(served, document("2h"))
    await click(served)
    planned = await served.definitions.plan(document())
    assert (planned.backfill, planned.pinned) == ({}, ())
    await apply(served, document())
    now = served.state.catalog
    assert now.views["spend"].view_id == before.views["spend"].view_id
    assert (await predict(served))["spend.count_1h"] == 3
    await check(served, 1)


async def test_a_service_that_is_removed_goes_on_for_its_models(served: Daemon) -> None:
    await apply(served, without_models("2h"))
    await click(served)
    assert (await predict(served))["spend.count_1h"] == 1
    with pytest.raises(NotFoundError):
        served.read.closure("risk")
    await serve(served, again="champion")
    assert (await predict(served))["spend.count_1h"] == 1
    await check(served, 2)


async def test_a_column_that_is_dropped_is_null_to_pinned_views(served: Daemon) -> None:
    await click(served)
    without = {name: dtype for name, dtype in SCHEMA.items() if name != "amount"}
    wanted = {**without_models("2h"), "views": {}, "transforms": {}}
    wanted["sources"] = {"clicks": {"timestamp": "at", "schema": without}}
    await apply(served, wanted)
    await send_clicks(served, {"at": [served.clock()], "user": ["a"]})
    found = await predict(served)
    assert (found["spend.count_1h"], found["spend.amount_sum_1h"]) == (2, 2.0)
    assert found["last.amount"] is None
    await check(served, 1)


async def test_an_erasure_reaches_pinned_views(served: Daemon) -> None:
    """Those of the entity lose its rows, those of others are built anew without its events."""
    wanted = document("2h")
    wanted["entities"]["bought"] = {"keys": {"bought": "int64"}}
    by_label = {**wanted["views"]["spend"], "entity": "bought"}
    both = {**wanted, "views": {**wanted["views"], "by_label": by_label}}
    both["services"] = {"risk": {**wanted["services"]["risk"]}}
    both["services"]["risk"]["features"] = [
        "by_label.count_2h",
        *wanted["services"]["risk"]["features"],
    ]
    await apply(served, both)
    await click(served, 2)
    now = served.clock()
    await send_clicks(served, {"at": [now] * 2, "user": ["a", "b"], "bought": [1, 1]})
    assert (await predict(served))["spend.count_1h"] == 3
    former = served.state.catalog
    await served.erase.run("user", [{"user": "a"}])
    assert (await predict(served))["spend.count_1h"] == 0
    closure = served.read.closure("risk")
    given = given_columns(closure, [{"user": "b", "bought": 1, "amount": 1.0}])
    columns = served.read.read(closure, given).frame.columns
    assert columns["by_label.count_2h"].to_list() == [1]
    assert served.state.catalog.pinned.keys() == former.pinned.keys()
    await until(lambda: not read_marks_of(served))


def read_marks_of(daemon: Daemon) -> dict[int, int]:
    with daemon.environment.snapshot() as snapshot:
        return read_marks(snapshot)


async def test_a_pinned_column_keeps_its_type(daemon: Daemon, monkeypatch: Any) -> None:
    """Also while no event has it: the views that read it run on."""
    await daemon.definitions.apply(document())
    held = daemon.state.catalog.closures["risk"].hash

    async def read(_: Pins) -> Any:
        return {held: ("somebody",)}

    monkeypatch.setattr(Pins, "read", read)
    monkeypatch.setattr(Pins, "find", lambda *_: {held: ("somebody",)})
    wanted = document("2h", schema={**SCHEMA, "amount": "int64"})
    wanted["services"]["risk"]["request"] = {"amount": "int64"}
    for verb in (daemon.definitions.plan, daemon.definitions.apply):
        with pytest.raises(DefinitionError) as refused:
            await verb(wanted)
        assert refused.value.code == "column_type"


async def test_a_version_that_could_not_be_read_is_held_once_it_can(
    served: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    await served.routes.delete("quick", by="test")

    async def damaged(*_: Any) -> Any:
        raise InternalError("its lineage is damaged")

    served.definitions._pins._hashes.clear()
    with monkeypatch.context() as patched:
        patched.setattr(served.registry, "load_lineage", damaged)
        assert (await served.definitions.plan(document("2h"))).pinned == ()
    (pinned,) = (await served.definitions.plan(document("2h"))).pinned
    assert pinned.by == ("quick@champion",)


async def test_a_run_under_way_pins_what_it_trains_on(daemon: Daemon, click_columns: Any) -> None:
    await daemon.definitions.apply(document(rounds=1_000_000))
    await send_clicks(daemon, click_columns)
    run = await daemon.runs.enqueue("quick", trigger="test")
    await until(lambda: daemon.runs.get(run.run_id).progress.get("step") == "train")
    done = await apply(daemon, document("2h", rounds=1_000_000))
    assert [pinned.by for pinned in done.pinned] == [(f"run {run.run_id}",)]
    assert await daemon.definitions.release() == []
    await daemon.runs.cancel(run.run_id)
    assert len(await daemon.definitions.release()) == 1


async def test_an_alias_that_moves_while_views_are_built_is_seen(
    served: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    await served.routes.delete("quick", by="test")
    await served.registry.move_alias("quick", "champion", None, Cause("test"), expected="any")
    backfill, tries = served.definitions._backfill, 0

    async def move_first(catalog: Catalog) -> bool:
        nonlocal tries
        tries += 1
        await served.registry.move_alias("quick", "champion", 1, Cause("test"), expected="any")
        return await backfill(catalog)

    monkeypatch.setattr(served.definitions, "_backfill", move_first)
    done = await apply(served, document("2h"))
    assert tries == 2
    assert [pinned.by for pinned in done.pinned] == [("quick@champion",)]
    monkeypatch.undo()
    await serve(served, main="champion")
    await click(served)
    assert (await predict(served))["spend.count_1h"] == 1


async def test_an_alias_that_moves_during_a_release_keeps_its_version(
    served: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    await apply(served, document("2h"))
    await served.routes.delete("quick", by="test")
    await served.registry.move_alias("quick", "champion", None, Cause("test"), expected="any")
    build = served.state.build

    def move_first(*arguments: Any, **named: Any) -> Any:
        moving = served.registry.move_alias("quick", "old", 1, Cause("test"), expected="any")
        asyncio.run_coroutine_threadsafe(moving, loop).result(DEADLINE_S)
        return build(*arguments, **named)

    loop = asyncio.get_running_loop()
    monkeypatch.setattr(served.state, "build", move_first)
    assert await served.definitions.release() == []
    assert len(served.state.catalog.pinned) == 1


async def test_a_view_whose_entity_has_another_key_is_built_anew(daemon: Daemon) -> None:
    await daemon.definitions.apply(document())
    now = daemon.clock()
    await send_clicks(daemon, {"at": [now, now], "user": ["a", "b"], "bought": [1, 1]})
    wanted = document()
    wanted["entities"]["user"] = {"keys": {"bought": "int64"}}
    done = await daemon.definitions.apply(wanted)
    assert done.backfill == {"spend": 2, "last": 2}
    closure = daemon.read.ad_hoc_closure(["spend.count_1h"], {})
    frame = daemon.read.read(closure, given_columns(closure, [{"bought": 1}])).frame
    assert frame.columns["spend.count_1h"].to_list() == [2]


async def test_a_state_of_an_earlier_format_is_read(open_daemon: Any) -> None:
    async with open_daemon() as daemon:
        await daemon.definitions.apply(document())
        await click(daemon, 2)
        catalog = daemon.state.catalog
        state = catalog.to_state()
        ids = {f"{v.view.name}@{v.view.hash}": v.view_id for v in catalog.running}
        del state["revision"], state["pinned"]
        old = msgpack.packb({**state, "view_ids": ids})
        await daemon.writer.write(lambda txn: txn.put(Table.DEFINITIONS, b"current", old))
        await daemon.writer.write(lambda txn: txn.put(Table.DEFINITIONS, b"v\0\0\0\1", old))
    async with open_daemon() as daemon:
        assert daemon.state.catalog.view_ids == catalog.view_ids
        assert (await daemon.definitions.plan(document("2h"))).backfill == {"spend": 2}
        directory, clock = daemon.paths.root, daemon.clock
    report = await asyncio.to_thread(check_stopped, directory, clock, deep=True)
    assert report["problems"] == []


@pytest.mark.parametrize("compacted", [False, True])
async def test_a_plan_measures_what_views_will_take(daemon: Daemon, compacted: bool) -> None:
    """Of 900 users with one event each and 100 with 100, some without one: the rows are counted."""
    base = {**without_models("1h"), "views": {}, "transforms": {}}
    await daemon.definitions.apply(base)
    users = [*(f"u{i}" for i in range(900)), *(f"v{i % 100}" for i in range(10_000)), None, None]
    now, n = daemon.clock(), len(users)
    await send_clicks(
        daemon, {"at": [now - i for i in range(n)], "user": users, "amount": [1.0] * n}
    )
    if compacted:
        await daemon.compactor.run()
    planned = await daemon.definitions.plan(document("30d"))
    assert set(planned.cost) == {"spend", "last"}
    for found in planned.cost.values():
        assert (found["events"], found["entities"]) == (n, 1_000)
        assert found["seconds"] > 0
    with daemon.environment.snapshot() as snapshot:
        assert snapshot.count(Table.ONLINE) == 0  # it was all done elsewhere
    await daemon.definitions.apply(document("30d"))
    rows = {name: view_bytes(daemon, name) for name in planned.cost}
    for name, found in planned.cost.items():
        assert rows[name] < found["bytes"] < 4 * rows[name]


async def test_a_document_may_leave_out_what_is_empty(served: Daemon) -> None:
    """No format, and null for a kind without definitions."""
    wanted = {**document("2h"), "jobs": None}
    del wanted["format"]
    planned = await served.definitions.plan(wanted)
    assert (set(planned.cost), len(planned.pinned)) == ({"spend"}, 1)
    await apply(served, wanted)
    assert (await served.definitions.plan(document("3h"))).pinned == planned.pinned
    await click(served)
    assert (await predict(served))["spend.count_1h"] == 1


async def test_the_cost_of_few_events_is_measured_too(daemon: Daemon) -> None:
    """No event has a key, or one has more than the sample takes."""
    base = {**without_models("1h"), "views": {}, "transforms": {}}
    await daemon.definitions.apply(base)
    await send_clicks(daemon, {"at": [daemon.clock()], "user": [None]})
    planned = await daemon.definitions.plan(document())
    assert {(c["entities"], c["bytes"]) for c in planned.cost.values()} == {(0, 0)}
    now, n = daemon.clock(), 2 * SAMPLE_ROWS
    await send_clicks(daemon, {"at": [now - i for i in range(n)], "user": ["a"] * n})
    planned = await daemon.definitions.plan(document())
    assert {(c["events"], c["entities"]) for c in planned.cost.values()} == {(n + 1, 1)}
    assert all(c["bytes"] > 0 for c in planned.cost.values())


def view_bytes(daemon: Daemon, name: str) -> int:
    """Return the bytes of a view's keys and values."""
    view_id = daemon.state.catalog.views[name].view_id.to_bytes(4, "big")
    with daemon.environment.snapshot() as snapshot:
        tables = (*snapshot.scan(Table.ONLINE), *snapshot.scan(Table.TILES))
        return sum(len(key) + len(value) for key, value in tables if key[2:6] == view_id)


USERS = 2_000
EVENTS = 60_000
PAUSE_S = 0.005
"""Between two requests of a kind: the daemon has other things to do, too."""


@contextmanager
def traffic(url: str, sent: list[int]) -> Iterator[list[BaseException]]:
    """Predict, read and send events until the block ends; yields what went wrong before `sent`.

    `sent` grows by one with every acknowledged click of user `a`.
    """
    stop, wrong = threading.Event(), list[BaseException]()

    def repeat(step: Callable[[Client], None]) -> None:
        with Client(url) as client:
            while not stop.wait(PAUSE_S):
                try:
                    step(client)
                except MlpdError as error:
                    if not stop.is_set() and error.code not in ("unreachable", "connection_lost"):
                        wrong.append(error)

    def predict_once(client: Client) -> None:
        least = len(sent)
        answer = client.predict("quick", [ROW], include=["features"])
        assert answer["predictions"][0]["features"]["spend.count_1h"] >= least

    def read_once(client: Client) -> None:
        client.read_features("risk", entities=[ROW])

    def send_once(client: Client) -> None:
        click = {"at": time.time_ns() // 1000, "user": "a", "amount": 2.0}
        assert client.events.send("clicks", [click])["accepted"] == 1
        sent.append(1)

    steps = (predict_once, read_once, send_once)
    threads = [threading.Thread(target=repeat, args=(step,)) for step in steps]
    for thread in threads:
        thread.start()
    try:
        yield wrong
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def has_begun(directory: Path) -> bool:
    """Tell whether rows of a view that doesn't run yet are on disk."""
    lmdb = DataDirectory(directory).lmdb
    with (
        Environment.open(lmdb, clock=system_clock, readonly=True) as environment,
        environment.snapshot() as snapshot,
    ):
        marked = read_marks(snapshot)
        keys = (key for key, _ in snapshot.scan(Table.ONLINE))
        return bool(marked) and any(int.from_bytes(key[2:6], "big") in marked for key in keys)


def test_a_change_under_load_survives_a_kill_in_its_middle(
    serve_process: Any, click_columns: Any
) -> None:
    """What was acknowledged counts in both versions, and the model reads its own throughout."""
    directory, sent = serve_process.directory, list[int]()
    with Client(serve_process.url) as client:
        client.apply(document("1h"))
        client.events.send("clicks", click_columns)
        run = client.runs.wait(client.runs.start("quick", deploy="champion")["run_id"])
        assert run["state"] == "succeeded"
        now = time.time_ns() // 1000
        users = [f"u{i % USERS}" for i in range(EVENTS)]
        client.events.send("clicks", {"at": [now - i for i in range(EVENTS)], "user": users})
        client.routes.put("quick", {"service": "risk", "arms": [MAIN]})
    killing = threading.Thread(target=kill_once_begun, args=(serve_process, directory))
    with traffic(serve_process.url, sent) as wrong, Client(serve_process.url) as client:
        killing.start()
        with pytest.raises(MlpdError):
            client.apply(document("2h"))
        killing.join()
    assert wrong == []
    serve_process.start()
    with traffic(serve_process.url, sent) as wrong, Client(serve_process.url) as client:
        assert client.definitions()["version"] == 1
        done = client.apply(document("2h"))
        assert [pinned["by"] for pinned in done["pinned"]] == [["quick@champion", "route quick"]]
        least, deadline_s = len(sent), time.monotonic() + DEADLINE_S
        while len(sent) < least + 20:
            assert time.monotonic() < deadline_s
            time.sleep(0.01)
    assert wrong == []
    with Client(serve_process.url) as client:
        served = client.predict("quick", [ROW], include=["features"])["predictions"][0]["features"]
        former = client.read_features("risk", entities=[ROW])["columns"]
        assert served["spend.count_1h"] == former["spend.count_2h"][0] >= len(sent)
        found = client.run_consistency()
        assert (found["mismatches"], found["unavailable"]) == (0, 0)
        assert found["rows_compared"] > 1
    serve_process.stop()
    report = check_stopped(directory, system_clock, deep=True)
    assert report["problems"] == []
    assert report["checked"]["replay"]["different"] == 0


def kill_once_begun(process: Any, directory: Path) -> None:
    """Kill the daemon as soon as it has written rows of the new view."""
    deadline_s = time.monotonic() + DEADLINE_S
    while not has_begun(directory):
        assert time.monotonic() < deadline_s
    process.kill()
