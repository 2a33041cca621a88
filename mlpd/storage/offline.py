"""Offline reads: all rows of a source from segments and log tail, for child processes only."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from mlpd.core.columns import Columns, DType
from mlpd.core.errors import ValidationError
from mlpd.storage.environment import Environment
from mlpd.storage.frames import polars_type, records_frame, schema_of
from mlpd.storage.log import LogRecord, RecordKind, compacted_through, copy_records, decode_record
from mlpd.storage.segments import EVENT_TIME, KNOWN_TIME, SEQUENCE, Segment, load_manifests
from mlpd.storage.transactions import Snapshot

if TYPE_CHECKING:
    import polars as pl

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
    collected later.
    """
    with environment.snapshot() as snapshot:
        last = snapshot.sequence if through_sequence is None else through_sequence
        segments = _find_segments(snapshot, source, kind, last)
        copies = _copy_tail(snapshot, kind, last)
    records = (decode_record(value, start) for start, value in copies)
    tail = [(record, record.columns()) for record in records if record.source == source]
    schema = _merge_schemas(source, columns, segments, tail)
    frames = [*_scan_segments(segments_directory, segments), *_frame_tail(tail)]
    return _unite(frames, schema, last)


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

    times = {name: pl.Int64() for name in (EVENT_TIME, KNOWN_TIME, SEQUENCE)}
    full: dict[str, pl.DataType] = times | {n: polars_type(d) for n, d in schema.items()}
    united = pl.concat([pl.LazyFrame(schema=full), *frames], how="diagonal")
    return united.filter(pl.col(SEQUENCE) <= last).select(list(full))
