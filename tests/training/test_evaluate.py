import itertools
import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlpd.core.errors import ValidationError
from mlpd.training.evaluate import (
    MAX_SLICES,
    NULL,
    OTHER,
    Evaluation,
    calibration_table,
    evaluate_binary,
    evaluate_regression,
    log_losses,
)

ROWS = st.lists(
    st.tuples(st.sampled_from([0.0, 1.0]), st.sampled_from([0.0, 0.2, 1.0]) | st.floats(0, 1)),
    min_size=1,
    max_size=60,
)


def value(evaluation: Evaluation, metric: str) -> float:
    estimate = evaluation.metrics[metric]
    assert estimate is not None
    return estimate.value


@given(ROWS)
def test_log_loss_and_brier_are_their_definitions(rows: list[tuple[float, float]]) -> None:
    labels, scores = np.array(rows).T
    losses, squares = [], []
    for label, score in rows:
        given_chance = score if label else 1 - score
        losses.append(-math.log(min(max(given_chance, 1e-15), 1 - 1e-15)))
        squares.append((score - label) ** 2)
    assert log_losses(labels, scores) == pytest.approx(losses, rel=1e-9, abs=1e-12)
    if len(rows) > 1:
        found = evaluate_binary(labels, scores)
        assert value(found, "log_loss") == pytest.approx(math.fsum(losses) / len(rows), rel=1e-9)
        assert value(found, "brier") == pytest.approx(math.fsum(squares) / len(rows), rel=1e-9)
        assert value(found, "base_rate") == pytest.approx(labels.mean())


def test_bounds_are_those_of_a_mean() -> None:
    scores = np.array([0.1, 0.4, 0.8, 0.7])
    labels = np.array([0.0, 1.0, 1.0, 0.0])
    brier = evaluate_binary(labels, scores, confidence=0.95).metrics["brier"]
    squares = np.array([0.01, 0.36, 0.04, 0.49])
    assert brier is not None
    assert brier.standard_error == pytest.approx(squares.std(ddof=1) / 2)
    assert brier.low == 0.0  # cut: a Brier score is not negative
    assert brier.high == pytest.approx(squares.mean() + 1.959963984540054 * brier.standard_error)


@given(ROWS)
def test_calibration_bins_hold_each_row_once_and_part_no_tie(
    rows: list[tuple[float, float]],
) -> None:
    labels, scores = np.array(rows).T
    table = calibration_table(labels, scores)
    assert 1 <= len(table) <= 10
    assert sum(row.rows for row in table) == len(rows)
    for row in table:
        inside = (scores >= row.low) & (scores <= row.high)
        assert inside.sum() == row.rows
        assert row.mean_score == pytest.approx(scores[inside].mean())
        assert row.observed == pytest.approx(labels[inside].mean())
    assert all(one.high < other.low for one, other in itertools.pairwise(table))


def test_distinct_scores_fill_ten_equal_bins() -> None:
    scores = np.random.default_rng(0).permutation(np.linspace(0, 1, 1_000))
    table = calibration_table((scores > 0.5).astype(np.float64), scores)
    assert [row.rows for row in table] == [100] * 10
    assert [row.observed for row in table] == [0.0] * 5 + [1.0] * 5


def test_each_slice_is_the_evaluation_of_its_rows() -> None:
    rng = np.random.default_rng(1)
    labels, scores = rng.integers(0, 2, 300).astype(np.float64), rng.random(300)
    carriers = np.array([["UA", "AA", None][i % 3] for i in range(300)], object)
    found = evaluate_binary(
        labels, scores, slices={"carrier": carriers, "hour": np.arange(300) % 2}
    )
    assert list(found.slices["carrier"]) == [NULL, "AA", "UA"]
    assert list(found.slices["hour"]) == ["0", "1"]
    mine = np.array([c == "AA" for c in carriers])
    assert found.slices["carrier"]["AA"].rows == 100
    alone = evaluate_binary(labels[mine], scores[mine])
    assert found.slices["carrier"]["AA"].metrics == alone.metrics


