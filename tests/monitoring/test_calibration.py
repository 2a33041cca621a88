"""Calibration, estimates before labels, and concept drift: brute force, scipy, simulations."""

import json
import math
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.optimize import isotonic_regression  # type: ignore[import-untyped]  # ships no types

from mlpd.core.errors import ValidationError
from mlpd.core.isotonic import isotonic
from mlpd.core.time import DAY_US
from mlpd.monitoring.calibration import Calibration, fit_calibration, losses_of
from mlpd.monitoring.estimate import Estimated, estimate_performance
from mlpd.monitoring.loss_drift import ROWS_MIN, DayLoss, judge_losses
from mlpd.monitoring.scores import LabelledScores

Floats = NDArray[np.float64]
SCORE = st.one_of(st.floats(0, 1), st.sampled_from([0.0, 0.25, 0.5, 1.0]))


def measure(scores: Floats, labels: NDArray[np.int64]) -> dict[str, float | None]:
    found = LabelledScores(exact_max=10**9)
    found.record_many(scores, labels)
    whole = found.performance()
    names = ("auc", "log_loss", "brier", "precision", "recall")
    return {name: getattr(whole, name) for name in names}


@given(st.lists(st.tuples(SCORE, st.integers(0, 1)), min_size=1, max_size=60))
def test_isotonic_agrees_with_scipy(rows: list[tuple[float, int]]) -> None:
    scores, labels = (np.array(column, np.float64) for column in zip(*rows, strict=True))
    knots, chances = isotonic(scores, labels)
    assert (np.diff(knots) > 0).all()
    assert (np.diff(chances) >= 0).all()
    distinct, at = np.unique(scores, return_inverse=True)
    weights = np.bincount(at)
    means = np.bincount(at, labels) / weights
    expected = isotonic_regression(means, weights=weights).x
    assert np.interp(distinct, knots, chances) == pytest.approx(expected, abs=1e-9)


@given(st.lists(st.tuples(SCORE, st.floats(0, 1)), min_size=2, max_size=7))
@settings(max_examples=60)
def test_estimates_are_expectations_over_all_labels(rows: list[tuple[float, float]]) -> None:
    scores, chances = (np.array(column) for column in zip(*rows, strict=True))
    found = estimate_performance(scores, chances)
    wins = pairs = log_loss = brier = 0.0
    for labels in product((0, 1), repeat=len(rows)):
        chance = math.prod(p if y else 1 - p for (_, p), y in zip(rows, labels, strict=True))
        measured = measure(scores, np.array(labels))
        ones = sum(labels)
        pairs += chance * ones * (len(rows) - ones)
        wins += chance * (measured["auc"] or 0.0) * ones * (len(rows) - ones)
        log_loss += chance * (measured["log_loss"] or 0.0)
        brier += chance * (measured["brier"] or 0.0)
    assert found.log_loss is not None
    assert found.brier is not None
    assert found.log_loss.value == pytest.approx(log_loss, abs=1e-6)
    assert found.brier.value == pytest.approx(brier, abs=1e-9)
    if pairs > 1e-9:
        assert found.auc is not None
        assert found.auc.value == pytest.approx(wins / pairs, abs=1e-6)


def draw(rng: np.random.Generator, rows: int) -> tuple[Floats, Floats]:
    """Return scores that are too sure of themselves, and the chances that they stand for."""
    chances = 1 / (1 + np.exp(-rng.normal(-1, 1.2, rows)))
    return chances**2 / (chances**2 + (1 - chances) ** 2), chances


def test_the_band_holds_the_realized_metrics_where_calibration_holds() -> None:
    rng = np.random.default_rng(0)
    scores, chances = draw(rng, 40_000)
    reference = fit_calibration((rng.random(40_000) < chances).astype(float), scores, "binary")
    missed: dict[str, int] = {}
    for _ in range(200):
        scores, chances = draw(rng, 1_000)
        labels = (rng.random(1_000) < chances).astype(np.int64)
        found = estimate_performance(scores, reference.chances_of(scores))
        for name, realized in measure(scores, labels).items():
            band = getattr(found, name)
            assert isinstance(band, Estimated)
            assert realized is not None
            missed[name] = missed.get(name, 0) + (not band.low <= realized <= band.high)
    assert max(missed.values()) <= 6, missed  # 3 % of 200


