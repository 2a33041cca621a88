"""Offline reads: all rows of a source from segments and log tail, for child processes only."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mlpd.core.columns import Columns, DType
from mlpd.core.errors import ConflictError, ValidationError
from mlpd.storage.environment import Environment
from mlpd.storage.frames import events_schema, records_frame, schema_of
from mlpd.storage.log import LogRecord, RecordKind, compacted_through, copy_records, decode_record
from mlpd.storage.segments import SEQUENCE, Segment, load_manifests
from mlpd.storage.transactions import Snapshot

if TYPE_CHECKING:
    import polars as pl

RESCANS = 5
"""How often files may be written anew, and so vanish, under one read."""

Schema = dict[str, DType]
Decoded = tuple[LogRecord, Columns]
"""A record and its columns, which are decoded once."""


def scan_events(
    environment: Environment,
    segments_directory: Path,
    source: str,
    *,
    columns: Mapping[str, DType] | None = None,
    through_sequence: int | None = None,
    kind: RecordKind = RecordKind.EVENTS,
) -> "pl.LazyFrame":
    """Return every acknowledged row of `source` exactly once, in no promised order.

    First the int64 columns `__event_time`, `__known_time` (microseconds) and `__sequence`, then
    `columns`, or without it all that were ever there.  A column that older rows lack is null
    there; one that was stored with another type raises ValidationError(code="column_type").
    `through_sequence` (inclusive; None: the newest now) cuts the log.  The segment list and the
    tail come from one snapshot that is closed before any file is read; the frame may be
    collected later, unless files are written anew: in a child use `collect_events`.
    """
    found = _find(environment, source, kind, through_sequence)
    schema = _merge_schemas(source, columns, found.segments, found.tail)
    frames = [*_scan_segments(segments_directory, found.segments), *_frame_tail(found.tail)]
    return _unite(frames, schema, found.last)


def read_events(
    environment: Environment,
    segments_directory: Path,
    source: str,
    *,
    columns: Mapping[str, DType],
    through_sequence: int,
    rows_max: int,
) -> "Iterator[pl.DataFrame]":
    """Yield what `scan_events` returns, in frames of at most `rows_max` rows.

    Whole segments are read at once: one alone may have more.  Raises ConflictError(
    code="segments_changed") if one was written anew after the first frame.
    """
    found = _find(environment, source, RecordKind.EVENTS, through_sequence)
    schema = _merge_schemas(source, columns, found.segments, found.tail)
    for group in _grouped(found.segments, rows_max):
        try:
            frame = _unite(_scan_segments(segments_directory, group), schema, found.last).collect()
        except FileNotFoundError:
            raise ConflictError(
                f"segments of source {source!r} were written anew while they were read",
                code="segments_changed",
                hint="Ask again: an entity was erased meanwhile.",
            ) from None
        yield frame
    tail = _unite(_frame_tail(found.tail), schema, found.last).collect()
    yield from tail.iter_slices(rows_max)


def count_events(environment: Environment, source: str, *, through_sequence: int) -> int:
    """Return about how many events of `source` there are up to a sequence, but never too few."""
    found = _find(environment, source, RecordKind.EVENTS, through_sequence)
    in_segments = sum(segment.rows for segment in found.segments)
    return in_segments + sum(len(record.event_us) for record, _ in found.tail)


@dataclass(frozen=True, slots=True)
class _Found:
    """Where a source's rows up to the sequence `last` are."""

    segments: list[Segment]
    tail: list[Decoded]
    last: int


def _find(environment: Environment, source: str, kind: RecordKind, through: int | None) -> _Found:
    with environment.snapshot() as snapshot:
        last = snapshot.sequence if through is None else through
        segments = _find_segments(snapshot, source, kind, last)
        copies = _copy_tail(snapshot, kind, last)
    records = (decode_record(value, start) for start, value in copies)
    tail = [(record, record.columns()) for record in records if record.source == source]
    return _Found(segments, tail, last)


def _grouped(segments: list[Segment], rows_max: int) -> Iterator[list[Segment]]:
    """Yield neighbouring segments of at most `rows_max` rows together, or one alone."""
    group: list[Segment] = []
    rows = 0
    for segment in segments:
        if group and rows + segment.rows > rows_max:
            yield group
            group, rows = [], 0
        group.append(segment)
        rows += segment.rows
    if group:
        yield group


def collect_events(scan: "Callable[[], pl.LazyFrame]") -> "pl.DataFrame":
    """Return the rows that `scan` finds, scanned again if its files were written anew meanwhile."""
    for _ in range(RESCANS):
        try:
            return scan().collect()
        except FileNotFoundError:
            continue
    return scan().collect()


def _find_segments(snapshot: Snapshot, source: str, kind: RecordKind, last: int) -> list[Segment]:
    return [
        segment
        for manifest in load_manifests(snapshot)
        for segment in manifest.segments
        if segment.source == source and segment.kind is kind and segment.first_sequence <= last
    ]


def _copy_tail(snapshot: Snapshot, kind: RecordKind, last: int) -> list[tuple[int, bytes]]:
    first = compacted_through(snapshot) + 1
    return list(copy_records(snapshot, first, last, kinds=frozenset((kind,))))


def _merge_schemas(
    source: str,
    wanted: Mapping[str, DType] | None,
    segments: Iterable[Segment],
    tail: Iterable[Decoded],
) -> Schema:
    """Return the wanted columns, or all of them in order of appearance, checking every type."""
    merged: Schema = dict(wanted or {})
    schemas = dict.fromkeys(
        [
            *(tuple(s.columns.items()) for s in segments),
            *(schema_of(columns) for _, columns in tail),
        ]
    )
    for name, dtype in (column for schema in schemas for column in schema):
        if wanted is None:
            merged.setdefault(name, dtype)
        if merged.get(name, dtype) is not dtype:
            raise ValidationError(
                f"column {name!r} of source {source!r} was stored as {dtype} and is wanted "
                f"as {merged[name]}",
                code="column_type",
                hint="Give the column with the new type another name.",
            )
    return merged


def _scan_segments(directory: Path, segments: Iterable[Segment]) -> "list[pl.LazyFrame]":
    """Return one frame per schema: files with equal columns are scanned together."""
    import polars as pl  # noqa: PLC0415 - not in the daemon

    groups: dict[tuple[tuple[str, DType], ...], list[Path]] = {}
    for segment in segments:
        group = groups.setdefault(tuple(segment.columns.items()), [])
        group.append(directory / segment.path)
    return [pl.scan_parquet(paths, glob=False) for paths in groups.values()]


def _frame_tail(tail: Iterable[Decoded]) -> "list[pl.LazyFrame]":
    groups: dict[tuple[tuple[str, DType], ...], list[Decoded]] = {}
    for decoded in tail:
        groups.setdefault(schema_of(decoded[1]), []).append(decoded)
    return [records_frame(*zip(*group, strict=True)).lazy() for group in groups.values()]


def _unite(frames: "list[pl.LazyFrame]", schema: Schema, last: int) -> "pl.LazyFrame":
    import polars as pl  # noqa: PLC0415 - not in the daemon

    full = events_schema(schema)
    united = pl.concat([pl.LazyFrame(schema=full), *frames], how="diagonal")
    return united.filter(pl.col(SEQUENCE) <= last).select(list(full))
