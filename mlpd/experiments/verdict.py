"""Compares arms phase by phase, guards against small numbers, and says what may be concluded."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Final, Literal, NamedTuple

from mlpd.experiments.moments import RatioMoments
from mlpd.experiments.records import Pair
from mlpd.experiments.sequences import Interval, adjust, confidence_sequence, welch, welch_df
from mlpd.experiments.spec import ExperimentSpec, Metric

MIN_UNITS: Final = 100
MIN_EVENTS: Final = 25
"""A 99/1 canary judged on fewer has 78 % false positives: normality isn't there yet."""

Verdict = Literal["better", "worse", "undecided", "insufficient", "blocked"]


class Cell(NamedTuple):
    """One metric in one arm and phase: moments over units that have an outcome.

    `events` counts units with a numerator other than 0, `non_events` units with a numerator other
    than the denominator: for a proportion, units with a 1 and units with a 0 among their outcomes.
    """

    moments: RatioMoments = RatioMoments()
    events: int = 0
    non_events: int = 0

    def change(self, old: Pair | None, new: Pair | None) -> "Cell":
        """Return the cell after a unit's pair went from `old` to `new`; None means not in here."""
        moments, events, non_events = self
        if old is not None:
            events, non_events = events - (old[0] != 0), non_events - (old[0] != old[1])
        if new is not None:
            events, non_events = events + (new[0] != 0), non_events + (new[0] != new[1])
        if old is not None and new is not None:
            moments = moments.replace(old, new)
        elif old is not None:
            moments = moments.remove(*old)
        elif new is not None:
            moments = moments.add(*new)
        return Cell(moments, events, non_events)


Cells = Mapping[tuple[int, str, str], Cell]
"""Cells by (phase, metric, arm); an absent one is empty."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """One arm against the control on one metric; the numbers are None while data is insufficient.

    `difference` = value - control_value, both weighted by the traffic of the phases used;
    [`low`, `high`] is its interval at the experiment's alpha, uncorrected; `relative` divides by
    the control's value.  `units` counts both arms in the phases used.
    """

    metric: str
    arm: str
    control: str
    units: int = 0
    phases: int = 0
    value: float | None = None
    control_value: float | None = None
    difference: float | None = None
    relative: float | None = None
    std_error: float | None = None
    low: float | None = None
    high: float | None = None
    p_value: float = 1.0
    p_adjusted: float = 1.0
    verdict: Verdict = "insufficient"
    reason: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON shape."""
        return asdict(self)


def compare_arms(
    spec: ExperimentSpec, phases: int, cells: Cells, *, srm_alarm: bool
) -> tuple[Comparison, ...]:
    """Return every arm against the control on every metric, corrected for their number.

    Within a phase the arms were randomised with one split at one time; the differences of phases
    are averaged by traffic (units of both arms).  Pooling a ramp while the base rate moves instead
    rejects 100 % of A/A tests.  A phase takes part once both its arms pass the guard.
    """
    treatments = [arm.name for arm in spec.arms if arm.name != spec.control]
    compared = [
        _compare(spec, metric, arm, phases, cells) for metric in spec.metrics for arm in treatments
    ]
    adjusted = adjust([c.p_value for c in compared], spec.correction)
    return tuple(
        _judged(spec, replace(c, p_adjusted=p), cells, srm_alarm)
        for c, p in zip(compared, adjusted, strict=True)
    )


def shortfall(metric: Metric, arm: str, cell: Cell) -> str | None:
    """Return what the guard misses in a cell, or None: >= 100 units, >= 25 events (and non-events).

    Non-events are asked of proportions only: a mean of continuous numbers has none.
    """
    if cell.moments.n < MIN_UNITS:
        return f"{arm} has {cell.moments.n} of {MIN_UNITS} units with an outcome"
    if cell.events < MIN_EVENTS:
        return f"{arm} has {cell.events} of {MIN_EVENTS} units with an event"
    if metric.kind == "proportion" and cell.non_events < MIN_EVENTS:
        return f"{arm} has {cell.non_events} of {MIN_EVENTS} units with a non-event"
    return None


