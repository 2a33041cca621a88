"""Segment manifests: which part of the log lies in which immutable Parquet files.

A compaction covers a range of sequences that begins where the last one ended.  Its manifest names
the files and is stored in one transaction that also moves the watermark `log/compacted`: from then
on the rows are read from the files, and their log records are purged at leisure.  Bytes and
steps: docs/formats/segments.md.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mlpd.core.columns import DType
from mlpd.core.errors import ConflictError, InternalError
from mlpd.storage.files import fsync_dir
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
class Removal:
    """Rows that are nowhere any more; both sequences were among them."""

    cause: str
    """What removed them, for example the order `erase 5f0c...`."""
    source: str
    rows: int
    first_sequence: int
    last_sequence: int


@dataclass(frozen=True, slots=True)
class Manifest:
    """Where the rows `first_sequence` to `last_sequence` (inclusive) are."""

    first_sequence: int
    last_sequence: int
    kept: tuple[tuple[int, int], ...]
    """Ranges (inclusive) that stay in the log: DEFINITIONS records."""
    segments: tuple[Segment, ...]
    removed: tuple[Removal, ...] = ()
    revision: int = 0
    """How often its files were written anew."""

    @property
    def name(self) -> str:
        """File name of the copy in the `_manifests` folder."""
        stem = f"{self.first_sequence}-{self.last_sequence}"
        return f"{stem}.{self.revision}.json" if self.revision else f"{stem}.json"

    @property
    def rows(self) -> int:
        """Rows in its files."""
        return sum(segment.rows for segment in self.segments)

    @property
    def files(self) -> set[str]:
        """Paths of all that it names, below the segments directory, its copy among them."""
        return {f"{MANIFESTS}/{self.name}", *(segment.path for segment in self.segments)}

    def encode(self) -> bytes:
        """Return the JSON that `decode_manifest` reads."""
        fields = {"format": FORMAT, **asdict(self)}
        if not self.revision:
            del fields["revision"], fields["removed"]
        return json.dumps(fields, indent=1).encode()


def decode_manifest(data: bytes) -> Manifest:
    """Return the manifest from its JSON; InternalError(code="manifest_corrupt") if it isn't one."""
    try:
        fields = json.loads(data)
        if fields.pop("format") != FORMAT:
            raise ValueError("unknown format")  # noqa: TRY301 - one place tells what is wrong
        fields["kept"] = tuple((first, last) for first, last in fields["kept"])
        fields["segments"] = tuple(_decode_segment(s) for s in fields["segments"])
        fields["removed"] = tuple(Removal(**r) for r in fields.get("removed", ()))
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


def sizes_by_source(manifests: Iterable[Manifest]) -> dict[str, dict[str, int]]:
    """Return what segments take per source, labels under `_feedback/`: files, rows, size_bytes."""
    found: dict[str, dict[str, int]] = {}
    for segment in (segment for manifest in manifests for segment in manifest.segments):
        is_events = segment.kind is RecordKind.EVENTS
        name = segment.source if is_events else f"{FEEDBACK}/{segment.source}"
        sizes = found.setdefault(name, {"files": 0, "rows": 0, "size_bytes": 0})
        sizes["files"] += 1
        sizes["rows"] += segment.rows
        sizes["size_bytes"] += segment.size_bytes
    return dict(sorted(found.items()))


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


def replace_manifests(txn: WriteTransaction, manifests: Iterable[Manifest]) -> list[str]:
    """Make manifests written anew the ones that count; return the files that none names any more.

    Each covers the range of one that is there, or of several neighbours, with the next revision,
    and its files must be durable; else ConflictError(code="rewriting_overtaken").
    """
    stale: set[str] = set()
    for manifest in manifests:
        former = _stored_in(txn, manifest)
        if not former or (
            former[0].first_sequence,
            former[-1].last_sequence,
            1 + max(one.revision for one in former),
        ) != (manifest.first_sequence, manifest.last_sequence, manifest.revision):
            raise ConflictError(
                f"{manifest.name} does not follow what is there",
                code="rewriting_overtaken",
                hint="Nothing is lost; it is done again.",
            )
        for one in former:
            txn.delete(Table.SEGMENTS, u64be(one.first_sequence))
        txn.put(Table.SEGMENTS, u64be(manifest.first_sequence), manifest.encode())
        stale |= {path for one in former for path in one.files} - manifest.files
    return sorted(stale)


def _stored_in(txn: WriteTransaction, manifest: Manifest) -> list[Manifest]:
    first, after = u64be(manifest.first_sequence), u64be(manifest.last_sequence + 1)
    return [decode_manifest(value) for _, value in txn.scan(Table.SEGMENTS, first, after)]


def remove_files(directory: Path, paths: Iterable[str]) -> None:
    """Remove files that no manifest names any more, durably; some may be gone already."""
    folders = set()
    for path in paths:
        (directory / path).unlink(missing_ok=True)
        folders.add((directory / path).parent)
    for folder in sorted(folders):
        if folder.is_dir():
            fsync_dir(folder)


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
