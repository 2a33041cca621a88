"""Tombstones: rows that say that an entity has no latest values from their event time on.

They are marked in the bool column `__deleted`, which is there only where a batch has one; see
docs/formats/definitions.md.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from mlpd.core.columns import Column, Columns, DType, concat, height

DELETED = "__deleted"
"""Column of rows on the wire, in the log and in segments; no user's column begins with `__`."""


def deleted_rows(columns: Mapping[str, Column]) -> NDArray[np.bool_] | None:
    """Return which rows are tombstones, bool [n], or None if none is."""
    column = columns.get(DELETED)
    if column is None:
        return None
    deleted: NDArray[np.bool_] = column.values & column.mask()
    return deleted if bool(deleted.any()) else None


def mark_deleted(columns: Columns, deleted: NDArray[np.bool_] | None) -> Columns:
    """Return the columns with this mark and no other."""
    others = {name: column for name, column in columns.items() if name != DELETED}
    return others if deleted is None else {**others, DELETED: Column(DType.BOOL, deleted)}


def concat_events(parts: Sequence[Columns]) -> Columns:
    """Return the rows of events with equal columns one after the other; marks may be in some."""
    names = [name for name in parts[0] if name != DELETED]
    columns = {name: concat(part[name] for part in parts) for name in names}
    marks = [deleted_rows(part) for part in parts]
    if all(mark is None for mark in marks):
        return columns
    filled = (
        np.zeros(height(part), np.bool_) if mark is None else mark
        for part, mark in zip(parts, marks, strict=True)
    )
    return mark_deleted(columns, np.concatenate([*filled]))
