"""The counting kernels, plain and native, against numpy one value at a time; merging; bytes."""

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from mlpd.core.errors import ValidationError
from mlpd.core.kernels import load_kernels
from mlpd.monitoring.counting import CountKernels, CountLayout, Counts, PlainKernels
from mlpd.monitoring.reference import ReferenceProfile, bin_index, build_reference

PLAIN = PlainKernels()
RNG = np.random.default_rng(10)


def build_profile() -> ReferenceProfile:
    rows = 600
    vectors = np.column_stack(
        [
            RNG.normal(size=rows),
            RNG.integers(0, 4, rows).astype(float),  # atoms
            RNG.zipf(1.5, rows).clip(max=400).astype(float),  # categories beyond the hundred
            np.full(rows, np.nan),
            np.where(RNG.random(rows) < 0.3, np.nan, RNG.exponential(size=rows)),
        ]
    )
    return build_reference(
        vectors,
        names=["normal", "atoms", "code", "void", "holes"],
        kinds=["numeric", "numeric", "categorical", "numeric", "numeric"],
        scores=RNG.random(rows),
    )


PROFILE = build_profile()
LAYOUT = CountLayout(PROFILE)


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> CountKernels:
    cache: Path = tmp_path_factory.mktemp("kernels")
    return load_kernels("mlpd.monitoring.count_kernel", cache_dir=cache)


def random_rows(count: int, seed: int = 0) -> NDArray[np.float64]:
    rng = np.random.default_rng(seed)
    rows = rng.normal(scale=3, size=(count, LAYOUT.width))
    rows[:, 1:3] = rng.integers(-1, 600, (count, 2))
    odd = [math.nan, math.inf, -math.inf, 1e6, -0.0, 0.0, 1.0]
    return np.where(rng.random(rows.shape) < 0.2, rng.choice(odd, rows.shape), rows)


def count(rows: NDArray[np.float64], kernels: CountKernels = PLAIN) -> Counts:
    counts = Counts(LAYOUT)
    counts.add_rows(np.ascontiguousarray(rows), kernels=kernels)
    return counts


def assert_is_plain_count(counts: Counts, rows: NDArray[np.float64]) -> None:
    """Compare every number that can be read with numpy on the raw values."""
    assert counts.rows == len(rows)
    for index, column in enumerate(LAYOUT.columns):
        values, found = rows[:, index], counts.column(index)
        finite = values[np.isfinite(values)]
        expected = np.bincount(bin_index(column, values), minlength=column.bins)
        assert found.bins.tolist() == expected.tolist()
        assert found.missing == np.isnan(values).sum()
        assert found.negative_infinite == (values == -np.inf).sum()
        assert found.positive_infinite == (values == np.inf).sum()
        if column.kind == "categorical":
            assert found.new == (~np.isin(values, column.keys) & ~np.isnan(values)).sum()
            assert found.mean is None
            continue
        if column.low is not None and column.high is not None:
            assert found.below == (finite < column.low).sum()
            assert found.above == (finite > column.high).sum()
        if len(finite):
            assert found.mean == pytest.approx(finite.mean(), rel=1e-9, abs=1e-9)
            assert found.deviation == pytest.approx(finite.std(), rel=1e-9, abs=1e-9)
            assert (found.low, found.high) == (finite.min(), finite.max())
        else:
            assert found.mean is found.deviation is found.low is found.high is None


@given(st.integers(0, 40), st.integers(0, 10_000))
@settings(max_examples=30)
def test_plain_kernel_counts_like_numpy(rows: int, seed: int) -> None:
    matrix = random_rows(rows, seed)
    assert_is_plain_count(count(matrix), matrix)


@pytest.mark.parametrize("rows", [0, 1, 3, 511, 512, 513, 5000])
def test_native_kernel_counts_like_numpy(rows: int, native: CountKernels) -> None:
    matrix = random_rows(rows, rows)
    assert_is_plain_count(count(matrix, native), matrix)


