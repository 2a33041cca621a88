"""Horizons: of which sources old history is gone, and from where on reads are still exact."""

import struct
from dataclasses import dataclass

from mlpd.storage.tables import Table
from mlpd.storage.transactions import Snapshot, WriteTransaction

PREFIX = b"horizon/"
"""Before the name of a source in META."""

_HORIZON = struct.Struct("<2q")


@dataclass(frozen=True, slots=True)
class Horizon:
    """What went of a source: rows older than `before_us`, up to and including `sequence`.

    Both their event time and their known time are before `before_us`.
    """

    before_us: int
    sequence: int

    def moved(self, other: "Horizon | None") -> "Horizon":
        """Return the later of two, by each of their fields."""
        if other is None:
            return self
        return Horizon(max(self.before_us, other.before_us), max(self.sequence, other.sequence))


def load_horizons(snapshot: Snapshot | WriteTransaction) -> dict[str, Horizon]:
    """Return the horizons by source; sources of which all is kept have none."""
    rows = snapshot.scan(Table.META, PREFIX, PREFIX[:-1] + bytes([PREFIX[-1] + 1]))
    return {key[len(PREFIX) :].decode(): Horizon(*_HORIZON.unpack(value)) for key, value in rows}


def move_horizon(txn: WriteTransaction, source: str, horizon: Horizon) -> None:
    """Note what goes of a source, in the transaction that lets it go; never moves back."""
    found = horizon.moved(load_horizons(txn).get(source))
    txn.put(Table.META, PREFIX + source.encode(), _HORIZON.pack(found.before_us, found.sequence))
