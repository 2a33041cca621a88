"""Checks of the stored truth for fsck: pages, a dense log, whole segments.  Changes nothing."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from lmdb.verify import VerifyError, verify

from mlpd.core.errors import InternalError
from mlpd.storage.environment import Environment
from mlpd.storage.files import DataDirectory
from mlpd.storage.log import LogRecord, RecordKind, compacted_through, decode_record
from mlpd.storage.segments import Manifest, Segment, load_manifests
from mlpd.storage.tables import Head, Table, from_u64be
from mlpd.storage.transactions import Snapshot

PART_ROWS = 20_000
PART_BYTES = 16 << 20
"""Bounds of what one snapshot copies out of a table: about 50 ms."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong: a stable code, the thing, and what was found."""

    code: str
    subject: str
    message: str


@dataclass(frozen=True, slots=True)
class Part:
    """Some rows of a table as a snapshot had them, its head and its log's watermark.

    `beside`: for each row what the other table has under its key.
    """

    rows: list[tuple[bytes, bytes]]
    beside: list[bytes | None]
    head: Head
    compacted: int


def scan_parts(
    environment: Environment, table: Table, beside: Table | None = None
) -> Iterator[Part]:
    """Yield all of a table part by part, each copied out of a snapshot of its own; at least one.

    `beside`: a table whose values under the same keys come along.
    """
    start: bytes | None = b""
    while start is not None:
        rows: list[tuple[bytes, bytes]] = []
        size_bytes, next_start = 0, None
        with environment.snapshot() as snapshot:
            for key, value in snapshot.scan(table, start):
                if len(rows) >= PART_ROWS or size_bytes >= PART_BYTES:
                    next_start = key
                    break
                rows.append((key, value))
                size_bytes += len(value)
            keys = [] if beside is None else [key for key, _ in rows]
            others = snapshot.get_many(beside or table, keys)
            part = Part(rows, others, snapshot.head, compacted_through(snapshot))
        yield part
        start = next_start


def check(environment: Environment, data: DataDirectory) -> list[Problem]:
    """Return what is wrong with log, manifests and segments; empty means all is well.

    Works beside a writing daemon: snapshots are short.  Reads and hashes every segment, about 1 s
    per GB; what is in them is for `check_segments`.
    """
    problems = check_log(environment)
    with environment.snapshot() as snapshot:
        manifests = load_manifests(snapshot)
    segments = (segment for manifest in manifests for segment in manifest.segments)
    return problems + [p for segment in segments for p in check_digest(data.segments, segment)]


def check_log(environment: Environment) -> list[Problem]:
    """Return what is wrong with the manifests and the log's records, in short snapshots."""
    with environment.snapshot() as snapshot:
        problems = [*_check_manifests(snapshot, load_manifests(snapshot))]
    return [*problems, *_check_records(environment)]


def check_pages(data: DataDirectory) -> list[Problem]:
    """Return what is wrong with LMDB's own structure; only while no process writes it.

    Walks every page in Python, about 30 s per GB.
    """
    path = data.lmdb / "data.mdb"
    try:
        found = verify(str(path), subdir=False)  # type: ignore[no-untyped-call]  # lmdb ships no types for it
    except VerifyError as error:
        found = [error]
    return [Problem("lmdb_damaged", str(path), str(finding)) for finding in found]


def _check_manifests(snapshot: Snapshot, manifests: Sequence[Manifest]) -> Iterator[Problem]:
    expected = 1
    for manifest in manifests:
        if manifest.first_sequence != expected:
            yield _gap("manifest_gap", manifest.name, expected, manifest.first_sequence)
        expected = manifest.last_sequence + 1
        yield from _check_rows(manifest)
        yield from _check_kept(snapshot, manifest)
    if expected != compacted_through(snapshot) + 1:
        yield _gap("watermark", "log/compacted", expected - 1, compacted_through(snapshot))


def _check_rows(manifest: Manifest) -> Iterator[Problem]:
    rows = sum(segment.rows for segment in manifest.segments)
    rows += sum(last - first + 1 for first, last in manifest.kept)
    rows += sum(removal.rows for removal in manifest.removed)
    wanted = manifest.last_sequence - manifest.first_sequence + 1
    if rows != wanted:
        yield Problem("manifest_rows", manifest.name, f"it covers {wanted} rows and names {rows}")


def _check_kept(snapshot: Snapshot, manifest: Manifest) -> Iterator[Problem]:
    for first, last in manifest.kept:
        start, stop = (number.to_bytes(8, "big") for number in (first, last + 1))
        for key, value in snapshot.scan(Table.LOG, start, stop):
            record = _decode(key, value)
            if isinstance(record, Problem):
                yield record
            else:
                first = record.last + 1  # noqa: PLW2901 - what is still to be found
        if first != last + 1:
            yield Problem("kept_missing", manifest.name, f"records {first} to {last} are gone")


def _check_records(environment: Environment) -> Iterator[Problem]:
    """Decode the records part by part: each part is copied out of a snapshot of its own."""
    expected = newest = 0
    for part in scan_parts(environment, Table.LOG):
        # Compaction may have gone on since the part before: what it took is in a segment now.
        expected, newest = max(expected, part.compacted + 1), part.head.sequence
        for key, value in part.rows:
            record = _decode(key, value)
            if isinstance(record, Problem):
                yield record
            elif record.first > part.compacted:
                if record.first != expected:
                    yield _gap("log_gap", "log", expected, record.first)
                expected = record.last + 1
            elif record.last > part.compacted and record.kind is not RecordKind.DEFINITIONS:
                yield _gap("log_overlap", "log", part.compacted, record.last)
    if expected != newest + 1:
        yield _gap("log_end", "log", newest, expected - 1)


def _decode(key: bytes, value: bytes) -> LogRecord | Problem:
    try:
        record = decode_record(value, from_u64be(key))
        record.columns()
    except InternalError as error:
        return Problem("log_corrupt", f"log record {from_u64be(key)}", error.message)
    return record


def check_digest(directory: Path, segment: Segment) -> Iterator[Problem]:
    """Yield what is wrong with a segment's file: it is missing, or its digest is another."""
    path = directory / segment.path
    if not path.is_file():
        yield Problem("segment_missing", segment.path, "the file is not there")
        return
    with path.open("rb") as file:
        digest = f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"
    if digest != segment.digest:
        yield Problem("segment_corrupt", segment.path, f"its digest is {digest}")


def _gap(code: str, subject: str, wanted: int, found: int) -> Problem:
    return Problem(code, subject, f"sequence {wanted} was expected, {found} was found")
