"""Requests of one group of writes: their events update the views as one batch, and fail alone."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

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
from mlpd.core.errors import OverloadedError
from mlpd.core.time import MINUTE_US
from mlpd.daemon import ingest as ingest_module
from mlpd.daemon.app import Daemon
from mlpd.daemon.ingest import Ingested, _Pending
from mlpd.daemon.read import given_columns
from mlpd.features.ingest import parse_batch
from mlpd.storage.transactions import WriteTransaction
from mlpd.storage.writer import QUEUE_BYTES_MAX

USERS = ["a", "b", "c"]

user = Entity("user")
clicks = Source("clicks", timestamp="at", schema={"user": "string", "x": "float64"})
last = FeatureView("last", user, clicks, ["x"])
load = WindowView("load", user, clicks, ["1h"], [Aggregate.count(), Aggregate.sum("x")])
DOCUMENT = build_document([user, clicks, last, load, FeatureService("s", [last, load])])

Columns = dict[str, list[Any]]


def requests(now_us: int) -> list[Columns]:
    """Twenty requests of one to three rows; sums whose last bits would know a wrong order."""
    found = []
    for i in range(20):
        n = i % 3 + 1
        users = [USERS[(i + k) % 3] for k in range(n)]
        values = [0.1 * 3.0 ** (i % 7) + k for k in range(n)]
        times = [now_us - 1_000_000 * ((i * 7 + k) % 11 + 1) for k in range(n)]
        found.append({"at": times, "user": users, "x": values})
    return found


@asynccontextmanager
async def one_group(daemon: Daemon) -> AsyncIterator[None]:
    """Hold the writer up, so that what the block submits is taken as one group."""
    begun, go_on = threading.Event(), threading.Event()

    def wait(_: WriteTransaction) -> None:
        begun.set()
        go_on.wait(20)

    held = asyncio.create_task(daemon.writer.write(wait))
    await asyncio.to_thread(begun.wait, 20)
    try:
        yield
    finally:
        go_on.set()
        await held


def send(daemon: Daemon, columns: Columns) -> "asyncio.Task[Ingested]":
    source = daemon.state.catalog.definitions.source("clicks")
    batch = parse_batch(source, columns, now_us=daemon.clock())
    return asyncio.create_task(daemon.ingest.ingest([batch]))


def features(daemon: Daemon, at_us: int) -> dict[str, list[Any]]:
    closure = daemon.read.closure("s")
    given = given_columns(closure, [{"user": name} for name in USERS])
    columns = daemon.read.read(closure, given, at_us=at_us).frame.columns
    return {
        name: [v.hex() if isinstance(v, float) else v for v in column.to_list()]
        for name, column in columns.items()
    }


@pytest.fixture
def updates(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows of every batch that views were updated with."""
    rows: list[int] = []
    apply: Callable[..., None] = ingest_module.apply_batch

    def counted(txn: Any, views: Any, columns: Any, stamps: Any, *rest: Any) -> None:
        rows.append(len(stamps.sequences))
        apply(txn, views, columns, stamps, *rest)

    monkeypatch.setattr(ingest_module, "apply_batch", counted)
    return rows


async def expected(open_daemon: Any, directory: Path, batches: list[Columns], at_us: int) -> Any:
    """Return the features of a daemon to which the requests came one after the other."""
    async with open_daemon(directory) as daemon:
        await daemon.definitions.apply(DOCUMENT)
        for columns in batches:
            await send(daemon, columns)
        return features(daemon, at_us)


async def test_a_group_updates_views_once_with_the_bits_of_one_by_one(
    open_daemon: Any, tmp_path: Path, updates: list[int]
) -> None:
    async with open_daemon() as daemon:
        await daemon.definitions.apply(DOCUMENT)
        batches = requests(daemon.clock())
        async with one_group(daemon):
            sent = [send(daemon, columns) for columns in batches]
            await asyncio.sleep(0)
        answers = [await task for task in sent]
        total = sum(len(columns["at"]) for columns in batches)
        assert updates == [total]
        first = answers[0].sequence - answers[0].accepted
        ends = [answer.sequence - first for answer in answers]
        assert ends == [sum(len(b["at"]) for b in batches[: i + 1]) for i in range(len(batches))]
        at_us = daemon.clock() + MINUTE_US
        found = features(daemon, at_us)
    assert found == await expected(open_daemon, tmp_path / "one by one", batches, at_us)


@pytest.mark.parametrize("fails", ["another operation", "the update itself"])
async def test_what_fails_in_a_group_fails_alone(
    open_daemon: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    updates: list[int],
    fails: str,
) -> None:
    def fail(*_: Any) -> None:
        raise ZeroDivisionError

    async with open_daemon() as daemon:
        await daemon.definitions.apply(DOCUMENT)
        batches = requests(daemon.clock())
        if fails == "the update itself":
            monkeypatch.setattr(_Pending, "finish", fail)
        async with one_group(daemon):
            sent = [send(daemon, columns) for columns in batches]
            if fails == "another operation":
                failing = asyncio.create_task(daemon.writer.write(fail))
            await asyncio.sleep(0)
        if fails == "another operation":
            with pytest.raises(ZeroDivisionError):
                await failing
        assert [(await task).accepted for task in sent] == [len(b["at"]) for b in batches]
        assert updates == [len(columns["at"]) for columns in batches]
        at_us = daemon.clock() + MINUTE_US
        found = features(daemon, at_us)
    assert found == await expected(open_daemon, tmp_path / "one by one", batches, at_us)


async def test_long_lists_and_texts_fill_the_writers_queue(daemon: Daemon) -> None:
    source = Source("notes", timestamp="at", schema={"text": "string", "near": "list[float64]"})
    await daemon.definitions.apply(build_document([source]))
    spec = daemon.state.catalog.definitions.source("notes")
    columns = {"at": [1] * 100, "text": ["x" * 100_000] * 100, "near": [[0.5] * 1_000] * 100}
    batch = parse_batch(spec, columns, now_us=daemon.clock())
    assert 10_800_000 < batch.size_bytes < 10_900_000
    fit = QUEUE_BYTES_MAX // batch.size_bytes
    async with one_group(daemon):
        waiting = [asyncio.create_task(daemon.ingest.ingest([batch])) for _ in range(fit)]
        await asyncio.sleep(0)
        with pytest.raises(OverloadedError):
            await daemon.ingest.ingest([batch])
    assert [done.accepted for done in await asyncio.gather(*waiting)] == [100] * fit
