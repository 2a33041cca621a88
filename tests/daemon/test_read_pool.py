"""Reads of many rows happen beside the loop, by the same rules as those of few."""

import asyncio
import threading

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
from mlpd.core.errors import OverloadedError, UnavailableError
from mlpd.daemon.app import Daemon
from mlpd.daemon.read import ReadResult, given_columns
from mlpd.daemon.read_pool import OFF_LOOP_ROWS, ReadPool, rows_worth
from mlpd.features.ingest import parse_batch

MANY = OFF_LOOP_ROWS + 1
user = Entity("user")
clicks = Source("clicks", timestamp="at", schema={"user": "string"})
load = WindowView("load", user, clicks, ["1h"], [Aggregate.count()])
DOCUMENT = build_document([user, clicks, load, FeatureService("s", [load])])


async def test_few_rows_stay_on_the_loop_and_many_leave_it() -> None:
    pool = ReadPool(threads=1)
    try:
        here = threading.current_thread().name
        assert await pool.call(OFF_LOOP_ROWS, lambda: threading.current_thread().name) == here
        assert await pool.call(MANY, lambda: threading.current_thread().name) == "mlpd-read_0"
    finally:
        pool.close()
    pool.close()
    with pytest.raises(UnavailableError) as refused:
        await pool.call(MANY, int)
    assert refused.value.code == "shutting_down"


async def test_what_waits_is_bounded_and_what_fails_makes_room() -> None:
    pool = ReadPool(threads=1, waiting_max=2)
    go = threading.Event()
    try:
        waiting = [asyncio.ensure_future(pool.call(MANY, go.wait, 30)) for _ in range(2)]
        await asyncio.sleep(0)
        with pytest.raises(OverloadedError) as refused:
            await pool.call(MANY, int)
        assert refused.value.code == "read_queue_full"
        assert refused.value.details["retry_after_s"] > 0
        assert await pool.call(1, int) == 0
        go.set()
        assert await asyncio.gather(*waiting) == [True, True]
        with pytest.raises(ZeroDivisionError):
            await pool.call(MANY, lambda: 1 // 0)
        assert await asyncio.gather(*(pool.call(MANY, int) for _ in range(2))) == [0, 0]
    finally:
        go.set()
        pool.close()


async def test_a_read_in_a_thread_sees_exactly_what_was_known_at_its_moment(
    daemon: Daemon,
) -> None:
    await daemon.definitions.apply(DOCUMENT)
    source = daemon.state.catalog.definitions.source("clicks")
    closure = daemon.read.closure("s")
    given = given_columns(closure, [{"user": "a"}] * MANY)
    known: list[int] = []
    done = False

    async def send() -> None:
        for _ in range(150):
            now = daemon.clock()
            batch = parse_batch(source, {"at": [now - 1], "user": ["a"]}, now_us=now)
            known.append((await daemon.ingest.ingest([batch])).known_us)

    async def read() -> list[ReadResult]:
        found = []
        while not done:
            found.append(await daemon.read_pool.call(MANY, daemon.read.read, closure, given))
        return found

    readers = [asyncio.ensure_future(read()) for _ in range(3)]
    await asyncio.gather(send(), send())
    done = True
    after = await daemon.read_pool.call(MANY, daemon.read.read, closure, given)
    assert after.frame.columns["load.count_1h"].to_list() == [300] * MANY
    reads = [result for results in await asyncio.gather(*readers) for result in results]
    counts = [result.frame.columns["load.count_1h"].to_list() for result in reads]
    assert reads
    for result, values in zip(reads, counts, strict=True):
        # The first sequence is that of the definitions.
        assert values == [result.sequence - 1] * MANY
        assert sum(k <= result.t_us for k in known) == values[0]


async def test_rows_of_lists_and_long_vectors_count_for_more(daemon: Daemon) -> None:
    types = {"x": "float64", "near": "vector[float32, 128]", "tags": "list[string]"}
    source = Source("s", timestamp="at", schema={"user": "string", **types})
    latest = FeatureView("latest", user, source, list(types))
    services = [FeatureService(f"with_{name}", [latest[name]]) for name in types]
    await daemon.definitions.apply(build_document([user, source, latest, *services]))
    plain, vector, lists = (daemon.read.closure(f"with_{name}") for name in types)
    assert [rows_worth(plain, n) for n in (0, 1, 10_000)] == [0, 1, 10_000]
    assert rows_worth(vector, 1) == 33
    assert rows_worth(vector, 4) > OFF_LOOP_ROWS > rows_worth(vector, 3)
    assert rows_worth(lists, 0) == 0
    assert rows_worth(lists, 1) > OFF_LOOP_ROWS
