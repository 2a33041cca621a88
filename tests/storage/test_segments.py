"""Compaction and offline reads: every acknowledged row exactly once, whatever crashes when."""

import asyncio
import errno
import os
import random
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from mlpd.core.columns import Column, Columns, DType
from mlpd.core.convert import column_of
from mlpd.core.errors import (
    ConflictError,
    InternalError,
    NotFoundError,
    StorageFullError,
    ValidationError,
)
from mlpd.core.time import DAY_US
from mlpd.daemon.offline import from_series
from mlpd.storage import compact as compact_module
from mlpd.storage import segment_files
from mlpd.storage.check import check, check_pages
from mlpd.storage.compact import compact
from mlpd.storage.compactor import REPLACED_S, CompactionPolicy, Compactor
from mlpd.storage.environment import Environment
from mlpd.storage.files import DataDirectory
from mlpd.storage.log import RecordKind, append, compacted_through, read_records
from mlpd.storage.merge import MANIFESTS_MIN, find_mergeable, merge
from mlpd.storage.offline import collect_events, scan_events
from mlpd.storage.segments import (
    Manifest,
    Segment,
    decode_manifest,
    load_manifests,
    purge_log,
    remove_files,
    replace_manifests,
    sizes_by_source,
    store_manifest,
)
from mlpd.storage.tables import Table, u64be
from mlpd.storage.unnamed import remove_orphans
from mlpd.storage.writer import Writer

START_US = 1_700_000_000_000_000


class Store:
    """A data directory with its environment and writer, and the rows that went in."""

    def __init__(self, root: Path, clock: Any) -> None:
        self.data = DataDirectory(root)
        self.clock = clock
        self.rows: dict[int, tuple[str, int, int | None]] = {}
        self.open()

    def open(self) -> None:
        self.environment = Environment.open(self.data.lmdb, clock=self.clock)
        self.writer = Writer(self.environment)

    def close(self) -> None:
        self.writer.close()
        self.environment.close()

    def reopen(self) -> None:
        self.close()
        self.open()

    def append(
        self,
        source: str,
        columns: Columns,
        event_us: list[int],
        kind: RecordKind = RecordKind.EVENTS,
    ) -> tuple[int, int]:
        return self.writer.write_blocking(
            lambda txn: append(
                txn, kind=kind, source=source, columns=columns, event_us=np.array(event_us)
            )
        )

    def fill(self, batches: int, seed: int = 0) -> None:
        """Batches of two sources over many days, a definition now and then, some nulls."""
        rng = random.Random(seed)
        for number in range(batches):
            source = rng.choice(("departures", "weather"))
            values = [rng.choice((None, rng.randrange(100))) for _ in range(rng.randrange(1, 9))]
            times = [START_US + rng.randrange(-3 * DAY_US, 3 * DAY_US) for _ in values]
            first, _ = self.append(source, {"n": column_of(DType.INT64, values)}, times)
            for offset, row in enumerate(zip(times, values, strict=True)):
                self.rows[first + offset] = (source, *row)
            if number % 5 == 0:
                document = {"document": column_of(DType.BYTES, [b"{}"])}
                self.append("mlpd.definitions", document, [START_US], RecordKind.DEFINITIONS)

    def compact(self, rows_max: int = 500_000) -> Manifest:
        """What the Compactor does, in this process."""
        with self.environment.snapshot() as snapshot:
            through = snapshot.sequence
        manifest = compact(self.environment, self.data.segments, through=through, rows_max=rows_max)
        self.writer.write_blocking(lambda txn: store_manifest(txn, manifest))
        return manifest

    def merge(self) -> Manifest | None:
        """What the Compactor does, in this process."""
        with self.environment.snapshot() as snapshot:
            found = find_mergeable(load_manifests(snapshot))
        if not found:
            return None
        first, last = found[0].first_sequence, found[-1].last_sequence
        merged = merge(self.environment, self.data.segments, first, last)
        stale = self.writer.write_blocking(partial(replace_manifests, manifests=[merged]))
        remove_files(self.data.segments, stale)
        return merged

    def purge(self) -> None:
        start: int | None = 0
        while start is not None:
            start = self.writer.write_blocking(partial(purge_log, start=start))

    def scan(self, source: str, **options: Any) -> pl.DataFrame:
        frame = scan_events(self.environment, self.data.segments, source, **options)
        return frame.sort("__sequence").collect()

    def check_rows(self) -> None:
        """Every row is there exactly once, as it went in, and fsck finds nothing."""
        assert check(self.environment, self.data) == []
        for source in ("departures", "weather"):
            frame = self.scan(source, columns={"n": DType.INT64})
            found = frame.select("__sequence", "__event_time", "n").rows()
            wanted = [(s, t, n) for s, (name, t, n) in self.rows.items() if name == source]
            assert found == wanted


