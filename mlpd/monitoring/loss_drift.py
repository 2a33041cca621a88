"""Concept drift: whether the loss on matured labels is another one than on held-out rows.

An always-valid confidence sequence of mean loss minus reference loss, day by day: it may be looked
at every day for ever, and calls a model that is as it was worse with a probability of at most 0.01.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Final, Literal, NamedTuple

from mlpd.core.sequences import sequence_multiplier
from mlpd.monitoring.calibration import Calibration

ALPHA: Final = 0.01
ROWS_MIN: Final = 100
PLANNED_ROWS: Final = 10_000
"""The sequence is tightest after so many labels; from 1,000 to ten million it is a fifth wider."""

State = Literal["ok", "worse", "better", "insufficient", "no_reference"]


class DayLoss(NamedTuple):
    """Losses of a mature day: how many, their sum and the sum of their squares."""

    day_us: int
    rows: int
    total: float
    squares: float


class LossAt(NamedTuple):
    """After the labels up to this day: mean loss minus the reference's, and its interval."""

    day_us: int
    rows: int
    loss: float
    difference: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class LossDrift:
    """`state` as of the last day; `since_us` the first day whose interval left 0 out, for ever.

    A state once reached holds: all intervals are right together with a probability of 0.99.
    """

    state: State
    since_us: int | None
    reference_loss: float | None
    sequence: tuple[LossAt, ...]


def judge_losses(reference: Calibration | None, days: Sequence[DayLoss]) -> LossDrift:
    """Return the sequence over mature days in ascending order.

    Half of alpha is for the labels (Waudby-Smith et al. 2021, asymptotic, any number of looks),
    half for the reference, which was measured once.
    """
    if reference is None:
        return LossDrift("no_reference", None, None, ())
    sequence = tuple(_sequence(reference, days))
    for at in sequence:
        if at.low > 0.0 or at.high < 0.0:
            state: State = "worse" if at.low > 0.0 else "better"
            return LossDrift(state, at.day_us, reference.loss_mean, sequence)
    last: State = "ok" if sequence else "insufficient"
    return LossDrift(last, None, reference.loss_mean, sequence)


def _sequence(reference: Calibration, days: Sequence[DayLoss]) -> "list[LossAt]":
    z = NormalDist().inv_cdf(1.0 - ALPHA / 4)
    fixed = z * math.sqrt(reference.loss_variance / reference.rows)
    rows, total, squares, found = 0, 0.0, 0.0, []
    for day in days:
        rows, total, squares = rows + day.rows, total + day.total, squares + day.squares
        if rows < ROWS_MIN:
            continue
        mean = total / rows
        error = math.sqrt(max(0.0, squares / rows - mean * mean) / (rows - 1))
        half = fixed + error * sequence_multiplier(
            rows, planned_units=PLANNED_ROWS, alpha=ALPHA / 2
        )
        difference = mean - reference.loss_mean
        found.append(
            LossAt(day.day_us, rows, mean, difference, difference - half, difference + half)
        )
    return found
