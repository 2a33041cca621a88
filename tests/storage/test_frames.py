"""Columns become series and come back, bit for bit; users' Arrow lists are read alike."""

import io
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlpd.core.columns import Column, DType
from mlpd.core.convert import column_of
from mlpd.core.dtypes import SCALARS, list_of
from mlpd.daemon.offline import from_series
from mlpd.http.batches import read_arrow, read_series
from mlpd.storage.frames import polars_type, to_series

BITS = {DType.FLOAT32: np.uint32, DType.FLOAT64: np.uint64}
VALUES: dict[DType, st.SearchStrategy[Any]] = {
    DType.BOOL: st.booleans(),
    DType.INT64: st.integers(-(2**63), 2**63 - 1),
    DType.FLOAT32: st.floats(width=32),
    DType.FLOAT64: st.floats(),
    DType.STRING: st.text(st.characters(exclude_categories=["Cs"]), max_size=3),
    DType.BYTES: st.binary(max_size=3),
    DType.TIMESTAMP: st.integers(-(10**15), 10**15),
}
TYPES = [*map(list_of, SCALARS), *(DType(f"vector[{t}, {n}]") for t in BITS for n in (1, 3))]


@st.composite
def columns(draw: st.DrawFn) -> Column:
    dtype = draw(st.sampled_from(TYPES))
    assert dtype.element is not None
    least, most = dtype.length or 0, dtype.length or 3
    lists = st.lists(VALUES[dtype.element], min_size=least, max_size=most)
    return column_of(dtype, draw(st.lists(st.none() | lists, max_size=6)))


def same(found: Any, wanted: Column) -> None:
    assert isinstance(found, Column)
    assert found.dtype is wanted.dtype
    assert found.values.tolist() == wanted.values.tolist()
    assert found.mask().tolist() == wanted.mask().tolist()


@given(columns())
def test_lists_survive_polars(column: Column) -> None:
    series = to_series("x", column)
    assert (series.name, series.dtype) == ("x", polars_type(column.dtype))
    assert len(series) == len(column)
    same(from_series(series, column.dtype), column)


@given(columns())
def test_lists_survive_arrow_and_are_taken_whole(column: Column) -> None:
    buffer = io.BytesIO()
    pl.DataFrame([to_series("x", column)]).write_ipc_stream(buffer)
    same(read_series(read_arrow(buffer.getvalue())["x"], column.dtype), column)


@given(columns())
def test_slices_of_lists_are_those_of_the_values(column: Column) -> None:
    series, half = to_series("x", column), len(column) // 2
    same(from_series(series[half:], column.dtype), column.take(slice(half, None)))
    same(from_series(series.reverse(), column.dtype), column.take(slice(None, None, -1)))


@pytest.mark.parametrize("inner", [pl.Int8, pl.Int16, pl.Int32, pl.Int64])
def test_narrow_integers_are_widened(inner: Any) -> None:
    series = pl.Series("x", [[1, -1], None, []], dtype=pl.List(inner))
    found = read_series(series, DType("list[int64]"))
    same(found, column_of(DType("list[int64]"), [[1, -1], None, []]))


def test_float32_is_widened_exactly_and_float64_is_checked_before_it_is_narrowed() -> None:
    tenth = float(np.float32(0.1))
    series = pl.Series("x", [[0.1]], dtype=pl.List(pl.Float32))
    same(read_series(series, DType("list[float64]")), column_of(DType("list[float64]"), [[tenth]]))
    assert read_series(pl.Series("x", [[1e300]]), DType("list[float32]")) == [[1e300]]
