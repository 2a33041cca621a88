"""Cells, strata and CUPED against arithmetic on the whole data."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from statsmodels.regression.linear_model import OLS  # type: ignore[import-untyped]  # ships no types

from mlpd.experiments.estimates import Cell, combine, pooled_theta, strata_of
from mlpd.experiments.metric import Metric
from mlpd.experiments.spec import Arm, ExperimentSpec
from mlpd.experiments.verdict import compare_arms

Floats = np.ndarray[Any, np.dtype[np.float64]]
PAIR = st.tuples(st.integers(-50, 50), st.integers(1, 9))
UNITS = st.lists(st.tuples(PAIR, st.integers(-50, 50)), min_size=1, max_size=20)


def fill(x: Floats, y: Floats, c: Floats) -> Cell:
    cell = Cell()
    for values in zip(x.tolist(), y.tolist(), c.tolist(), strict=True):
        cell = cell.add(values[:2], values[2])
    return cell


def flat(cell: Cell) -> list[float]:
    (x, y, _), c = cell.moments, cell.covariate.c
    sums = [v for moments in (x, y, c) for v in (moments.n, moments.mean, moments.m2, moments.m3)]
    return [cell.events, cell.non_events, *sums, cell.moments.comoment, *products(cell)]


def products(cell: Cell) -> list[float]:
    """Sums of products of deviations of the covariate with x and y."""
    (x, y, _), covariate = cell.moments, cell.covariate
    return [
        covariate.x.about_means(x, covariate.c),
        covariate.y.about_means(y, covariate.c),
    ]


@given(UNITS, PAIR, PAIR, st.integers(-50, 50))
def test_a_changed_unit_leaves_the_cell_as_if_it_had_always_been_so(
    units: list[tuple[tuple[int, int], int]],
    old: tuple[int, int],
    new: tuple[int, int],
    value: int,
) -> None:
    def with_unit(*pairs: tuple[int, int]) -> list[float]:
        cell = Cell()
        for pair, c in [*units, *((pair, value) for pair in pairs)]:
            cell = cell.change(None, pair, c)
        return flat(cell)

    cell = Cell()
    for pair, c in units:
        cell = cell.add(pair, c)
    entered = cell.change(None, old, value)
    assert flat(entered.change(old, new, value)) == with_unit(new)
    assert flat(entered.change(old, None, value)) == with_unit()
    for cut in range(len(units) + 1):
        parts = [Cell(), Cell()]
        for i, (pair, c) in enumerate(units):
            parts[i < cut] = parts[i < cut].add(pair, c)
        assert flat(parts[0].merge(parts[1])) == with_unit()
    (x, y), c = np.array([p for p, _ in units]).T, np.array([c for _, c in units])
    xc, yc = products(cell)
    assert xc == pytest.approx(((x - x.mean()) * (c - c.mean())).sum(), abs=1e-6)
    assert yc == pytest.approx(((y - y.mean()) * (c - c.mean())).sum(), abs=1e-6)


def arms(rng: np.random.Generator, *, ratio: bool) -> list[tuple[Floats, Floats, Floats]]:
    found = []
    for n, effect in ((400, 0.0), (300, 0.4)):
        c = rng.normal(3, 2, n)
        y = rng.integers(1, 9, n).astype(float) if ratio else np.ones(n)
        found.append((y * (effect + 0.8 * c + rng.normal(0, 1, n)), y, c))
    return found


def test_theta_and_the_adjusted_difference_are_those_of_a_regression() -> None:
    (x0, _, c0), (x1, _, c1) = data = arms(np.random.default_rng(1), ratio=False)
    cells = [fill(*arm) for arm in data]
    treated = np.repeat([0.0, 1.0], [400, 300])
    design = np.column_stack([np.ones(700), treated, np.append(c0, c1)])
    fitted: Any = OLS(np.append(x0, x1), design).fit()
    theta = pooled_theta(cells)
    found = combine(strata_of([(cells[0], cells[1])], theta=theta))
    assert theta == pytest.approx(float(fitted.params[2]), rel=1e-9)
    assert found.difference == pytest.approx(float(fitted.params[1]), rel=1e-9)
    variance = sum(np.var(x - theta * c, ddof=1) / len(x) for x, c in ((x0, c0), (x1, c1)))
    assert found.std_error**2 == pytest.approx(float(variance), rel=1e-9)


def test_a_ratio_is_adjusted_by_its_linearised_outcome() -> None:
    data = arms(np.random.default_rng(2), ratio=True)
    cells = [fill(*arm) for arm in data]
    linear = [(x - x.sum() / y.sum() * y) / y.mean() for x, y, _ in data]
    centred = [c - c.mean() for _, _, c in data]
    theta = sum(z @ c for z, c in zip(linear, centred, strict=True)) / sum(c @ c for c in centred)
    assert pooled_theta(cells) == pytest.approx(float(theta), rel=1e-9)
    found = combine(strata_of([(cells[0], cells[1])], theta=float(theta)))
    ratios = [x.sum() / y.sum() for x, y, _ in data]
    moved = float(theta) * (data[1][2].mean() - data[0][2].mean())
    assert found.difference == pytest.approx(ratios[1] - ratios[0] - moved, rel=1e-9)
    variance = sum(
        np.var(z - theta * c, ddof=1) / len(z) for z, c in zip(linear, centred, strict=True)
    )
    assert found.std_error**2 == pytest.approx(float(variance), rel=1e-9)


def test_a_covariate_narrows_the_interval_and_says_by_how_much() -> None:
    data = arms(np.random.default_rng(3), ratio=False)
    metric = Metric("delay", "mean", covariate="before")
    spec = ExperimentSpec("e", "unit", (Arm("a"), Arm("b")), (metric,), 700)
    cells = {(0, "delay", arm): fill(*values) for arm, values in zip("ab", data, strict=True)}
    (found,) = compare_arms(spec, 1, cells, srm_alarm=False)
    plain = ExperimentSpec("e", "unit", (Arm("a"), Arm("b")), (Metric("delay", "mean"),), 700)
    (without,) = compare_arms(plain, 1, cells, srm_alarm=False)
    assert found.std_error is not None
    assert without.std_error is not None
    assert found.variance_kept == pytest.approx((found.std_error / without.std_error) ** 2)
    assert found.variance_kept == pytest.approx(1 / (1 + (0.8 * 2) ** 2), rel=0.15)
    assert found.theta == pytest.approx(0.8, rel=0.1)
    assert (without.theta, without.variance_kept) == (None, None)


def test_a_covariate_that_does_not_vary_changes_nothing() -> None:
    x, y = np.arange(200.0), np.ones(200)
    cells = [fill(x, y, np.full(200, 5.0)), fill(x + 1, y, np.full(200, 5.0))]
    assert pooled_theta(cells) == 0.0
    plain = combine(strata_of([(cells[0], cells[1])], theta=None))
    assert combine(strata_of([(cells[0], cells[1])], theta=0.0)) == plain
