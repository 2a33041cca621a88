"""Rows of views that don't run are removed; those that do run are never touched."""

import time
from collections import Counter
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
    Source,
    WindowView,
    build_document,
)
from mlpd.core.errors import InternalError
from mlpd.core.time import HOUR_US, system_clock
from mlpd.daemon.app import Daemon
from mlpd.daemon.dropped import read_marks
from mlpd.daemon.process import Child
from mlpd.daemon.read import given_columns
from mlpd.features.ingest import parse_batch
from mlpd.storage.environment import Environment
from mlpd.storage.files import DataDirectory
from mlpd.storage.tables import Table
from tests.conftest import until

USERS = 1_000
MANY = 10_000
"""Users of a view whose removal takes seconds: a kill comes in the middle."""
DEADLINE_S = 40.0

user = Entity("user")
clicks = Source("clicks", timestamp="at", schema={"user": "string", "x": "float64"})
last = FeatureView("last", user, clicks, ["x"])


def document(*, load: bool, window: str = "1h") -> dict[str, Any]:
    if not load:
        return build_document([user, clicks, last, FeatureService("s", [last])])
    view = WindowView("load", user, clicks, [window], [Aggregate.count()])
    return build_document([user, clicks, last, view, FeatureService("s", [last, view])])


async def send(daemon: Daemon, each: int = 1) -> None:
    """Store events of every user."""
    source = daemon.state.catalog.definitions.source("clicks")
    names = [f"u{i}" for i in range(USERS)] * each
    columns = {"at": [daemon.clock() - 1] * len(names), "user": names, "x": [1.0] * len(names)}
    batch = parse_batch(source, columns, now_us=daemon.clock())
    assert (await daemon.ingest.ingest([batch])).accepted == len(names)


def rows_by_view(daemon: Daemon) -> Counter[int]:
    with daemon.environment.snapshot() as snapshot:
        keys = [key for key, _ in snapshot.scan(Table.ONLINE)]
    return Counter(int.from_bytes(key[2:6], "big") for key in keys)


def rows_of(daemon: Daemon, table: Table) -> int:
    with daemon.environment.snapshot() as snapshot:
        return snapshot.count(table)


def running(daemon: Daemon) -> dict[int, int]:
    """Return the rows that there are when all views have all users and nobody else has any."""
    return dict.fromkeys(daemon.state.catalog.view_ids.values(), USERS)


def clean(daemon: Daemon) -> bool:
    with daemon.environment.snapshot() as snapshot:
        return not read_marks(snapshot)


def counted(daemon: Daemon) -> set[Any]:
    """Return what the window view counts, of all users."""
    closure = daemon.read.closure("s")
    given = given_columns(closure, [{"user": f"u{i}"} for i in range(USERS)])
    return set(daemon.read.read(closure, given).frame.columns["load.count_1h"].to_list())


async def test_a_dropped_view_leaves_no_rows(daemon: Daemon) -> None:
    await daemon.definitions.apply(document(load=True))
    await send(daemon)
    assert rows_by_view(daemon) == running(daemon)
    before = daemon.writer.stats.operations
    await daemon.definitions.apply(document(load=False))
    await until(lambda: clean(daemon))
    assert rows_by_view(daemon) == running(daemon)
    assert daemon.dropped.removed == USERS
    assert daemon.writer.stats.operations - before > 10  # never all at once


async def test_older_tiles_of_a_dropped_view_go_with_it(daemon: Daemon) -> None:
    await daemon.definitions.apply(document(load=True, window="7d"))
    source = daemon.state.catalog.definitions.source("clicks")
    times = [daemon.clock() - hours * HOUR_US for hours in range(1, 40)]
    columns = {"at": times, "user": ["u1"] * len(times), "x": [1.0] * len(times)}
    await daemon.ingest.ingest([parse_batch(source, columns, now_us=daemon.clock())])
    assert rows_of(daemon, Table.TILES) == 1
    await daemon.definitions.apply(document(load=False))
    await until(lambda: clean(daemon))
    assert rows_of(daemon, Table.TILES) == 0


async def test_a_changed_view_leaves_no_rows_of_its_old_form(daemon: Daemon) -> None:
    await daemon.definitions.apply(document(load=True, window="2h"))
    await send(daemon)
    await daemon.definitions.apply(document(load=True))
    await until(lambda: clean(daemon))
    assert rows_by_view(daemon) == running(daemon)
    assert counted(daemon) == {1}


