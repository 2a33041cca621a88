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
from mlpd.storage.tables import Table, from_u64be
from mlpd.storage.transactions import Snapshot


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong: a stable code, the thing, and what was found."""

    code: str
    subject: str
    message: str


def check(environment: Environment, data: DataDirectory) -> list[Problem]:
    """Return what is wrong with log, manifests and segments; empty means all is well.

    Works beside a writing daemon.  Decodes the log's tail in one snapshot, then reads and hashes
    every segment, about 1 s per GB.
    """
    with environment.snapshot() as snapshot:
        manifests = load_manifests(snapshot)
        problems = [*_check_manifests(snapshot, manifests), *_check_log(snapshot)]
    segments = (segment for manifest in manifests for segment in manifest.segments)
    return problems + [p for segment in segments for p in _check_segment(data.segments, segment)]


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


def _check_log(snapshot: Snapshot) -> Iterator[Problem]:
    compacted = compacted_through(snapshot)
    expected = compacted + 1
    for key, value in snapshot.scan(Table.LOG):
        record = _decode(key, value)
        if isinstance(record, Problem):
            yield record
        elif record.first > compacted:
            if record.first != expected:
                yield _gap("log_gap", "log", expected, record.first)
            expected = record.last + 1
        elif record.last > compacted and record.kind is not RecordKind.DEFINITIONS:
            yield _gap("log_overlap", "log", compacted, record.last)
    if expected != snapshot.sequence + 1:
        yield _gap("log_end", "log", snapshot.sequence, expected - 1)


def _decode(key: bytes, value: bytes) -> LogRecord | Problem:
    try:
        record = decode_record(value, from_u64be(key))
        record.columns()
    except InternalError as error:
        return Problem("log_corrupt", f"log record {from_u64be(key)}", error.message)
    return record


def _check_segment(directory: Path, segment: Segment) -> Iterator[Problem]:
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
