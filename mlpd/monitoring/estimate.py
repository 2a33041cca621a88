"""Performance before labels come, estimated from calibrated scores (CBPE).

If scores mean on what is served what they meant on the held-out rows, then the chances that they
stand for say how often the model will have been right.  That sees the effect of other inputs and is
blind to concept drift, where the same input gets another outcome; so it is shown, and alone it
never alerts.  The idea is NannyML's (CBPE); the band is of sampling alone, 3 standard errors.
"""

import math
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from mlpd.monitoring.scores import PROBABILITY_MIN

Floats = NDArray[np.float64]

STANDARD_ERRORS: Final = 3.0
THRESHOLD: Final = 0.5
"""Precision and recall are at this score."""


@dataclass(frozen=True, slots=True)
class Estimated:
    """A metric's expectation, and the band in which the realized one of these rows will lie."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class EstimatedPerformance:
    """Of `rows` scores; None where the chances allow no answer."""

    rows: int
    auc: Estimated | None
    log_loss: Estimated | None
    brier: Estimated | None
    precision: Estimated | None
    recall: Estimated | None


def estimate_performance(scores: Floats, chances: Floats) -> EstimatedPerformance:
    """Return the expected metrics of scores [n] whose labels are 1 with these chances [n].

    Scores that are no probabilities are left out.  One sort: 0.1 s for a million.
    """
    keep = (scores >= 0.0) & (scores <= 1.0)
    scores, chances = scores[keep], chances[keep]
    kept = np.maximum(np.minimum(scores, 1.0), PROBABILITY_MIN)
    other = np.maximum(1.0 - scores, PROBABILITY_MIN)
    called = scores >= THRESHOLD
    hits, positives = float(chances[called].sum()), float(chances.sum())
    return EstimatedPerformance(
        rows=len(scores),
        auc=_auc(scores, chances),
        log_loss=_mean(-np.log(kept), -np.log(other), chances),
        brier=_mean((1.0 - scores) ** 2, scores**2, chances, most=1.0),
        precision=_share(hits, float(called.sum())),
        recall=_share(hits, positives),
    )


def _mean(
    if_one: Floats, if_zero: Floats, chances: Floats, most: float = math.inf
) -> Estimated | None:
    """Return the mean of losses that are one or the other, independently of each other."""
    rows = len(chances)
    if not rows:
        return None
    value = float((chances * if_one + (1.0 - chances) * if_zero).mean())
    variance = float((chances * (1.0 - chances) * (if_one - if_zero) ** 2).sum()) / rows**2
    return _band(value, math.sqrt(variance), most)


def _share(hits: float, rows: float) -> Estimated | None:
    if rows <= 0.0:
        return None
    value = min(1.0, hits / rows)
    return _band(value, math.sqrt(value * (1.0 - value) / rows), 1.0)


def _auc(scores: Floats, chances: Floats) -> Estimated | None:
    """Return expected wins over expected pairs of a one and a zero, ties half, no row with itself.

    The standard error is Hanley and McNeil's (1982).
    """
    _, at = np.unique(scores, return_inverse=True)
    weights = (chances, 1.0 - chances, chances * (1.0 - chances))
    ones, zeros, both = (np.bincount(at, weight) for weight in weights)
    pairs = float(ones.sum() * zeros.sum() - both.sum())
    if pairs <= 0.0:
        return None
    below = np.cumsum(zeros) - zeros
    value = float((ones * (below + zeros / 2) - both / 2).sum()) / pairs
    return _band(value, _auc_error(value, float(ones.sum()), float(zeros.sum())), 1.0)


def _auc_error(auc: float, ones: float, zeros: float) -> float:
    q1, q2 = auc / (2.0 - auc), 2.0 * auc**2 / (1.0 + auc)
    spread = (ones - 1.0) * (q1 - auc**2) + (zeros - 1.0) * (q2 - auc**2)
    return math.sqrt(max(0.0, auc * (1.0 - auc) + spread) / (ones * zeros))


def _band(value: float, error: float, most: float) -> Estimated:
    half = STANDARD_ERRORS * error
    return Estimated(value, max(0.0, value - half), min(most, value + half))
