"""Gains over another model: paired, signed so that above 0 is better, against plain arithmetic."""

import math
from typing import Any

import numpy as np
import pytest
from scipy import stats

from mlpd.training.auc import auc
from mlpd.training.compare import gains

RNG = np.random.default_rng(5)
N = 300


def check(found: Any, name: str, differences: Any) -> None:
    """A paired t test with the normal's quantile."""
    mean, error = np.mean(differences), stats.sem(differences)
    assert found[name].value == pytest.approx(mean)
    assert found[name].low == pytest.approx(mean - stats.norm.ppf(0.975) * error)


def test_gains_of_probabilities() -> None:
    labels = RNG.integers(0, 2, N).astype(float)
    good = np.clip(0.7 * labels + 0.3 * RNG.random(N), 0.01, 0.99)
    bad = np.clip(0.3 * labels + 0.7 * RNG.random(N), 0.01, 0.99)
    found = gains("binary", labels, good[:, None], bad[:, None])
    assert found.keys() == {"auc", "log_loss", "brier"}
    check(found, "brier", (bad - labels) ** 2 - (good - labels) ** 2)
    losses = [-np.log(np.where(labels == 1, p, 1 - p)) for p in (bad, good)]
    check(found, "log_loss", losses[0] - losses[1])
    area = found["auc"]
    assert area is not None
    wanted = [auc(labels, s) or math.nan for s in (good, bad)]
    assert area.value == pytest.approx(wanted[0] - wanted[1])
    assert all(g is not None and g.low > 0 for g in found.values())
    turned = gains("binary", labels, bad[:, None], good[:, None])
    assert all(g is not None and g.high < 0 for g in turned.values())


def test_gains_of_classes_and_numbers() -> None:
    labels = RNG.integers(0, 3, N).astype(float)
    raw = RNG.random((2, N, 3))
    raw[0, np.arange(N), labels.astype(int)] += 1
    mine, theirs = raw / raw.sum(axis=2, keepdims=True)
    found = gains("multiclass", labels, mine, theirs)
    right = [(s.argmax(axis=1) == labels).astype(float) for s in (mine, theirs)]
    check(found, "accuracy", right[0] - right[1])
    squares = [((s - np.eye(3)[labels.astype(int)]) ** 2).sum(axis=1) for s in (mine, theirs)]
    check(found, "brier", squares[1] - squares[0])
    numbers = gains("regression", labels, mine[:, :1], theirs[:, :1])
    errors = [s[:, 0] - labels for s in (mine, theirs)]
    check(numbers, "mae", np.abs(errors[1]) - np.abs(errors[0]))
    check(numbers, "mse", errors[1] ** 2 - errors[0] ** 2)


def test_gains_of_orders_are_by_group() -> None:
    labels = RNG.integers(0, 2, N).astype(float)
    groups = np.repeat(np.arange(N // 10), 10)
    mine, theirs = labels + RNG.normal(size=N) / 4, RNG.normal(size=N)
    found = gains("ranking", labels, mine[:, None], theirs[:, None], groups)
    assert found.keys() == {"ndcg@10", "map@10", "mrr"}
    ranks = []
    for scores in (mine, theirs):
        orders = [labels[i : i + 10][np.argsort(-scores[i : i + 10])] for i in range(0, N, 10)]
        ranks.append(np.array([1 / (1 + o.argmax()) for o in orders if o.any()]))
    check(found, "mrr", ranks[0] - ranks[1])


def test_a_model_against_itself_gains_nothing() -> None:
    labels = RNG.integers(0, 2, N).astype(float)
    scores = RNG.random((N, 1))
    for found in gains("binary", labels, scores, scores).values():
        assert found is not None
        assert (found.value, found.low, found.high) == (0, 0, 0)
