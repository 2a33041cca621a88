"""Segment manifests: which part of the log lies in which immutable Parquet files.

A compaction covers a range of sequences that begins where the last one ended.  Its manifest names
the files and is stored in one transaction that also moves the watermark `log/compacted`: from then
on the rows are read from the files, and their log records are purged at leisure.  Bytes and
steps: docs/formats/segments.md.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mlpd.core.columns import DType
from mlpd.core.errors import ConflictError, InternalError
from mlpd.storage.log import COMPACTED_KEY, RecordKind, compacted_through, record_kind
from mlpd.storage.tables import Table, from_u64be, u64be
from mlpd.storage.transactions import Snapshot, WriteTransaction

FORMAT = 1
MANIFESTS = "_manifests"
TEMPORARY = "_tmp"
FEEDBACK = "_feedback"
EVENT_TIME, KNOWN_TIME, SEQUENCE = "__event_time", "__known_time", "__sequence"
"""The three int64 columns that every segment has before those of its source."""

PURGE_RECORDS = 1_000
PURGE_BYTES = 8 << 20
"""Bounds of one purging operation, so that ingest waits for a few ms at most."""


@dataclass(frozen=True, slots=True)
class Segment:
    """One Parquet file: rows of one source with one schema; all bounds are inclusive."""

    path: str
    """Relative to the segments directory."""
    kind: RecordKind
    source: str
    columns: Mapping[str, DType]
    rows: int
    size_bytes: int
    digest: str
    first_sequence: int
    last_sequence: int
    min_event_us: int
    max_event_us: int
    min_known_us: int
    max_known_us: int


@dataclass(frozen=True, slots=True)
class Manifest:
    """Where the rows `first_sequence` to `last_sequence` (inclusive) are."""

    first_sequence: int
    last_sequence: int
    kept: tuple[tuple[int, int], ...]
    """Ranges (inclusive) that stay in the log: DEFINITIONS records."""
    segments: tuple[Segment, ...]

    @property
    def name(self) -> str:
        """File name of the copy in the `_manifests` folder."""
        return f"{self.first_sequence}-{self.last_sequence}.json"

    def encode(self) -> bytes:
        """Return the JSON that `decode_manifest` reads."""
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=1).encode()


def decode_manifest(data: bytes) -> Manifest:
    """Return the manifest from its JSON; InternalError(code="manifest_corrupt") if it isn't one."""
    try:
        fields = json.loads(data)
        if fields.pop("format") != FORMAT:
            raise ValueError("unknown format")  # noqa: TRY301 - one place tells what is wrong
        fields["kept"] = tuple((first, last) for first, last in fields["kept"])
        fields["segments"] = tuple(_decode_segment(s) for s in fields["segments"])
        return Manifest(**fields)
    except (ValueError, KeyError, TypeError) as error:
        raise InternalError(
            f"a segment manifest is damaged: {error!r}",
            code="manifest_corrupt",
            hint="Run mlpd fsck; a copy lies in segments/_manifests.",
        ) from error


def _decode_segment(fields: dict[str, Any]) -> Segment:
    columns = {name: DType(dtype) for name, dtype in fields["columns"].items()}
    return Segment(**{**fields, "kind": RecordKind(fields["kind"]), "columns": columns})


def load_manifests(snapshot: Snapshot | WriteTransaction) -> list[Manifest]:
    """Return all manifests in sequence order; about 30 us per segment."""
    return [decode_manifest(value) for _, value in snapshot.scan(Table.SEGMENTS)]


def store_manifest(txn: WriteTransaction, manifest: Manifest) -> None:
    """Make the manifest's files the place of its rows, and their log records garbage.

    The files must be durable.  Raises ConflictError(code="compaction_overtaken") unless the
    manifest begins where the last one ended.
    """
    expected = compacted_through(txn) + 1
    if manifest.first_sequence != expected or manifest.last_sequence > txn.sequence:
        raise ConflictError(
            f"the compaction of {manifest.first_sequence} to {manifest.last_sequence} does not "
            f"continue at {expected}",
            code="compaction_overtaken",
            hint="Another compaction was faster; nothing is lost, the next run goes on.",
        )
    txn.put(Table.SEGMENTS, u64be(manifest.first_sequence), manifest.encode(), append=True)
    txn.put(Table.META, COMPACTED_KEY, u64be(manifest.last_sequence))


def purge_log(txn: WriteTransaction, start: int = 0) -> int | None:
    """Delete some compacted log records from sequence `start` on.

    Returns where to go on, None when there are no more.  DEFINITIONS records stay.
    """
    garbage: list[bytes] = []
    taken_bytes, stop = 0, u64be(compacted_through(txn) + 1)
    next_start: int | None = None
    for key, value in txn.scan(Table.LOG, u64be(start), stop):
        if len(garbage) >= PURGE_RECORDS or taken_bytes >= PURGE_BYTES:
            next_start = from_u64be(key)
            break
        if record_kind(value) is not RecordKind.DEFINITIONS:
            garbage.append(key)
            taken_bytes += len(value)
    for key in garbage:
        txn.delete(Table.LOG, key)
    return next_start


def remove_orphans(snapshot: Snapshot, directory: Path) -> list[Path]:
    """Remove the files that no manifest names, left by a crashed compaction; return them.

    Only at start, before the first compaction: a running one has files that nobody names yet.
    """
    manifests = load_manifests(snapshot)
    named = {directory / s.path for m in manifests for s in m.segments}
    named |= {directory / MANIFESTS / m.name for m in manifests}
    orphans = [p for p in directory.rglob("*") if p.is_file() and p not in named]
    for path in orphans:
        path.unlink()
    return orphans
