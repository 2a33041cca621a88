"""Pages of events: every stored row once, in the order of the log, wherever it lies."""

import asyncio
import random
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Any

import polars as pl
import pytest

from mlpd.core.definitions import Entity, Source, build_document
from mlpd.core.errors import MlpdError
from mlpd.core.time import DAY_US
from mlpd.daemon import pages
from mlpd.daemon.app import Daemon
from mlpd.daemon.pages import MAX_SEQUENCE, Selection
from mlpd.features.ingest import parse_batch, rows_to_columns
from mlpd.features.tombstones import DELETED
from tests.conftest import START_US, ManualClock

OpenDaemon = Callable[..., AbstractAsyncContextManager[Daemon]]
schema = {"user": "string", "x": "float64", "raw": "bytes"}
DOCUMENT = build_document(
    [
        Entity("user"),
        Source("clicks", timestamp="at", schema=schema),
        Source("other", timestamp="at", schema={"user": "string"}),
    ]
)


async def send(daemon: Daemon, source: str, rows: list[dict[str, Any]]) -> int:
    spec = daemon.state.catalog.definitions.source(source)
    batch = parse_batch(spec, rows_to_columns(spec, rows), now_us=START_US)
    assert not batch.rejected
    return (await daemon.ingest.ingest([batch])).sequence


async def fill(daemon: Daemon, chance: random.Random, batches: int) -> list[dict[str, Any]]:
    """Send batches of two sources and return the rows of the first as a page has them."""
    told: list[dict[str, Any]] = []
    for _ in range(batches):
        rows = [
            {
                "at": START_US - chance.randrange(3 * DAY_US),
                "known_at": START_US,
                "user": chance.choice(["a", "b", None]),
                "x": chance.choice([None, 0.5, 1.0]),
                "raw": chance.choice([None, b"\xff\x00"]),
            }
            for _ in range(chance.randrange(1, 9))
        ]
        if chance.random() < 0.3:
            rows[0][DELETED] = True
        last = await send(daemon, "clicks", rows)
        for sequence, row in enumerate(rows, last - len(rows) + 1):
            told.append({**row, "__sequence": sequence, DELETED: bool(row.get(DELETED))})
        if chance.random() < 0.5:
            await send(daemon, "other", [{"at": START_US, "user": "c"}] * 3)
    return told


async def read_all(daemon: Daemon, source: str = "clicks", **options: Any) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    after, through = options.pop("after", 0), options.pop("through", MAX_SEQUENCE)
    while True:
        selection = Selection(after=after, through=through, **options)
        page = await daemon.pages.read(source, selection)
        lists = {name: column.to_list() for name, column in page.columns.items()}
        found = [dict(zip(lists, row, strict=True)) for row in zip(*lists.values(), strict=True)]
        assert len(found) <= options.get("limit", pages.ROWS_MAX)
        assert page.sequence > after or page.sequence == page.through
        rows += found
        after, through = page.sequence, page.through
        if after == through:
            return rows


async def test_every_row_is_in_one_page_from_segments_and_tail(open_daemon: OpenDaemon) -> None:
    chance = random.Random(4)
    async with open_daemon(clock=ManualClock()) as daemon:
        await daemon.definitions.apply(DOCUMENT)
        told = await fill(daemon, chance, 20)
        assert await read_all(daemon, limit=7) == told
        await daemon.compactor.run()
        told += await fill(daemon, chance, 10)
        assert await read_all(daemon) == told
        found = await read_all(daemon, limit=60)
        assert found == told
        assert list(found[0]) == ["at", "known_at", "__sequence", *schema, DELETED]


