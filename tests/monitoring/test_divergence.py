"""The distances, against plain Python and against scipy to 1e-9."""

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats
from scipy.integrate import quad
from scipy.spatial.distance import jensenshannon

from mlpd.monitoring.divergence import (
    adjust_benjamini_hochberg,
    chi_square_p,
    chi_square_survival,
    jensen_shannon,
    knots_of,
    kolmogorov_smirnov,
    psi,
    psi_adjusted,
    wasserstein,
)

TABLES = st.integers(1, 30).flatmap(
    lambda k: st.tuples(*[st.lists(st.integers(0, 10_000), min_size=k, max_size=k)] * 2)
)


def plain_psi(reference: list[int], current: list[int]) -> float:
    total_r, total_c = sum(reference), sum(current)
    if not total_r or not total_c:
        return 0.0
    used = [(r, c) for r, c in zip(reference, current, strict=True) if r + c > 0]
    a, total = len(used) / 2, 0.0
    for r, c in used:
        pi = (r + c) / (total_r + total_c)
        p, q = (r + a * pi) / (total_r + a), (c + a * pi) / (total_c + a)
        total += (q - p) * math.log(q / p)
    return total


def array(values: list[int]) -> NDArray[np.int64]:
    return np.array(values, np.int64)


@given(TABLES)
def test_psi_is_what_plain_python_gives(table: tuple[list[int], list[int]]) -> None:
    reference, current = table
    assert float(psi(array(reference), array(current))) == pytest.approx(
        plain_psi(reference, current), rel=1e-9, abs=1e-12
    )


@given(TABLES)
def test_identical_counts_give_exactly_zero_everywhere(table: tuple[list[int], list[int]]) -> None:
    counts = array(table[0])
    assert float(psi(counts, counts)) == 0.0
    assert float(psi_adjusted(counts, counts)) == 0.0
    assert jensen_shannon(counts, counts) == 0.0
    assert kolmogorov_smirnov(counts, counts) == 0.0
    assert chi_square_p(counts, counts) == pytest.approx(1.0)


def test_psi_of_a_new_category_is_finite_and_large() -> None:
    value = float(psi(array([500, 500, 0]), array([0, 0, 1000])))
    assert 5 < value < 50


def test_psi_of_many_windows_at_once_is_each_by_itself() -> None:
    rng = np.random.default_rng(1)
    reference, windows = rng.integers(0, 99, 12), rng.integers(0, 9, (40, 12))
    together = psi_adjusted(reference, windows)
    assert together.shape == (40,)
    assert together.tolist() == [float(psi_adjusted(reference, window)) for window in windows]


def test_adjustment_removes_about_what_sampling_alone_gives() -> None:
    rng = np.random.default_rng(2)
    shares = np.full(10, 0.1)
    reference = rng.multinomial(50_000, shares)
    raw = np.mean([float(psi(reference, rng.multinomial(500, shares))) for _ in range(300)])
    noise = 9 * (1 / 50_000 + 1 / 500)
    assert raw == pytest.approx(noise, rel=0.1)


@pytest.mark.parametrize("degrees", [*range(1, 12), 50, 99, 102, 103])
def test_chi_square_tail_agrees_with_scipy(degrees: int) -> None:
    for statistic in [0.0, 1e-9, 0.01, 0.5, 1.0, 3.84, degrees, 2.5 * degrees, 300.0, 5e3, 1e7]:
        ours = chi_square_survival(statistic, degrees)
        assert ours == pytest.approx(stats.chi2.sf(statistic, degrees), abs=1e-12, rel=1e-9)


@given(TABLES)
def test_chi_square_p_agrees_with_scipy(table: tuple[list[int], list[int]]) -> None:
    reference, current = array(table[0]), array(table[1])
    used = (reference + current) > 0
    ours = chi_square_p(reference, current)
    if used.sum() < 2 or not reference.any() or not current.any():
        assert ours == 1.0
        return
    both = np.vstack([reference[used], current[used]])
    assert ours == pytest.approx(stats.chi2_contingency(both, correction=False).pvalue, abs=1e-9)


@given(st.lists(st.floats(0, 1), max_size=40))
def test_benjamini_hochberg_agrees_with_scipy(p_values: list[float]) -> None:
    ours = adjust_benjamini_hochberg(p_values)
    expected = stats.false_discovery_control(p_values).tolist() if p_values else []
    assert ours == pytest.approx(expected, abs=1e-12)


@given(TABLES)
def test_jensen_shannon_agrees_with_scipy(table: tuple[list[int], list[int]]) -> None:
    reference, current = array(table[0]), array(table[1])
    if reference.any() and current.any():
        expected = jensenshannon(reference, current, base=2)
        # Near 0 the root magnifies what rounding leaves of the divergence.
        assert jensen_shannon(reference, current) ** 2 == pytest.approx(expected**2, abs=1e-9)


