"""Event ids: the same event counts once, within its retention, however it comes again."""

import asyncio
import random
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from mlpd.core.columns import DType
from mlpd.core.convert import column_of
from mlpd.core.definitions import Aggregate, Entity, FeatureService, Source, WindowView
from mlpd.core.definitions import build_document as document_of
from mlpd.core.document import parse_document
from mlpd.core.errors import DefinitionError
from mlpd.core.specs import SourceSpec
from mlpd.core.time import DAY_US, HOUR_US
from mlpd.daemon.app import Daemon
from mlpd.daemon.fsck import check_stopped
from mlpd.daemon.ingest import Ingested
from mlpd.daemon.read import given_columns
from mlpd.features.event_ids import decode_seen, encode_ids, find_buckets, purge, take_new
from mlpd.features.ingest import ORIGINAL_EVENT_TIME, parse_batch, rows_to_columns
from mlpd.features.tombstones import DELETED
from mlpd.storage.environment import Environment
from mlpd.storage.log import RecordKind, read_records
from mlpd.storage.tables import Table
from mlpd.storage.transactions import WriteTransaction
from mlpd.storage.writer import Writer
from tests.conftest import START_US, ManualClock

user = Entity("user")
schema = {"user": "string", "id": "string", "x": "float64"}
WEEK = Source("clicks", timestamp="at", schema=schema, event_id="id")
DAY = Source("clicks", timestamp="at", schema=schema, event_id="id", event_id_retention="1d")
PLAIN = Source("clicks", timestamp="at", schema=schema)


def definitions(source: Source) -> dict[str, Any]:
    load = WindowView("load", user, source, ["1h"], [Aggregate.count(), Aggregate.sum("x")])
    return document_of([user, source, load, FeatureService("s", [load])])


def spec_of(source: Source) -> SourceSpec:
    return parse_document(definitions(source)).source("clicks")


def row(event_id: str | None, ago_us: int = 0, **values: Any) -> dict[str, Any]:
    return {"at": START_US - ago_us, "user": "a", "id": event_id, "x": 1.0, **values}


async def send(daemon: Daemon, *rows: dict[str, Any], now_us: int = START_US) -> Ingested:
    source = daemon.state.catalog.definitions.source("clicks")
    batch = parse_batch(source, rows_to_columns(source, rows), now_us=now_us)
    return await daemon.ingest.ingest([batch])


def logged(daemon: Daemon) -> list[str]:
    with daemon.environment.snapshot() as snapshot:
        records = [*read_records(snapshot, 1, kinds=frozenset({RecordKind.EVENTS}))]
    return [value for record in records for value in record.columns()["id"].to_list()]


def counted(daemon: Daemon) -> list[Any]:
    closure = daemon.read.closure("s")
    frame = daemon.read.read(closure, given_columns(closure, [{"user": "a"}])).frame
    return [column.to_list()[0] for column in frame.columns.values()]


