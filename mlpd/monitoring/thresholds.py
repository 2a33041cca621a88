"""Calibrated thresholds: how far windows of the reference itself lie from the whole of it.

A column's threshold is mean + c standard deviations of psi_adj over time-ordered windows of the
training rows.  c is 3, or as much more as it takes for at most one such window in twenty to have
any column beyond its threshold: what a model is judged by is the worst of all its columns, and of
forty that each leave their own band once in a hundred windows, some column does so in a third of
them.  The joint distribution comes from the windows themselves, so that columns that move together
cost little: the max-T of Westfall and Young (1993), "Resampling-Based Multiple Testing", section
2.5, with the reference's windows in place of the permutations.
"""

from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from mlpd.monitoring.divergence import Counts, psi_adjusted

Floats = NDArray[np.float64]

WARN_PSI: Final = 0.1
ALERT_PSI: Final = 0.2
"""No column drifts below these, whatever its calibrated threshold."""
WINDOWS_MIN: Final = 20
ROWS_MIN: Final = 100
"""Windows with fewer rows say nothing about drift and are left out of the calibration."""
DEVIATIONS_MIN: Final = 3.0
WINDOWS_PER_FLAGGED: Final = 20
"""Of so many of the reference's windows one may have a column beyond its threshold."""
_MARGIN: Final = 1 + 1e-9


def window_drifts(
    index: NDArray[np.int64], counts: Counts, windows: NDArray[np.int64]
) -> Floats | None:
    """Return psi_adj of each window of at least 100 rows against the whole, in order of time.

    `index` [n] is each row's bin, `counts` what the whole has in each bin, `windows` [n] numbers
    each row's window.  None with fewer than 20 such windows.
    """
    _, number = np.unique(windows, return_inverse=True)
    cells = np.bincount(
        number * len(counts) + index, minlength=(number.max(initial=-1) + 1) * len(counts)
    )
    table = cells.reshape(-1, len(counts))
    table = table[table.sum(axis=1) >= ROWS_MIN]
    return psi_adjusted(counts, table) if len(table) >= WINDOWS_MIN else None


def calibrate(drifts: Sequence[Floats]) -> list[float]:
    """Return the threshold of each column from psi_adj [W] of each, all over the same windows.

    W is at least 20.  A window below WARN_PSI flags nothing and doesn't count.

    >>> calm = np.linspace(0.0, 0.02, 20)
    >>> f"{calibrate([calm])[0]:.4f} = {calm.mean() + 3 * calm.std(ddof=1):.4f}"
    '0.0287 = 0.0287'
    """
    table = np.array(drifts)
    mean = table.mean(axis=1, keepdims=True)
    deviation = table.std(axis=1, ddof=1, keepdims=True)
    away = np.divide(table - mean, deviation, out=np.zeros_like(table), where=deviation > 0)
    worst = np.sort(np.where(table >= WARN_PSI, away, 0.0).max(axis=0))[::-1]
    # The first that may not be flagged lies below its threshold, by more than rounding.
    needed = float(worst[len(worst) // WINDOWS_PER_FLAGGED]) * _MARGIN
    found = mean + max(DEVIATIONS_MIN, needed) * deviation
    thresholds: list[float] = found[:, 0].tolist()
    return thresholds
