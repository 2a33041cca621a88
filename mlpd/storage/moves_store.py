"""What a shard notes of moves under way: the slots that leave it, and those that arrive.

One of each at a time; docs/formats/lmdb.md has the bytes, docs/decisions/moving-slots.md says why.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

import msgpack

from mlpd.core.hashing import SLOTS
from mlpd.core.shards import format_runs, parse_runs
from mlpd.storage.tables import Table
from mlpd.storage.transactions import Snapshot, WriteTransaction

LeavingState = Literal["copying", "paused", "leaving", "cancelling"]
ArrivingState = Literal["importing", "sealed"]

_LEAVING, _ARRIVING = b"move/leaving", b"move/arriving"


@dataclass(frozen=True, slots=True)
class Leaving:
    """Slots that leave for `shard`.

    `sequence`: the newest one here when they were paused, 0 before: the last that the target needs.
    `definitions`: digest of those that ran when the move began.
    """

    move: str
    slots: tuple[int, ...]
    shard: str
    definitions: str
    state: LeavingState = "copying"
    sequence: int = 0

    @property
    def flags(self) -> bytes:
        """Per slot 1 if it leaves."""
        return flags_of(self.slots)


@dataclass(frozen=True, slots=True)
class Arriving:
    """Slots that arrive from `shard`.

    `through`: the last sequence of the source that is here; `served`, in hex, how far its
    predictions are.  `number`: of the import in the lineage.
    """

    move: str
    slots: tuple[int, ...]
    shard: str
    definitions: str
    number: int
    state: ArrivingState = "importing"
    through: int = 0
    rows: int = 0
    served: str = ""
    predictions: int = 0

    @property
    def flags(self) -> bytes:
        """Per slot 1 if it arrives."""
        return flags_of(self.slots)


def flags_of(slots: tuple[int, ...]) -> bytes:
    """Return, per slot, whether it is among these."""
    flags = bytearray(SLOTS)
    for slot in slots:
        flags[slot] = 1
    return bytes(flags)


def load_leaving(reader: Snapshot | WriteTransaction) -> Leaving | None:
    """Return what leaves, None if nothing does."""
    value = reader.get(Table.META, _LEAVING)
    return None if value is None else Leaving(**_unpack(value))


def load_arriving(reader: Snapshot | WriteTransaction) -> Arriving | None:
    """Return what arrives, None if nothing does."""
    value = reader.get(Table.META, _ARRIVING)
    return None if value is None else Arriving(**_unpack(value))


def store_leaving(txn: WriteTransaction, leaving: Leaving | None) -> None:
    """Note what leaves; None: nothing."""
    _store(txn, _LEAVING, leaving)


def store_arriving(txn: WriteTransaction, arriving: Arriving | None) -> None:
    """Note what arrives; None: nothing."""
    _store(txn, _ARRIVING, arriving)


def to_fields(note: Leaving | Arriving) -> dict[str, Any]:
    """Return a note with its slots as text; 0.1 us per slot."""
    found = {one.name: getattr(note, one.name) for one in fields(note)}  # asdict copies each slot
    return {**found, "slots": format_runs(note.slots)}


def _store(txn: WriteTransaction, key: bytes, note: Leaving | Arriving | None) -> None:
    if note is None:
        txn.delete(Table.META, key)
    else:
        txn.put(Table.META, key, msgpack.packb(to_fields(note)))


def _unpack(value: bytes) -> Mapping[str, Any]:
    found = msgpack.unpackb(value)
    return {**found, "slots": tuple(parse_runs(found["slots"]))}
