"""Area under the ROC curve from ranks, exact with ties, and its standard error by DeLong."""

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Estimate:
    """A metric with its standard error and a two-sided normal confidence interval."""

    value: float
    standard_error: float
    low: float
    high: float

    @classmethod
    def build(
        cls,
        value: float,
        standard_error: float,
        *,
        confidence: float,
        bounds: tuple[float, float] = (-math.inf, math.inf),
    ) -> "Estimate":
        """Return value +- z standard errors, cut to what the metric can be."""
        half = NormalDist().inv_cdf((1 + confidence) / 2) * standard_error
        low, high = max(value - half, bounds[0]), min(value + half, bounds[1])
        return cls(value, standard_error, low, high)

    def to_dict(self) -> dict[str, float]:
        """Return the JSON form."""
        return {
            "value": self.value,
            "standard_error": self.standard_error,
            "low": self.low,
            "high": self.high,
        }


def midranks(values: Floats) -> Floats:
    """Return ranks from 1, ties sharing their mean rank; O(n log n).

    >>> midranks(np.array([3.0, 1.0, 3.0]))
    array([2.5, 1. , 2.5])
    """
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    ranks: Floats = (last - (counts - 1) / 2)[inverse]
    return ranks


def auc(labels: Floats, scores: Floats) -> float | None:
    """Return P(score of a 1 > score of a 0), ties counting half; None where a class is absent.

    `labels` 0 or 1, `scores` without NaN.  The Mann-Whitney statistic from midranks.

    >>> auc(np.array([0.0, 1.0, 1.0]), np.array([0.2, 0.2, 0.9]))
    0.75
    """
    positive = labels == 1
    ones, zeros = int(positive.sum()), int((~positive).sum())
    if not ones or not zeros:
        return None
    rank_sum = float(midranks(scores)[positive].sum())
    return (rank_sum - ones * (ones + 1) / 2) / (ones * zeros)


def auc_estimate(labels: Floats, scores: Floats, *, confidence: float = 0.95) -> Estimate | None:
    """Return the AUC with DeLong's interval, cut to [0, 1]; None below 2 rows of a class.

    DeLong, DeLong, Clarke-Pearson 1988, in the midrank form of Sun and Xu 2014: O(n log n).
    """
    if _smallest_class(labels) <= 1:
        return None
    of_ones, of_zeros = _placements(labels, scores)
    error = math.sqrt(_variance(of_ones) + _variance(of_zeros))
    return Estimate.build(float(of_ones.mean()), error, confidence=confidence, bounds=(0.0, 1.0))


def auc_difference(
    labels: Floats, challenger: Floats, champion: Floats, *, confidence: float = 0.95
) -> Estimate | None:
    """Return AUC(challenger) - AUC(champion) on the same rows; None below 2 rows of a class.

    DeLong's paired interval: what both find hard cancels out, so it is far narrower than the
    intervals of the two apart.
    """
    if _smallest_class(labels) <= 1:
        return None
    pairs = zip(_placements(labels, challenger), _placements(labels, champion), strict=True)
    of_ones, of_zeros = (mine - theirs for mine, theirs in pairs)
    error = math.sqrt(_variance(of_ones) + _variance(of_zeros))
    return Estimate.build(float(of_ones.mean()), error, confidence=confidence, bounds=(-1.0, 1.0))


def roc_curve(labels: Floats, scores: Floats, *, points_max: int = 200) -> tuple[Floats, Floats]:
    """Return false and true positive rates from (0, 0) to (1, 1), a point per distinct score.

    Both classes must be present.  Beyond `points_max` an even choice of the points, ends kept; the
    area under all of them, by trapezoids, is the AUC.
    """
    order = np.argsort(-scores, kind="stable")
    ones = np.cumsum(labels[order] == 1)
    ends = np.append(np.flatnonzero(np.diff(scores[order])), len(scores) - 1)
    true = np.concatenate([[0.0], ones[ends] / ones[-1]])
    false = np.concatenate([[0.0], (ends + 1 - ones[ends]) / (len(scores) - ones[-1])])
    shown = np.unique(np.linspace(0, len(true) - 1, points_max).astype(int))
    return false[shown], true[shown]


def _placements(labels: Floats, scores: Floats) -> tuple[Floats, Floats]:
    """Return for each 1 the share of 0s below it, for each 0 the share of 1s above it."""
    positive = labels == 1
    ones, zeros = scores[positive], scores[~positive]
    ranks = midranks(scores)
    below = (ranks[positive] - midranks(ones)) / len(zeros)
    above = 1 - (ranks[~positive] - midranks(zeros)) / len(ones)
    return below, above


def _variance(values: Floats) -> float:
    """Return the variance of the mean."""
    return float(values.var(ddof=1)) / len(values)


def _smallest_class(labels: Floats) -> int:
    ones = int((labels == 1).sum())
    return min(ones, len(labels) - ones)
