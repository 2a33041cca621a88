"""Python values become columns exactly, or the first wrong one is named."""

import math
from typing import Any

import pytest

from mlpd.core.columns import DType
from mlpd.core.convert import column_of, convert_value
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
    ],
)
def test_the_first_wrong_value_is_named(dtype: DType, wrong: Any) -> None:
    good = {DType.STRING: "ä", DType.BYTES: b"", DType.BOOL: True}.get(dtype, 1)
    with pytest.raises(ValidationError) as refused:
        column_of(dtype, [good, None, wrong, wrong], "column 'c'")
    assert refused.value.code == "wrong_type"
    assert refused.value.details["index"] == 2
    assert "column 'c'" in refused.value.message
    assert str(dtype) in refused.value.message


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