def test_many_slices_show_the_largest_and_gather_the_rest() -> None:
    sizes = np.arange(1, 81)
    values = np.repeat(sizes, sizes).astype(np.float64)
    values[values == 80] = np.nan
    labels = np.arange(len(values)) % 2 * 1.0
    found = evaluate_binary(labels, np.full(len(values), 0.5), slices={"x": values}).slices["x"]
    assert len(found) == MAX_SLICES
    assert list(found)[:2] == [NULL, "79.0"]
    assert [part.rows for part in found.values()][:-1] == list(range(80, 31, -1))
    assert found[OTHER].rows == sum(range(1, 32))


def test_one_class_or_one_row_leaves_a_metric_open() -> None:
    found = evaluate_binary(np.ones(5), np.full(5, 0.5))
    assert found.metrics["auc"] is None
    assert value(found, "log_loss") == pytest.approx(math.log(2))
    assert set(evaluate_binary(np.ones(1), np.ones(1)).metrics.values()) == {None}


def test_regression_metrics_are_their_definitions() -> None:
    rng = np.random.default_rng(2)
    labels = rng.normal(size=4_000) * 10
    scores = labels + rng.normal(size=4_000) * 3 + 0.5
    found = evaluate_regression(labels, scores, slices={"half": np.arange(4_000) // 2_000})
    errors = scores - labels
    assert value(found, "rmse") == pytest.approx(np.sqrt((errors**2).mean()))
    assert value(found, "mae") == pytest.approx(np.abs(errors).mean())
    assert value(found, "bias") == pytest.approx(errors.mean())
    rmse = found.metrics["rmse"]
    assert rmse is not None
    # The sample deviation of a normal error has the standard error sigma / sqrt(2 n).
    assert rmse.standard_error == pytest.approx(3 / np.sqrt(8_000), rel=0.1)
    assert found.slices["half"]["1"].rows == 2_000
    assert found.calibration == calibration_table(labels, scores)
    assert sum(b.observed * b.rows for b in found.calibration) == pytest.approx(labels.sum())


def test_a_perfect_regression_has_no_error() -> None:
    rmse = evaluate_regression(np.arange(9.0), np.arange(9.0)).metrics["rmse"]
    assert rmse is not None
    assert (rmse.value, rmse.low, rmse.high) == (0.0, 0.0, 0.0)


def test_the_json_form_carries_everything() -> None:
    labels, scores = np.array([0.0, 1.0, 1.0, 0.0]), np.array([0.2, 0.9, 0.4, 0.5])
    found = evaluate_binary(labels, scores, slices={"a": np.array([1, 1, 1, 2])})
    document = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert document["rows"] == 4
    assert document["metrics"]["auc"]["value"] == 0.75
    assert [row["rows"] for row in document["calibration"]] == [1, 1, 1, 1]
    assert document["slices"]["a"]["1"]["rows"] == 3
    assert document["slices"]["a"]["2"]["metrics"]["auc"] is None
    assert "calibration" not in document["slices"]["a"]["1"]


@pytest.mark.parametrize("judge", [evaluate_binary, evaluate_regression])
@pytest.mark.parametrize(
    ("labels", "scores", "slices"),
    [
        ([], [], {}),
        ([1.0], [0.5, 0.5], {}),
        ([1.0, np.nan], [0.5, 0.5], {}),
        ([1.0, 0.0], [0.5, np.inf], {}),
        ([1.0, 0.0], [0.5, 0.5], {"a": np.array([1])}),
    ],
)
def test_scores_that_cannot_be_judged_are_refused(
    judge: Callable[..., Any], labels: list[float], scores: list[float], slices: dict[str, Any]
) -> None:
    with pytest.raises(ValidationError) as refusal:
        judge(np.array(labels), np.array(scores), slices=slices)
    assert refusal.value.code == "wrong_scores"


@pytest.mark.parametrize(("label", "score"), [(2.0, 0.5), (0.5, 0.5), (1.0, 1.1), (1.0, -0.1)])
def test_binary_takes_labels_of_0_and_1_and_probabilities(label: float, score: float) -> None:
    with pytest.raises(ValidationError) as refusal:
        evaluate_binary(np.array([label, 0.0]), np.array([score, 0.5]))
    assert refusal.value.code == "wrong_scores"
