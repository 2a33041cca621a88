"""Where the rows of one view lie: found slot by slot, in small steps that can be resumed."""

from mlpd.core.hashing import SLOTS
from mlpd.storage.tables import Table
from mlpd.storage.transactions import Snapshot

_PREFIX_BYTES = 6
"""Slot and view id: what keys of ONLINE begin with."""


def find_rows(
    snapshot: Snapshot, view_id: int, slot: int, *, rows_max: int, seeks_max: int
) -> tuple[list[bytes], int | None]:
    """Return up to `rows_max` keys of the view from `slot` on, and the slot to go on at.

    None: there are no more.  A slot that isn't through comes again: its first keys are expected to
    be gone by then.  Slots without a row of any view are jumped over; at most `seeks_max` seeks of
    about 8 us each.
    """
    keys: list[bytes] = []
    for _ in range(seeks_max):
        if slot >= SLOTS:
            return keys, None
        prefix = slot.to_bytes(2, "big") + view_id.to_bytes(4, "big")
        for key, _ in snapshot.scan(Table.ONLINE, prefix):
            if key[:_PREFIX_BYTES] != prefix:
                slot = _next_slot(key, view_id, slot)
                break
            if len(keys) == rows_max:
                return keys, slot
            keys.append(key)
        else:
            return keys, None  # the end of the table
    return keys, slot


def _next_slot(beyond: bytes, view_id: int, slot: int) -> int:
    """Return the next slot that may hold a row of the view, given the key behind its range."""
    found_slot = int.from_bytes(beyond[:2], "big")
    found_view = int.from_bytes(beyond[2:_PREFIX_BYTES], "big")
    return found_slot if found_slot > slot and found_view <= view_id else found_slot + 1
