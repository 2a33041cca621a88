"""Isotonic regression: the monotone step function nearest to 0/1 labels or means."""

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def isotonic(scores: Floats, labels: Floats) -> tuple[Floats, Floats]:
    """Return knots (score, mean label) of the monotone step function nearest to the labels.

    Pool adjacent violators (Ayer, Brunk, Ewing, Reid and Silverman 1955): neighbours whose means
    fall are pooled until none do.  A pool has a knot at its first and one at its last score.

    >>> isotonic(np.array([0.1, 0.2, 0.3, 0.4]), np.array([0.0, 1.0, 0.0, 1.0]))[1].tolist()
    [0.0, 0.5, 0.5, 1.0]
    """
    distinct, at = np.unique(scores, return_inverse=True)
    weights = np.bincount(at).astype(np.float64)
    sums = np.bincount(at, labels)
    pools: list[tuple[float, float, int, int]] = []  # (sum, weight, first, last distinct score)
    for index, (total, weight) in enumerate(zip(sums.tolist(), weights.tolist(), strict=True)):
        pool = (total, weight, index, index)
        while pools and pools[-1][0] * pool[1] >= pool[0] * pools[-1][1]:
            before = pools.pop()
            pool = (before[0] + pool[0], before[1] + pool[1], before[2], pool[3])
        pools.append(pool)
    ends = [(i, total / weight) for total, weight, *span in pools for i in sorted(set(span))]
    return distinct[[i for i, _ in ends]], np.array([mean for _, mean in ends])