class TestInTheDaemon:
    async def test_a_second_event_is_left_out_and_counted(self, open_daemon: Any) -> None:
        async with open_daemon(clock=ManualClock()) as daemon:
            await daemon.definitions.apply(definitions(WEEK))
            first = await send(daemon, row("a"), row("b"), row("a", x=7.0))
            assert (first.accepted, first.duplicates, first.sequence) == (2, 1, 3)
            again = await send(daemon, row("b"), row("c"))
            assert (again.accepted, again.duplicates, again.sequence) == (1, 1, 4)
            nothing = await send(daemon, row("b"))
            assert (nothing.accepted, nothing.duplicates, nothing.sequence) == (0, 1, 4)
            assert logged(daemon) == ["a", "b", "c"]
            assert counted(daemon) == [3, 3.0]
            rows = {
                fate: count
                for item in daemon.monitor.metrics.collect()
                if item.descriptor.name == "mlpd_ingest_rows_total"
                for (_, fate), count in item.samples
            }
            assert rows == {"accepted": 3, "rejected": 0, "clamped": 0, "duplicate": 3}

    async def test_ids_are_known_after_a_restart_and_after_compaction(
        self, open_daemon: Any, daemon_directory: Path
    ) -> None:
        clock = ManualClock()
        async with open_daemon(clock=clock) as daemon:
            await daemon.definitions.apply(definitions(WEEK))
            await send(daemon, row("a"), row("b"))
            await daemon.compactor.run()
        async with open_daemon(clock=clock) as daemon:
            done = await send(daemon, row("a"), row("c"))
            assert (done.accepted, done.duplicates) == (1, 1)
            assert counted(daemon) == [3, 3.0]
        report = await asyncio.to_thread(check_stopped, daemon_directory, clock, deep=True)
        assert report["problems"] == []
        assert report["checked"]["tables"]["event_ids"] == 4  # three and the bucket
        assert report["checked"]["replay"]["equal_bytes"] == 1

    async def test_concurrent_requests_store_an_event_once(self, open_daemon: Any) -> None:
        async with open_daemon(clock=ManualClock()) as daemon:
            await daemon.definitions.apply(definitions(WEEK))
            sent = [send(daemon, *(row(f"id {n}") for n in range(i, i + 10))) for i in range(30)]
            done = await asyncio.gather(*sent)
            assert daemon.writer.stats.groups < len(done)
            assert sum(answer.accepted for answer in done) == 39
            assert sum(answer.duplicates for answer in done) == 300 - 39
            assert sorted(logged(daemon)) == sorted(f"id {n}" for n in range(39))
            assert counted(daemon) == [39, 39.0]

    async def test_an_operation_that_fails_beside_it_forgets_no_id(self, open_daemon: Any) -> None:
        def fail(_: WriteTransaction) -> None:
            raise ZeroDivisionError

        async with open_daemon(clock=ManualClock()) as daemon:
            await daemon.definitions.apply(definitions(WEEK))
            done, failed, again = await asyncio.gather(
                send(daemon, row("a")),
                daemon.writer.write(fail),
                send(daemon, row("a")),
                return_exceptions=True,
            )
            assert isinstance(failed, ZeroDivisionError)
            assert isinstance(done, Ingested)
            assert isinstance(again, Ingested)
            assert done.accepted + again.accepted == done.duplicates + again.duplicates == 1
            assert logged(daemon) == ["a"]

    async def test_rows_without_an_id_are_refused_one_by_one(self, open_daemon: Any) -> None:
        async with open_daemon(clock=ManualClock()) as daemon:
            await daemon.definitions.apply(definitions(WEEK))
            done = await send(daemon, row("a"), row(None), row(""), row("b"))
            assert (done.accepted, done.duplicates) == (2, 0)
            refused = [(r["index"], r["code"]) for r in done.rejected]
            assert refused == [(1, "missing_event_id"), (2, "missing_event_id")]

    async def test_ids_go_when_their_retention_ends_or_their_declaration(
        self, open_daemon: Any
    ) -> None:
        clock = ManualClock()
        async with open_daemon(clock=clock) as daemon:
            await daemon.definitions.apply(definitions(DAY))
            await send(daemon, *(row(f"old {n}") for n in range(5_000)))
            clock.now_us += DAY_US
            await send(daemon, row("new"))
            await daemon.retention.run()
            assert daemon.retention.removed["event_ids"] == 0  # the bucket is half a day wide
            clock.now_us += DAY_US // 2 + HOUR_US
            await daemon.retention.run()
            assert daemon.retention.removed["event_ids"] == 5_000
            assert (await send(daemon, row("new"))).duplicates == 1
            await daemon.definitions.apply(definitions(PLAIN))
            await daemon.retention.run()
            with daemon.environment.snapshot() as snapshot:
                assert snapshot.count(Table.EVENT_IDS) == 0
            assert (await send(daemon, row("new"))).accepted == 1

    async def test_what_stays_of_a_batch_keeps_its_marks_and_clamps(self, open_daemon: Any) -> None:
        async with open_daemon(clock=ManualClock()) as daemon:
            await daemon.definitions.apply(definitions(WEEK))
            ahead = {"at": START_US + 1000, "known_at": START_US}
            late = {"known_at": START_US}
            await send(daemon, row("a", **late))
            rows = [row("a", **late), row("b", **ahead), row("c", **late, **{DELETED: True})]
            done = await send(daemon, *rows)
            assert (done.accepted, done.duplicates, done.clamped) == (2, 1, 1)
            done = await send(daemon, row("b", **ahead), row("d", **late))
            assert (done.accepted, done.duplicates, done.clamped) == (1, 1, 0)
            with daemon.environment.snapshot() as snapshot:
                found = [r.columns() for r in read_records(snapshot, 3)]
            assert found[0][DELETED].to_list() == [False, True]
            assert found[0][ORIGINAL_EVENT_TIME].to_list() == [START_US + 1000, START_US]


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def writer(tmp_path: Path, clock: ManualClock) -> Iterator[Writer]:
    with Environment.open(tmp_path / "lmdb", clock=clock) as environment:
        writer = Writer(environment)
        yield writer
        writer.close()


