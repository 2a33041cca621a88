"""Columns as polars frames and back, for child processes only: polars is imported on use."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mlpd.core.columns import Column, Columns, DType, concat
from mlpd.storage.log import LogRecord
from mlpd.storage.segments import EVENT_TIME, KNOWN_TIME, SEQUENCE

if TYPE_CHECKING:
    import polars as pl


def polars_type(dtype: DType) -> "pl.DataType":
    """Return the polars (and Parquet) type of a column; a timestamp is Datetime("us", "UTC")."""
    import polars as pl  # noqa: PLC0415 - not in the daemon

    types: dict[DType, Any] = {
        DType.BOOL: pl.Boolean(),
        DType.INT64: pl.Int64(),
        DType.FLOAT32: pl.Float32(),
        DType.FLOAT64: pl.Float64(),
        DType.STRING: pl.String(),
        DType.BYTES: pl.Binary(),
        DType.TIMESTAMP: pl.Datetime("us", "UTC"),
    }
    found: pl.DataType = types[dtype]
    return found


def to_series(name: str, column: Column) -> "pl.Series":
    """Return the column as a series: its nulls are nulls, NaN stays NaN."""
    import polars as pl  # noqa: PLC0415 - not in the daemon

    dtype = polars_type(column.dtype)
    if not column.dtype.is_numeric:
        return pl.Series(name, column.to_list(), dtype=dtype)
    series = pl.Series(name, column.values)
    if column.valid is not None:
        mask = pl.Series(column.valid)
        series = series.zip_with(mask, pl.Series([None], dtype=series.dtype))
    return series.cast(dtype)


def records_frame(records: Sequence[LogRecord], decoded: Sequence[Columns]) -> "pl.DataFrame":
    """Return the rows of records with one schema, in log order, after the three `__` columns.

    `decoded`: the columns of each.
    """
    import polars as pl  # noqa: PLC0415 - not in the daemon

    return pl.DataFrame(
        [
            pl.Series(EVENT_TIME, np.concatenate([r.event_us for r in records])),
            pl.Series(KNOWN_TIME, np.concatenate([r.known_us for r in records])),
            pl.Series(SEQUENCE, np.concatenate([r.sequences() for r in records])),
            *(to_series(name, concat(c[name] for c in decoded)) for name in decoded[0]),
        ]
    )


def schema_of(columns: Columns) -> tuple[tuple[str, DType], ...]:
    """Return names and types of columns, in order."""
    return tuple((name, column.dtype) for name, column in columns.items())
