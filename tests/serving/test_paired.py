import doctest
import json
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as stn

from mlpd.core.errors import ValidationError
from mlpd.serving import paired
from mlpd.serving.paired import PairedDifference

SCORES = st.floats(-1e3, 1e3, allow_subnormal=False)
PAIRS = st.integers(1, 3).flatmap(
    lambda outputs: stn.arrays(
        np.float64, st.tuples(st.just(2), st.integers(1, 30), st.just(outputs)), elements=SCORES
    )
)


@given(pairs=PAIRS, cut=st.integers(0, 30))
def test_parts_merged_equal_the_whole_by_brute_force(pairs: np.ndarray, cut: int) -> None:
    whole, left, right = (PairedDifference(0.25) for _ in range(3))
    primary, shadow = pairs
    whole.add(primary, shadow)
    left.add(primary[:cut], shadow[:cut])
    right.add(primary[cut:], shadow[cut:])
    left.merge(right)
    d, differ = brute_force(primary, shadow, 0.25)
    assert left == whole
    exact = [Fraction(value) for value in d]
    assert whole.mean == float(sum(exact) / len(exact))
    assert whole.m2 == float(sum((x - sum(exact) / len(exact)) ** 2 for x in exact))
    for found in (whole, left):
        assert (found.n, found.disagreements) == (len(d), sum(differ))
        assert found.max_abs == max(map(abs, d))
        assert found.mean == pytest.approx(np.mean(d), rel=1e-9, abs=1e-9)
        if len(d) > 1:
            assert found.sd == pytest.approx(np.std(d, ddof=1), rel=1e-6, abs=1e-6)


def brute_force(
    primary: np.ndarray, shadow: np.ndarray, threshold: float
) -> tuple[list[float], list[bool]]:
    d, differ = [], []
    for p, s in zip(primary.tolist(), shadow.tolist(), strict=True):
        if len(p) == 1:
            d.append(s[0] - p[0])
            differ.append((p[0] >= threshold) != (s[0] >= threshold))
        else:
            d.append(s[p.index(max(p))] - p[p.index(max(p))])
            differ.append(p.index(max(p)) != s.index(max(s)))
    return d, differ


def test_the_documented_example_runs() -> None:
    assert doctest.testmod(paired).failed == 0
    assert doctest.testmod(paired).attempted > 0


def test_a_large_common_difference_keeps_the_variance() -> None:
    found = PairedDifference()
    for value in range(8):
        found.add(np.array([[0.0]]), np.array([[1e9 + value]]))
    assert found.sd**2 == pytest.approx(6.0)


def test_rows_that_are_not_finite_are_counted_apart() -> None:
    found = PairedDifference()
    found.add(
        np.array([[0.1], [math.nan], [0.2], [0.3]]), np.array([[0.2], [0.1], [math.inf], [0.4]])
    )
    assert (found.n, found.not_finite) == (2, 2)
    assert found.mean == pytest.approx(0.1)


def test_differences_that_no_float_holds_are_counted_apart_and_large_ones_are_not_lost() -> None:
    found = PairedDifference()
    found.add(np.array([[-1e308], [-1e308], [0.0]]), np.array([[1e308], [0.5e308], [5e-324]]))
    assert (found.n, found.not_finite) == (2, 1)
    assert found.mean == 0.75e308
    assert found.m2 == math.inf
    assert PairedDifference.from_dict(json.loads(json.dumps(found.to_dict()))) == found


def test_the_interval_covers_the_true_mean_as_often_as_it_says() -> None:
    rng, covered = np.random.default_rng(5), 0
    for _ in range(1000):
        found = PairedDifference()
        found.add(np.zeros((200, 1)), rng.normal(0.3, 2.0, size=(200, 1)))
        low, high = found.mean_interval(0.9)
        covered += low <= 0.3 <= high
    assert 870 <= covered <= 930


def test_wilsons_interval_as_published() -> None:
    found = PairedDifference(n=100, disagreements=10)
    assert found.disagreement_interval() == pytest.approx((0.0552, 0.1744), abs=1e-4)


def test_json_gives_the_same_state_back() -> None:
    found = PairedDifference(0.3)
    found.add(np.array([[0.1], [0.7]]), np.array([[0.5], [0.2]]))
    assert PairedDifference.from_dict(json.loads(json.dumps(found.to_dict()))) == found


def test_a_summary_without_rows_is_json_without_nan() -> None:
    for rows in range(3):
        found = PairedDifference()
        found.add(np.zeros((rows, 1)), np.ones((rows, 1)))
        summary = json.loads(json.dumps(found.summary(), allow_nan=False))
        assert summary["n"] == rows
        assert (summary["sd"] is None) == (rows < 2)


def test_other_thresholds_are_not_merged() -> None:
    with pytest.raises(ValidationError, match="threshold"):
        PairedDifference(0.5).merge(PairedDifference(0.4))
