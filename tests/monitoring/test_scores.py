"""Labelled scores against plain Python: exact, revisable, mergeable, bounded."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import mannwhitneyu

from mlpd.monitoring import scores as scores_module
from mlpd.monitoring.scores import LabelledScores, merge_scores

PROBABILITY = st.one_of(
    st.floats(0, 1), st.sampled_from([0.0, 1.0, 0.5, 0.1, 0.3, 5e-324, 1 - 2**-53])
)
ROWS = st.lists(st.tuples(PROBABILITY, st.integers(0, 1)), max_size=60)


def record_all(rows: list[tuple[float, int]], exact_max: int = 16_384) -> LabelledScores:
    found = LabelledScores(exact_max=exact_max)
    for score, label in rows:
        assert found.record(score, None, label)
    return found


def state(found: LabelledScores) -> tuple[object, ...]:
    """Return all that there is: equal where two can't be told apart."""
    found.fold()
    arrays = (found.keys, found.labels, found.calibration)
    sums = (found.is_exact, found.log_loss_units, found.square_units)
    return (*sums, *(array.tolist() for array in arrays))


def plain_auc(rows: list[tuple[float, int]]) -> float | None:
    """Compare every positive with every negative."""
    positives = [score for score, label in rows if label]
    negatives = [score for score, label in rows if not label]
    if not positives or not negatives:
        return None
    wins = sum((p > n) + (p == n) / 2 for p in positives for n in negatives)
    return wins / (len(positives) * len(negatives))


def plain_log_loss(rows: list[tuple[float, int]]) -> float:
    return sum(-math.log(max(s if y else 1 - s, 1e-15)) for s, y in rows) / len(rows)


@given(ROWS)
def test_metrics_are_what_plain_python_gives(rows: list[tuple[float, int]]) -> None:
    found = record_all(rows).performance()
    assert (found.rows, found.positives) == (len(rows), sum(label for _, label in rows))
    assert found.auc == (None if plain_auc(rows) is None else pytest.approx(plain_auc(rows)))
    assert found.auc_error_max == 0.0
    if not rows:
        assert found.log_loss is found.brier is found.calibration_error is None
        return
    assert found.log_loss == pytest.approx(plain_log_loss(rows), abs=2e-10)
    brier = sum((score - label) ** 2 for score, label in rows) / len(rows)
    assert found.brier == pytest.approx(brier, abs=2e-10)
    called = [label for score, label in rows if score >= 0.5]
    assert found.precision == (sum(called) / len(called) if called else None)
    assert found.recall == (sum(called) / found.positives if found.positives else None)


@given(ROWS.filter(bool))
def test_calibration_bins_are_what_plain_python_gives(rows: list[tuple[float, int]]) -> None:
    found = record_all(rows).performance()
    error = 0.0
    for index, column in enumerate(found.calibration):
        inside = [(s, y) for s, y in rows if min(int(s * 10), 9) == index]
        assert column.rows == len(inside)
        if inside:
            score = sum(s for s, _ in inside) / len(inside)
            share = sum(y for _, y in inside) / len(inside)
            assert column.score_mean == pytest.approx(score, abs=2e-10)
            assert column.positive_share == pytest.approx(share)
            error += abs(score - share) * len(inside) / len(rows)
    assert found.calibration_error == pytest.approx(error, abs=2e-9)


@given(ROWS, ROWS, st.booleans())
def test_what_is_taken_back_or_revised_leaves_no_trace(
    rows: list[tuple[float, int]], passing: list[tuple[float, int]], is_exact: bool
) -> None:
    exact_max = 16_384 if is_exact else 0
    expected = record_all(rows, exact_max)
    found = record_all([(score, 1 - label) for score, label in rows], exact_max)
    for score, label in passing:
        found.record(score, None, label)
    for score, label in rows:
        found.record(score, 1 - label, label)
    for score, label in reversed(passing):
        found.record(score, label, None)
    if rows:
        assert state(found) == state(expected)
    assert found.performance() == expected.performance()


@given(st.lists(ROWS, max_size=5), st.sampled_from([0, 7, 16_384]))
def test_merging_cohorts_is_recording_them_together(
    parts: list[list[tuple[float, int]]], exact_max: int
) -> None:
    merged = merge_scores([record_all(part, exact_max) for part in parts])
    flat = [row for part in parts for row in part]
    is_exact = all(len({score for score, _ in part}) <= exact_max for part in parts)
    expected = record_all(flat)
    if is_exact:
        assert merged.performance() == expected.performance()
    found, whole = merged.performance(), expected.performance()
    assert (found.rows, found.log_loss, found.brier) == (whole.rows, whole.log_loss, whole.brier)
    if whole.auc is not None:
        assert found.auc is not None
        assert abs(found.auc - whole.auc) <= found.auc_error_max + 1e-12


@given(ROWS, st.sampled_from([0, 3, 16_384]))
def test_recording_many_at_once_is_recording_each(
    rows: list[tuple[float, int]], exact_max: int
) -> None:
    found, each = LabelledScores(exact_max=exact_max), record_all(rows, exact_max)
    strange = [(math.nan, 1), (-0.5, 0), (2.0, 1)]
    values, labels = (np.array(column) for column in zip(*rows, *strange, strict=True))
    assert found.record_many(values, labels) == len(rows)
    assert (found.keys.tolist(), found.labels.tolist()) == state(each)[3:5]
    mine, theirs = found.performance(), each.performance()
    assert (mine.auc, mine.calibration) == (theirs.auc, theirs.calibration)
    if rows:
        assert mine.log_loss == pytest.approx(theirs.log_loss, abs=2e-10)
        assert mine.brier == pytest.approx(theirs.brier, abs=2e-10)


def test_many_distinct_scores_fall_into_bins_with_a_known_error() -> None:
    rng = np.random.default_rng(0)
    labels = rng.random(30_000) < 0.2
    values = 1 / (1 + np.exp(-(rng.normal(size=30_000) + labels)))
    rows = list(zip(values.tolist(), labels.astype(int).tolist(), strict=True))
    binned, exact = record_all(rows), record_all(rows, 10**9)
    assert not binned.is_exact
    assert len(binned.keys) <= scores_module.SCORE_BINS
    found, whole = binned.performance(), exact.performance()
    assert whole.auc is not None
    assert found.auc is not None
    assert 0 < found.auc_error_max < 0.001
    assert abs(found.auc - whole.auc) <= found.auc_error_max
    assert found.log_loss == whole.log_loss
    assert found.brier == whole.brier


def test_exact_auc_of_many_rows_agrees_with_a_rank_sum() -> None:
    rng = np.random.default_rng(1)
    labels = (rng.random(9_000) < 0.3).astype(int)
    values = np.round(rng.random(9_000), 3)  # many ties
    statistic = mannwhitneyu(values[labels == 1], values[labels == 0]).statistic
    found = record_all(list(zip(values.tolist(), labels.tolist(), strict=True))).performance()
    pairs = labels.sum() * (1 - labels).sum()
    assert found.auc == pytest.approx(statistic / pairs, abs=1e-12)


@pytest.mark.parametrize("score", [math.nan, -0.1, 1.1, math.inf])
def test_a_score_that_is_no_probability_is_not_recorded(score: float) -> None:
    found = LabelledScores()
    assert not found.record(score, None, 1)
    assert found.performance().rows == 0


@given(st.lists(PROBABILITY, min_size=1, max_size=50))
@settings(max_examples=40)
def test_one_class_alone_has_no_auc(values: list[float]) -> None:
    found = record_all([(value, 1) for value in values]).performance()
    assert found.auc is None
    assert found.recall is not None
