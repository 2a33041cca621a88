"""Columns survive their byte form, bit for bit."""

import math
from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlpd.core.columns import Column, Columns, DType, concat, decode_columns, encode_columns, height
from mlpd.core.convert import column_of
from mlpd.core.dtypes import list_of
from mlpd.core.errors import ValidationError

VALUES: dict[DType, st.SearchStrategy[Any]] = {
    DType.BOOL: st.booleans(),
    DType.INT64: st.integers(-(2**63), 2**63 - 1),
    DType.FLOAT32: st.floats(width=32),
    DType.FLOAT64: st.floats(),
    DType.STRING: st.text(st.characters(exclude_categories=["Cs"])),
    DType.BYTES: st.binary(),
    DType.TIMESTAMP: st.integers(-(10**15), 10**15),
}
VALUES |= {list_of(dtype): st.lists(values, max_size=5) for dtype, values in VALUES.items()}
VALUES |= {
    DType(f"vector[{element}, {n}]"): st.lists(VALUES[element], min_size=n, max_size=n)
    for element in (DType.FLOAT32, DType.FLOAT64)
    for n in (1, 3)
}


@st.composite
def tables(draw: st.DrawFn) -> Columns:
    n = draw(st.integers(0, 20))
    dtypes = draw(st.lists(st.sampled_from(list(VALUES)), max_size=8))
    found = {}
    for i, dtype in enumerate(dtypes):
        values = st.one_of(st.none(), VALUES[dtype]) if draw(st.booleans()) else VALUES[dtype]
        found[f"c{i}"] = column_of(dtype, draw(st.lists(values, min_size=n, max_size=n)))
    return found


def bits(column: Column) -> list[Any]:
    return [
        v.hex() if isinstance(v, float) and not math.isnan(v) else repr(v) for v in column.to_list()
    ]


@given(tables())
def test_columns_survive_their_byte_form(columns: Columns) -> None:
    decoded = decode_columns(encode_columns(columns))
    assert list(decoded) == list(columns)
    assert height(decoded) == height(columns)
    for name, column in columns.items():
        assert decoded[name].dtype is column.dtype
        assert decoded[name].values.dtype == column.values.dtype
        assert bits(decoded[name]) == bits(column)


@given(tables())
def test_equal_columns_have_equal_bytes(columns: Columns) -> None:
    assert encode_columns(decode_columns(encode_columns(columns))) == encode_columns(columns)


def test_the_byte_form_is_as_described() -> None:
    columns = {
        "k": column_of(DType.INT64, [1, None, -1]),
        "flag": column_of(DType.BOOL, [True, False, True]),
        "text": column_of(DType.STRING, ["a", None, ""]),
    }
    n, parts = msgpack.unpackb(encode_columns(columns))
    assert n == 3
    minus_one = (-1).to_bytes(8, "little", signed=True)
    assert parts == [
        ["k", "int64", b"\xa0", (1).to_bytes(8, "little") + bytes(8) + minus_one],
        ["flag", "bool", None, b"\xa0"],
        ["text", "string", b"\xa0", ["a", "", ""]],
    ]


def test_numbers_decode_without_a_copy() -> None:
    decoded = decode_columns(encode_columns({"x": column_of(DType.FLOAT64, [1.0, 2.0])}))
    assert not decoded["x"].values.flags.owndata
    assert not decoded["x"].values.flags.writeable


@given(st.lists(tables(), min_size=1, max_size=4))
def test_concatenation_is_that_of_the_values(parts: list[Columns]) -> None:
    columns = [c for part in parts for c in part.values() if c.dtype is DType.INT64]
    if columns:
        wanted = [v for c in columns for v in c.to_list()]
        assert concat(columns).to_list() == wanted


def test_taking_rows_takes_their_validity() -> None:
    column = column_of(DType.INT64, [1, None, 3])
    assert column.take(slice(1, 3)).to_list() == [None, 3]
    assert column.take(np.array([2, 2, 1])).to_list() == [3, 3, None]
    assert column.take(np.array([True, False, True])).to_list() == [1, 3]


@pytest.mark.parametrize("text", ["int32", "", None, 5, "FLOAT64", []])
def test_an_unknown_type_is_refused_with_those_known(text: object) -> None:
    with pytest.raises(ValidationError) as refused:
        DType.parse(text, "column 'x'")
    assert refused.value.code == "unknown_type"
    assert "timestamp" in refused.value.hint
