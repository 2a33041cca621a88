"""Entities of two tables' rows by one numbering, for joins; in child processes alone."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from mlpd.core.columns import Column
from mlpd.core.specs import EntitySpec
from mlpd.storage.frames import series_of

if TYPE_CHECKING:
    import polars as pl

Codes = NDArray[np.int64]
_CODE = "code"


def shared_codes(
    entity: EntitySpec, events: Mapping[str, Column], spine: Mapping[str, Column]
) -> tuple[Codes, Codes]:
    """Return the codes of two tables' rows, equal for equal keys; for child processes.

    Only entities of the spine have one: rows of others are -1, like those with a null key.  Where
    the columns are a `FrameColumns`, no Python object is made of a key: 0.05 us per row.
    """
    asked, found = (_key_frame(entity, columns) for columns in (spine, events))
    numbered = asked.unique().with_row_index(_CODE)
    return _codes(found, numbered), _codes(asked, numbered)


def _key_frame(entity: EntitySpec, columns: Mapping[str, Column]) -> "pl.DataFrame":
    """Return the key columns, named by their position."""
    import polars as pl  # noqa: PLC0415 - not in the daemon

    series = (series_of(columns, name) for name in entity.columns)
    return pl.DataFrame([key.alias(str(i)) for i, key in enumerate(series)])


def _codes(keys: "pl.DataFrame", numbered: "pl.DataFrame") -> Codes:
    import polars as pl  # noqa: PLC0415 - not in the daemon

    # Nulls match nothing, not even each other.
    found = keys.join(numbered, on=keys.columns, how="left", maintain_order="left")[_CODE]
    return found.cast(pl.Int64).fill_null(-1).to_numpy()
