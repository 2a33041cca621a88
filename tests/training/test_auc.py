import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from mlpd.training.auc import Floats, auc, auc_difference, auc_estimate, midranks

SCORES = st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.75, 1.0]) | st.floats(-1e6, 1e6)
PAIRS = st.lists(st.tuples(st.sampled_from([0.0, 1.0]), SCORES, SCORES), min_size=1, max_size=40)


def kernel(ones: Floats, zeros: Floats) -> Floats:
    """1 where the one is above the zero, 0.5 where they tie: [ones, zeros]."""
    return np.greater.outer(ones, zeros) + 0.5 * np.equal.outer(ones, zeros)


@given(st.lists(SCORES, min_size=1))
def test_midranks_are_scipys_average_ranks(values: list[float]) -> None:
    assert midranks(np.array(values)).tolist() == stats.rankdata(values, "average").tolist()


@given(PAIRS)
def test_auc_is_the_share_of_pairs_in_the_right_order(pairs: list[tuple[float, ...]]) -> None:
    labels, scores, _ = np.array(pairs).T
    table = kernel(scores[labels == 1], scores[labels == 0])
    found = auc(labels, scores)
    if table.size == 0:
        assert found is None
    else:
        assert found == pytest.approx(table.mean(), abs=1e-12)


@given(PAIRS)
def test_delong_errors_are_those_of_the_structural_components(
    pairs: list[tuple[float, ...]],
) -> None:
    labels, first, second = np.array(pairs).T
    estimate, difference = auc_estimate(labels, first), auc_difference(labels, first, second)
    one, zero = labels == 1, labels == 0
    if min(one.sum(), zero.sum()) < 2:
        assert estimate is None
        assert difference is None
        return
    tables = [kernel(scores[one], scores[zero]) for scores in (first, second)]
    for found, table in ((estimate, tables[0]), (difference, tables[0] - tables[1])):
        assert found is not None
        rows, columns = table.mean(axis=1), table.mean(axis=0)
        variance = rows.var(ddof=1) / len(rows) + columns.var(ddof=1) / len(columns)
        assert found.value == pytest.approx(table.mean(), abs=1e-12)
        assert found.standard_error == pytest.approx(np.sqrt(variance), abs=1e-9)
        assert found.low <= found.value <= found.high


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(4)
    truth = stats.norm.cdf(1 / np.sqrt(2))  # P(N(1,1) > N(0,1))
    labels = np.repeat([1.0, 0.0], [80, 160])
    hits = 0
    for _ in range(1_000):
        found = auc_estimate(labels, rng.normal(size=240) + labels, confidence=0.9)
        assert found is not None
        hits += found.low <= truth <= found.high
    assert 0.87 <= hits / 1_000 <= 0.93


def test_a_difference_on_the_same_rows_is_narrower_than_the_two_apart() -> None:
    rng = np.random.default_rng(5)
    labels = rng.integers(0, 2, 2_000).astype(np.float64)
    shared = rng.normal(size=2_000) + labels
    better, worse = shared + 0.2 * labels, shared + 0.1 * rng.normal(size=2_000)
    apart = [auc_estimate(labels, scores) for scores in (better, worse)]
    paired = auc_difference(labels, better, worse)
    assert paired is not None
    assert paired.low > 0
    assert all(one is not None and paired.standard_error < one.standard_error for one in apart)


def test_bounds_stay_within_what_an_auc_can_be() -> None:
    labels = np.array([0.0, 0.0, 1.0, 1.0, 0.0])
    found = auc_estimate(labels, np.array([0.1, 0.6, 0.5, 0.9, 0.2]))
    assert found is not None
    assert found.high == 1.0
    assert found.value + found.standard_error > 1.0
