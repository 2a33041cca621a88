"""Reads that come together are read together, and each gets what it would get alone."""

import asyncio
import random
import time
from typing import Any

import numpy as np
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
from mlpd.core.errors import MlpdError
from mlpd.daemon.app import Daemon
from mlpd.daemon.read import ReadResult, given_columns
from mlpd.daemon.read_pool import OFF_LOOP_ROWS
from mlpd.daemon.read_tick import ROWS_MAX, ReadPart
from mlpd.features.ingest import parse_batch

user = Entity("user")
clicks = Source("clicks", timestamp="at", schema={"user": "string", "x": "float64"})
load = WindowView("load", user, clicks, ["1h"], [Aggregate.count(), Aggregate.sum("x")])
last = FeatureView("last", user, clicks, ["x"])
services = [FeatureService("s", [load, last]), FeatureService("t", [last])]
DOCUMENT = build_document([user, clicks, load, last, *services])
USERS = [*"abcdefgh", None]


async def filled(daemon: Daemon) -> None:
    await daemon.definitions.apply(DOCUMENT)
    source, now = daemon.state.catalog.definitions.source("clicks"), daemon.clock()
    columns = {"at": [now - 1] * 20, "user": [*"abcde"] * 4, "x": [float(i) for i in range(20)]}
    await daemon.ingest.ingest([parse_batch(source, columns, now_us=now)])


def values(result: ReadResult, start: int, stop: int) -> list[Any]:
    frame = result.frame.take(np.arange(start, stop))
    return [frame.value_lists(), frame.status_lists()]


def count_reads(daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    read, sizes = daemon.read.read, list[int]()

    def counted(closure: Any, given: Any, **options: Any) -> ReadResult:
        sizes.append(len(given["user"]))
        return read(closure, given, **options)

    monkeypatch.setattr(daemon.read, "read", counted)
    return sizes


@pytest.mark.parametrize("seed", range(3))
async def test_each_gets_what_it_would_get_alone(daemon: Daemon, seed: int) -> None:
    await filled(daemon)
    lot, waiting, wanted = random.Random(seed), list[asyncio.Task[ReadPart]](), list[Any]()
    for _ in range(60):
        closure = daemon.read.closure(lot.choice("sst"))
        rows = [{"user": lot.choice(USERS)} for _ in range(lot.choice([0, 1, 1, 5, 40]))]
        deadline_s, fate = None, lot.random()
        expected: Any = values(
            daemon.read.read(closure, given_columns(closure, rows)), 0, len(rows)
        )
        if rows and fate < 0.1:
            rows[-1], expected = {"user": 7}, "wrong_type"
        elif rows and fate < 0.2:
            rows[-1], expected = {}, "missing_entity_key"
        elif fate < 0.3:
            deadline_s, expected = time.monotonic() - 1.0, "deadline_exceeded"
        read = daemon.read_tick.read(closure, rows, len(rows), deadline_s=deadline_s)
        waiting.append(asyncio.ensure_future(read))
        wanted.append(expected)
        if fate > 0.9:
            await asyncio.sleep(0)
        elif fate > 0.8:
            waiting[-1].cancel()
            wanted[-1] = "cancelled"
    found = await asyncio.gather(*waiting, return_exceptions=True)
    for expected, part in zip(wanted, found, strict=True):
        if expected == "cancelled":
            assert isinstance(part, asyncio.CancelledError)
        elif isinstance(expected, str):
            assert isinstance(part, MlpdError)
            assert part.code == expected
        else:
            assert isinstance(part, ReadPart)
            assert values(*part) == expected


async def test_those_that_come_in_one_turn_are_one_read_beside_the_first(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    await filled(daemon)
    closure, sizes = daemon.read.closure("s"), count_reads(daemon, monkeypatch)
    read = daemon.read_tick.read
    await asyncio.gather(*(read(closure, [{"user": "a"}], 1) for _ in range(16)))
    assert sizes == [1, 15]
    await asyncio.sleep(0)
    await asyncio.sleep(0)  # the crowd has gone
    sizes.clear()
    await read(closure, [{"user": "a"}], 1)
    assert sizes == [1]


async def test_a_turn_reads_no_more_than_its_rows(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    await filled(daemon)
    closure, sizes = daemon.read.closure("s"), count_reads(daemon, monkeypatch)
    rows = [{"user": "a"}] * 50
    await asyncio.gather(*(daemon.read_tick.read(closure, rows, 50) for _ in range(6)))
    assert sizes == [50, 100, 100, 50]
    assert max(sizes) <= ROWS_MAX == OFF_LOOP_ROWS


async def test_what_one_has_not_seen_yet_holds_up_nobody_else(daemon: Daemon) -> None:
    await filled(daemon)
    closure, read = daemon.read.closure("s"), daemon.read_tick.read
    rows = [{"user": "a"}]
    asked = [read(closure, rows, 1), read(closure, rows, 1), read(closure, rows, 1, 10**9)]
    first, second, third = await asyncio.gather(*asked, return_exceptions=True)
    assert isinstance(first, ReadPart)
    assert isinstance(second, ReadPart)
    assert isinstance(third, MlpdError)
    assert third.code == "sequence_not_reached"
