"""Helpers that another kernel module imports."""

import numpy as np
import numpy.typing as npt

from mlpd.core.kernels import device, routine

SCALE = 3


@device
def two_sum(a: float, b: float) -> tuple[float, float]:
    total = a + b
    virtual = total - a
    return total, (a - (total - virtual)) + (b - virtual)


@routine
def add_twice(out: npt.NDArray[np.int64], at: int, value: int) -> int:
    for _ in range(2):
        out[at] += value
    return at + 1