@pytest.fixture
def store(tmp_path: Path, clock: Any) -> Iterator[Store]:
    opened = Store(tmp_path / "data", clock)
    yield opened
    opened.close()


@pytest.fixture(autouse=True)
def small_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compact_module, "SEGMENT_ROWS_MIN", 10)


def files(store: Store) -> set[str]:
    return {str(p.relative_to(store.data.segments)) for p in store.data.segments.rglob("*.parquet")}


def test_rows_are_the_same_before_during_and_after_compaction(store: Store) -> None:
    store.fill(40)
    store.check_rows()
    store.compact(rows_max=60)
    store.check_rows()
    store.purge()
    store.check_rows()
    store.fill(10, seed=1)
    store.compact()
    store.purge()
    store.check_rows()
    assert check_pages(store.data) == []


def test_compaction_takes_whole_records_up_to_its_bound(store: Store) -> None:
    store.fill(40)
    manifest = store.compact(rows_max=60)
    assert 50 < manifest.last_sequence <= 60
    second = store.compact(rows_max=60)
    assert second.first_sequence == manifest.last_sequence + 1


def test_segments_hold_whole_days_sorted_by_time(store: Store) -> None:
    store.fill(60)
    for segment in store.compact().segments:
        frame = pl.read_parquet(store.data.segments / segment.path)
        times = frame["__event_time"].to_list()
        assert times == sorted(times)
        assert (min(times), max(times)) == (segment.min_event_us, segment.max_event_us)
        assert segment.path.startswith(f"{segment.source}/2023-11-")
    with store.environment.snapshot() as snapshot:
        segments = [s for m in load_manifests(snapshot) for s in m.segments]
    for source in ("departures", "weather"):
        days = [
            set(range(s.min_event_us // DAY_US, s.max_event_us // DAY_US + 1))
            for s in segments
            if s.source == source
        ]
        assert len(days) > 2
        assert sum(map(len, days)) == len(set().union(*days))


def test_every_type_survives_with_nulls_and_nan(store: Store) -> None:
    values: dict[DType, list[Any]] = {
        DType.BOOL: [True, None, False],
        DType.INT64: [2**53 + 1, None, -(2**63)],
        DType.FLOAT32: [1.5, None, float("nan")],
        DType.FLOAT64: [0.1, None, float("nan")],
        DType.STRING: ["é", None, ""],
        DType.BYTES: [b"\xff", None, b""],
        DType.TIMESTAMP: [START_US, None, -1],
        DType("list[int64]"): [[2**53 + 1, -(2**63)], None, []],
        DType("list[string]"): [[], None, ["a\x00", ""]],
        DType("list[bytes]"): [[b"\x00"], None, [b"", b"a"]],
        DType("list[bool]"): [[True, False], None, []],
        DType("list[timestamp]"): [[START_US, -1], None, []],
        DType("vector[float32, 2]"): [[1.5, float("nan")], None, [-0.0, 0.5]],
        DType("vector[float64, 1]"): [[0.1], None, [5e-324]],
    }
    columns = {str(dtype): column_of(dtype, column) for dtype, column in values.items()}
    store.append("s", columns, [3, 2, 1])
    before = store.scan("s")
    store.compact()
    store.purge()
    after = store.scan("s")
    assert before.equals(after)
    for dtype, column in values.items():
        series = after[str(dtype)]
        if DType.TIMESTAMP in (dtype, dtype.element):
            series = series.to_physical()
        assert [repr(v) for v in series.to_list()] == [repr(v) for v in column]


def test_column_added_later_is_null_in_older_rows(store: Store) -> None:
    store.append("s", {"a": column_of(DType.INT64, [1])}, [1])
    store.compact()
    both = {"a": column_of(DType.INT64, [2]), "b": column_of(DType.FLOAT64, [0.5])}
    store.append("s", both, [2])
    assert store.scan("s").select("a", "b").rows() == [(1, None), (2, 0.5)]
    assert store.scan("s", columns={"b": DType.FLOAT64}).columns[3:] == ["b"]
    assert store.scan("s", columns={"c": DType.STRING})["c"].to_list() == [None, None]


def test_column_of_another_type_is_refused(store: Store) -> None:
    store.append("s", {"a": column_of(DType.INT64, [1])}, [1])
    with pytest.raises(ValidationError) as caught:
        store.scan("s", columns={"a": DType.FLOAT64})
    assert caught.value.code == "column_type"
    store.compact()
    store.append("s", {"a": column_of(DType.STRING, ["x"])}, [1])
    with pytest.raises(ValidationError):
        store.scan("s")


def test_source_without_rows_has_the_wanted_columns(store: Store) -> None:
    frame = store.scan("nothing", columns={"x": DType.FLOAT32})
    assert frame.schema == {
        "__event_time": pl.Int64,
        "__known_time": pl.Int64,
        "__sequence": pl.Int64,
        "x": pl.Float32,
    }
    assert frame.height == 0


def test_through_sequence_cuts_segments_and_tail(store: Store) -> None:
    store.fill(30)
    store.compact(rows_max=40)
    for last in (1, 20, 45, 70):
        found = store.scan("departures", through_sequence=last)["__sequence"].to_list()
        wanted = [s for s, (name, *_) in store.rows.items() if name == "departures" and s <= last]
        assert found == wanted


def test_feedback_has_segments_of_its_own_and_definitions_stay(store: Store) -> None:
    labels = {"label": column_of(DType.FLOAT64, [1.0])}
    store.append("departures", labels, [START_US], RecordKind.FEEDBACK)
    store.append("departures", {"n": column_of(DType.INT64, [5])}, [START_US])
    store.append("defs", {"d": column_of(DType.BYTES, [b"x"])}, [START_US], RecordKind.DEFINITIONS)
    manifest = store.compact()
    store.purge()
    assert manifest.kept == ((3, 3),)
    assert files(store) == {
        "_feedback/departures/2023-11-14/1-1.parquet",
        "departures/2023-11-14/2-2.parquet",
    }
    assert store.scan("departures")["n"].to_list() == [5]
    feedback = store.scan("departures", kind=RecordKind.FEEDBACK)
    assert feedback["label"].to_list() == [1.0]
    with store.environment.snapshot() as snapshot:
        kinds = frozenset((RecordKind.DEFINITIONS,))
        assert [r.first for r in read_records(snapshot, 1, kinds=kinds)] == [3]
        with pytest.raises(NotFoundError) as caught:
            list(read_records(snapshot, 1))
        assert caught.value.code == "log_compacted"
    assert check(store.environment, store.data) == []


def test_sizes_are_told_by_source(store: Store) -> None:
    store.fill(20)
    store.append("clf", {"label": column_of(DType.FLOAT64, [1.0])}, [1], RecordKind.FEEDBACK)
    store.compact()
    with store.environment.snapshot() as snapshot:
        found = sizes_by_source(load_manifests(snapshot))
    assert [*found] == ["_feedback/clf", "departures", "weather"]
    for name, sizes in found.items():
        paths = [*(store.data.segments / name).rglob("*.parquet")]
        assert sizes["files"] == len(paths)
        assert sizes["size_bytes"] == sum(path.stat().st_size for path in paths)
        assert sizes["rows"] == sum(len(pl.read_parquet(path)) for path in paths)


def test_overtaken_compaction_is_refused(store: Store) -> None:
    store.fill(5)
    manifest = store.compact()
    with pytest.raises(ConflictError):
        store.writer.write_blocking(lambda txn: store_manifest(txn, manifest))
    ahead = replace(
        manifest,
        first_sequence=manifest.last_sequence + 1,
        last_sequence=manifest.last_sequence + 9,
    )
    with pytest.raises(ConflictError):
        store.writer.write_blocking(lambda txn: store_manifest(txn, ahead))


def test_manifest_and_its_copy_are_equal_and_damage_is_noticed(store: Store) -> None:
    store.fill(5)
    manifest = store.compact()
    copy = store.data.segments / "_manifests" / manifest.name
    assert decode_manifest(copy.read_bytes()) == manifest
    with pytest.raises(InternalError):
        decode_manifest(copy.read_bytes()[:-20])
    with pytest.raises(InternalError):
        decode_manifest(b'{"format": 99}')


class CrashError(Exception):
    """Stands for the end of the process."""


def crash_at(monkeypatch: pytest.MonkeyPatch, step: int) -> Callable[[], int]:
    """Let the `step`-th file operation of a compaction crash; return a counter of operations."""
    count = 0

    def wrap(target: Any, name: str) -> None:
        real = getattr(target, name)

        def operation(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            if count == step:
                raise CrashError
            return real(*args, **kwargs)

        monkeypatch.setattr(target, name, operation)

    wrap(pl.DataFrame, "write_parquet")
    wrap(segment_files, "fsync_file")
    wrap(segment_files, "fsync_dir")
    wrap(segment_files, "make_dirs")
    wrap(segment_files, "atomic_write")
    wrap(segment_files.SegmentFiles, "_publish")
    return lambda: count


def test_crash_at_every_file_operation_loses_and_doubles_nothing(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.fill(12)
    step, crashes = 0, 0
    while True:
        step += 1
        with monkeypatch.context() as patch:
            count = crash_at(patch, step)
            try:
                store.compact()
            except CrashError:
                crashes += 1
            else:
                assert count() < step
                break
        store.check_rows()
        with store.environment.snapshot() as snapshot:
            remove_orphans(snapshot, store.data.segments)
        assert files(store) == set()
    assert crashes > 20
    store.check_rows()


def test_crash_between_manifest_and_purge_is_finished_at_start(store: Store) -> None:
    store.fill(20)
    store.compact()
    store.reopen()
    store.check_rows()

    async def start() -> None:
        await Compactor(store.environment, store.writer, store.data).start()

    asyncio.run(start())
    store.check_rows()
    with store.environment.snapshot() as snapshot:
        kinds = frozenset((RecordKind.DEFINITIONS,))
        assert len(list(read_records(snapshot, 1, kinds=kinds))) == 4
        assert snapshot.count(Table.LOG) == 4
    assert len(files(store)) > 0


def test_purging_goes_in_small_steps(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlpd.storage.segments.PURGE_RECORDS", 3)
    store.fill(20)
    store.compact()
    steps = 0
    start: int | None = 0
    while start is not None:
        start = store.writer.write_blocking(partial(purge_log, start=start))
        store.check_rows()
        steps += 1
    assert steps == 7
    with store.environment.snapshot() as snapshot:
        assert snapshot.count(Table.LOG) == 4


async def test_compactor_runs_the_child_when_it_is_due(store: Store) -> None:
    now_s = 0.0
    policy = CompactionPolicy(tail_rows=50, interval_s=60, rows_max=100)
    compactor = Compactor(
        store.environment, store.writer, store.data, policy=policy, monotonic=lambda: now_s
    )
    await compactor.start()
    assert not compactor.is_due()
    assert await compactor.run() is None
    await asyncio.to_thread(store.fill, 3)
    assert await compactor.run_if_due() is None
    now_s = 61
    assert compactor.is_due()
    await asyncio.to_thread(store.fill, 40, 1)
    manifest = await compactor.run_if_due()
    assert manifest is not None
    assert compactor.get_tail().rows > 0
    with store.environment.snapshot() as snapshot:
        assert compacted_through(snapshot) == manifest.last_sequence
    store.check_rows()


async def test_failing_child_leaves_the_log_alone(store: Store) -> None:
    await asyncio.to_thread(store.fill, 3)
    store.data.segments.write_bytes(b"in the way")
    compactor = Compactor(store.environment, store.writer, store.data)
    with pytest.raises(StorageFullError):
        await compactor.run()
    store.data.segments.unlink()
    store.check_rows()
    assert await compactor.run() is not None
    store.check_rows()


def test_full_disk_is_told_and_nothing_is_left_of_the_attempt(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.fill(12)
    whole, count = pl.DataFrame.write_parquet, 0

    def full(frame: pl.DataFrame, path: Path, **options: Any) -> None:
        nonlocal count
        count += 1
        if count == 3:
            path.write_bytes(b"half")
            raise pl.exceptions.ComputeError("No space left on device (os error 28)")
        whole(frame, path, **options)

    monkeypatch.setattr(pl.DataFrame, "write_parquet", full)
    with pytest.raises(OSError, match="No space left") as caught:
        store.compact()
    assert caught.value.errno == errno.ENOSPC
    assert [p for p in store.data.segments.rglob("*") if p.is_file()] == []
    store.check_rows()
    store.compact()
    store.check_rows()


def compaction_children(store: Store) -> list[str]:
    """Children of this process that compact `store`; other tests' children are none of ours."""
    found = []
    for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split():
        with suppress(FileNotFoundError, ProcessLookupError):
            command = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            if str(store.data.root).encode() in command:
                found.append(pid)
    return found


async def test_cancelled_compaction_ends_its_child(store: Store) -> None:
    await asyncio.to_thread(store.fill, 3)
    compactor = Compactor(store.environment, store.writer, store.data)
    task = asyncio.create_task(compactor.run())
    while not compaction_children(store):
        assert not task.done()
        await asyncio.sleep(0.001)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert compaction_children(store) == []
    store.check_rows()


def damage_segment(store: Store, manifest: Manifest) -> None:
    path = store.data.segments / manifest.segments[0].path
    path.write_bytes(path.read_bytes()[:-1] + b"x")


def remove_segment(store: Store, manifest: Manifest) -> None:
    (store.data.segments / manifest.segments[0].path).unlink()


def damage_record(store: Store, _manifest: Manifest) -> None:
    def op(txn: Any) -> None:
        key, value = next(iter(txn.scan(Table.LOG, reverse=True)))
        txn.put(Table.LOG, key, value[:-1] + bytes([value[-1] ^ 1]))

    store.writer.write_blocking(op)


def remove_record(store: Store, manifest: Manifest) -> None:
    key = u64be(manifest.last_sequence + 1)
    store.writer.write_blocking(lambda txn: txn.delete(Table.LOG, key))


def remove_definitions(store: Store, manifest: Manifest) -> None:
    key = u64be(manifest.kept[0][0])
    store.writer.write_blocking(lambda txn: txn.delete(Table.LOG, key))


def remove_manifest(store: Store, manifest: Manifest) -> None:
    key = u64be(manifest.first_sequence)
    store.writer.write_blocking(lambda txn: txn.delete(Table.SEGMENTS, key))


@pytest.mark.parametrize(
    ("damage", "code"),
    [
        (damage_segment, "segment_corrupt"),
        (remove_segment, "segment_missing"),
        (damage_record, "log_corrupt"),
        (remove_record, "log_gap"),
        (remove_definitions, "kept_missing"),
        (remove_manifest, "watermark"),
    ],
)
def test_check_finds_damage(store: Store, damage: Any, code: str) -> None:
    store.fill(10)
    manifest = store.compact()
    store.purge()
    store.append("departures", {"n": column_of(DType.INT64, [1, 2])}, [1, 2])
    store.append("departures", {"n": column_of(DType.INT64, [3])}, [3])
    assert check(store.environment, store.data) == []
    damage(store, manifest)
    assert code in {p.code for p in check(store.environment, store.data)}


def test_check_finds_damaged_pages(store: Store) -> None:
    store.fill(10)
    store.close()
    path = store.data.lmdb / "data.mdb"
    data = bytearray(path.read_bytes())
    for page in range(2, len(data) // 4096):
        data[page * 4096 : page * 4096 + 8] = b"\xff" * 8
    path.write_bytes(data)
    found = check_pages(store.data)
    path.unlink()
    store.open()
    assert {p.code for p in found} == {"lmdb_damaged"}


def test_masked_values_do_not_leak_into_segments(store: Store) -> None:
    column = Column(DType.FLOAT64, np.array([1.0, 99.0]), np.array([True, False]))
    store.append("s", {"x": column}, [1, 2])
    assert store.scan("s")["x"].to_list() == [1.0, None]


def test_every_bit_of_a_nan_in_a_list_survives(store: Store) -> None:
    patterns = np.array([0x7FC12345, 0xFF800001, 0x80000000, 0x00000001], np.uint32)
    values = np.empty(3, object)
    values[:] = [patterns[:2].tobytes(), b"", patterns[2:].tobytes()]
    for source, text in (("lists", "list[float32]"), ("vectors", "vector[float32, 2]")):
        dtype = DType(text)
        column = Column(dtype, values, np.array([True, False, True]))
        store.append(source, {"x": column}, [1, 2, 3])
        tail = from_series(store.scan(source)["x"], dtype)
        store.compact()
        store.purge()
        for found in (tail, from_series(store.scan(source)["x"], dtype)):
            assert found.values.tolist() == values.tolist()
            assert found.mask().tolist() == [True, False, True]


class TestMerging:
    def fill(self, store: Store, compactions: int = 20) -> None:
        for number in range(compactions):
            store.fill(3, seed=number)
            store.compact()
        store.purge()

    def test_small_files_of_a_source_become_fewer_and_every_row_stays(self, store: Store) -> None:
        self.fill(store)
        before = files(store)
        merged = store.merge()
        assert merged is not None
        store.check_rows()
        assert len(files(store)) < len(before) / 2
        for segment in merged.segments:
            assert segment.path in files(store)
        with store.environment.snapshot() as snapshot:
            assert remove_orphans(snapshot, store.data.segments) == []
        store.reopen()
        store.check_rows()

    async def test_the_compactor_runs_the_child(self, store: Store) -> None:
        await asyncio.to_thread(self.fill, store)
        now_s = 0.0
        monotonic = lambda: now_s  # noqa: E731 - a clock that the test moves
        compactor = Compactor(store.environment, store.writer, store.data, monotonic=monotonic)
        before = files(store)
        merged = await compactor.merge_if_due()
        assert merged is not None
        assert compactor.merged_files > 20
        assert before < files(store)  # readers may have the former list
        now_s = REPLACED_S - 1
        assert await compactor.merge_if_due() is None
        assert before < files(store)
        now_s = REPLACED_S
        assert await compactor.merge_if_due() is None
        assert len(files(store)) < len(before) / 2
        store.check_rows()
        with store.environment.snapshot() as snapshot:
            assert remove_orphans(snapshot, store.data.segments) == []

    def test_large_files_are_not_written_anew(
        self, store: Store, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.fill(store)
        monkeypatch.setattr(compact_module, "SEGMENT_ROWS_MIN", 6)
        before = files(store)
        merged = store.merge()
        assert merged is not None
        large = {s.path for s in merged.segments if ".1." not in s.path and s.rows >= 6}
        assert large
        assert large <= before
        store.check_rows()

    def test_a_crash_at_every_file_operation_loses_and_doubles_nothing(
        self, store: Store, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.fill(store, MANIFESTS_MIN)
        before = files(store)
        step = crashes = 0
        while True:
            step += 1
            with monkeypatch.context() as patch:
                crash_at(patch, step)
                try:
                    assert store.merge()
                except CrashError:
                    crashes += 1
                else:
                    break
            store.check_rows()
            with store.environment.snapshot() as snapshot:
                remove_orphans(snapshot, store.data.segments)
            assert files(store) == before
        assert crashes > 10
        store.check_rows()

    def test_what_a_crash_leaves_is_never_taken_for_rows_of_another_log(
        self, store: Store, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Not even where the random part of a file's name is a great number, as of a sequence."""
        self.fill(store, MANIFESTS_MIN)
        before = files(store)

        def crash(*_: object) -> None:
            raise CrashError

        monkeypatch.setattr("secrets.token_hex", lambda _: "5204999674422424")
        monkeypatch.setattr(segment_files.SegmentFiles, "_publish", crash)
        with pytest.raises(CrashError):
            store.merge()
        assert files(store) - before
        with store.environment.snapshot() as snapshot:
            remove_orphans(snapshot, store.data.segments)
        assert files(store) == before

    def test_what_was_merged_is_merged_again_and_mergings_may_be_mixed(self, store: Store) -> None:
        mergings = 0
        for number in range(70):
            store.fill(1, seed=number)
            store.compact()
            mergings += store.merge() is not None
        store.check_rows()
        with store.environment.snapshot() as snapshot:
            manifests = load_manifests(snapshot)
        assert max(manifest.revision for manifest in manifests) > 1
        assert mergings > 5
        assert len(manifests) < 2 * MANIFESTS_MIN

    def test_one_that_was_overtaken_is_refused(self, store: Store) -> None:
        self.fill(store)
        with store.environment.snapshot() as snapshot:
            found = find_mergeable(load_manifests(snapshot))
        first, last = found[0].first_sequence, found[-1].last_sequence
        late = merge(store.environment, store.data.segments, first, last)
        assert store.merge()
        with pytest.raises(ConflictError) as caught:
            store.writer.write_blocking(partial(replace_manifests, manifests=[late]))
        assert caught.value.code == "rewriting_overtaken"
        store.check_rows()

    def test_a_reader_with_the_former_list_reads_again(self, store: Store) -> None:
        self.fill(store)
        wanted = store.scan("weather")
        scans = 0

        def scan() -> pl.LazyFrame:
            nonlocal scans
            scans += 1
            frame = scan_events(store.environment, store.data.segments, "weather")
            if scans == 1:
                assert store.merge()  # between the list and the files
            return frame.sort("__sequence")

        assert collect_events(scan).equals(wanted)
        assert scans == 2

    def test_each_row_is_written_anew_a_few_times_at_most(self) -> None:
        """Compactions of every size, 2,000 of them: few files at any time, and little work."""
        for seed in range(5):
            chance = random.Random(seed)
            manifests: list[Manifest] = []
            total = written = most = 0
            for _ in range(2_000):
                rows = chance.choice([1, 5, 40, 300, 300, 2_000])
                manifests.append(pretended(total + 1, rows))
                total += rows
                if found := find_mergeable(manifests):
                    at, rows = manifests.index(found[0]), sum(m.rows for m in found)
                    manifests[at : at + len(found)] = [pretended(found[0].first_sequence, rows)]
                    written += rows
                most = max(most, len(manifests))
            assert most < 40
            assert written < 5 * total


def pretended(first: int, rows: int) -> Manifest:
    """A manifest of `rows` rows in one file."""
    last = first + rows - 1
    place = {"path": "", "kind": RecordKind.EVENTS, "source": "s", "columns": {}, "digest": ""}
    bounds = dict.fromkeys(("min_event_us", "max_event_us", "min_known_us", "max_known_us"), 0)
    segment = Segment(
        **place, **bounds, rows=rows, size_bytes=rows, first_sequence=first, last_sequence=last
    )
    return Manifest(first, last, (), (segment,))
