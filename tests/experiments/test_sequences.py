import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats  # type: ignore[import-untyped]  # ships no types

from mlpd.core.sequences import confidence_sequence, rho_squared, sequence_multiplier
from mlpd.experiments.sequences import adjust, welch, welch_df
from mlpd.experiments.student_t import t_survival, t_upper_quantile

P_VALUES = st.lists(st.floats(0, 1), min_size=1, max_size=12)
DEGREES = [1, 1.5, 2, 3.7, 9.9, 39.9, 40.1, 98, 1000.5, 1e4, 1e6, 1.1e6, 1e8, 1e12]


@pytest.mark.parametrize("df", DEGREES)
@pytest.mark.parametrize("t", [-3.0, 0.0, 1e-200, 1e-6, 0.3, 1.0, 1.73, 1.74, 1.96, 4.0, 8.0])
def test_t_survival_matches_scipy(df: float, t: float) -> None:
    assert t_survival(t, df) == pytest.approx(stats.t.sf(t, df), rel=1e-9)


@pytest.mark.parametrize("df", DEGREES)
@pytest.mark.parametrize("q", [0.49, 0.1, 0.025, 0.005, 1e-4, 1e-8])
def test_t_quantile_matches_scipy(df: float, q: float) -> None:
    assert t_upper_quantile(q, df) == pytest.approx(stats.t.isf(q, df), rel=1e-9)


@given(st.floats(1, 1e7), st.floats(1e-9, 0.49))
def test_t_quantile_inverts_t_survival(df: float, q: float) -> None:
    assert t_survival(t_upper_quantile(q, df), df) == pytest.approx(q, rel=1e-9)


@given(st.integers(1, 10**9), st.integers(1, 10**9), st.floats(1e-6, 0.4))
def test_half_width_is_the_formula_of_the_spec(n: int, planned: int, alpha: float) -> None:
    rho = math.sqrt(rho_squared(planned, alpha))
    k = n * rho**2 + 1
    expected = math.sqrt(n) * math.sqrt(2 * k / (n * rho) ** 2 * math.log(math.sqrt(k) / alpha))
    found = sequence_multiplier(n, planned_units=planned, alpha=alpha)
    assert found == pytest.approx(expected, rel=1e-12)


def test_half_width_of_a_known_case() -> None:
    # rho^2 = (5.99146 + ln 6.99146) / 1000 = 0.00793616; k = 8.93616; ln(2.98934 / .05) = 4.09078
    interval = confidence_sequence(0.5, 0.1, 1000, planned_units=1000, alpha=0.05)
    assert interval.high - 0.5 == pytest.approx(0.1 * math.sqrt(2 * 8.93616 / 7.93616 * 4.09078))
    assert interval.low + interval.high == pytest.approx(1.0)


def test_the_sequence_is_tightest_near_the_planned_total() -> None:
    def half(n: int, planned: int) -> float:
        return sequence_multiplier(n, planned_units=planned, alpha=0.05)

    assert half(10_000, 10_000) < min(half(10_000, 1000), half(10_000, 100_000))


@given(
    st.floats(-1, 1), st.floats(1e-3, 1), st.integers(1, 10**6), st.sampled_from([0.01, 0.05, 0.2])
)
def test_zero_is_outside_of_the_sequence_exactly_where_p_is_below_alpha(
    difference: float, std_error: float, n: int, alpha: float
) -> None:
    found = confidence_sequence(difference, std_error, n, planned_units=5000, alpha=alpha)
    if abs(found.p_value / alpha - 1) > 1e-9:
        assert (found.low > 0 or found.high < 0) == (found.p_value < alpha)
    assert 0 <= found.p_value <= 1


def test_without_spread_only_equality_is_undecided() -> None:
    for difference, p_value in ((0.0, 1.0), (0.1, 0.0)):
        expected = (difference, difference, p_value)
        found = confidence_sequence(difference, 0.0, 500, planned_units=500, alpha=0.05)
        assert found == expected
        assert welch(difference, 0.0, 99.0, alpha=0.05) == expected


@pytest.mark.parametrize("sizes", [(5, 7), (100, 3), (400, 300)])
def test_welch_matches_scipy(sizes: tuple[int, int]) -> None:
    rng = np.random.default_rng(1)
    a, b = rng.normal(0, 1, sizes[0]), rng.normal(0.3, 3, sizes[1])
    parts = [(float(x.var(ddof=1) / len(x)), len(x)) for x in (a, b)]
    std_error = math.sqrt(parts[0][0] + parts[1][0])
    found = welch(float(b.mean() - a.mean()), std_error, welch_df(parts), alpha=0.05)
    expected: Any = stats.ttest_ind(b, a, equal_var=False)
    bounds = expected.confidence_interval(0.95)
    assert found == pytest.approx((bounds.low, bounds.high, expected.pvalue), rel=1e-9)


def test_welch_df_without_spread_is_the_smallest() -> None:
    assert welch_df([(0.0, 10), (0.0, 30)]) == 9


@given(P_VALUES)
def test_bh_matches_scipy(p_values: list[float]) -> None:
    expected = stats.false_discovery_control(p_values, method="bh")
    assert adjust(p_values, "bh") == pytest.approx(list(expected))


@given(P_VALUES, st.floats(0.001, 0.2))
def test_holm_rejects_step_down(p_values: list[float], alpha: float) -> None:
    rejected: set[int] = set()
    for rank, i in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        if p_values[i] * (len(p_values) - rank) > alpha:
            break
        rejected.add(i)
    assert {i for i, p in enumerate(adjust(p_values, "holm")) if p <= alpha} == rejected


@given(P_VALUES)
def test_corrections_are_ordered(p_values: list[float]) -> None:
    none, bh, holm, bonferroni = (adjust(p_values, c) for c in ("none", "bh", "holm", "bonferroni"))
    tiny = 1e-12
    for a, b, c, d in zip(none, bh, holm, bonferroni, strict=True):
        assert a <= b + tiny <= c + 2 * tiny <= d + 3 * tiny <= 1 + 3 * tiny
    assert none == p_values


def test_no_p_values_need_no_correction() -> None:
    assert [adjust([], c) for c in ("none", "bh", "holm", "bonferroni")] == [[], [], [], []]
