"""Lists in META that a move keeps while it is under way; docs/formats/lmdb.md has the bytes.

The source notes which rows of its prediction log changed since the move began.  The target notes
which sequences of the source its rows had, which units of experiments came with their predictions,
and which of their outcomes.  All of them go when the move is finished or cancelled.
"""

from collections.abc import Iterable, Iterator
from hashlib import blake2b
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from mlpd.storage.tables import Table, from_u64be, u64be
from mlpd.storage.transactions import Snapshot, WriteTransaction
from mlpd.storage.writer import Writer

CHANGED = b"move/changed/"
"""Then arrival, 16 bytes, what it is: PREDICTION or LABEL of the key, OUTCOME by its key's hash."""
SEQUENCES = b"move/sequences/"
"""Then the first row's sequence here; value: the source's sequences of it and those behind it."""
UNITS = b"move/units/"
"""Then the hash of experiment and unit."""
OUTCOMES = b"move/outcomes/"
"""Then the hash of its key in the table `units`, which is the value."""

PREDICTION, LABEL, OUTCOME = b"p", b"l", b"u"
REMOVED_KEYS = 1_000
"""Keys that go with one write."""
_HASH_BYTES = 16


def note_changed(txn: WriteTransaction, kind: bytes, keys: Iterable[bytes]) -> None:
    """Note that rows changed in this group; an OUTCOME's key has any length."""
    head = CHANGED + u64be(max(txn.known_us, 0))
    for key in keys:
        name = key if kind != OUTCOME else hash_of(key)
        txn.put(Table.META, head + name + kind, key if kind == OUTCOME else b"")


def read_changed(
    reader: Snapshot | WriteTransaction, after: bytes, rows_max: int
) -> list[tuple[bytes, bytes, bytes]]:
    """Return (position, kind, key) of what changed after a position, in that order."""
    start = CHANGED + after + b"\x00" if after else CHANGED
    found = islice(reader.scan(Table.META, start, _end(CHANGED)), rows_max)
    return [(key[len(CHANGED) :], key[-1:], _key_of(key, value)) for key, value in found]


def read_changed_keys(reader: Snapshot | WriteTransaction, after: bytes) -> Iterator[bytes]:
    """Yield the keys of predictions and labels that changed after a position."""
    start = CHANGED + after + b"\x00" if after else CHANGED
    for key, _ in reader.scan(Table.META, start, _end(CHANGED)):
        if key[-1:] != OUTCOME:
            yield key[len(CHANGED) + 8 : -1]


def _key_of(key: bytes, value: bytes) -> bytes:
    return value or key[len(CHANGED) + 8 : -1]


def note_sequences(txn: WriteTransaction, first: int, sequences: NDArray[np.int64]) -> None:
    """Note which sequences at the source rows from `first` on had."""
    txn.put(Table.META, SEQUENCES + u64be(first), sequences.astype("<i8").tobytes())


def load_sequences(
    reader: Snapshot | WriteTransaction,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the source's sequences of all rows that came, ascending, and those they have here."""
    theirs, ours = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    for key, value in reader.scan(Table.META, SEQUENCES, _end(SEQUENCES)):
        theirs.append(np.frombuffer(value, "<i8").astype(np.int64))
        ours.append(np.arange(len(theirs[-1])) + from_u64be(key[len(SEQUENCES) :]))
    return np.concatenate(theirs), np.concatenate(ours)


def read_outcomes(reader: Snapshot | WriteTransaction) -> list[bytes]:
    """Return the keys of the outcomes that came."""
    return [value for _, value in reader.scan(Table.META, OUTCOMES, _end(OUTCOMES))]


def hash_of(*parts: bytes) -> bytes:
    """Return 16 bytes that stand for parts without a zero byte in all but the last."""
    return blake2b(b"\x00".join(parts), digest_size=_HASH_BYTES).digest()


async def remove_list(writer: Writer, prefix: bytes) -> None:
    """Remove one of the lists, `REMOVED_KEYS` a write."""
    while await writer.write(lambda txn: _remove(txn, prefix)) == REMOVED_KEYS:
        pass


def _remove(txn: WriteTransaction, prefix: bytes) -> int:
    keys = [key for key, _ in islice(txn.scan(Table.META, prefix, _end(prefix)), REMOVED_KEYS)]
    for key in keys:
        txn.delete(Table.META, key)
    return len(keys)


def read_keys(reader: Snapshot | WriteTransaction, prefix: bytes) -> Iterator[bytes]:
    """Yield what stands behind a prefix."""
    return (key[len(prefix) :] for key, _ in reader.scan(Table.META, prefix, _end(prefix)))


def _end(prefix: bytes) -> bytes:
    return prefix[:-1] + b"0"
