"""Event ids: which events of a source came before; docs/formats/event_ids.md.

Seen ids lie in buckets by arrival, each half a retention wide, so that a few lookups find an id and
a bucket that is old enough is removed in the order of its keys.
"""

import hashlib
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import islice

import numpy as np
from numpy.typing import NDArray
from xxhash import xxh64_intdigest

from mlpd.core.columns import Column, Columns, DType
from mlpd.core.errors import InternalError
from mlpd.core.specs import SourceSpec
from mlpd.storage.tables import Table, from_u64be, u64be
from mlpd.storage.transactions import Snapshot, WriteTransaction

ID_BYTES_MAX = 63
"""Longer ids are replaced by their hash, which has 64 bytes."""

_TABLE = Table.EVENT_IDS
_TAG_BYTES, _HEAD_BYTES = 8, 16
_TIME = struct.Struct("<q")


@dataclass(frozen=True, slots=True)
class Bucket:
    """Ids of a source that arrived at `start_us` and before `end_us`; `head` begins their keys."""

    head: bytes
    start_us: int
    end_us: int


def missing_ids(source: SourceSpec, columns: Mapping[str, Column]) -> NDArray[np.bool_]:
    """Return which rows have no event id, bool [n]: a null, an empty text or no bytes."""
    assert source.event_id is not None
    column = columns[source.event_id]
    missing = ~column.mask()
    if not column.dtype.is_numeric:
        missing |= np.fromiter((not v for v in column.values), np.bool_, len(column))
    return missing


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows of a batch by what their ids say, ascending int64 numbers.

    `new`: those whose id never came.  `known`: those whose id came, the first of each in the batch,
    with the sequences of the rows that had it, empty where none was noted.
    """

    new: NDArray[np.int64]
    known: Mapping[int, tuple[int, ...]]


def take_rows(txn: WriteTransaction, source: SourceSpec, columns: Columns, first: int) -> Rows:
    """Remember the ids of a batch, of a source whose events concern several entities.

    As `take_new`, but each id has the sequence of its row with it: the new rows are to be appended
    from `first` on, in their order.
    """
    assert source.event_id is not None
    ids = encode_ids(columns[source.event_id])
    first_rows = {value: row for row, value in reversed([*enumerate(ids)])}
    buckets = _live(txn, source)
    seen = _sequences(txn, buckets, sorted(first_rows), txn.known_us - source.event_id_retention_us)
    new = np.sort(np.array([r for v, r in first_rows.items() if v not in seen], np.int64))
    places = {ids[row]: (first + place,) for place, row in enumerate(new.tolist())}
    _remember(txn, _current(txn, source, buckets), places)
    return Rows(new, {first_rows[value]: found for value, found in seen.items()})


def add_sequences(txn: WriteTransaction, source: SourceSpec, columns: Columns, first: int) -> None:
    """Note one more row for each id: a batch that was appended from sequence `first` on."""
    assert source.event_id is not None
    buckets, ids = _live(txn, source), encode_ids(columns[source.event_id])
    seen = _sequences(txn, buckets, sorted({*ids}), txn.known_us - source.event_id_retention_us)
    places: dict[bytes, tuple[int, ...]] = {}
    for place, value in enumerate(ids, start=first):
        if value in seen and not seen[value]:
            places[value] = ()  # of before sequences were noted: it counts as all that was here
        else:
            places[value] = (*places.get(value, seen.get(value, ())), place)
    _remember(txn, _current(txn, source, buckets), places)


def take_new(
    txn: WriteTransaction, source: SourceSpec, columns: Columns
) -> NDArray[np.int64] | None:
    """Remember the ids of a batch and return its rows that are no repetition, None for all.

    A row is one if a row before it, in this batch or one that arrived within the retention, has its
    id.  Writer thread.  3 us per row where ids grow in the order of their bytes, 9 where they are
    random and a million are known: each then lies on a page of its own (bench/ingest_ids.py).
    """
    assert source.event_id is not None
    ids = encode_ids(columns[source.event_id])
    first_rows = {value: row for row, value in reversed([*enumerate(ids)])}
    oldest_us = txn.known_us - source.event_id_retention_us
    buckets = _live(txn, source)
    wanted = sorted(first_rows)  # neighbours in the order of keys share pages
    for bucket in reversed(buckets):
        wanted = _unseen(txn, bucket, wanted, oldest_us)
    _remember(txn, _current(txn, source, buckets), dict.fromkeys(wanted, ()))
    if len(wanted) == len(ids):
        return None
    return np.sort(np.array([first_rows[value] for value in wanted], np.int64))


def remember_ids(txn: WriteTransaction, source: SourceSpec, columns: Columns) -> None:
    """Remember the ids of events that came to another shard before, as if they came now."""
    assert source.event_id is not None
    ids = set(encode_ids(columns[source.event_id]))
    _remember(txn, _current(txn, source, _live(txn, source)), dict.fromkeys(ids, ()))


def encode_ids(column: Column) -> list[bytes]:
    """Return the ids of a column as they stand in keys, 1 to 64 bytes; none may be missing."""
    if column.dtype is DType.INT64:
        raw: bytes = (column.values.view(np.uint64) + np.uint64(1 << 63)).astype(">u8").tobytes()
        return [raw[i : i + 8] for i in range(0, len(raw), 8)]
    values: list[bytes] = column.values.tolist()
    if column.dtype is DType.STRING:
        values = [text.encode() for text in column.values.tolist()]
    return [v if len(v) <= ID_BYTES_MAX else hashlib.blake2b(v).digest() for v in values]


def find_buckets(reader: Snapshot | WriteTransaction, source: str | None = None) -> list[Bucket]:
    """Return the buckets of a source, or of all, the oldest first.  About 5 us each."""
    start = b"" if source is None else _tag(source)
    prefix, found = start, []
    while (row := next(iter(reader.scan(_TABLE, start)), None)) and row[0].startswith(prefix):
        head, width_us = row[0][:_HEAD_BYTES], _TIME.unpack(row[1])[0]
        start_us = from_u64be(head[_TAG_BYTES:])
        found.append(Bucket(head, start_us, start_us + width_us))
        start = _after(head)
    return found


def forget(txn: WriteTransaction, source: str, ids: Iterable[bytes]) -> int:
    """Remove ids of a source, as `encode_ids` gives them; returns how many were there."""
    heads = [bucket.head for bucket in find_buckets(txn, source)]
    return sum(txn.delete(_TABLE, head + value) for value in ids for head in heads)


def old_buckets(
    reader: Snapshot | WriteTransaction, sources: Iterable[SourceSpec], now_us: int
) -> list[Bucket]:
    """Return the buckets that no declared retention keeps any more."""
    kept_us = {_tag(s.name): s.event_id_retention_us for s in sources if s.event_id is not None}

    def is_old(bucket: Bucket) -> bool:
        retention_us = kept_us.get(bucket.head[:_TAG_BYTES])
        return retention_us is None or bucket.end_us <= now_us - retention_us

    return [*filter(is_old, find_buckets(reader))]


def purge(txn: WriteTransaction, sources: Iterable[SourceSpec], *, rows_max: int) -> int:
    """Remove up to `rows_max` ids that no declared retention keeps; returns how many went."""
    removed = 0
    for bucket in old_buckets(txn, sources, txn.known_us):
        rows = txn.scan(_TABLE, bucket.head + b"\x00", _after(bucket.head))
        keys = [key for key, _ in islice(rows, rows_max - removed)]
        for key in keys:
            txn.delete(_TABLE, key)
        removed += len(keys)
        if removed >= rows_max:
            break
        txn.delete(_TABLE, bucket.head)
    return removed


def decode_seen(key: bytes, value: bytes) -> tuple[bytes, int]:
    """Return (id, empty for a bucket's own row; its time) of a row of the table; for fsck."""
    if not _HEAD_BYTES <= len(key) <= _HEAD_BYTES + ID_BYTES_MAX + 1:
        raise InternalError(f"an event id has a key of {len(key)} bytes")
    if len(value) % _TIME.size:
        raise InternalError(f"an event id has a value of {len(value)} bytes")
    return key[_HEAD_BYTES:], _TIME.unpack_from(value)[0]


def _unseen(txn: WriteTransaction, bucket: Bucket, ids: list[bytes], oldest_us: int) -> list[bytes]:
    """Return the ids that are not in the bucket, or too old there."""
    values = txn.get_many(_TABLE, [bucket.head + value for value in ids])
    return [
        value
        for value, seen in zip(ids, values, strict=True)
        if seen is None or _TIME.unpack_from(seen)[0] < oldest_us
    ]


def _live(txn: WriteTransaction, source: SourceSpec) -> list[Bucket]:
    """Return the buckets whose ids may count, the oldest first."""
    oldest_us = txn.known_us - source.event_id_retention_us
    return [b for b in find_buckets(txn, source.name) if b.end_us > oldest_us]


def _sequences(
    txn: WriteTransaction, buckets: list[Bucket], ids: list[bytes], oldest_us: int
) -> dict[bytes, tuple[int, ...]]:
    """Return the sequences noted for the ids that came, of all buckets together."""
    found: dict[bytes, tuple[int, ...]] = {}
    for bucket in buckets:
        values = txn.get_many(_TABLE, [bucket.head + value for value in ids])
        for value, seen in zip(ids, values, strict=True):
            if seen is not None and _TIME.unpack_from(seen)[0] >= oldest_us:
                sequences = np.frombuffer(seen, "<i8", offset=_TIME.size).tolist()
                found[value] = tuple(dict.fromkeys((*found.get(value, ()), *sequences)))
    return found


def _current(txn: WriteTransaction, source: SourceSpec, buckets: list[Bucket]) -> Bucket:
    """Return the bucket that takes what arrives now, made if the last one is full or differs."""
    now_us, width_us = txn.known_us, max(source.event_id_retention_us // 2, 1)
    if buckets:
        last = buckets[-1]
        if now_us < last.end_us and last.end_us - last.start_us == width_us:
            return last
    head = _tag(source.name) + u64be(max(now_us, 0))
    txn.put(_TABLE, head, _TIME.pack(width_us))
    return Bucket(head, now_us, now_us + width_us)


def _remember(txn: WriteTransaction, bucket: Bucket, ids: Mapping[bytes, tuple[int, ...]]) -> None:
    """Store ids with the sequences of their rows; neighbours in the order of keys share pages."""
    now = _TIME.pack(txn.known_us)
    rows = ((v, now + b"".join(map(_TIME.pack, ids[v])) if ids[v] else now) for v in sorted(ids))
    txn.put_many(_TABLE, [(bucket.head + value, row) for value, row in rows])


def _tag(source: str) -> bytes:
    return u64be(xxh64_intdigest(source.encode()))


def _after(head: bytes) -> bytes:
    """Return the first key after those of a bucket."""
    return (int.from_bytes(head, "big") + 1).to_bytes(_HEAD_BYTES, "big")
