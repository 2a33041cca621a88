"""How good a model is on held-out rows: metrics with bounds, calibration, the same by slice."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlpd.core.errors import ValidationError
from mlpd.training.auc import Estimate, Floats, auc_estimate

CALIBRATION_BINS = 10
MAX_SLICES = 50
"""Slices shown per column, the largest ones; the other rows are gathered as one slice."""
OTHER, NULL = "(other)", "(null)"
_SMALLEST_PROBABILITY = 1e-15


@dataclass(frozen=True, slots=True)
class CalibrationBin:
    """Rows whose scores lie in [low, high]: what was promised and what came."""

    low: float
    high: float
    rows: int
    mean_score: float
    observed: float

    def to_dict(self) -> dict[str, float]:
        """Return the JSON form."""
        return {
            "low": self.low,
            "high": self.high,
            "rows": self.rows,
            "mean_score": self.mean_score,
            "observed": self.observed,
        }


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Metrics of one set of rows; None where one has no bound (a single row, AUC of one class).

    `slices`: by column, then by value.  Slices carry no calibration and no slices of their own.
    """

    rows: int
    metrics: Mapping[str, Estimate | None]
    calibration: tuple[CalibrationBin, ...] = ()
    slices: Mapping[str, Mapping[str, "Evaluation"]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form; empty parts are left out."""
        document: dict[str, Any] = {
            "rows": self.rows,
            "metrics": {name: m and m.to_dict() for name, m in self.metrics.items()},
        }
        if self.calibration:
            document["calibration"] = [row.to_dict() for row in self.calibration]
        if self.slices:
            document["slices"] = {
                column: {value: part.to_dict() for value, part in parts.items()}
                for column, parts in self.slices.items()
            }
        return document


def evaluate_binary(
    labels: Floats,
    scores: Floats,
    *,
    slices: Mapping[str, NDArray[Any]] | None = None,
    confidence: float = 0.95,
) -> Evaluation:
    """Judge probabilities: auc, log_loss, brier, mean_score, base_rate; calibration; by slice.

    `labels` 0 or 1, `scores` in [0, 1], both float64 [n], n >= 1.  `slices`: a value per row for
    each column to split by.  Log loss takes natural logarithms of probabilities kept 1e-15
    away from 0 and 1.  Raises ValidationError (`wrong_scores`).
    """
    check_pairs(labels, scores)
    if not (np.isin(labels, (0, 1)).all() and ((scores >= 0) & (scores <= 1)).all()):
        raise wrong_scores("labels must be 0 or 1 and scores lie in [0, 1]")

    def judge(pick: Any) -> dict[str, Estimate | None]:
        return _binary_metrics(labels[pick], scores[pick], confidence)

    return Evaluation(
        rows=len(labels),
        metrics=judge(slice(None)),
        calibration=calibration_table(labels, scores),
        slices=by_slice(slices or {}, judge, len(labels)),
    )


def evaluate_regression(
    labels: Floats,
    scores: Floats,
    *,
    slices: Mapping[str, NDArray[Any]] | None = None,
    confidence: float = 0.95,
) -> Evaluation:
    """Judge predictions of a number: rmse, mae, bias (score - label); calibration; by slice.

    The bound of rmse is that of the mean square by the delta method.
    Raises ValidationError (`wrong_scores`).
    """
    check_pairs(labels, scores)

    def judge(pick: Any) -> dict[str, Estimate | None]:
        return _regression_metrics(labels[pick], scores[pick], confidence)

    return Evaluation(
        rows=len(labels),
        metrics=judge(slice(None)),
        calibration=calibration_table(labels, scores),
        slices=by_slice(slices or {}, judge, len(labels)),
    )


def log_losses(labels: Floats, scores: Floats) -> Floats:
    """Return each row's -ln of the probability given to what came."""
    chances = np.where(labels == 1, scores, 1 - scores)
    kept: Floats = np.clip(chances, _SMALLEST_PROBABILITY, 1 - _SMALLEST_PROBABILITY)
    return -np.log(kept)


def calibration_table(
    labels: Floats, scores: Floats, bins: int = CALIBRATION_BINS
) -> tuple[CalibrationBin, ...]:
    """Return at most `bins` bins of about equal counts, in order of score; ties never part."""
    order = np.argsort(scores, kind="stable")
    ranked, outcome = scores[order], labels[order]
    wanted = np.linspace(0, len(ranked), bins + 1).astype(int)[1:-1]
    # A cut moves down to the first row of its tied scores, so that no score is in two bins.
    cuts = np.unique(np.searchsorted(ranked, ranked[wanted]))
    parts = zip(np.split(ranked, cuts), np.split(outcome, cuts), strict=True)
    return tuple(_bin(part, came) for part, came in parts if len(part))


def calibration_error(bins: Sequence[CalibrationBin]) -> float:
    """Return the expected calibration error (ECE): the bins' mean gap, weighted by their rows.

    Naeini, Cooper and Hauskrecht (2015), here with the bins of equal counts of
    `calibration_table`.
    """
    rows = sum(found.rows for found in bins)
    return sum(found.rows * abs(found.mean_score - found.observed) for found in bins) / rows


def _bin(scores: Floats, outcome: Floats) -> CalibrationBin:
    return CalibrationBin(
        low=float(scores[0]),
        high=float(scores[-1]),
        rows=len(scores),
        mean_score=float(scores.mean()),
        observed=float(outcome.mean()),
    )


def _binary_metrics(
    labels: Floats, scores: Floats, confidence: float
) -> dict[str, Estimate | None]:
    def mean(values: Floats, most: float = 1.0) -> Estimate | None:
        return mean_estimate(values, confidence, (0.0, most))

    return {
        "auc": auc_estimate(labels, scores, confidence=confidence),
        "log_loss": mean(log_losses(labels, scores), math.inf),
        "brier": mean((scores - labels) ** 2),
        "mean_score": mean(scores),
        "base_rate": mean(labels),
    }


def _regression_metrics(
    labels: Floats, scores: Floats, confidence: float
) -> dict[str, Estimate | None]:
    errors = scores - labels
    return {
        "rmse": _root(mean_estimate(errors**2, confidence, (0.0, math.inf)), confidence),
        "mae": mean_estimate(np.abs(errors), confidence, (0.0, math.inf)),
        "bias": mean_estimate(errors, confidence, (-math.inf, math.inf)),
    }


def mean_estimate(
    values: Floats, confidence: float, bounds: tuple[float, float] = (0.0, math.inf)
) -> Estimate | None:
    """Return a mean with its normal interval, cut to `bounds`; None below two values."""
    if len(values) <= 1:
        return None
    error = float(values.std(ddof=1)) / math.sqrt(len(values))
    return Estimate.build(float(values.mean()), error, confidence=confidence, bounds=bounds)


def _root(square: Estimate | None, confidence: float) -> Estimate | None:
    if square is None:
        return None
    root = math.sqrt(square.value)
    error = square.standard_error / (2 * root) if root else 0.0
    return Estimate.build(root, error, confidence=confidence, bounds=(0.0, math.inf))


def by_slice(
    slices: Mapping[str, NDArray[Any]],
    judge: Callable[[Any], dict[str, Estimate | None]],
    rows: int,
) -> dict[str, dict[str, Evaluation]]:
    """Return the evaluation of each value of each column; `judge` takes row numbers."""
    found: dict[str, dict[str, Evaluation]] = {}
    for column, values in slices.items():
        if len(values) != rows:
            raise wrong_scores(f"slice column {column!r} has {len(values)} rows, expected {rows}")
        found[column] = {name: Evaluation(len(pick), judge(pick)) for name, pick in _groups(values)}
    return found


def _groups(values: NDArray[Any]) -> Iterator[tuple[str, NDArray[np.intp]]]:
    """Yield each value's name with its row numbers, largest first, the smallest as OTHER."""
    named = np.array([_slice_name(value) for value in values.tolist()])
    names, inverse, counts = np.unique(named, return_inverse=True, return_counts=True)
    order = np.lexsort((np.arange(len(names)), -counts))
    shown = order if len(order) <= MAX_SLICES else order[: MAX_SLICES - 1]
    for index in shown:
        yield str(names[index]), np.flatnonzero(inverse == index)
    if len(shown) < len(order):
        yield OTHER, np.flatnonzero(np.isin(inverse, order[len(shown) :]))


def _slice_name(value: Any) -> str:
    missing = value is None or (isinstance(value, float) and math.isnan(value))
    return NULL if missing else str(value)


def check_pairs(labels: Floats, scores: Floats) -> None:
    """Raise ValidationError (`wrong_scores`) unless there is a finite score for each label."""
    if len(labels) != len(scores) or not len(labels):
        raise wrong_scores(f"{len(labels)} labels and {len(scores)} scores make no pairs")
    if not (np.isfinite(labels).all() and np.isfinite(scores).all()):
        raise wrong_scores("a label or score is NaN or infinite")


def wrong_scores(problem: str) -> ValidationError:
    """Return the error for labels and scores that can't be judged together."""
    return ValidationError(
        f"these scores can't be judged: {problem}",
        code="wrong_scores",
        hint="pass one label and one score per held-out row",
    )
