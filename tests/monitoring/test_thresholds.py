"""Calibrated thresholds: never below three deviations, and one window in twenty at most."""

import math
import statistics

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from mlpd.monitoring.counting import CountLayout, Counts, PlainKernels
from mlpd.monitoring.drift import report
from mlpd.monitoring.reference import bin_index, build_reference
from mlpd.monitoring.thresholds import WARN_PSI, calibrate, window_drifts

Matrix = NDArray[np.float64]


def flagged(drifts: list[Matrix], thresholds: list[float]) -> int:
    """Return in how many windows any column drifts."""
    return sum(
        any(d >= max(WARN_PSI, t) for d, t in zip(window, thresholds, strict=True))
        for window in zip(*(column.tolist() for column in drifts), strict=True)
    )


def at_deviations(drifts: list[Matrix], c: float) -> list[float]:
    return [statistics.mean(d.tolist()) + c * statistics.stdev(d.tolist()) for d in drifts]


@given(st.integers(1, 60), st.integers(20, 130), st.floats(0.0, 3.0), st.integers(0, 10_000))
def test_no_more_windows_than_one_in_twenty_and_no_stricter_than_that_takes(
    columns: int, windows: int, tail: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    drifts = [0.05 * np.exp(tail * rng.normal(size=windows)) for _ in range(columns)]
    found = calibrate(drifts)
    assert flagged(drifts, found) <= windows // 20
    usual = at_deviations(drifts, 3.0)
    if flagged(drifts, usual) <= windows // 20:
        assert found == pytest.approx(usual)
        return
    of_all = [(t - m) / s for t, m, s in
              zip(found, at_deviations(drifts, 0.0),
                  (statistics.stdev(d.tolist()) for d in drifts), strict=True)]  # fmt: skip
    assert max(of_all) == pytest.approx(min(of_all))
    assert flagged(drifts, at_deviations(drifts, 0.999 * min(of_all))) > windows // 20


def test_many_columns_that_never_drift_together_raise_each_others_thresholds() -> None:
    rng = np.random.default_rng(2)
    alone = 0.05 * np.exp(rng.normal(size=200))
    crowd = [alone, *(0.05 * np.exp(rng.normal(size=200)) for _ in range(39))]
    assert calibrate(crowd)[0] > calibrate([alone])[0]
    assert calibrate([alone] * 40) == pytest.approx(calibrate([alone]) * 40)


def test_windows_below_the_warning_raise_nothing() -> None:
    drifts = [np.append(np.zeros(39), 0.09), np.append(np.zeros(39), [0.099])]
    assert calibrate(drifts) == pytest.approx(at_deviations(drifts, 3.0))


def test_windows_that_are_all_alike_have_a_threshold() -> None:
    assert calibrate([np.full(20, 0.5), np.full(20, 0.0)]) == [0.5, 0.0]


def test_window_drifts_are_of_windows_with_rows_enough_in_order_of_time() -> None:
    index = np.repeat(np.arange(21) % 2, 100)
    windows = np.repeat(np.arange(21), 100)[:-1] * 7  # the last one has 99 rows
    index = index[:-1]
    counts = np.bincount(index)
    found = window_drifts(index, counts, windows)
    assert found is not None
    assert len(found) == 20
    assert found[0::2] == pytest.approx([found[0]] * 10)
    assert found[0] != found[1]
    assert window_drifts(index[:-100], np.bincount(index[:-100]), windows[:-100]) is None


def test_of_the_training_days_themselves_one_in_twenty_is_called_drifted_at_most() -> None:
    """Forty features that each have days of their own; three deviations call a third drifted."""
    rng = np.random.default_rng(3)
    days, rows, width = 120, 120, 40
    odd = rng.random((days, width)) < 0.015
    level = rng.normal(scale=0.3, size=(days, width)) + 2.0 * odd
    vectors = np.repeat(level, rows, axis=0) + rng.normal(size=(days * rows, width))
    profile = build_reference(
        vectors,
        names=[f"f{i}" for i in range(width)],
        kinds=["numeric"] * width,
        scores=vectors[:, 0],
        windows=np.repeat(np.arange(days), rows),
    )
    states = []
    for day in range(days):
        counts = Counts(CountLayout(profile))
        of_day = vectors[day * rows : (day + 1) * rows]
        counts.add_rows(np.column_stack([of_day, of_day[:, 0]]), kernels=PlainKernels())
        states.append(report(profile, counts).state)
    assert 1 <= sum(state != "ok" for state in states) <= days // 20
    days_of = np.repeat(np.arange(days), rows)
    drifts = [window_drifts(bin_index(column, vectors[:, i]), np.array(column.counts), days_of)
              for i, column in enumerate(profile.features)]  # fmt: skip
    known = [found for found in drifts if found is not None]
    assert flagged(known, at_deviations(known, 3.0)) > days / 3
    assert math.isfinite(max(column.threshold or 0.0 for column in profile.columns))
    assert profile.score is not None
    assert profile.score.threshold == profile.features[0].threshold
