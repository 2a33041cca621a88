"""Served rows that left with their slots: what files and lists of before say of them is past.

Files and the list by arrival are not written anew for each move.  A row of a slot is gone if it was
listed here up to the moment at which the slot left; META has one note per move, under
`served-left/` and `u64be` that moment.  While slots arrive, theirs aren't looked at yet.
"""

from collections.abc import Sequence
from itertools import islice

import msgpack
import numpy as np
from numpy.typing import NDArray

from mlpd.core.hashing import SLOTS
from mlpd.core.shards import format_runs, parse_runs
from mlpd.daemon.predictions import KEY_BYTES
from mlpd.storage.moves_store import load_arriving
from mlpd.storage.tables import Table, from_u64be, u64be
from mlpd.storage.transactions import Snapshot, WriteTransaction

_PREFIX, _END = b"served-left/", b"served-left0"
_NEVER = np.iinfo(np.int64).max

Times = NDArray[np.int64]


class Left:
    """Which served rows are gone, by slot and arrival; a value, any thread."""

    def __init__(self, left_us: Times) -> None:
        """`left_us`: per slot, the arrival up to which rows are gone, -1 for none."""
        self._left_us = left_us

    def gone(self, slots: Times, arrived_us: Times) -> NDArray[np.bool_]:
        """Tell of which rows that is so: int64 [n] both."""
        answer: NDArray[np.bool_] = arrived_us <= self._left_us[slots]
        return answer

    def has(self, position: bytes, key: bytes) -> bool:
        """Tell whether a key listed at a position of SERVED is gone."""
        return bool(int.from_bytes(position[:8], "big") <= self._left_us[key[0] << 8 | key[1]])


def listed_keys(position: bytes, value: bytes, left: Left | None) -> list[bytes]:
    """Return the keys that a row of SERVED lists, without those that are gone."""
    keys = [value[at : at + KEY_BYTES] for at in range(0, len(value), KEY_BYTES)]
    return keys if left is None else [key for key in keys if not left.has(position, key)]


def load_left(reader: Snapshot | WriteTransaction) -> Left | None:
    """Return what is gone, None where no slot ever left or arrives; 5 us then."""
    arriving = load_arriving(reader)
    left_us: Times | None = None if arriving is None else np.full(SLOTS, -1, np.int64)
    for key, value in reader.scan(Table.META, _PREFIX, _END):
        left_us = np.full(SLOTS, -1, np.int64) if left_us is None else left_us
        left_us[parse_runs(msgpack.unpackb(value))] = from_u64be(key[len(_PREFIX) :])
    if left_us is None:
        return None
    if arriving is not None:
        left_us[list(arriving.slots)] = _NEVER
    return Left(left_us)


def note_left(txn: WriteTransaction, slots: Sequence[int]) -> None:
    """Note that what was served in slots up to now is gone."""
    txn.put(Table.META, _PREFIX + u64be(max(txn.known_us, 0)), msgpack.packb(format_runs(slots)))


def forget_left(txn: WriteTransaction, before_us: int, notes_max: int) -> int:
    """Remove the oldest notes, of before a time when nothing of then is left; how many went."""
    stop = _PREFIX + u64be(max(before_us, 0))
    keys = [key for key, _ in islice(txn.scan(Table.META, _PREFIX, stop), notes_max)]
    for key in keys:
        txn.delete(Table.META, key)
    return len(keys)