def take(writer: Writer, source: SourceSpec, ids: list[str]) -> tuple[list[int], int]:
    """Return which of the ids are new, by their places, and when they arrived."""
    columns = {"id": column_of(DType.STRING, ids)}
    new, known_us = writer.write_blocking(
        lambda txn: (take_new(txn, source, columns), int(txn.known_us))
    )
    return ([*range(len(ids))] if new is None else new.tolist()), known_us


class TestTheTable:
    @pytest.mark.parametrize("retentions_us", [[HOUR_US], [DAY_US], [3 * DAY_US, DAY_US, 1]])
    def test_it_agrees_with_a_dict(
        self, writer: Writer, clock: ManualClock, retentions_us: list[int]
    ) -> None:
        """Random ids, jumps of the clock, retentions that become shorter, removals in between."""
        chance = random.Random(5)
        first_us: dict[str, int] = {}
        duplicates = 0
        for retention_us in retentions_us:
            source = SourceSpec("clicks", "at", {"id": DType.STRING}, None, "id", retention_us)
            for _ in range(150):
                clock.now_us += chance.choice([0, 1, HOUR_US, 5 * HOUR_US, 13 * HOUR_US])
                if chance.random() < 0.3:
                    purge_some = partial(purge, sources=[source], rows_max=7)
                    assert writer.write_blocking(purge_some) <= 7
                ids = [f"{chance.randrange(60)}" for _ in range(chance.randrange(1, 6))]
                got, now_us = take(writer, source, ids)
                wanted = []
                for place, value in enumerate(ids):
                    if value not in first_us or now_us - first_us[value] > retention_us:
                        wanted.append(place)
                        first_us[value] = now_us
                assert got == wanted
                duplicates += len(ids) - len(got)
        assert duplicates

    def test_few_buckets_are_looked_at(self, writer: Writer, clock: ManualClock) -> None:
        source = spec_of(DAY)
        for number in range(200):
            clock.now_us += HOUR_US
            assert take(writer, source, [f"{number}", f"{number - 20}"])[0] == (
                [0, 1] if number < 20 else [0]
            )
            writer.write_blocking(lambda txn: purge(txn, [source], rows_max=100))
        assert writer.write_blocking(lambda txn: len(find_buckets(txn))) <= 4
        assert writer.write_blocking(lambda txn: txn.count(Table.EVENT_IDS)) <= 2 * 24 + 4

    def test_sources_know_their_own_ids_alone(self, writer: Writer) -> None:
        one, other = spec_of(WEEK), SourceSpec("other", "at", {}, None, "id")
        assert take(writer, one, ["a"])[0] == [0]
        assert take(writer, other, ["a", "b"])[0] == [0, 1]
        assert take(writer, one, ["b", "a"])[0] == [0]


@pytest.mark.parametrize(
    ("dtype", "values"),
    [
        (DType.STRING, ["a", "a\x00", "ü" * 31, "ü" * 32, "ü" * 33, "x" * 600]),
        (DType.BYTES, [b"\x00", b"\xff" * 63, b"\xff" * 64, b"\xff" * 65]),
        (DType.INT64, [-(2**63), -1, 0, 1, 2**63 - 1]),
    ],
)
def test_different_ids_have_different_keys_that_fit(dtype: DType, values: list[Any]) -> None:
    ids = encode_ids(column_of(dtype, values))
    assert len(set(ids)) == len(values)
    assert all(1 <= len(value) <= 64 for value in ids)
    assert dtype is not DType.INT64 or ids == sorted(ids)
    assert [decode_seen(bytes(16) + value, bytes(8)) for value in ids] == [(v, 0) for v in ids]


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"event_id": "nothing"}, "'nothing' is none"),
        ({"event_id": "x"}, "'x' is none"),
        ({"event_id": "id", "event_id_retention": "0s"}, "not a positive duration"),
        ({"event_id_retention": "1d"}, "says nothing without"),
    ],
)
def test_wrong_declarations_are_refused(fields: dict[str, str], problem: str) -> None:
    document = definitions(PLAIN)
    document["sources"]["clicks"] |= fields
    with pytest.raises(DefinitionError, match=problem):
        parse_document(document)
