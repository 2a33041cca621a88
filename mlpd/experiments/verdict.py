"""Compares arms phase by phase, guards against small numbers, and says what may be concluded."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import chain
from typing import Any, Final, Literal

from mlpd.core.sequences import Interval, confidence_sequence
from mlpd.experiments.answers import (
    BayesianAnswer,
    FixedAnswer,
    bayesian_answer,
    fixed_answer,
)
from mlpd.experiments.estimates import Cell, Combined, combine, pooled_theta, strata_of
from mlpd.experiments.metric import Metric
from mlpd.experiments.sequences import adjust
from mlpd.experiments.spec import ExperimentSpec

MIN_UNITS: Final = 100
MIN_EVENTS: Final = 25
"""A 99/1 canary judged on fewer has 78 % false positives: normality isn't there yet.

A rare proportion's squared skewness is 1 / rate, so 25 events are 25 squared skewnesses; skewed
amounts are asked for as many units: without, a 99/1 split of them has 13 %.
"""

Verdict = Literal["better", "worse", "undecided", "insufficient", "blocked"]


Cells = Mapping[tuple[int, str, str], Cell]
"""Cells by (phase, metric, arm); an absent one is empty."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """One arm against the control on one metric; the numbers are None while data is insufficient.

    `difference` = value - control_value, both weighted by the traffic of the phases used;
    [`low`, `high`] is its interval at the experiment's alpha, by its method, uncorrected;
    `relative` divides by the control's value.  `units` counts both arms in the phases used.
    `fixed` and `bayesian` are what other schools say; the verdict is the method's.
    `theta` and `variance_kept` (adjusted over plain variance) are set where a covariate adjusts.
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
    fixed: FixedAnswer | None = None
    bayesian: BayesianAnswer | None = None
    theta: float | None = None
    variance_kept: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON shape."""
        found = {f.name: getattr(self, f.name) for f in fields(self)}
        for name in ("fixed", "bayesian"):
            found[name] = found[name] and found[name]._asdict()
        return found


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
    """Return what the guard misses in a cell, or None.

    It asks for 100 units and 25 events; of a proportion for 25 non-events, too; of other metrics
    for 25 squared skewnesses of units.
    """
    if cell.moments.n < MIN_UNITS:
        return f"{arm} has {cell.moments.n} of {MIN_UNITS} units with an outcome"
    if cell.events < MIN_EVENTS:
        return f"{arm} has {cell.events} of {MIN_EVENTS} units with an event"
    if metric.kind == "proportion" and cell.non_events < MIN_EVENTS:
        return f"{arm} has {cell.non_events} of {MIN_EVENTS} units with a non-event"
    skewness = cell.moments.x.skewness
    if metric.kind != "proportion" and cell.moments.n < (asked := MIN_EVENTS * skewness**2):
        return f"{arm} has {cell.moments.n} of {asked:.0f} units at a skewness of {skewness:.1f}"
    return None


def _compare(
    spec: ExperimentSpec, metric: Metric, arm: str, phases: int, cells: Cells
) -> Comparison:
    """Return the comparison without its verdict, or insufficient with the last phase's reason."""
    empty = Comparison(metric.name, arm, spec.control)
    pairs, missing = usable_pairs(spec, metric, arm, phases, cells)
    return _estimated(spec, metric, empty, pairs) if pairs else replace(empty, reason=missing)


def usable_pairs(
    spec: ExperimentSpec, metric: Metric, arm: str, phases: int, cells: Cells
) -> tuple[list[tuple[Cell, Cell]], str]:
    """Return (control, treated) of each phase that passes the guard, and what one lacks."""
    pairs: list[tuple[Cell, Cell]] = []
    missing = "no phase has begun"
    for phase in range(phases):
        control, treated = (
            cells.get((phase, metric.name, name), Cell()) for name in (spec.control, arm)
        )
        lack = shortfall(metric, spec.control, control) or shortfall(metric, arm, treated)
        if lack:
            missing = f"in phase {phase + 1}, {lack}"  # people count from 1
        else:
            pairs.append((control, treated))
    return pairs, missing


def _estimated(
    spec: ExperimentSpec, metric: Metric, empty: Comparison, pairs: Sequence[tuple[Cell, Cell]]
) -> Comparison:
    theta = None if metric.covariate is None else pooled_theta(chain.from_iterable(pairs))
    found = combine(strata_of(pairs, theta=theta))
    plain = found.std_error if theta is None else combine(strata_of(pairs, theta=None)).std_error
    fixed = fixed_answer(found, alpha=spec.alpha)
    answer = fixed.interval if spec.method == "welch" else _sequence(spec, found)
    base = found.control_value
    return replace(
        empty,
        units=found.units,
        phases=len(pairs),
        value=found.value,
        control_value=base,
        difference=found.difference,
        relative=found.difference / base if base else None,
        std_error=found.std_error,
        **answer._asdict(),
        verdict="undecided",
        fixed=fixed,
        bayesian=bayesian_answer(found, metric, alpha=spec.alpha),
        theta=theta,
        variance_kept=(found.std_error / plain) ** 2 if theta is not None and plain else None,
    )


def _sequence(spec: ExperimentSpec, found: Combined) -> Interval:
    return confidence_sequence(
        found.difference,
        found.std_error,
        found.units,
        planned_units=spec.planned_units,
        alpha=spec.alpha,
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
    metric = next(metric for metric in spec.metrics if metric.name == comparison.metric)
    wins = comparison.difference * metric.sign > 0
    reason = f"p = {comparison.p_adjusted:.3g} < alpha = {spec.alpha:g} ({spec.method})"
    return replace(comparison, verdict="better" if wins else "worse", reason=reason)


def _undecided_reason(spec: ExperimentSpec, comparison: Comparison) -> str:
    if comparison.p_value < spec.alpha:
        return f"the interval excludes 0, but not after {spec.correction} over all comparisons"
    return f"no difference shown: p = {comparison.p_value:.3g}, alpha = {spec.alpha:g}"
