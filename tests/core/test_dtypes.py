"""Types are what their texts say, and equal ones are one object."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from mlpd.core.dtypes import MAX_VECTOR_LENGTH, SCALARS, DType, list_of
from mlpd.core.errors import ValidationError


def test_scalars_are_there_by_name_and_by_text() -> None:
    assert [getattr(DType, dtype.upper()) for dtype in SCALARS] == list(SCALARS)
    assert DType("int64") is DType.INT64
    assert DType.INT64 == "int64"
    assert (DType.INT64.numpy, DType.INT64.element, DType.INT64.length) == (np.int64, None, None)
    numeric = {DType.BOOL, DType.INT64, DType.FLOAT32, DType.FLOAT64, DType.TIMESTAMP}
    assert {dtype for dtype in SCALARS if dtype.is_numeric} == numeric


@pytest.mark.parametrize("element", SCALARS)
def test_there_are_lists_of_every_scalar(element: DType) -> None:
    dtype = DType.parse(f"list[ {element} ]", "x")
    assert dtype is list_of(element)
    assert (str(dtype), dtype.element, dtype.length) == (f"list[{element}]", element, None)
    assert not dtype.is_numeric
    assert dtype.numpy == np.dtype(object)


def test_a_vector_has_an_element_and_a_length() -> None:
    dtype = DType("vector[float32,8]")
    assert dtype is DType("vector[ float32, 8 ]")
    assert str(dtype) == "vector[float32, 8]"
    assert (dtype.element, dtype.length) == (DType.FLOAT32, 8)
    assert DType(f"vector[float64, {MAX_VECTOR_LENGTH}]").length == MAX_VECTOR_LENGTH


def test_copies_and_racing_threads_get_the_one_object() -> None:
    dtype = DType("vector[float64, 77]")
    assert copy.deepcopy(dtype) is pickle.loads(pickle.dumps(dtype)) is dtype
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(DType, ["vector[float64, 78]", "vector[float64,78]"] * 500))
    assert {id(dtype) for dtype in found} == {id(found[0])}


@pytest.mark.parametrize(
    "text",
    [
        *("list", "list[]", "list[int32]", "list[list[int64]]", "list[int64", "LIST[int64]"),
        *("vector[float32]", "vector[int64, 3]", "vector[float32, 0]", "vector[float32, -1]"),
        *(f"vector[float32, {MAX_VECTOR_LENGTH + 1}]", "vector[float32, 99999999999]"),
        *("vector[float32, 08]", "vector[float32, \u0663]", "list[int64]\n"),
    ],
)
def test_what_is_no_type_is_refused_with_those_there_are(text: str) -> None:
    with pytest.raises(ValidationError) as refused:
        DType.parse(text, "column 'x'")
    assert refused.value.code == "unknown_type"
    assert "vector[float32 or float64, 1 to 8192]" in refused.value.hint
    with pytest.raises(ValueError, match="is no type"):
        DType(text)
