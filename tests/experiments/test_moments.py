from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlpd.experiments.moments import Moments, RatioMoments

VALUES = st.lists(st.floats(-1e6, 1e6), max_size=30)
PAIR = st.tuples(st.floats(-1e3, 1e3), st.floats(0.5, 1e3))
PAIRS = st.lists(PAIR, min_size=1, max_size=30)


def exact_variance(values: list[float]) -> float:
    """The unbiased variance in rational arithmetic, rounded once."""
    exact = [Fraction(v) for v in values]
    if len(exact) < 2:
        return 0.0
    mean = sum(exact) / len(exact)
    return float(sum((v - mean) ** 2 for v in exact) / (len(exact) - 1))


def exact_ratio_variance(pairs: list[tuple[float, float]]) -> float:
    """The linearised form sum((x - R y)^2) / ((n - 1) n mean(y)^2), in rational arithmetic."""
    exact = [(Fraction(x), Fraction(y)) for x, y in pairs]
    n, total = len(exact), sum(y for _, y in exact)
    if n < 2:
        return 0.0
    ratio = sum(x for x, _ in exact) / total
    squares = sum((x - ratio * y) ** 2 for x, y in exact)
    return float(squares / ((n - 1) * n * (total / n) ** 2))


def test_variance_is_true_far_from_zero() -> None:
    values = [1e9 + i for i in range(8)]
    assert Moments.of(values).variance == 6.0
    pairs = RatioMoments.of([(v, 1.0) for v in values])
    assert pairs.x.variance == 6.0
    assert pairs.ratio_variance == 6.0 / 8


@given(VALUES)
def test_moments_match_rational_arithmetic(values: list[float]) -> None:
    found = Moments.of(values)
    assert found.n == len(values)
    assert found.variance == pytest.approx(exact_variance(values), rel=1e-9, abs=1e-6)


def exact_skewness(values: list[float]) -> float:
    """sqrt(n) m3 / m2^1.5 with the moments in rational arithmetic."""
    exact = [Fraction(v) for v in values]
    mean = sum(exact) / len(exact)
    m2, m3 = (float(sum((v - mean) ** k for v in exact)) for k in (2, 3))
    return float(len(exact) ** 0.5 * m3 / m2**1.5)


SPREAD = st.lists(st.integers(-1000, 1000), min_size=2, max_size=30).filter(
    lambda values: len(set(values)) > 1
)


@given(SPREAD, SPREAD, st.integers(-1000, 1000), st.integers(-1000, 1000))
def test_skewness_matches_rational_arithmetic_however_it_came_about(
    left: list[int], right: list[int], old: int, new: int
) -> None:
    expected = pytest.approx(exact_skewness([float(v) for v in left + right]), abs=1e-9)
    whole = Moments.of(map(float, left + right))
    assert whole.skewness == expected
    assert Moments.of(map(float, left)).merge(Moments.of(map(float, right))).skewness == expected
    assert whole.add(old).remove(old).skewness == expected
    assert whole.add(new).replace(new, old).remove(old).skewness == expected


def test_nothing_that_varies_has_no_skewness() -> None:
    assert Moments().skewness == Moments.of([3.0]).skewness == Moments.of([2.0, 2.0]).skewness == 0


def same(found: Moments | RatioMoments, expected: Moments | RatioMoments) -> bool:
    """Tell whether all that is read of two is the same to the bit."""
    names = ("n", "mean", "m2", "m3", "variance", "skewness")
    if isinstance(found, RatioMoments):
        names = ("n", "comoment", "ratio", "ratio_variance")
        assert isinstance(expected, RatioMoments)
        assert same(found.x, expected.x)
        assert same(found.y, expected.y)
    return all(
        np.float64(getattr(found, n)).tobytes() == np.float64(getattr(expected, n)).tobytes()
        for n in names
    )


@given(VALUES, VALUES)
def test_merging_equals_adding_all_in_any_order(left: list[float], right: list[float]) -> None:
    merged, whole = Moments.of(left).merge(Moments.of(right)), Moments.of(right[::-1] + left)
    assert same(merged, whole)


@given(VALUES, st.floats(-1e100, 1e100), st.floats(-1e6, 1e6))
def test_replacing_and_removing_undo_adding(values: list[float], old: float, new: float) -> None:
    with_old = Moments.of([*values, old])
    assert same(with_old.replace(old, new), Moments.of([*values, new]))
    assert same(with_old.remove(old), Moments.of(values))


@given(st.lists(st.floats(-1e100, 1e100), min_size=1, max_size=10))
def test_what_is_read_is_the_rational_answer_rounded_once(values: list[float]) -> None:
    found, exact = Moments.of(values), [Fraction(v) for v in values]
    mean = sum(exact) / len(exact)
    assert found.mean == float(mean)
    assert found.m2 == float(sum((v - mean) ** 2 for v in exact))


def test_sums_that_no_number_holds_are_infinite() -> None:
    found = Moments.of([1e308, -1e308, 1e308])
    assert (found.mean, found.m2, found.m3) == (1e308 / 3, np.inf, -np.inf)


@given(PAIRS)
def test_ratio_and_its_variance_match_rational_arithmetic(
    pairs: list[tuple[float, float]],
) -> None:
    found = RatioMoments.of(pairs)
    expected = sum(x for x, _ in pairs) / sum(y for _, y in pairs)
    assert found.ratio == pytest.approx(expected, rel=1e-9, abs=1e-9)
    scale = max(abs(x) for x, _ in pairs) + max(y for _, y in pairs)
    assert found.ratio_variance == pytest.approx(
        exact_ratio_variance(pairs), rel=1e-6, abs=1e-9 * scale**2
    )


@given(PAIRS, PAIRS)
def test_pairs_merge(left: list[tuple[float, float]], right: list[tuple[float, float]]) -> None:
    assert same(RatioMoments.of(left).merge(RatioMoments.of(right)), RatioMoments.of(left + right))


@given(PAIRS, PAIR, PAIR)
def test_pairs_are_replaced_and_removed(
    pairs: list[tuple[float, float]], old: tuple[float, float], new: tuple[float, float]
) -> None:
    with_old = RatioMoments.of([*pairs, old])
    assert same(with_old.replace(old, new), RatioMoments.of([*pairs, new]))
    assert same(with_old.remove(*old), RatioMoments.of(pairs))


def test_empty_moments_are_neutral() -> None:
    some = RatioMoments.of([(1.0, 2.0), (3.0, 2.0)])
    assert RatioMoments().merge(some) == some == some.merge(RatioMoments())
    assert RatioMoments().merge(RatioMoments()) == RatioMoments()
    assert RatioMoments.of([(1.0, 2.0)]).remove(1.0, 2.0) == RatioMoments()
    assert (RatioMoments().ratio, RatioMoments().ratio_variance) == (0.0, 0.0)


def test_the_delta_method_sees_what_naive_variance_misses_in_clusters() -> None:
    rng = np.random.default_rng(5)
    estimates, claimed, naive = [], [], []
    for _ in range(300):
        counts = rng.integers(1, 20, 200)
        sums = rng.binomial(counts, rng.beta(1, 3, 200))
        moments = RatioMoments.of(zip(map(float, sums), map(float, counts), strict=True))
        estimates.append(moments.ratio)
        claimed.append(moments.ratio_variance)
        naive.append(moments.ratio * (1 - moments.ratio) / counts.sum())
    truth = float(np.var(estimates, ddof=1))
    assert np.mean(claimed) == pytest.approx(truth, rel=0.25)
    assert np.mean(naive) < 0.5 * truth
