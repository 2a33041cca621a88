"""The audit's comparison: logged feature vectors against recomputed ones, bit for bit.

No tolerance: a difference of one unit in the last place is a difference.  All NaNs are one value
(their payload carries nothing), but 0.0 and -0.0 are two.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from mlpd.core.errors import ValidationError

MISMATCHES_MAX: Final = 100
"""Mismatches described one by one; the counters go on."""


@dataclass(frozen=True, slots=True)
class Mismatch:
    """One value that differs: of prediction `prediction_id`, in feature `feature`."""

    prediction_id: str
    feature: str
    logged: float
    recomputed: float


@dataclass(frozen=True, slots=True)
class Comparison:
    """What comparing some rows found; `mismatches` holds the first 100 differing values."""

    rows: int
    values: int
    mismatched_rows: int
    mismatched_values: int
    by_feature: dict[str, int]
    mismatches: tuple[Mismatch, ...]


def compare(
    prediction_ids: Sequence[str],
    names: Sequence[str],
    logged: NDArray[np.float64],
    recomputed: NDArray[np.float64],
) -> Comparison:
    """Compare float64 [n, F] as served with [n, F] as recomputed from the log.

    Row i belongs to `prediction_ids[i]`, column j to `names[j]`.  ValidationError unless the shapes
    and dtypes agree.  10 ns per value.
    """
    shape = (len(prediction_ids), len(names))
    for what, matrix in (("logged", logged), ("recomputed", recomputed)):
        if matrix.shape != shape or matrix.dtype != np.float64:
            raise ValidationError(
                f"{what} vectors are {matrix.dtype} {matrix.shape}, expected float64 {shape}"
            )
    differs = canonical_bits(logged) != canonical_bits(recomputed)
    per_feature = differs.sum(axis=0)
    found = np.argwhere(differs)[:MISMATCHES_MAX].tolist()
    return Comparison(
        rows=len(logged),
        values=logged.size,
        mismatched_rows=int(differs.any(axis=1).sum()),
        mismatched_values=int(per_feature.sum()),
        by_feature={
            name: count for name, count in zip(names, per_feature.tolist(), strict=True) if count
        },
        mismatches=tuple(
            Mismatch(prediction_ids[i], names[j], float(logged[i, j]), float(recomputed[i, j]))
            for i, j in found
        ),
    )


def canonical_bits(values: NDArray[np.float64]) -> NDArray[np.int64]:
    """Return the float64s' bits, every NaN as the one that numpy writes."""
    return np.where(np.isnan(values), np.nan, values).view(np.int64)
