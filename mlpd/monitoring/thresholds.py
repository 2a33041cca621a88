"""Calibrated thresholds: how far windows of the reference itself lie from the rest of it.

A column's threshold is mean + c standard deviations of psi_adj over time-ordered windows of the
training rows, as wide as those that it is held against: an hour is a narrow band of whatever
changes within a day, a week an average of what changes between days.  c is 3, or as much more as
it takes for at most one such window in twenty to have any column beyond its threshold: what a model
is judged by is the worst of its columns, and of forty that each leave their own band once in a
hundred windows, some column does so in a third of them.  The joint distribution comes from the
windows themselves, so that columns that move together cost little: the max-T of Westfall and Young
(1993), "Resampling-Based Multiple Testing", section 2.5, with the reference's windows in place of
the permutations.
"""

from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from mlpd.core.time import DAY_US, HOUR_US
from mlpd.monitoring.divergence import Counts, psi_adjusted

Floats = NDArray[np.float64]

WARN_PSI: Final = 0.1
ALERT_PSI: Final = 0.2
"""No column drifts below these, whatever its calibrated threshold."""
WIDTHS_US: Final = (HOUR_US, 6 * HOUR_US, DAY_US, 7 * DAY_US)
"""Widths of windows that are calibrated, in us; windows begin at their multiples."""
WINDOWS_MIN: Final = 20
WINDOWS_MAX: Final = 10_000
"""The newest windows that are calibrated on: over a year of hours, and a bound on memory."""
PARTS: Final = 10
"""Windows are compared with the rows outside their own tenth, as served ones are with training."""
ROWS_MIN: Final = 100
"""Windows with fewer rows say nothing about drift and are left out of the calibration."""
DEVIATIONS_MIN: Final = 3.0
WINDOWS_PER_FLAGGED: Final = 20
"""Of so many of the reference's windows one may have a column beyond its threshold."""
_MARGIN: Final = 1 + 1e-9


def number_windows(t_us: NDArray[np.int64], width_us: int) -> NDArray[np.int64]:
    """Return each row's window, those with rows numbered from 0 in order of time."""
    _, number = np.unique(t_us // width_us, return_inverse=True)
    return number


def window_drifts(index: NDArray[np.int64], counts: Counts, number: NDArray[np.int64]) -> Floats:
    """Return psi_adj of each window of at least 100 rows against the rest, in order of time.

    `index` [n] is each row's bin, `counts` what all rows have in each bin, `number` [n] each row's
    window as `number_windows` gives it.  The rest is all rows but those of the windows of the same
    tenth: a window that looks like its neighbours doesn't look like the past.  Of more than 10,000
    windows the newest.
    """
    windows = int(number.max(initial=-1)) + 1
    first = max(0, windows - WINDOWS_MAX)
    kept, bins = number >= first, len(counts)
    cells = np.bincount(
        (number[kept] - first) * bins + index[kept], minlength=(windows - first) * bins
    )
    table = cells.reshape(-1, bins)
    parts = np.array_split(table[table.sum(axis=1) >= ROWS_MIN], PARTS)
    return np.concatenate([psi_adjusted(counts - part.sum(axis=0), part) for part in parts])


def calibrate(drifts: Sequence[Floats]) -> list[float]:
    """Return the threshold of each column from psi_adj [W] of each, all over the same windows.

    Empty with fewer than 20 windows.  A window below WARN_PSI flags nothing and doesn't count.

    >>> calm = np.linspace(0.0, 0.02, 20)
    >>> f"{calibrate([calm])[0]:.4f} = {calm.mean() + 3 * calm.std(ddof=1):.4f}"
    '0.0287 = 0.0287'
    """
    table = np.array(drifts)
    if not len(table) or table.shape[1] < WINDOWS_MIN:
        return []
    mean = table.mean(axis=1, keepdims=True)
    deviation = table.std(axis=1, ddof=1, keepdims=True)
    away = np.divide(table - mean, deviation, out=np.zeros_like(table), where=deviation > 0)
    worst = np.sort(np.where(table >= WARN_PSI, away, 0.0).max(axis=0))[::-1]
    # The first that may not be flagged lies below its threshold, by more than rounding.
    needed = float(worst[len(worst) // WINDOWS_PER_FLAGGED]) * _MARGIN
    found = mean + max(DEVIATIONS_MIN, needed) * deviation
    thresholds: list[float] = found[:, 0].tolist()
    return thresholds
