"""Kernels for the tests: each also runs as plain Python, which is the reference."""

import math
from typing import Any

import numpy as np
import numpy.typing as npt
from sample_helpers import SCALE, add_twice, two_sum

from mlpd.core.kernels import kernel

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]


@kernel("const f8[], f8[], i8, f8[]", returns="i8")
def fold(values: Floats, out: Floats, n: int, state: Floats) -> int:
    total, error = state[0], state[1]
    for i in range(n):
        total, lost = two_sum(total, values[i])
        error += lost
    state[0], state[1] = total, error
    out[0] = total + error
    return n


@kernel("const f8[], f8[]")
def exponentials(values: Floats, out: Floats) -> None:
    for i in range(values.size):
        out[i] = math.exp(values[i])


@kernel("const f8[], const f8[], const f8[], f8[]")
def multiply_add(a: Floats, b: Floats, c: Floats, out: Floats) -> None:
    for i in range(a.size):
        out[i] = a[i] * b[i] + c[i]


@kernel("const f8[]", returns="f8")
def running_sum(values: Floats) -> float:
    total = 0.0
    for i in range(values.size):
        total += values[i]
    return total


@kernel("const i8[], i8[]")
def scaled(values: Integers, out: Integers) -> None:
    for i in range(values.size):
        out[i] = values[i] * SCALE + 1


@kernel("const i8[], i8[]")
def doubled(values: Integers, out: Integers) -> None:
    at = 0
    for i in range(values.size):
        out[at] = 0
        at = add_twice(out, at, values[i])


@kernel("const f8[], f8[]")
def copied(values: Floats, out: Floats) -> None:
    for i in range(values.size):
        out[i] = values[i]


@kernel("const f8[], i8", returns="f8")
def item(values: Floats, i: int) -> float:
    return values[i]


@kernel("b1, u1, i4, u4, b1[], u1[], i4[], u4[]")
def spread_small(a: bool, b: int, c: int, d: int, w: Any, x: Any, y: Any, z: Any) -> None:
    w[0], x[0], y[0], z[0] = a, b, c, d


@kernel("f4, i8, u8, f8, f4[], i8[], u8[], f8[]")
def spread_large(a: float, b: int, c: int, d: float, w: Any, x: Any, y: Any, z: Any) -> None:
    w[0], x[0], y[0], z[0] = a, b, c, d


@kernel("b1", returns="b1")
def inverted(value: bool) -> bool:
    return not value


@kernel("i8", returns="i4")
def narrowed(value: int) -> int:
    return value


@kernel("u1", returns="u1")
def echoed(value: int) -> int:
    return value


@kernel("f4", returns="f4")
def halved(value: float) -> float:
    return value / 2


@kernel("i8")
def guarded(value: int) -> None:
    assert value >= 0
    if value > 100:
        raise ValueError("too large")
