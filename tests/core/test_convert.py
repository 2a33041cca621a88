"""Python values become columns exactly, or the first wrong one is named."""

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlpd.core.columns import DType
from mlpd.core.convert import bytes_text, column_of, convert_value
from mlpd.core.errors import ValidationError

BIG = 2**53 + 1


@pytest.mark.parametrize(
    ("dtype", "values"),
    [
        (DType.INT64, [BIG, None, -(2**63), 2**63 - 1]),
        (DType.FLOAT64, [0.1, -0.0, math.inf, None]),
        (DType.FLOAT32, [0.5, math.inf, -math.inf, None]),
        (DType.BOOL, [True, False, None]),
        (DType.STRING, ["", "é\x00", None, "\U0001f600"]),
        (DType.BYTES, [b"", b"\xff\x00", None]),
        (DType("list[int64]"), [[BIG, -(2**63)], None, []]),
        (DType("list[float64]"), [[0.1, -0.0, math.nan], [], None]),
        (DType("list[string]"), [None, ["a\x00", "", "\U0001f600"]]),
        (DType("list[bytes]"), [[b"", b"\x00"], []]),
        (DType("list[bool]"), [[True, False], None]),
        (DType("vector[float32, 2]"), [[0.5, math.nan], None]),
    ],
)
def test_values_are_kept_exactly(dtype: DType, values: list[Any]) -> None:
    column = column_of(dtype, values)
    assert [repr(v) for v in column.to_list()] == [repr(v) for v in values]
    assert column.values.dtype == dtype.numpy


def test_integers_in_a_float_column_are_floats() -> None:
    assert column_of(DType.FLOAT64, [1, 2**80]).to_list() == [1.0, float(2**80)]


def test_nan_is_a_value_and_none_is_not() -> None:
    column = column_of(DType.FLOAT64, [math.nan, None])
    assert column.mask().tolist() == [True, False]
    assert math.isnan(column.values[0])


def test_times_are_what_parse_time_takes() -> None:
    column = column_of(DType.TIMESTAMP, ["1970-01-01T00:00:01Z", 5, None])
    assert column.to_list() == [1_000_000, 5, None]


@pytest.mark.parametrize(
    ("dtype", "wrong"),
    [
        (DType.INT64, True),
        (DType.INT64, 1.0),
        (DType.INT64, 2**63),
        (DType.INT64, "1"),
        (DType.FLOAT64, "1.0"),
        (DType.FLOAT64, False),
        (DType.FLOAT64, 10**400),
        (DType.FLOAT32, 1e300),
        (DType.FLOAT32, 10**400),
        (DType.BOOL, 1),
        (DType.STRING, b"a"),
        (DType.STRING, "a\ud800"),
        (DType.STRING, {"a": 1}),
        (DType.BYTES, "a"),
        (DType("list[int64]"), 1),
        (DType("list[int64]"), "12"),
        (DType("list[int64]"), [1, True]),
        (DType("list[float32]"), [0.5, 1e300]),
        (DType("list[string]"), ["a", "\ud800"]),
        (DType("list[bool]"), [[True]]),
        (DType("vector[float32, 1]"), [None]),
        (DType("vector[float32, 1]"), ["1"]),
    ],
)
def test_the_first_wrong_value_is_named(dtype: DType, wrong: Any) -> None:
    goods: dict[DType, Any] = {DType.STRING: "ä", DType.BYTES: b"", DType.BOOL: True}
    good = [] if dtype.element else goods.get(dtype, 1)
    if dtype.length is not None:
        good = [0.5] * dtype.length
    with pytest.raises(ValidationError) as refused:
        column_of(dtype, [good, None, wrong, wrong], "column 'c'")
    assert refused.value.code == ("null_element" if wrong == [None] else "wrong_type")
    assert refused.value.details["index"] == 2
    assert "column 'c'" in refused.value.message
    assert str(dtype) in refused.value.message


@given(st.binary())
def test_bytes_may_come_as_text(value: bytes) -> None:
    text = bytes_text(value)
    assert column_of(DType.BYTES, [text, None, value]).to_list() == [value, None, value]
    assert column_of(DType.BYTES, [f"0x{text[2:].upper()}"]).to_list() == [value]
    assert column_of(DType("list[bytes]"), [[text, value]]).to_list() == [[value, value]]
    assert column_of(DType.STRING, [text]).to_list() == [text]


@pytest.mark.parametrize(
    "text", ["0x0", "0X00", "00", "0x0g", "0x 00", "", "0x00\n", "0x\u0660\u0660"]
)
def test_text_that_is_no_bytes_is_refused_with_how_to_write_them(text: str) -> None:
    with pytest.raises(ValidationError) as refused:
        column_of(DType.BYTES, [None, text])
    assert (refused.value.code, refused.value.details["index"]) == ("wrong_type", 1)
    assert "0x" in refused.value.hint


@pytest.mark.parametrize("wrong", ["2013-01-01T00:00:00", "soon", 1.5])
def test_a_wrong_time_is_named(wrong: object) -> None:
    with pytest.raises(ValidationError) as refused:
        column_of(DType.TIMESTAMP, [0, wrong])
    assert refused.value.details["index"] == 1


def test_one_value_is_converted_as_its_column_would() -> None:
    assert convert_value(DType.FLOAT64, 1, "x") == 1.0
    assert convert_value(DType.STRING, None, "x") is None
    with pytest.raises(ValidationError):
        convert_value(DType.INT64, "1", "x")


@pytest.mark.parametrize(
    ("dtype", "wrong", "code"),
    [
        ("vector[float64, 2]", [0.5], "wrong_length"),
        ("vector[float64, 2]", [], "wrong_length"),
        ("list[int64]", [1, None], "null_element"),
        ("list[int64]", [0] * 8193, "list_too_long"),
        ("list[string]", ["a" * 65_536], "list_too_long"),
        ("list[timestamp]", ["2013-01-01T00:00:00"], "naive_time"),
    ],
)
def test_a_list_that_can_not_be_is_named(dtype: str, wrong: list[Any], code: str) -> None:
    good = [0.5, 1.5] if dtype.startswith("vector") else []
    with pytest.raises(ValidationError) as refused:
        column_of(DType(dtype), [good, None, wrong, wrong], "column 'c'")
    assert (refused.value.code, refused.value.details["index"]) == (code, 2)
    assert dtype in refused.value.message
    assert "row 2" in refused.value.message
    assert refused.value.hint


def test_the_longest_list_is_taken() -> None:
    assert column_of(DType("list[float64]"), [[0.5] * 8192]).to_list() == [[0.5] * 8192]
