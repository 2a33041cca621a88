"""Helpers that another kernel module imports."""

from mlpd.core.kernels import device

SCALE = 3


@device
def two_sum(a: float, b: float) -> tuple[float, float]:
    total = a + b
    virtual = total - a
    return total, (a - (total - virtual)) + (b - virtual)