def _compare(
    spec: ExperimentSpec, metric: Metric, arm: str, phases: int, cells: Cells
) -> Comparison:
    """Return the comparison without its verdict, or insufficient with the last phase's reason."""
    empty = Comparison(metric.name, arm, spec.control)
    strata: list[tuple[RatioMoments, RatioMoments]] = []
    missing = "no phase has begun"
    for phase in range(phases):
        control, treated = (
            cells.get((phase, metric.name, name), Cell()) for name in (spec.control, arm)
        )
        lack = shortfall(metric, spec.control, control) or shortfall(metric, arm, treated)
        if lack:
            missing = f"in phase {phase + 1}, {lack}"  # people count from 1
        else:
            strata.append((control.moments, treated.moments))
    return _combined(spec, empty, strata) if strata else replace(empty, reason=missing)


def _combined(
    spec: ExperimentSpec, empty: Comparison, strata: Sequence[tuple[RatioMoments, RatioMoments]]
) -> Comparison:
    units = sum(control.n + treated.n for control, treated in strata)
    shares = [(control.n + treated.n) / units for control, treated in strata]
    control_value = sum(s * c.ratio for s, (c, _) in zip(shares, strata, strict=True))
    value = sum(s * t.ratio for s, (_, t) in zip(shares, strata, strict=True))
    parts = [
        (s * s * arm.ratio_variance, arm.n)
        for s, arms in zip(shares, strata, strict=True)
        for arm in arms
    ]
    std_error = math.sqrt(sum(variance for variance, _ in parts))
    found = _interval(spec, value - control_value, std_error, units, parts)
    return replace(
        empty,
        units=units,
        phases=len(strata),
        value=value,
        control_value=control_value,
        difference=value - control_value,
        relative=(value - control_value) / control_value if control_value else None,
        std_error=std_error,
        low=found.low,
        high=found.high,
        p_value=found.p_value,
        verdict="undecided",
    )


def _interval(
    spec: ExperimentSpec,
    difference: float,
    std_error: float,
    units: int,
    parts: Sequence[tuple[float, int]],
) -> Interval:
    if spec.method == "welch":
        return welch(difference, std_error, welch_df(parts), alpha=spec.alpha)
    return confidence_sequence(
        difference, std_error, units, planned_units=spec.planned_units, alpha=spec.alpha
    )


def _judged(
    spec: ExperimentSpec, comparison: Comparison, cells: Cells, srm_alarm: bool
) -> Comparison:
    """Return the comparison with its verdict and reason."""
    if srm_alarm:
        reason = "units per arm don't match the weights: find out why before deciding anything"
        return replace(comparison, verdict="blocked", reason=reason)
    if comparison.difference is None:
        return comparison
    seen = sum(cell.moments.n for key, cell in cells.items() if key[1] == comparison.metric)
    if spec.method == "welch" and seen < spec.planned_units:
        reason = f"fixed horizon: {seen} of {spec.planned_units} planned units have an outcome"
        return replace(comparison, reason=reason)
    if comparison.p_adjusted >= spec.alpha:
        return replace(comparison, reason=_undecided_reason(spec, comparison))
    better = next(metric.better for metric in spec.metrics if metric.name == comparison.metric)
    wins = (comparison.difference > 0) == (better == "higher")
    reason = f"p = {comparison.p_adjusted:.3g} < alpha = {spec.alpha:g} ({spec.method})"
    return replace(comparison, verdict="better" if wins else "worse", reason=reason)


def _undecided_reason(spec: ExperimentSpec, comparison: Comparison) -> str:
    if comparison.p_value < spec.alpha:
        return f"the interval excludes 0, but not after {spec.correction} over all comparisons"
    return f"no difference shown: p = {comparison.p_value:.3g}, alpha = {spec.alpha:g}"
