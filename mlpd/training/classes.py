"""How good a model of several classes is: metrics with bounds, calibration, by class and slice."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlpd.training.auc import Estimate, Floats, auc_estimate, auc_mean
from mlpd.training.evaluate import (
    Evaluation,
    by_slice,
    calibration_table,
    check_pairs,
    log_losses,
    mean_estimate,
    wrong_scores,
)

CLASS_SLICE = "(class)"
"""The slice that holds each class against all others; no column is called so."""


def evaluate_classes(
    labels: Floats,
    scores: Floats,
    *,
    slices: Mapping[str, NDArray[Any]] | None = None,
    confidence: float = 0.95,
) -> Evaluation:
    """Judge probabilities of classes: accuracy, log_loss, brier, auc; calibration; by slice.

    `labels` class numbers [n] from 0, `scores` float64 [n, K] of rows that sum to 1, n >= 1.  `auc`
    is the mean of each class against all others, `brier` the sum over the classes of the squared
    error (0 to 2).  The chosen class is the one of the largest score, the first of equals; the
    calibration compares its probability with how often it was right.  The slice CLASS_SLICE has for
    each class auc, precision and recall.  Raises ValidationError (`wrong_scores`).
    """
    check_pairs(labels, scores)
    if not (np.isin(labels, range(scores.shape[1])).all() and (scores >= 0).all()):
        raise wrong_scores("labels must be class numbers and scores at least 0")

    def judge(pick: Any) -> dict[str, Estimate | None]:
        return _metrics(labels[pick], scores[pick], confidence)

    right = (scores.argmax(axis=1) == labels).astype(np.float64)
    parts = by_slice(slices or {}, judge, len(labels))
    return Evaluation(
        rows=len(labels),
        metrics=judge(slice(None)),
        calibration=calibration_table(right, scores.max(axis=1)),
        slices={CLASS_SLICE: _by_class(labels, scores, confidence), **parts},
    )


def _metrics(labels: Floats, scores: Floats, confidence: float) -> dict[str, Estimate | None]:
    classes = labels.astype(np.intp)
    chances = scores[np.arange(len(labels)), classes]
    right = int((scores.argmax(axis=1) == classes).sum())
    wanted = np.zeros_like(scores)
    wanted[np.arange(len(labels)), classes] = 1.0
    squares = ((scores - wanted) ** 2).sum(axis=1)
    return {
        "accuracy": Estimate.of_share(right, len(labels), confidence=confidence),
        "log_loss": mean_estimate(log_losses(np.ones(len(labels)), chances), confidence),
        "brier": mean_estimate(squares, confidence, (0.0, 2.0)),
        "auc": auc_mean(labels, scores, confidence=confidence) if len(labels) > 1 else None,
    }


def _by_class(labels: Floats, scores: Floats, confidence: float) -> dict[str, Evaluation]:
    chosen = scores.argmax(axis=1)
    found = {}
    for k in range(scores.shape[1]):
        mine, said = labels == k, chosen == k
        both, rows = int((mine & said).sum()), int(mine.sum())
        found[str(k)] = Evaluation(
            rows,
            {
                "auc": auc_estimate(mine.astype(float), scores[:, k], confidence=confidence),
                "precision": Estimate.of_share(both, int(said.sum()), confidence=confidence),
                "recall": Estimate.of_share(both, rows, confidence=confidence),
            },
        )
    return found