def test_native_and_plain_kernels_agree_to_the_bit(native: CountKernels) -> None:
    matrix = random_rows(700, 5)
    flags = np.random.default_rng(5).integers(0, 4, matrix.shape).astype(np.uint8)
    both = []
    for kernels in (PLAIN, native):
        counts = Counts(LAYOUT)
        counts.add_rows(matrix, kernels=kernels, flags=flags)
        both.append(counts.to_bytes())
    assert both[0] == both[1]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 0.0, 1e6, -1e150])
def test_one_row_of_anything_is_counted(value: float, native: CountKernels) -> None:
    matrix = np.full((1, LAYOUT.width), value)
    assert_is_plain_count(count(matrix, native), matrix)


def test_moments_that_overflow_are_absent_and_the_bins_still_right(native: CountKernels) -> None:
    largest = 1.7976931348623157e308
    matrix = np.array([[largest], [-largest], [1.0]]) * np.ones(LAYOUT.width)
    found = count(matrix, native).column(0)
    assert found.deviation is None
    assert (found.low, found.high) == (-largest, largest)
    assert found.bins.sum() == 3


def test_flags_are_counted_by_column() -> None:
    flags = np.zeros((4, LAYOUT.width), np.uint8)
    flags[:, 0] = [1, 1, 3, 0]
    flags[:, 4] = [2, 0, 0, 0]
    counts = Counts(LAYOUT)
    counts.add_rows(np.zeros((4, LAYOUT.width)), kernels=PLAIN, flags=flags)
    assert (counts.column(0).stale, counts.column(0).defaulted) == (3, 1)
    assert (counts.column(4).stale, counts.column(4).defaulted) == (0, 1)


@given(st.lists(st.integers(0, 25), min_size=1, max_size=6), st.randoms(use_true_random=False))
@settings(max_examples=30)
def test_merging_parts_in_any_order_counts_the_whole(sizes: list[int], random: object) -> None:
    matrix = random_rows(sum(sizes), sum(sizes))
    parts = [count(part) for part in np.split(matrix, np.cumsum(sizes)[:-1])]
    random.shuffle(parts)  # type: ignore[attr-defined]
    merged = Counts(LAYOUT)
    for part in parts:
        merged.add(part)
    whole = count(matrix)
    assert merged.tallies.tolist() == whole.tallies.tolist()
    assert merged.apart.tolist() == whole.apart.tolist()
    assert_is_plain_count(merged, matrix)


def test_counts_come_back_from_bytes_and_go_on_counting() -> None:
    matrix = random_rows(50)
    back = Counts.from_bytes(count(matrix[:30]).to_bytes(), LAYOUT)
    back.add_rows(matrix[30:], kernels=PLAIN)
    assert_is_plain_count(back, matrix)


def test_counts_of_another_profile_or_cut_short_are_refused() -> None:
    other = CountLayout(build_profile())
    data = count(random_rows(5)).to_bytes()
    for layout, stored in ((other, data), (LAYOUT, data[:-8]), (LAYOUT, b""), (LAYOUT, b"x" * 99)):
        with pytest.raises(ValidationError, match="no counts of reference profile"):
            Counts.from_bytes(stored, layout)
    with pytest.raises(ValidationError, match="two reference profiles"):
        Counts(LAYOUT).add(Counts(other))


def test_the_reference_counted_again_gives_its_own_counts(native: CountKernels) -> None:
    rng = np.random.default_rng(8)
    vectors, scores = rng.normal(size=(2000, 3)).round(1), rng.random(2000)
    profile = build_reference(
        vectors, names=list("abc"), kinds=["numeric", "numeric", "categorical"], scores=scores
    )
    counts = Counts(CountLayout(profile))
    counts.add_rows(np.column_stack([vectors, scores]), kernels=native)
    for index, column in enumerate(profile.columns):
        assert tuple(counts.column(index).bins.tolist()) == column.counts
