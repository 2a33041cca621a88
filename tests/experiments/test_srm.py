import math

import numpy as np
import pytest

from mlpd.experiments.srm import CONCENTRATION, log_e_value, sample_ratio


def predictive_log_e(arms: list[str], weights: dict[str, float]) -> float:
    """The same e-value one unit after the other: predictive over expected probability."""
    total, seen, log_e = sum(weights.values()), dict.fromkeys(weights, 0), 0.0
    for n, arm in enumerate(arms):
        share = weights[arm] / total
        log_e += math.log((CONCENTRATION * share + seen[arm]) / (CONCENTRATION + n) / share)
        seen[arm] += 1
    return log_e


def test_e_value_is_the_product_of_predictions() -> None:
    rng = np.random.default_rng(3)
    weights = {"a": 5.0, "b": 3.0, "c": 2.0}
    arms = [str(a) for a in rng.choice(["a", "b", "c"], 2000, p=[0.4, 0.4, 0.2])]
    counts = {arm: arms.count(arm) for arm in weights}
    assert log_e_value(counts, weights) == pytest.approx(predictive_log_e(arms, weights), rel=1e-9)


def test_a_fair_split_hardly_ever_alarms_whenever_one_looks() -> None:
    rng = np.random.default_rng(7)
    alarms = 0
    for _ in range(400):
        b = np.cumsum(rng.binomial(100, 0.01, 60))
        looks = ((100 * (i + 1) - int(n), int(n)) for i, n in enumerate(b))
        alarms += any(
            sample_ratio([({"a": x, "b": y}, {"a": 99.0, "b": 1.0})]).alarm for x, y in looks
        )
    assert alarms / 400 <= 0.01 + 3 * math.sqrt(0.01 * 0.99 / 400)


def test_a_skewed_split_alarms() -> None:
    found = sample_ratio([({"a": 5300, "b": 4700}, {"a": 1.0, "b": 1.0})])
    assert found.alarm
    assert found.p_value < 0.001
    assert found.to_dict()["alarm"] is True


def test_units_in_an_arm_without_weight_have_p_zero() -> None:
    found = sample_ratio([({"a": 1000, "b": 1}, {"a": 1.0, "b": 0.0})])
    assert found.p_value == 0.0
    assert found.alarm
    assert math.isfinite(found.e_value)
    assert sample_ratio([({"a": 5, "gone": 1}, {"a": 1.0, "b": 1.0})]).p_value == 0.0
    assert not sample_ratio([({"a": 1000, "b": 0}, {"a": 1.0, "b": 0.0})]).alarm


def test_phases_are_tested_against_their_own_weights() -> None:
    first = ({"a": 990, "b": 10}, {"a": 99.0, "b": 1.0})
    second = ({"a": 500, "b": 500}, {"a": 1.0, "b": 1.0})
    assert not sample_ratio([first, second]).alarm
    pooled = ({"a": 1490, "b": 510}, {"a": 1.0, "b": 1.0})
    assert sample_ratio([pooled]).alarm


def test_phases_multiply_their_evidence() -> None:
    slight = ({"a": 2620, "b": 2380}, {"a": 1.0, "b": 1.0})
    assert not sample_ratio([slight]).alarm
    assert sample_ratio([slight] * 3).alarm


def test_no_units_are_no_evidence() -> None:
    assert sample_ratio([]) == (1.0, 1.0)
    assert sample_ratio([({"a": 0, "b": 0}, {"a": 1.0, "b": 1.0})]) == (1.0, 1.0)
