"""Metrics of several classes against brute force, scipy, and coverage of their intervals."""

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from mlpd.core.errors import ValidationError
from mlpd.training.auc import Estimate, auc_estimate, auc_mean
from mlpd.training.classes import CLASS_SLICE, evaluate_classes


def make(rows: int, classes: int, seed: int, signal: float = 1.0) -> tuple[Any, Any]:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, rows).astype(np.float64)
    raw = rng.normal(size=(rows, classes))
    raw[np.arange(rows), labels.astype(int)] += signal
    scores = np.exp(raw)
    return labels, scores / scores.sum(axis=1, keepdims=True)


def slow_auc(mine: Any, scores: Any) -> float:
    pairs = [(a > b) + (a == b) / 2 for a in scores[mine] for b in scores[~mine]]
    return float(np.mean(pairs))


@given(st.integers(2, 4), st.integers(3, 25), st.integers(0, 10_000))
@settings(max_examples=60)
def test_every_metric_is_its_definition(classes: int, rows: int, seed: int) -> None:
    labels, scores = make(rows, classes, seed)
    scores = np.round(scores, 1)  # ties
    found = evaluate_classes(labels, scores).metrics
    chances = [scores[i, int(k)] for i, k in enumerate(labels)]
    right = [scores[i].tolist().index(max(scores[i])) == k for i, k in enumerate(labels)]
    squares = [
        sum((scores[i, j] - (j == k)) ** 2 for j in range(classes)) for i, k in enumerate(labels)
    ]
    losses = [-math.log(min(max(p, 1e-15), 1 - 1e-15)) for p in chances]
    areas = [
        slow_auc(labels == k, scores[:, k])
        for k in range(classes)
        if 0 < (labels == k).sum() < rows
    ]
    assert found["accuracy"].value == pytest.approx(np.mean(right))  # type: ignore[union-attr]
    assert found["brier"].value == pytest.approx(np.mean(squares))  # type: ignore[union-attr]
    assert found["log_loss"].value == pytest.approx(np.mean(losses))  # type: ignore[union-attr]
    if areas:
        assert found["auc"].value == pytest.approx(np.mean(areas))  # type: ignore[union-attr]
    else:
        assert found["auc"] is None


@pytest.mark.parametrize(("hits", "rows"), [(0, 5), (5, 5), (1, 3), (40, 100), (999, 1000)])
def test_shares_have_wilsons_interval(hits: int, rows: int) -> None:
    found = Estimate.of_share(hits, rows, confidence=0.9)
    assert found is not None
    expected = stats.binomtest(hits, rows).proportion_ci(0.9, method="wilson")
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    assert Estimate.of_share(0, 0, confidence=0.9) is None


def test_one_class_against_one_other_has_delongs_error() -> None:
    labels, scores = make(400, 2, 1)
    one = auc_estimate(labels, scores[:, 1])
    both = auc_mean(labels, scores)
    assert one is not None
    assert both is not None
    assert both.value == pytest.approx(one.value)
    assert both.standard_error == pytest.approx(one.standard_error, rel=1 / 100)


def test_the_mean_auc_covers_the_truth_as_often_as_it_says() -> None:
    """0.95 of 400 intervals: 0.91 to 0.98 would be seen by chance once in 10,000 times."""
    labels, scores = make(60_000, 3, 0)
    truth = auc_mean(labels, scores)
    assert truth is not None
    inside = 0
    for seed in range(1, 401):
        found = auc_mean(*make(150, 3, seed))
        assert found is not None
        inside += found.low <= truth.value <= found.high
    assert 0.91 < inside / 400 < 0.985


def test_classes_stand_beside_the_slices_and_calibration_is_of_the_chosen() -> None:
    labels, scores = make(500, 3, 4)
    places = np.array(["x", "y"])[np.arange(500) % 2]
    found = evaluate_classes(labels, scores, slices={"place": places})
    assert found.slices["place"].keys() == {"x", "y"}
    mine, said = labels == 2, scores.argmax(axis=1) == 2
    part = found.slices[CLASS_SLICE]["2"]
    assert part.rows == mine.sum()
    assert part.metrics["recall"].value == (mine & said).sum() / mine.sum()  # type: ignore[union-attr]
    assert part.metrics["precision"].value == (mine & said).sum() / said.sum()  # type: ignore[union-attr]
    right = scores.argmax(axis=1) == labels
    total = sum(b.observed * b.rows for b in found.calibration)
    assert total == pytest.approx(right.sum())


@pytest.mark.parametrize("label", [-1.0, 3.0, 0.5])
def test_a_label_that_is_no_class_is_refused(label: float) -> None:
    labels, scores = make(10, 3, 0)
    labels[4] = label
    with pytest.raises(ValidationError, match="class numbers"):
        evaluate_classes(labels, scores)
