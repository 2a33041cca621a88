"""Words: what kernels work on, 8 bytes each, seen through an int64 and a float64 array."""

from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from mlpd.core.kernels import device

I8: TypeAlias = NDArray[np.int64]
F8: TypeAlias = NDArray[np.float64]
U1: TypeAlias = NDArray[np.uint8]

nat = np.uint64
"""Marks an index as not negative: numba then leaves out the code for indices from the end, which
made a merge half as long again."""


@device
def copy_words(into: I8, to: int, words: I8, at: int, count: int) -> None:
    """Copy `count` words, from the first on: within one array only towards its front."""
    for i in range(count):
        into[nat(to + i)] = words[nat(at + i)]