async def test_a_view_that_comes_back_during_the_removal_is_whole(daemon: Daemon) -> None:
    await daemon.definitions.apply(document(load=True))
    await send(daemon)
    await daemon.definitions.apply(document(load=False))
    await until(lambda: daemon.dropped.removed > 0)
    assert not clean(daemon)
    await daemon.definitions.apply(document(load=True))
    await send(daemon)
    await until(lambda: clean(daemon))
    assert rows_by_view(daemon) == running(daemon)
    assert counted(daemon) == {2}


async def test_a_removal_goes_on_after_a_restart(open_daemon: Any) -> None:
    async with open_daemon() as daemon:
        await daemon.definitions.apply(document(load=True))
        await send(daemon)
        await daemon.definitions.apply(document(load=False))
        await until(lambda: daemon.dropped.removed > 0)
        with daemon.environment.snapshot() as snapshot:
            assert read_marks(snapshot)
    async with open_daemon() as daemon:
        await until(lambda: clean(daemon))
        assert rows_by_view(daemon) == running(daemon)


def test_a_removal_goes_on_after_a_kill(serve_process: Any) -> None:
    with Client(serve_process.url) as client:
        client.apply(document(load=True))
        names = [f"u{i}" for i in range(MANY)]
        times = [time.time_ns() // 1000] * MANY
        client.events.send("clicks", {"at": times, "user": names, "x": [1.0] * MANY})
        client.apply(document(load=False))
    serve_process.kill()
    kept, dropped, marks = stored(serve_process.directory)
    assert (kept, bool(dropped), bool(marks)) == (MANY, True, True)
    serve_process.start()
    deadline_s = time.monotonic() + DEADLINE_S
    while stored(serve_process.directory) != (MANY, 0, {}):
        assert time.monotonic() < deadline_s
        time.sleep(0.02)


def stored(directory: Path) -> tuple[int, int, dict[int, int]]:
    """Return the rows of the view that stayed and of the one that went, and the marks."""
    lmdb = DataDirectory(directory).lmdb
    with (
        Environment.open(lmdb, clock=system_clock, readonly=True) as environment,
        environment.snapshot() as snapshot,
    ):
        current = msgpack.unpackb(snapshot.get(Table.DEFINITIONS, b"current") or b"")
        running = set(current["view_ids"].values())
        keys = [key for key, _ in snapshot.scan(Table.ONLINE)]
        marks = read_marks(snapshot)
    kept = sum(int.from_bytes(key[2:6], "big") in running for key in keys)
    return kept, len(keys) - kept, marks


async def test_what_was_dropped_before_there_were_marks_is_found(open_daemon: Any) -> None:
    async with open_daemon() as daemon:
        await daemon.definitions.apply(document(load=True))
        await send(daemon)
        await daemon.definitions.apply(document(load=False))

        def forget(txn: Any) -> None:
            for key in [key for key, _ in txn.scan(Table.DEFINITIONS, b"g", b"h")]:
                txn.delete(Table.DEFINITIONS, key)

        await daemon.writer.write(forget)
        assert len(rows_by_view(daemon)) == 2
    async with open_daemon() as daemon:
        await until(lambda: rows_by_view(daemon) == running(daemon) and clean(daemon))


async def test_a_backfill_that_fails_leaves_nothing_to_the_next_one(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The child dies after half of the history: its rows must not count twice."""
    await daemon.definitions.apply(document(load=False))
    await send(daemon, each=3)
    messages = Child.messages

    async def half(child: Child) -> Any:
        blocks = 0
        async for message in messages(child):
            yield message
            blocks += message["kind"] == "block"
            if blocks == 2:
                raise InternalError("the child died", code="child_died")

    monkeypatch.setattr("mlpd.daemon.definitions.BLOCK_ROWS", 500)
    with monkeypatch.context() as patched:
        patched.setattr(Child, "messages", half)
        with pytest.raises(InternalError):
            await daemon.definitions.apply(document(load=True))
    assert daemon.state.catalog.version == 1
    await daemon.definitions.apply(document(load=True))
    assert counted(daemon) == {3}
    await until(lambda: clean(daemon))
    assert rows_by_view(daemon) == running(daemon)
