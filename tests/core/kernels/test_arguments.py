from typing import Any

import numpy as np
import pytest

from mlpd.core.errors import DefinitionError
from mlpd.core.kernels import Kernels, kernel, parse_signature


def read_only(array: np.ndarray) -> np.ndarray:
    array.flags.writeable = False
    return array


def unaligned() -> np.ndarray:
    return np.frombuffer(bytearray(17), dtype=np.uint8)[1:].view(np.float64)


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        (np.zeros(3, dtype=np.float32), "an array of float32"),
        (np.zeros(3, dtype=">f8"), "an array of >f8"),
        (np.zeros(6)[::2], "an array that is strided"),
        (np.zeros((2, 2)), "an array of 2 dimensions"),
        (read_only(np.zeros(3)), "an array that is read-only"),
        (unaligned(), "an array that is unaligned"),
        ([0.0, 0.0], "a list"),
        (None, "a NoneType"),
    ],
)
def test_a_wrong_array_is_refused_by_name(kernels: Kernels, value: Any, problem: str) -> None:
    with pytest.raises(TypeError, match=rf"'copied' wants f8\[\] for 'out' but got {problem};"):
        kernels.copied(np.zeros(1), value)


def test_a_const_array_may_be_read_only(kernels: Kernels) -> None:
    assert kernels.running_sum(read_only(np.ones(3))) == 3.0


def test_the_number_of_arguments_is_checked(kernels: Kernels) -> None:
    with pytest.raises(TypeError, match="takes 2 arguments, not 1; it is declared"):
        kernels.copied(np.zeros(1))


@pytest.mark.parametrize("value", [1.0, "1", None, np.float64(1)])
def test_an_integer_must_be_one(kernels: Kernels, value: Any) -> None:
    with pytest.raises(TypeError):
        kernels.narrowed(value)


@pytest.mark.parametrize("value", [2**63, -(2**63) - 1])
def test_an_integer_must_fit(kernels: Kernels, value: int) -> None:
    with pytest.raises(TypeError, match="doesn't fit into int64"):
        kernels.narrowed(value)


@pytest.mark.parametrize("value", ["1.5", None, [1.5], 1j])
def test_a_float_must_be_a_number(kernels: Kernels, value: Any) -> None:
    with pytest.raises(TypeError, match="expected a float"):
        kernels.halved(value)


def test_numpy_scalars_are_welcome(kernels: Kernels) -> None:
    assert kernels.narrowed(np.int32(7)) == 7
    assert kernels.halved(np.float32(3)) == 1.5
    assert kernels.halved(3) == 1.5


def test_a_bool_must_be_one(kernels: Kernels) -> None:
    with pytest.raises(TypeError, match="expected a bool"):
        kernels.inverted(1)


@pytest.mark.parametrize(
    ("types", "returns", "message"),
    [
        ("f8[], f9", None, "unknown type 'f9'"),
        ("f8[][], i8", None, r"unknown type 'f8\[\]'"),
        ("f8[]", None, "2 arguments but 1 types"),
        ("f8[], i8", "f8[]", r"unknown type 'f8\[\]'"),
        ("const i8, i8", None, "'const' is for arrays"),
    ],
)
def test_a_wrong_signature_is_refused(types: str, returns: str | None, message: str) -> None:
    with pytest.raises(DefinitionError, match=message) as caught:
        parse_signature("fold", ("values", "n"), types, returns)
    assert caught.value.code == "kernel_signature"


def test_a_declared_function_stays_an_ordinary_one() -> None:
    @kernel("i8, i8", returns="i8")
    def add(a: int, b: int) -> int:
        return a + b

    assert add(2, 3) == 5
    assert (
        str(parse_signature("f", ("a", "b"), " const f8[] ,i8 ", "f8")) == "(const f8[], i8) -> f8"
    )
