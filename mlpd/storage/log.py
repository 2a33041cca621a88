"""The event log: the truth.  Records of rows with dense sequences; bytes in docs/formats/log.md."""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray
from xxhash import xxh64_intdigest

from mlpd.core.columns import Columns, decode_columns, encode_columns, height
from mlpd.core.errors import InternalError, NotFoundError, TooLargeError, ValidationError
from mlpd.core.names import Sequence, check_name
from mlpd.storage.tables import Table, from_u64be, rows_key, u64be
from mlpd.storage.transactions import Snapshot, WriteTransaction

RECORD_ROWS_MAX = 100_000
"""Rows of one record; a compaction takes whole records, so this bounds its memory."""

_VERSION = 1
_HEADER = struct.Struct("<BBHIQQ")
"""version, kind, bytes of the source name, rows, first sequence, checksum."""
_CHECKED = struct.Struct("<BBHIQ")
"""The part of the header that the checksum covers: xxh64(body, seed = xxh64(this part))."""
COMPACTED_KEY = b"log/compacted"


class RecordKind(IntEnum):
    """What the rows of a record are; the number is on disk."""

    EVENTS = 1
    """Rows of a source."""
    FEEDBACK = 2
    """Labels of a route or model."""
    DEFINITIONS = 3
    """Applied definition documents; these records are never compacted."""


_EVENTS = RecordKind.EVENTS
_LOG = Table.LOG


@dataclass(frozen=True, slots=True)
class LogRecord:
    """Rows that entered together: sequences `first` to `last`, both included."""

    kind: RecordKind
    source: str
    first: Sequence
    event_us: NDArray[np.int64]
    known_us: NDArray[np.int64]
    body: memoryview

    @property
    def count(self) -> int:
        """Number of rows, at least 1."""
        return len(self.event_us)

    @property
    def last(self) -> Sequence:
        """Sequence of the last row."""
        return Sequence(self.first + self.count - 1)

    def columns(self) -> Columns:
        """Decode and return the columns, in schema order; read-only arrays."""
        return decode_columns(self.body)

    def sequences(self) -> NDArray[np.int64]:
        """Return the sequence of every row."""
        return np.arange(self.first, self.first + self.count, dtype=np.int64)


