"""Answers beside the sequence agree with scipy and statsmodels to 1e-9."""

import gc
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, stats  # type: ignore[import-untyped]  # ships no types
from statsmodels.regression.linear_model import OLS  # type: ignore[import-untyped]  # ships no types
from statsmodels.stats.multitest import multipletests  # type: ignore[import-untyped]
from statsmodels.stats.weightstats import CompareMeans  # type: ignore[import-untyped]

from mlpd.experiments.answers import bayesian_answer, fixed_answer
from mlpd.experiments.estimates import Cell, Combined, combine, strata_of
from mlpd.experiments.metric import Metric
from mlpd.experiments.moments import RatioMoments
from mlpd.experiments.sequences import adjust

MEAN = Metric("delay", "mean")
P_VALUES = st.lists(st.floats(0, 1), min_size=1, max_size=12)


@pytest.fixture(scope="module", autouse=True)
def little_to_collect() -> Iterator[None]:
    """Leave out what was imported: statsmodels collects garbage for every correction by Holm."""
    gc.freeze()
    yield
    gc.unfreeze()


def cell_of(values: list[float]) -> Cell:
    return Cell(RatioMoments.of((value, 1.0) for value in values))


def combined(difference: float, std_error: float) -> Combined:
    return Combined(200, 0.0, difference, [(std_error**2, 200)])


@pytest.mark.parametrize("sizes", [(5, 7), (100, 3), (400, 300)])
def test_the_fixed_answer_is_statsmodels_welch(sizes: tuple[int, int]) -> None:
    rng = np.random.default_rng(1)
    a, b = rng.normal(10, 1, sizes[0]), rng.lognormal(0.3, 1, sizes[1])
    pairs = [(cell_of(a.tolist()), cell_of(b.tolist()))]
    found = fixed_answer(combine(strata_of(pairs, theta=None)), alpha=0.01)
    compared = CompareMeans.from_data(b, a)
    low, high = compared.tconfint_diff(alpha=0.01, usevar="unequal")
    _, p_value, df = compared.ttest_ind(usevar="unequal")
    assert found == pytest.approx((low, high, p_value, df), rel=1e-9)
    assert found.interval == pytest.approx(found[:3])


def test_the_delta_method_is_a_regression_clustered_by_unit() -> None:
    rng = np.random.default_rng(2)
    counts = rng.integers(1, 20, 150)
    unit = np.repeat(np.arange(150), counts)
    outcomes = (rng.random(len(unit)) < rng.beta(1, 3, 150)[unit]).astype(float)
    fitted: Any = OLS(outcomes, np.ones(len(unit))).fit(
        cov_type="cluster", cov_kwds={"groups": unit}
    )
    sums = np.bincount(unit, outcomes)
    found = RatioMoments.of(zip(sums.tolist(), map(float, counts), strict=True))
    assert found.ratio == pytest.approx(float(fitted.params[0]), rel=1e-9)
    assert found.ratio_variance == pytest.approx(float(fitted.bse[0]) ** 2, rel=1e-9)


@given(
    P_VALUES, st.sampled_from([("holm", "holm"), ("bonferroni", "bonferroni"), ("bh", "fdr_bh")])
)
def test_corrections_are_statsmodels(p_values: list[float], names: tuple[Any, str]) -> None:
    ours, theirs = names
    expected = multipletests(p_values, method=theirs)[1]
    assert adjust(p_values, ours) == pytest.approx(expected.tolist(), rel=1e-9, abs=1e-300)


@settings(max_examples=30)
@given(st.floats(-3, 3), st.floats(0.01, 2), st.none() | st.floats(0.01, 10))
def test_the_posterior_is_the_normal_one(
    difference: float, std_error: float, prior_sd: float | None
) -> None:
    metric = Metric("delay", "mean", "lower", prior_sd=prior_sd)
    found = bayesian_answer(combined(difference, std_error), metric, alpha=0.1)
    weight = 0.0 if prior_sd is None else prior_sd**-2
    precision = std_error**-2 + weight
    posterior = stats.norm(difference * std_error**-2 / precision, precision**-0.5)
    low, high = posterior.interval(0.9)
    assert (found.mean, found.sd) == pytest.approx((posterior.mean(), posterior.std()), rel=1e-9)
    assert (found.low, found.high) == pytest.approx((low, high), rel=1e-9, abs=1e-12)
    assert found.chance == pytest.approx(posterior.cdf(0), rel=1e-9)


@pytest.mark.parametrize("difference", [-1.0, -0.1, 0.0, 0.2, 1.0])
def test_the_risk_is_what_is_lost_on_average(difference: float) -> None:
    for better, sign in (("higher", 1), ("lower", -1)):
        metric = Metric("delay", "mean", "higher" if better == "higher" else "lower")
        found = bayesian_answer(combined(difference, 0.3), metric, alpha=0.05)
        posterior = stats.norm(sign * difference, 0.3)
        lost, _ = integrate.quad(lambda x, p=posterior: -x * p.pdf(x), -10, 0, epsabs=1e-14)
        assert found.risk == pytest.approx(lost, rel=1e-9)
        assert found.chance == pytest.approx(posterior.sf(0), rel=1e-9)


def test_far_out_the_chance_keeps_its_digits() -> None:
    found = bayesian_answer(combined(-1.0, 0.1), MEAN, alpha=0.05)
    assert found.chance == pytest.approx(stats.norm.sf(10), rel=1e-9)


@pytest.mark.parametrize(
    ("difference", "chance", "risk"), [(0.5, 1.0, 0.0), (0.0, 0.5, 0.0), (-0.5, 0.0, 0.5)]
)
def test_without_spread_the_posterior_is_a_point(
    difference: float, chance: float, risk: float
) -> None:
    found = bayesian_answer(combined(difference, 0.0), MEAN, alpha=0.05)
    assert found == (difference, 0.0, difference, difference, chance, risk)
    assert math.isfinite(fixed_answer(combined(difference, 0.0), alpha=0.05).df)
