import json
from typing import Any

import numpy as np
import pytest
from scipy import stats

from mlpd.core.errors import ValidationError
from mlpd.training.checks import (
    CheckLimits,
    Finding,
    best_single_auc,
    check_data,
    raise_for_errors,
    rank_correlation,
)
from mlpd.training.trainer import Dataset

NAMES = ("a", "b", "c")


def make(rows: int = 1_000, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    vectors = rng.normal(size=(rows, 3))
    labels = (vectors[:, 0] + rng.normal(size=rows) > 0.5).astype(np.float64)
    return vectors, labels


def check(
    vectors: np.ndarray, labels: np.ndarray, valid: Any = None, **options: Any
) -> list[Finding]:
    judged = make(300, seed=1) if valid is None else valid
    parts = (Dataset(v, y, NAMES) for v, y in ((vectors, labels), judged))
    return check_data(*parts, **{"objective": "binary"} | options)


def codes(findings: list[Finding]) -> list[tuple[str, str, str | None]]:
    return [(finding.level, finding.code, finding.feature) for finding in findings]


def test_good_data_has_no_findings() -> None:
    assert check(*make()) == []
    raise_for_errors([])


@pytest.mark.parametrize("seed", range(3))
def test_a_feature_that_orders_the_labels_is_a_leak_both_ways_round(seed: int) -> None:
    vectors, labels = make(seed=seed)
    noise = np.random.default_rng(9).normal(size=len(labels))
    for sign in (1, -1):
        vectors[:, 1] = sign * (labels * 8 + noise)
        assert codes(check(vectors, labels)) == [("error", "label_leak", "b")]
    vectors[:, 1] = labels * 2 + noise  # strong (AUC 0.92), and no leak
    assert check(vectors, labels) == []


def test_being_null_can_be_the_leak() -> None:
    vectors, labels = make()
    vectors[labels == 1, 2] = np.nan
    assert ("error", "label_leak", "c") in codes(check(vectors, labels))


def test_a_value_in_the_middle_can_be_the_leak() -> None:
    vectors, labels = make()
    vectors[:, 2] = np.where(labels == 1, vectors[:, 2] % 1, 3 * np.sign(vectors[:, 2]) + 0.5)
    assert codes(check(vectors, labels)) == [("error", "label_leak", "c")]


def test_a_category_can_be_the_leak_but_an_identifier_is_none() -> None:
    vectors, labels = make()
    vectors[:, 0] = np.random.default_rng(2).permutation(len(labels))
    assert check(vectors, labels, categorical=(0,)) == []
    vectors[:, 0] = np.random.default_rng(2).integers(0, 10, len(labels)) * 2 + labels
    assert codes(check(vectors, labels, categorical=(0,))) == [("error", "label_leak", "a")]


def test_a_copy_of_the_target_is_the_leak_of_a_regression() -> None:
    vectors, _ = make()
    target = vectors[:, 0] + 0.05 * np.random.default_rng(3).normal(size=len(vectors))
    valid = (vectors[:50], target[:50])
    assert check(vectors, target, valid, objective="regression") == []
    vectors[:, 1] = -3 * target + 7
    found = check(vectors, target, valid, objective="regression")
    assert codes(found) == [("error", "label_leak", "b")]


def test_rank_correlation_is_spearmans_over_the_rows_with_a_value() -> None:
    rng = np.random.default_rng(6)
    labels, column = rng.normal(size=200), rng.integers(0, 9, 200).astype(np.float64)
    expected = abs(stats.spearmanr(labels[:150], column[:150]).statistic)
    column[150:] = np.nan
    assert rank_correlation(labels, column) == pytest.approx(expected)
    assert rank_correlation(labels, np.ones(200)) == 0.0


def test_infinite_values_break_no_check() -> None:
    vectors, labels = make()
    vectors[::7, 1], vectors[::11, 1], vectors[:, 2] = np.inf, -np.inf, np.inf
    assert codes(check(vectors, labels)) == [("warning", "constant", "c")]


def test_best_single_auc_of_noise_is_near_a_half() -> None:
    rng = np.random.default_rng(7)
    labels = rng.integers(0, 2, 20_000).astype(np.float64)
    for categorical in (False, True):
        column = rng.integers(0, 50, 20_000).astype(np.float64)
        assert 0.5 <= best_single_auc(labels, column, is_categorical=categorical) < 0.52


def test_empty_and_constant_features_are_told_apart() -> None:
    vectors, labels = make()
    vectors[:, 0], vectors[:, 1] = np.nan, 3.0
    found = codes(check(vectors, labels))
    assert found[0] == ("error", "always_null", "a")
    assert ("warning", "constant", "b") in found


def test_null_shares_and_their_shift_are_warnings() -> None:
    vectors, labels = make()
    vectors[::3, 0], vectors[: len(labels) * 6 // 10, 1] = np.nan, np.nan
    valid = make(300, seed=1)
    valid[0][::3, 0] = np.nan
    found = check(vectors, labels, valid)
    assert codes(found) == [("warning", "often_null", "b"), ("warning", "null_share_shift", "b")]
    assert [finding.value for finding in found] == [0.6, -0.6]


@pytest.mark.parametrize(
    ("labels", "code"),
    [
        (np.zeros(150), "too_few_rows"),
        (np.full(500, np.nan), "label_not_finite"),
        (np.full(500, np.inf), "label_not_finite"),
        (np.arange(500.0), "label_not_binary"),
        (np.arange(500) < 19, "too_few_of_class"),
        (np.arange(500) >= 19, "too_few_of_class"),
    ],
)
def test_labels_that_cannot_be_learned_are_errors(labels: np.ndarray, code: str) -> None:
    found = check(np.random.default_rng(0).normal(size=(len(labels), 3)), labels.astype(float))
    assert codes(found) == [("error", code, None)]


def test_a_constant_target_is_an_error() -> None:
    found = check(make()[0], np.full(1_000, 2.5), objective="regression")
    assert codes(found) == [("error", "label_constant", None)]


def test_validation_rows_of_one_class_are_a_warning_and_none_are_fine() -> None:
    empty = (np.empty((0, 3)), np.empty(0))
    one_class = (make(300, seed=1)[0], np.zeros(300))
    assert codes(check(*make(), one_class)) == [("warning", "valid_one_class", None)]
    assert check(*make(), empty) == []


def grades(rows: int = 1_000, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Vectors whose first feature speaks for a label of 0, 1 or 2."""
    vectors, _ = make(rows, seed)
    noise = np.random.default_rng(seed + 5).normal(size=rows)
    return vectors, np.digitize(vectors[:, 0] + noise, [-0.5, 0.7]).astype(np.float64)


def test_classes_and_grades_of_good_data_have_no_findings() -> None:
    for objective in ("multiclass", "ranking"):
        assert check(*grades(), grades(300, 1), objective=objective) == []


@pytest.mark.parametrize(
    ("objective", "label", "code"),
    [
        ("multiclass", 1.5, "label_not_class"),
        ("multiclass", -1.0, "label_not_class"),
        ("multiclass", 3.0, "too_few_of_class"),
        ("multiclass", 100.0, "too_many_classes"),
        ("ranking", -1.0, "label_not_grade"),
        ("ranking", 31.0, "label_not_grade"),
        ("ranking", 0.5, "label_not_grade"),
    ],
)
def test_one_label_that_is_no_class_or_grade_is_enough(
    objective: str, label: float, code: str
) -> None:
    vectors, labels = grades()
    labels[17] = label
    found = check(vectors, labels, grades(300, 1), objective=objective)
    assert codes(found) == [("error", code, None)]


@pytest.mark.parametrize("objective", ["multiclass", "ranking"])
def test_a_feature_that_tells_one_class_or_relevance_is_a_leak(objective: str) -> None:
    vectors, labels = grades()
    asked = labels == 1 if objective == "multiclass" else labels > 0
    vectors[:, 2] = asked * 9 + np.random.default_rng(3).normal(size=len(labels))
    found = check(vectors, labels, grades(300, 1), objective=objective)
    assert codes(found) == [("error", "label_leak", "c")]


def test_groups_of_one_grade_each_leave_nothing_to_order() -> None:
    vectors, labels = grades()
    labels = np.repeat(labels[::4], 4)
    sizes = np.full(250, 4)
    parts = [Dataset(vectors, labels, NAMES, sizes), Dataset(*grades(300, 1), NAMES)]
    found = check_data(*parts, objective="ranking")
    assert codes(found) == [("error", "nothing_to_order", None)]
    assert "training" in found[0].message
    labels[1] = (labels[0] + 1) % 3  # one group is enough
    assert check_data(*parts, objective="ranking") == []


def test_errors_stop_the_run_and_warnings_do_not() -> None:
    vectors, labels = make()
    vectors[:, 0], vectors[:, 1] = 1.0, labels
    findings = check(vectors, labels)
    assert [finding.level for finding in findings] == ["error", "warning"]
    raise_for_errors(findings[1:])
    with pytest.raises(ValidationError, match="'b' alone tells the label") as refusal:
        raise_for_errors(findings)
    assert refusal.value.code == "training_data"
    assert json.dumps(refusal.value.to_dict(), allow_nan=False)


def test_limits_can_be_moved() -> None:
    vectors, labels = make()
    assert codes(check(vectors, labels, limits=CheckLimits(leak_auc=0.7))) == [
        ("error", "label_leak", "a")
    ]
    assert codes(check(vectors, labels, limits=CheckLimits(rows_min=1_001))) == [
        ("error", "too_few_rows", None)
    ]