def test_an_estimate_sees_other_inputs_and_not_another_concept() -> None:
    rng = np.random.default_rng(1)
    scores, chances = draw(rng, 20_000)
    labels = (rng.random(20_000) < chances).astype(float)
    reference = fit_calibration(labels, scores, "binary")
    usual = estimate_performance(scores, reference.chances_of(scores))
    middle = np.abs(scores - 0.5) < 0.2  # only hard rows come now
    hard = estimate_performance(scores[middle], reference.chances_of(scores[middle]))
    assert usual.auc is not None
    assert hard.auc is not None
    assert hard.auc.high < usual.auc.low
    realized = measure(scores[middle], labels[middle].astype(np.int64))["auc"]
    assert realized is not None
    assert hard.auc.low <= realized <= hard.auc.high


def test_without_rows_or_without_one_class_there_is_no_estimate() -> None:
    none = estimate_performance(np.empty(0), np.empty(0))
    assert (none.rows, none.auc, none.log_loss, none.precision) == (0, None, None, None)
    sure = estimate_performance(np.array([0.2, 0.3, math.nan, 7.0]), np.zeros(4))
    assert (sure.rows, sure.auc, sure.recall) == (2, None, None)


def test_a_calibration_survives_json_and_refuses_another_format() -> None:
    rng = np.random.default_rng(2)
    scores, chances = draw(rng, 500)
    found = fit_calibration((rng.random(500) < chances).astype(float), scores, "binary")
    document = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert Calibration.from_dict(document) == found
    with pytest.raises(ValidationError, match="format"):
        Calibration.from_dict({**document, "format": 2})
    numbers = fit_calibration(np.array([1.0, 2.0]), np.array([1.5, 4.0]), "regression")
    assert (numbers.loss_mean, numbers.scores) == (pytest.approx(2.125), ())


def losses_by_day(
    rng: np.random.Generator, days: int, rows: int, flipped: float = 0.0
) -> list[DayLoss]:
    found = []
    for day in range(days):
        scores, chances = draw(rng, rows)
        labels = (rng.random(rows) < chances).astype(float)
        wrong = rng.random(rows) < (flipped if day >= days // 2 else 0.0)
        losses = losses_of(np.where(wrong, 1 - labels, labels), scores, "binary")
        found.append(DayLoss(day * DAY_US, rows, float(losses.sum()), float((losses**2).sum())))
    return found


def reference_of(rng: np.random.Generator) -> Calibration:
    scores, chances = draw(rng, 5_000)
    return fit_calibration((rng.random(5_000) < chances).astype(float), scores, "binary")


def test_a_model_that_is_as_it_was_is_not_called_worse_however_often_one_looks() -> None:
    rng = np.random.default_rng(3)
    states = [judge_losses(reference_of(rng), losses_by_day(rng, 40, 150)).state
              for _ in range(150)]  # fmt: skip
    assert states.count("ok") >= 147  # 1 % is allowed; 98 % of 150 with room for chance


def test_another_concept_is_found_and_since_when() -> None:
    rng = np.random.default_rng(4)
    found = judge_losses(reference_of(rng), losses_by_day(rng, 40, 500, flipped=0.3))
    assert found.state == "worse"
    assert found.since_us is not None
    assert 20 * DAY_US <= found.since_us <= 28 * DAY_US
    assert [at.rows for at in found.sequence[:2]] == [500, 1000]


def test_few_labels_or_no_reference_are_states_of_their_own() -> None:
    rng = np.random.default_rng(5)
    few = judge_losses(reference_of(rng), losses_by_day(rng, 1, ROWS_MIN - 1))
    assert (few.state, few.sequence) == ("insufficient", ())
    assert judge_losses(None, losses_by_day(rng, 3, 500)).state == "no_reference"
    assert judge_losses(reference_of(rng), []).state == "insufficient"