def append(
    txn: WriteTransaction,
    *,
    kind: RecordKind,
    source: str,
    columns: Columns,
    event_us: NDArray[np.int64],
    known_us: NDArray[np.int64] | None = None,
) -> tuple[Sequence, Sequence]:
    """Append rows as one record and return their first and last sequence.

    `event_us`, `known_us`: int64, one per row; without `known_us` every row gets the group's
    arrival time.  1 to `RECORD_ROWS_MAX` rows, else ValidationError or TooLargeError; a known time
    later than the arrival ValidationError(code="known_time_ahead").  EVENTS raise the newest known
    and event time and the source's count of rows.  About 13 us for one row, 1 ms for 10,000 rows of
    8 numbers.
    """
    count = len(event_us)
    known = _known_times(txn, count, known_us)
    check_name(source, "source")  # it becomes a folder of the segments
    _check_rows(count, len(known) // 8, columns)
    if kind is _EVENTS:
        newest_known_us = txn.known_us if known_us is None else int(known_us.max())
        txn.note_times(newest_known_us, int(event_us[0] if count == 1 else event_us.max()))
        txn.count_rows(source, count)
    first = txn.take_sequences(count)
    value = _encode(kind, source, first, _int64_bytes(event_us) + known, columns)
    txn.put(_LOG, u64be(first), value, append=True)
    return first, Sequence(first + count - 1)


def _known_times(txn: WriteTransaction, count: int, known_us: NDArray[np.int64] | None) -> bytes:
    if known_us is None:
        return txn.known_us.to_bytes(8, "little", signed=True) * count
    return _int64_bytes(known_us)


def _int64_bytes(times_us: NDArray[np.int64]) -> bytes:
    return times_us.astype("<i8", copy=False).tobytes()


def read_records(
    snapshot: Snapshot | WriteTransaction,
    first: int = 1,
    last: int | None = None,
    *,
    kinds: frozenset[RecordKind] | None = None,
) -> Iterator[LogRecord]:
    """Yield the records with any row in first..last (both included; None: the newest), in order.

    Records come whole: one at either end may reach beyond the range.  Every checksum is verified;
    a wrong one raises InternalError(code="log_corrupt").  Compacted rows are no longer here:
    asking for them raises NotFoundError(code="log_compacted"), unless `kinds` is DEFINITIONS
    alone, which always stay.  About 15 us per record of one row.
    """
    for start, value in copy_records(snapshot, first, last, kinds=kinds):
        yield decode_record(value, start)


def copy_records(
    snapshot: Snapshot | WriteTransaction,
    first: int = 1,
    last: int | None = None,
    *,
    kinds: frozenset[RecordKind] | None = None,
) -> Iterator[tuple[int, bytes]]:
    """Yield (first sequence, bytes) of the records that `read_records` would decode.

    For reading many: copy them (2 us each), close the snapshot, then call `decode_record`.
    """
    compacted = compacted_through(snapshot)
    if first <= compacted and kinds != DEFINITIONS_ONLY:
        raise NotFoundError(
            f"the log up to sequence {compacted} has been compacted; asked for {first}",
            code="log_compacted",
            hint="Read compacted rows from the segments (mlpd.storage.offline.scan_events).",
        )
    stop = None if last is None else u64be(last + 1)
    for key, value in snapshot.scan(Table.LOG, _start_key(snapshot, first), stop):
        start = from_u64be(key)
        if start + record_rows(value) > first and (kinds is None or record_kind(value) in kinds):
            yield start, value


DEFINITIONS_ONLY = frozenset((RecordKind.DEFINITIONS,))


def compacted_through(snapshot: Snapshot | WriteTransaction) -> Sequence:
    """Return the last sequence that the segments hold, 0 before the first compaction."""
    value = snapshot.get(Table.META, COMPACTED_KEY)
    return Sequence(0 if value is None else from_u64be(value))


def rows_of(snapshot: Snapshot, source: str) -> int:
    """Return how many event rows of `source` ever entered, wherever they are now; about 1 us."""
    value = snapshot.get(Table.META, rows_key(source))
    return 0 if value is None else from_u64be(value)


def decode_record(value: bytes, first: int) -> LogRecord:
    """Return the record stored under `first`, its checksum verified; the arrays are views."""
    if len(value) < _HEADER.size:
        raise _corrupt(first, f"it has {len(value)} bytes")
    version, kind, source_bytes, count, stored_first, checksum = _HEADER.unpack_from(value)
    if version != _VERSION or kind not in _KINDS:
        raise _corrupt(first, f"version {version}, kind {kind}")
    if stored_first != first or _checksum(value) != checksum:
        raise _corrupt(first, "its checksum does not match")
    times_end = _HEADER.size + 16 * count
    times = np.frombuffer(value, "<i8", 2 * count, _HEADER.size)
    body_start = times_end + source_bytes
    return LogRecord(
        RecordKind(kind),
        value[times_end:body_start].decode(),
        Sequence(first),
        times[:count],
        times[count:],
        memoryview(value)[body_start:],
    )


def record_kind(value: bytes) -> RecordKind:
    """Return the kind of an encoded record without verifying or decoding the rest."""
    return _KIND_OF.get(value[1], _EVENTS)


def record_source(value: bytes) -> str:
    """Return the source of an encoded record without verifying or decoding the rest."""
    start = _HEADER.size + 16 * record_rows(value)
    return value[start : start + int.from_bytes(value[2:4], "little")].decode()


def record_rows(value: bytes) -> int:
    """Return the number of rows of an encoded record without verifying or decoding the rest."""
    return int.from_bytes(value[4:8], "little")


_KIND_OF = {kind.value: kind for kind in RecordKind}
_KINDS = frozenset(RecordKind)


def encode_record(
    kind: RecordKind,
    source: str,
    first: int,
    columns: Columns,
    event_us: NDArray[np.int64],
    known_us: NDArray[np.int64],
) -> bytes:
    """Return rows as a record that `decode_record` reads, for another log."""
    return _encode(kind, source, first, _int64_bytes(event_us) + _int64_bytes(known_us), columns)


def _encode(
    kind: RecordKind,
    source: str,
    first: int,
    times: bytes,
    columns: Columns,
) -> bytes:
    name = source.encode()
    body = b"".join((times, name, encode_columns(columns)))
    header = (_VERSION, kind, len(name), len(times) // 16, first)
    checksum = xxh64_intdigest(body, xxh64_intdigest(_CHECKED.pack(*header)))
    return _HEADER.pack(*header, checksum) + body


def _checksum(value: bytes) -> int:
    view = memoryview(value)
    return xxh64_intdigest(view[_HEADER.size :], xxh64_intdigest(view[: _CHECKED.size]))


def _check_rows(count: int, known_count: int, columns: Columns) -> None:
    if count > RECORD_ROWS_MAX:
        raise TooLargeError(
            f"a batch of {count} rows is over the limit of {RECORD_ROWS_MAX}",
            code="batch_too_large",
            hint="Split it into smaller batches.",
        )
    if count < 1 or known_count != count or (columns and height(columns) != count):
        raise ValidationError(
            f"{count} event times, {known_count} known times and {height(columns)} rows "
            "do not make a record",
            code="record_shape",
            hint="Give one event time and one known time per row, and at least one row.",
        )


def _start_key(snapshot: Snapshot | WriteTransaction, first: int) -> bytes:
    """Return the key of the record that holds sequence `first`, or the nearest before it."""
    for key, _ in snapshot.scan(Table.LOG, stop=u64be(first + 1), reverse=True):
        return key
    return b""


def _corrupt(first: int, why: str) -> InternalError:
    return InternalError(
        f"the log record at sequence {first} is damaged: {why}",
        code="log_corrupt",
        hint="Run mlpd fsck; restore from a backup or a replica.",
    )