ATOMS = st.lists(st.sampled_from([-3.0, 0.0, 0.1, 2.0, 7.5]), min_size=1, max_size=200)


def binned(values: NDArray[np.float64], edges: NDArray[np.float64]) -> NDArray[np.int64]:
    return np.bincount(edges.searchsorted(values, side="right"), minlength=len(edges) + 1)


@given(ATOMS, ATOMS)
def test_on_atoms_wasserstein_and_ks_are_exact(first: list[float], second: list[float]) -> None:
    a, b = np.array(first), np.array(second)
    distinct = np.unique(a)
    edges = np.union1d(distinct, np.nextafter(distinct, np.inf))
    knots_a, knots_b = (knots_of(edges, x.min(), x.max()) for x in (a, b))
    ours = wasserstein(binned(a, edges), binned(b, edges), knots_a, knots_b)
    if set(second) <= set(first):  # other values share a gap's bin: known to the bin alone
        assert ours == pytest.approx(stats.wasserstein_distance(a, b), abs=1e-9)
        # the two-sample p-value that scipy adds divides by zero for one row; only D is compared
        both = np.union1d(a, b)
        distances = np.abs([np.mean(a <= x) - np.mean(b <= x) for x in both])
        assert kolmogorov_smirnov(binned(a, edges), binned(b, edges)) == pytest.approx(
            distances.max(), abs=1e-12
        )


BINNED = st.integers(2, 12).flatmap(
    lambda k: st.tuples(*[st.lists(st.integers(0, 500), min_size=k, max_size=k)] * 2)
)


@given(BINNED)
def test_on_the_bins_ks_agrees_with_scipy(table: tuple[list[int], list[int]]) -> None:
    reference, current = array(table[0]), array(table[1])
    if min(reference.sum(), current.sum()) < 2:
        return
    samples = [np.repeat(np.arange(len(counts)), counts) for counts in (reference, current)]
    with np.errstate(all="ignore"):
        expected = stats.ks_2samp(*samples, method="asymp").statistic
    assert kolmogorov_smirnov(reference, current) == pytest.approx(expected, abs=1e-9)


@given(BINNED, st.integers(0, 10_000))
@settings(max_examples=25)
def test_on_the_bins_wasserstein_is_the_integral_of_the_gap(
    table: tuple[list[int], list[int]], seed: int
) -> None:
    reference, current = array(table[0]), array(table[1])
    if not reference.any() or not current.any():
        return
    rng = np.random.default_rng(seed)
    edges = np.sort(rng.normal(size=len(reference) - 1))
    knots = [knots_of(edges, edges[0] - rng.random(), edges[-1] + rng.random()) for _ in range(2)]
    ours = wasserstein(reference, current, *knots)

    def distribution(at: float, known: NDArray[np.float64], counts: NDArray[np.int64]) -> float:
        shares = np.concatenate([[0.0], np.cumsum(counts) / counts.sum()])
        return float(np.interp(at, known, shares, left=0.0, right=1.0))

    both = np.unique(np.concatenate(knots))
    expected = 0.0
    for left, right in pairwise(both.tolist()):  # the gap is linear here, but for one crossing
        ends = [distribution(x, knots[0], reference) - distribution(x, knots[1], current)
                for x in (left, right)]  # fmt: skip
        cut = ends[0] / (ends[0] - ends[1]) if ends[0] * ends[1] < 0 else 0.0
        points = [left, left + cut * (right - left), right]
        expected += sum(
            abs(quad(lambda x: distribution(x, knots[0], reference)
                     - distribution(x, knots[1], current), a, b)[0])
            for a, b in pairwise(points)
            if b > a
        )  # fmt: skip
    assert ours == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(("shift", "error"), [(0.0, 0.0), (0.3, 0.02), (-1.0, 0.1)])
def test_wasserstein_of_a_shift_is_the_shift_but_for_the_tails(shift: float, error: float) -> None:
    rng = np.random.default_rng(3)
    a = rng.normal(size=100_000)
    edges = np.quantile(a, np.arange(1, 100) / 100)
    b = a + shift
    ours = wasserstein(
        binned(a, edges),
        binned(b, edges),
        knots_of(edges, a.min(), a.max()),
        knots_of(edges, b.min(), b.max()),
    )
    assert ours == pytest.approx(abs(shift), abs=error)


def test_an_empty_side_is_no_distance() -> None:
    some, none = array([3, 4]), array([0, 0])
    knots = knots_of(np.array([1.0]), 0.0, 2.0)
    assert float(psi(some, none)) == float(psi(none, none)) == 0.0
    assert float(psi_adjusted(none, none)) == 0.0
    assert chi_square_p(some, none) == 1.0
    assert jensen_shannon(some, none) == kolmogorov_smirnov(none, some) == 0.0
    assert wasserstein(some, none, knots, knots) == 0.0
