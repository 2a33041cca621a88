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

    @classmethod
    def of_share(cls, hits: int, rows: int, *, confidence: float) -> "Estimate | None":
        """Return hits / rows with Wilson's interval (1927), which holds near 0 and 1, too.

        None without rows.
        """
        if not rows:
            return None
        z = NormalDist().inv_cdf((1 + confidence) / 2)
        p, shrink = hits / rows, 1 + z * z / rows
        centre = (p + z * z / (2 * rows)) / shrink
        half = z / shrink * math.sqrt(p * (1 - p) / rows + z * z / (4 * rows * rows))
        low, high = max(0.0, centre - half), min(1.0, centre + half)
        return cls(p, math.sqrt(p * (1 - p) / rows), low, high)

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


def auc_mean(labels: Floats, scores: Floats, *, confidence: float = 0.95) -> Estimate | None:
    """Return the mean of each class's AUC against all others, with one interval for the mean.

    `labels` class numbers [n], `scores` [n, K].  Classes without a row, or with all of them, are
    left out; None if no class is left.  The standard error is that of the mean over rows of each
    row's influence (LeDell, Petersen, van der Laan 2015), which counts what the classes share; for
    one class against one other it is DeLong's but for terms of 1/n.

    >>> auc_mean(np.array([0.0, 1.0, 2.0]), np.eye(3)).value
    1.0
    """
    sides = [(labels == k, scores[:, k]) for k in range(scores.shape[1])]
    parts = [_influence(mine, score) for mine, score in sides if mine.any() and not mine.all()]
    if not parts:
        return None
    value = float(np.mean([area for area, _ in parts]))
    influence = np.mean([rows for _, rows in parts], axis=0)
    error = float(influence.std(ddof=1)) / math.sqrt(len(labels))
    return Estimate.build(value, error, confidence=confidence, bounds=(0.0, 1.0))


def _influence(positive: NDArray[np.bool_], scores: Floats) -> tuple[float, Floats]:
    """Return an AUC and each row's influence on it, of mean 0: float64 [n]."""
    of_ones, of_zeros = _placements(positive.astype(np.float64), scores)
    area, n = float(of_ones.mean()), len(scores)
    influence = np.empty(n)
    influence[positive] = (of_ones - area) * (n / len(of_ones))
    influence[~positive] = (of_zeros - area) * (n / len(of_zeros))
    return area, influence


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
