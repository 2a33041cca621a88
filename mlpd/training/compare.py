"""What a model gains over another on the same rows: what both find hard cancels out."""

import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from mlpd.core.specs import Objective
from mlpd.training.auc import Estimate, Floats, auc_difference
from mlpd.training.evaluate import log_losses, mean_estimate
from mlpd.training.ranking import group_values


def gains(
    objective: Objective,
    labels: Floats,
    challenger: Floats,
    champion: Floats,
    groups: NDArray[np.int64] | None = None,
    *,
    confidence: float = 0.95,
) -> dict[str, Estimate | None]:
    """Return how much better the challenger is by each metric: above 0 is better for all of them.

    `challenger` and `champion`: scores [n, K] of the same rows.  binary: auc (DeLong's paired
    interval), log_loss, brier; multiclass: accuracy, log_loss, brier; regression: mae, mse;
    ranking: ndcg@10, map@10, mrr, by group.  All but auc are means of differences row by row (or
    group by group) with their normal interval.
    """
    if groups is not None:
        mine, theirs = (group_values(labels, s[:, 0], groups) for s in (challenger, champion))
        return _differences(mine, theirs, confidence)
    merits = _binary if objective == "binary" else _classes
    merits = _numbers if objective == "regression" else merits
    found = _differences(merits(labels, challenger), merits(labels, champion), confidence)
    if objective == "binary":
        sides = challenger[:, 0], champion[:, 0]
        return {"auc": auc_difference(labels, *sides, confidence=confidence), **found}
    return found


def _differences(
    mine: Mapping[str, Floats], theirs: Mapping[str, Floats], confidence: float
) -> dict[str, Estimate | None]:
    ends = (-math.inf, math.inf)
    return {name: mean_estimate(mine[name] - theirs[name], confidence, ends) for name in mine}


def _binary(labels: Floats, scores: Floats) -> dict[str, Floats]:
    chances = scores[:, 0]
    return {"log_loss": -log_losses(labels, chances), "brier": -((chances - labels) ** 2)}


def _numbers(labels: Floats, scores: Floats) -> dict[str, Floats]:
    errors = scores[:, 0] - labels
    return {"mae": -np.abs(errors), "mse": -(errors**2)}


def _classes(labels: Floats, scores: Floats) -> dict[str, Floats]:
    wanted = labels[:, None] == np.arange(scores.shape[1])
    chances = np.where(wanted, scores, 0.0).sum(axis=1)
    return {
        "accuracy": (scores.argmax(axis=1) == labels).astype(np.float64),
        "log_loss": -log_losses(np.ones(len(labels)), chances),
        "brier": -((scores - wanted) ** 2).sum(axis=1),
    }
