"""Columns as polars frames and back, for child processes only: polars is imported on use."""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mlpd.core.columns import Column, Columns, DType, concat
from mlpd.core.lists import pack_lists, unpack_lists
from mlpd.storage.log import LogRecord
from mlpd.storage.segments import EVENT_TIME, KNOWN_TIME, SEQUENCE

if TYPE_CHECKING:
    import polars as pl


def polars_type(dtype: DType) -> "pl.DataType":
    """Return the polars (and Parquet) type of a column; a timestamp is Datetime("us", "UTC")."""
    import polars as pl  # noqa: PLC0415 - not in the daemon

    if dtype.element is not None:
        inner = polars_type(dtype.element)
        return pl.List(inner) if dtype.length is None else pl.Array(inner, dtype.length)
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
    if column.dtype.element is not None:
        return _list_series(column, column.dtype.element).rename(name).cast(dtype)
    if not column.dtype.is_numeric:
        return pl.Series(name, column.to_list(), dtype=dtype)
    series = pl.Series(name, column.values)
    if column.valid is not None:
        mask = pl.Series(column.valid)
        series = series.zip_with(mask, pl.Series([None], dtype=series.dtype))
    return series.cast(dtype)


def _list_series(column: Column, element: DType) -> "pl.Series":
    """Return lists as a series, without making a Python object of every element."""
    import polars as pl  # noqa: PLC0415 - not in the daemon

    valid = column.mask()
    flat, lengths = unpack_lists(element, column.values[valid].tolist())
    elements = to_series("", Column(element, flat))
    place = np.arange(len(lengths))
    if column.dtype.length is not None:
        lists = elements.reshape((len(lengths), column.dtype.length))
    else:
        of_list = pl.DataFrame({"list": np.repeat(place, lengths), "element": elements})
        lists = of_list.group_by("list", maintain_order=True).agg("element")["element"]
        lists = lists.append(pl.Series([[]], dtype=lists.dtype))  # what the empty ones are
        place = np.where(lengths > 0, np.cumsum(lengths > 0), len(lists)) - 1
    index = np.full(len(column), -1)
    index[valid] = place
    rows = pl.Series(index)
    return lists.gather(rows.set(rows < 0, None))


def from_series(series: "pl.Series", dtype: DType) -> Column:
    """Return a polars series as a column; null stays null, NaN stays NaN."""
    valid = None if series.null_count() == 0 else series.is_not_null().to_numpy()
    if dtype.element is not None:
        return lists_from(dtype, *explode(series.drop_nulls()), valid)
    if not dtype.is_numeric:
        empty: Any = "" if dtype is DType.STRING else b""
        values = np.empty(len(series), object)
        values[:] = series.fill_null(empty).to_list()
        return Column(dtype, values, valid)
    physical = series.to_physical()
    zero: Any = False if dtype is DType.BOOL else 0
    array = (physical if valid is None else physical.fill_null(zero)).to_numpy()
    return Column(dtype, np.ascontiguousarray(array, dtype.numpy), valid)


def lists_from(
    dtype: DType,
    elements: "pl.Series",
    lengths: NDArray[np.int64],
    valid: NDArray[np.bool_] | None,
) -> Column:
    """Return a column of lists, of which `valid` are there, from what `explode` returns."""
    assert dtype.element is not None
    values = np.full(len(lengths) if valid is None else len(valid), b"", object)
    packed = pack_lists(dtype.element, from_series(elements, dtype.element).values, lengths)
    values[slice(None) if valid is None else valid] = packed
    return Column(dtype, values, valid)


def explode(series: "pl.Series") -> "tuple[pl.Series, NDArray[np.int64]]":
    """Return (elements, lengths) of a series of lists or arrays without nulls."""
    width = getattr(series.dtype, "size", None)  # of an array, a list has none
    if width is not None:
        return series.explode(), np.full(len(series), width, np.int64)
    lengths = series.list.len()
    return series.filter(lengths > 0).explode(), lengths.cast(int).to_numpy()


class FrameColumns(Mapping[str, Column]):
    """The columns of a polars frame by name, each made when it is asked for.

    Most of a join needs no column of texts but its keys, and those are compared in `frame`.
    """

    def __init__(self, frame: "pl.DataFrame", schema: Mapping[str, DType]) -> None:
        self.frame = frame
        self.schema = schema

    def __getitem__(self, name: str) -> Column:
        dtype = self.schema[name]  # KeyError for what isn't there, as of any mapping
        return from_series(self.frame[name], dtype)

    def __contains__(self, name: object) -> bool:
        return name in self.schema

    def take(self, index: "slice | NDArray[np.int64]") -> "FrameColumns":
        """Return the columns with the rows that `index` selects."""
        return FrameColumns(self.frame[index], self.schema)

    def __iter__(self) -> Iterator[str]:
        return iter(self.schema)

    def __len__(self) -> int:
        return len(self.schema)


def series_of(columns: Mapping[str, Column], name: str) -> "pl.Series":
    """Return a column as a series, as it is where it comes from a frame."""
    if isinstance(columns, FrameColumns):
        return columns.frame[name]
    return to_series(name, columns[name])


def events_schema(columns: Mapping[str, DType]) -> "dict[str, pl.DataType]":
    """Return the polars types of a frame of events: three `__` columns, then `columns`."""
    import polars as pl  # noqa: PLC0415 - not in the daemon

    times: dict[str, pl.DataType] = {n: pl.Int64() for n in (EVENT_TIME, KNOWN_TIME, SEQUENCE)}
    return times | {name: polars_type(dtype) for name, dtype in columns.items()}


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
