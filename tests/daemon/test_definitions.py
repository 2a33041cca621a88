"""Definitions that change under traffic: what a read sees belongs to its snapshot."""

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import lmdb
import pytest

from mlpd.core.definitions import (
    Aggregate,
    Entity,
    FeatureService,
    FeatureView,
    Source,
    WindowView,
    build_document,
)
from mlpd.core.errors import ConflictError, StorageFullError
from mlpd.daemon.app import Daemon
from mlpd.daemon.ingest import Ingested
from mlpd.daemon.read import ReadResult, given_columns
from mlpd.features.ingest import parse_batch
from mlpd.storage.transactions import WriteTransaction

user = Entity("user")
clicks = Source("clicks", timestamp="at", schema={"user": "string", "x": "float64"})


def document(window: str = "1h") -> dict[str, Any]:
    load = WindowView("load", user, clicks, [window], [Aggregate.count()])
    last = FeatureView("last", user, clicks, ["x"])
    return build_document([user, clicks, load, last, FeatureService("s", [load, last])])


async def send(daemon: Daemon, n: int) -> Ingested:
    source = daemon.state.catalog.definitions.source("clicks")
    now = daemon.clock()
    columns = {"at": [now - i for i in range(n)], "user": ["a"] * n, "x": [1.0] * n}
    return await daemon.ingest.ingest([parse_batch(source, columns, now_us=now)])


def read(daemon: Daemon) -> dict[str, Any]:
    return first(read_as(daemon, daemon.read.closure("s")))


def read_as(daemon: Daemon, closure: Any) -> ReadResult:
    return daemon.read.read(closure, given_columns(closure, [{"user": "a"}]))


def first(result: ReadResult) -> dict[str, Any]:
    return {name: column.to_list()[0] for name, column in result.frame.columns.items()}


@asynccontextmanager
async def before_commit(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch, error: Exception | None = None
) -> AsyncIterator[None]:
    """Enter once an apply's last transaction has done all but its commit; commit on leaving.

    With `error` it fails instead.
    """
    write, reached, go = daemon.writer.write, threading.Event(), threading.Event()

    def linger(_: WriteTransaction) -> None:
        reached.set()
        go.wait(30)
        if error is not None:
            raise error

    async def write_slowly(op: Any, **options: Any) -> Any:
        if getattr(op, "__name__", "") != "swap":
            return await write(op, **options)
        started = threading.Event()  # the writer waits, so that both make one group
        daemon.writer.post(lambda _: started.wait(30))
        swapped = asyncio.ensure_future(write(op, **options))
        await asyncio.sleep(0)
        daemon.writer.post(linger)
        started.set()
        return await swapped

    monkeypatch.setattr(daemon.writer, "write", write_slowly)
    applied = asyncio.ensure_future(daemon.definitions.apply(document("2h")))
    try:
        while not reached.is_set():
            assert not applied.done(), applied.result()
            await asyncio.sleep(0.01)
        yield
    finally:
        go.set()
        monkeypatch.setattr(daemon.writer, "write", write)
        done = (await asyncio.gather(applied, return_exceptions=True))[0]
    if error is None:
        assert done.version == 2
    else:
        assert isinstance(done, StorageFullError)


async def test_a_read_before_an_applys_commit_sees_the_former_definitions(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    await daemon.definitions.apply(document())
    await send(daemon, 5)
    async with before_commit(daemon, monkeypatch):
        assert read(daemon) == {"load.count_1h": 5, "last.x": 1.0}
        assert daemon.state.catalog.version == 1
    assert read(daemon) == {"load.count_2h": 5, "last.x": 1.0}


async def test_an_apply_whose_commit_fails_changes_nothing(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    await daemon.definitions.apply(document())
    await send(daemon, 5)
    async with before_commit(daemon, monkeypatch, lmdb.MapFullError("full")):
        pass
    assert daemon.state.catalog.version == 1
    await send(daemon, 1)
    assert read(daemon) == {"load.count_1h": 6, "last.x": 1.0}


async def test_a_view_that_was_half_built_is_built_anew(
    open_daemon: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_daemon() as daemon:
        await daemon.definitions.apply(document())
        await send(daemon, 5)
        async with before_commit(daemon, monkeypatch, lmdb.MapFullError("full")):
            pass
        async with before_commit(daemon, monkeypatch, lmdb.MapFullError("full")):
            pass
    async with open_daemon() as daemon:
        await daemon.definitions.apply(document("2h"))
        assert read(daemon) == {"load.count_2h": 5, "last.x": 1.0}


async def test_a_snapshot_keeps_its_definitions_through_many_applies(daemon: Daemon) -> None:
    await daemon.definitions.apply(document())
    with daemon.environment.snapshot() as snapshot:
        for hours in range(2, 9):
            await daemon.definitions.apply(document(f"{hours}h"))
        assert daemon.state.catalog.version == 8
        assert daemon.state.catalog_in(snapshot).document == document()


async def test_a_closure_that_means_something_else_by_now_is_refused(daemon: Daemon) -> None:
    await daemon.definitions.apply(document())
    before = daemon.read.closure("s")
    without = {**document(), "views": {"last": document()["views"]["last"]}, "services": {}}
    for changed in (document("2h"), without):
        await daemon.definitions.apply(changed)
        with pytest.raises(ConflictError) as refused:
            read_as(daemon, before)
        assert refused.value.code == "definitions_changed"
    await daemon.definitions.apply(document())
    assert first(read_as(daemon, before)) == {"load.count_1h": 0, "last.x": None}


async def test_a_store_without_the_running_version_is_taken_over(open_daemon: Any) -> None:
    async with open_daemon() as daemon:
        await daemon.definitions.apply(document())
        await send(daemon, 3)
        await daemon.writer.write(lambda txn: txn.delete("definitions", b"running"))
    async with open_daemon() as daemon:
        assert read(daemon)["load.count_1h"] == 3
        await daemon.definitions.apply(document("2h"))
        assert read(daemon)["load.count_2h"] == 3


async def test_a_feature_may_be_called_as_any_part_of_a_row(daemon: Daemon) -> None:
    names = ["version", "flags", "event_us", "known_us", "sequence", "nulls", "features"]
    source = Source(
        "odd", timestamp="at", schema={"user": "string", **dict.fromkeys(names, "string")}
    )
    view = FeatureView("odd_names", user, source, names)
    await daemon.definitions.apply(
        build_document([user, source, view, FeatureService("s", [view])])
    )
    sent = {"at": [daemon.clock()], "user": ["a"], **{name: [name] for name in names}}
    batch = parse_batch(daemon.state.catalog.definitions.source("odd"), sent, now_us=daemon.clock())
    await daemon.ingest.ingest([batch])
    assert read(daemon) == {f"odd_names.{name}": name for name in names}