async def test_sequences_and_times_bound_it(open_daemon: OpenDaemon) -> None:
    chance = random.Random(5)
    async with open_daemon(clock=ManualClock()) as daemon:
        await daemon.definitions.apply(DOCUMENT)
        told = await fill(daemon, chance, 12)
        await daemon.compactor.run()
        told += await fill(daemon, chance, 12)
        start_us, end_us = START_US - 2 * DAY_US, START_US - DAY_US
        first, last = told[9]["__sequence"], told[-9]["__sequence"]
        wanted = [
            row
            for row in told
            if first < row["__sequence"] <= last and start_us <= row["at"] < end_us
        ]
        assert 0 < len(wanted) < len(told) / 2
        found = await read_all(daemon, after=first, through=last, start_us=start_us, end_us=end_us)
        assert found == wanted


async def test_arrow_pages_are_full_but_for_the_last(open_daemon: OpenDaemon) -> None:
    chance = random.Random(7)
    async with open_daemon(clock=ManualClock()) as daemon:
        await daemon.definitions.apply(DOCUMENT)
        told = await fill(daemon, chance, 20)
        await daemon.compactor.run()
        told += await fill(daemon, chance, 10)
        size = len(told) // 2 + 1
        starts = (0, told[size - 1]["__sequence"])
        parts = [Selection(after, limit=size) for after in starts]
        streams = [await daemon.pages.read_arrow("clicks", part) for part in parts]
        first, last = map(pl.read_ipc_stream, streams)
        assert (len(first), len(last)) == (size, len(told) - size)
        frame = pl.concat([first, last])
        assert frame["__sequence"].to_list() == [row["__sequence"] for row in told]
        assert frame["raw"].to_list() == [row["raw"] for row in told]
        assert frame["at"].to_physical().to_list() == [row["at"] for row in told]
        assert frame.schema["at"] == pl.Datetime("us", "UTC")
        nothing = await daemon.pages.read_arrow("clicks", Selection(after=10**9))
        assert pl.read_ipc_stream(nothing).schema == frame.schema


async def test_a_page_looks_at_few_records_and_says_how_far_it_came(
    open_daemon: OpenDaemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pages, "RECORDS_MAX", 5)
    async with open_daemon(clock=ManualClock()) as daemon:
        await daemon.definitions.apply(DOCUMENT)
        for _ in range(12):
            await send(daemon, "other", [{"at": START_US, "user": "c"}])
        await send(daemon, "clicks", [{"at": START_US, "user": "a"}])
        page = await daemon.pages.read("clicks", Selection(after=1))
        assert (len(page.columns["at"]), page.sequence, page.through) == (0, 6, 14)
        assert len(await read_all(daemon)) == 1


async def test_rows_that_are_compacted_while_a_page_is_read_are_in_it(
    open_daemon: OpenDaemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_daemon(clock=ManualClock()) as daemon:
        await daemon.definitions.apply(DOCUMENT)
        told = await fill(daemon, random.Random(6), 5)
        read = pages.read_tail
        loop = asyncio.get_running_loop()

        def late(*arguments: Any) -> Any:
            compacted = asyncio.run_coroutine_threadsafe(daemon.compactor.run(), loop)
            compacted.result(40)
            return read(*arguments)

        monkeypatch.setattr(pages, "read_tail", late)
        assert await read_all(daemon) == told


@pytest.mark.parametrize(
    ("source", "options", "code"),
    [
        ("nothing", {}, "unknown_source"),
        ("clicks", {"limit": 0}, "invalid_page"),
        ("clicks", {"limit": 10_001}, "invalid_page"),
        ("clicks", {"after": -1}, "invalid_page"),
        ("clicks", {"after": 2**63}, "invalid_page"),
    ],
)
async def test_wrong_pages_are_refused(
    open_daemon: OpenDaemon, source: str, options: dict[str, int], code: str
) -> None:
    async with open_daemon(clock=ManualClock()) as daemon:
        await daemon.definitions.apply(DOCUMENT)
        with pytest.raises(MlpdError) as caught:
            await daemon.pages.read(source, Selection(**options))
        assert caught.value.code == code
        page = await daemon.pages.read("clicks", Selection(after=10**9))
        assert len(page.columns["at"]) == 0
