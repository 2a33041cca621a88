"""Metrics of an order against brute force and LightGBM's own ndcg."""

import math

import lightgbm
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlpd.core.errors import ValidationError
from mlpd.training.ranking import evaluate_ranking, group_sizes

ROW = st.tuples(st.integers(0, 3), st.integers(0, 6).map(float))


def slow(grades: list[int]) -> tuple[float, float, float]:
    """Return ndcg@10, ap@10 and rr of grades in the order of their scores."""

    def dcg(values: list[int]) -> float:
        return sum((2**g - 1) / math.log2(i + 2) for i, g in enumerate(values[:10]))

    relevant = [i for i, grade in enumerate(grades) if grade > 0]
    hits = [i for i in relevant if i < 10]
    precision = [sum(j <= i for j in hits) / (i + 1) for i in hits]
    ideal = dcg(sorted(grades, reverse=True))
    average = sum(precision) / min(len(relevant), 10)
    return dcg(grades) / ideal, average, 1 / (relevant[0] + 1)


@given(st.lists(st.lists(ROW, min_size=1, max_size=14), min_size=1, max_size=6))
@settings(max_examples=200)
def test_every_metric_is_its_definition(groups: list[list[tuple[int, float]]]) -> None:
    labels = np.array([row[0] for rows in groups for row in rows], np.float64)
    scores = np.array([row[1] for rows in groups for row in rows])
    numbers = np.array([9 - i for i, rows in enumerate(groups) for _ in rows])
    found = evaluate_ranking(labels, scores, numbers).metrics
    orders = [[row[0] for row in sorted(rows, key=lambda row: -row[1])] for rows in groups]
    judged = [slow(grades) for grades in orders if any(grades)]
    if len(judged) < 2:  # a mean of one has no interval
        assert set(found.values()) == {None}
        return
    for name, values in zip(("ndcg@10", "map@10", "mrr"), zip(*judged, strict=True), strict=True):
        metric = found[name]
        assert metric is not None
        assert metric.value == pytest.approx(np.mean(values))
        error = np.std(values, ddof=1) / math.sqrt(len(values))
        assert metric.standard_error == pytest.approx(error)


def test_ndcg_is_lightgbms() -> None:
    rng = np.random.default_rng(0)
    sizes = rng.integers(2, 30, 40)
    vectors = rng.normal(size=(sizes.sum(), 3))
    labels = rng.integers(0, 4, sizes.sum()).astype(np.float64)
    labels[np.cumsum(sizes) - 1] = 3.0  # no group without a relevant row: LightGBM counts it as 1
    data = lightgbm.Dataset(vectors, labels, group=sizes)
    params = {"objective": "lambdarank", "metric": "ndcg", "eval_at": [10], "verbosity": -1}
    booster = lightgbm.Booster(params, data)
    for _ in range(5):
        booster.update()
    expected = booster.eval_train()[0][2]
    scores = np.asarray(booster.predict(vectors))
    found = evaluate_ranking(labels, scores, np.repeat(np.arange(40), sizes)).metrics["ndcg@10"]
    assert found is not None
    assert found.value == pytest.approx(expected, abs=1e-9)


def test_sizes_of_groups_one_after_the_other() -> None:
    numbers = np.array([3, 3, 1, 7, 7, 7])
    assert group_sizes(numbers).tolist() == [2, 1, 3]
    assert group_sizes(numbers[:0]).tolist() == []


@pytest.mark.parametrize("grade", [-1.0, 31.0, 1.5])
def test_a_label_that_is_no_grade_is_refused(grade: float) -> None:
    with pytest.raises(ValidationError, match="grades"):
        evaluate_ranking(np.array([grade, 1.0]), np.zeros(2), np.zeros(2, np.int64))
