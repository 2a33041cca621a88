"""Calibrated thresholds: never below three deviations, and one window in twenty at most."""

import math
import statistics

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from mlpd.core.time import DAY_US
from mlpd.monitoring import thresholds
from mlpd.monitoring.counting import CountLayout, Counts, PlainKernels
from mlpd.monitoring.divergence import psi_adjusted
from mlpd.monitoring.drift import report
from mlpd.monitoring.reference import bin_index, build_reference
from mlpd.monitoring.thresholds import WARN_PSI, calibrate, number_windows, window_drifts

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
    """Forty windows of 120 rows, two of 99: each tenth against all rows outside of it."""
    rng = np.random.default_rng(6)
    number = np.repeat(np.arange(42), [*[120] * 20, 99, *[120] * 20, 99])
    index = rng.integers(0, 3, len(number))
    counts = np.bincount(index, minlength=3)
    found = window_drifts(index, counts, number)
    enough = [w for w in range(42) if w not in (20, 41)]
    expected = []
    for first in range(0, 40, 4):
        part = enough[first : first + 4]
        rest = np.bincount(index[~np.isin(number, part)], minlength=3)
        expected += [psi_adjusted(rest, np.bincount(index[number == w], minlength=3)) for w in part]
    assert found.tolist() == pytest.approx([float(value) for value in expected])


def test_windows_are_numbered_in_order_of_time_without_gaps() -> None:
    t_us = np.array([25, 3, 25, 9, 130, -1])
    assert number_windows(t_us, 10).tolist() == [2, 1, 2, 1, 3, 0]
    assert number_windows(t_us[:0], 10).tolist() == []
    assert len(window_drifts(t_us[:0], np.zeros(3, np.int64), t_us[:0])) == 0


def test_of_very_many_windows_the_newest_are_calibrated_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(thresholds, "WINDOWS_MAX", 30)
    number = np.repeat(np.arange(50), 100)
    index = (number < 20).astype(np.int64)
    found = window_drifts(index, np.bincount(index), number)
    assert len(found) == 30
    assert found == pytest.approx([found[0]] * 30)  # all are bin 0 alone


def test_fewer_than_twenty_windows_calibrate_nothing() -> None:
    assert calibrate([np.zeros(19), np.ones(19)]) == []
    assert calibrate([]) == []


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
        t_us=np.repeat(np.arange(days), rows) * DAY_US,
    )
    states = []
    for day in range(days):
        counts = Counts(CountLayout(profile))
        of_day = vectors[day * rows : (day + 1) * rows]
        counts.add_rows(np.column_stack([of_day, of_day[:, 0]]), kernels=PlainKernels())
        states.append(report(profile, counts).state)
    assert 1 <= sum(state != "ok" for state in states) <= days // 20
    of_day = np.repeat(np.arange(days), rows)
    drifts = [window_drifts(bin_index(column, vectors[:, i]), np.array(column.counts), of_day)
              for i, column in enumerate(profile.features)]  # fmt: skip
    assert flagged(drifts, at_deviations(drifts, 3.0)) > days / 3
    assert profile.score is not None
    assert profile.score.thresholds == profile.features[0].thresholds
    assert all(math.isfinite(column.threshold(DAY_US) or 0.0) for column in profile.columns)
