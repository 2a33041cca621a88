"""Native links for many rows: the same libm `exp`, one value at a time, as LightGBM's own code."""

import math

import numpy as np
from numpy.typing import NDArray

from mlpd.core.kernels import kernel

Floats = NDArray[np.float64]


@kernel("const f8[], f8[], f8")
def sigmoid(raw: Floats, score: Floats, scale: float) -> None:
    """Store 1 / (1 + exp(-scale * x)) of each value of `raw` into `score`, of equal length."""
    for i in range(len(raw)):
        score[i] = 1.0 / (1.0 + math.exp(-scale * raw[i]))


@kernel("const f8[], f8[]")
def exponential(raw: Floats, score: Floats) -> None:
    """Store exp(x) of each value of `raw` into `score`, of equal length."""
    for i in range(len(raw)):
        score[i] = math.exp(raw[i])


@kernel("const f8[], f8[], i8")
def softmax(raw: Floats, score: Floats, outputs: int) -> None:
    """Store the softmax of every `outputs` values of `raw` into `score`, of equal length."""
    for start in range(0, len(raw), outputs):
        largest = raw[start]
        for i in range(start + 1, start + outputs):
            largest = max(largest, raw[i])
        total = 0.0
        for i in range(start, start + outputs):
            score[i] = math.exp(raw[i] - largest)
            total += score[i]
        for i in range(start, start + outputs):
            score[i] /= total
