"""The small record kept per unit: first exposure, and its sums of outcomes; updates are pure."""

from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple

from mlpd.core.errors import ValidationError
from mlpd.experiments.metric import Metric

OUTCOME_MAX: Final = 1e100
"""Of one outcome, in size: the sums of squares of as many as there can be stay finite."""

Pair = tuple[float, float]
"""(sum of numerators, sum of denominators) of one unit and metric."""

Outcome = Mapping[str, float | Pair]
"""Values of one prediction by metric name: a number, or (numerator, denominator) for a ratio."""


class UnitRecord(NamedTuple):
    """What one unit did in one experiment: a few dozen bytes, whatever its number of predictions.

    `phase` and `arm` are those of the first exposure and never change; `switched` says that a later
    exposure had another arm; `sums` has one pair per metric, in the order of the definition, and is
    shorter before the first outcome; `covariates` are those of the definition at the first
    exposure, None where there was no number; `first_us` is its time, of a bandit's units alone.
    """

    phase: int
    arm: str
    switched: bool = False
    sums: tuple[Pair, ...] = ()
    covariates: tuple[float | None, ...] = ()
    first_us: int = 0


def expose(
    record: UnitRecord | None,
    *,
    phase: int,
    arm: str,
    covariates: tuple[float | None, ...] = (),
    first_us: int = 0,
) -> UnitRecord:
    """Return the unit's record after an exposure to `arm` in `phase`.

    `covariates`, in the order of the definition, and `first_us` are kept of the first exposure:
    what came after it may be an effect.

    The very same object where nothing is to be written: all but the first exposure of a unit that
    stays in its arm.  Only assignments with reason `assigned` are exposures.
    """
    if record is None:
        return UnitRecord(phase, arm, covariates=covariates, first_us=first_us)
    if record.arm == arm or record.switched:
        return record
    return record._replace(switched=True)


def observe(record: UnitRecord, metrics: Sequence[Metric], outcome: Outcome) -> UnitRecord:
    """Return the unit's record after the outcome of one prediction.

    Metrics that the outcome doesn't name stay as they are, names that are no metric are not read:
    one feedback may serve several experiments.  Raises ValidationError for a value that is no
    number up to OUTCOME_MAX in size, a proportion other than 0 or 1, or a negative denominator.
    """
    return _shifted(record, metrics, outcome, 1)


def retract(record: UnitRecord, metrics: Sequence[Metric], outcome: Outcome) -> UnitRecord:
    """Return the unit's record without an outcome observed before: its label was corrected.

    Exact for proportions and other integers, to rounding for other numbers.
    """
    return _shifted(record, metrics, outcome, -1)


def pair_of(record: UnitRecord, index: int, metric: Metric) -> Pair | None:
    """Return the unit's sums of the metric at `index`, or None before its first outcome.

    A ratio may have a numerator before it has a denominator; a mean's sum without outcomes is what
    rounding left of retracted ones.
    """
    if index >= len(record.sums):
        return None
    x, y = record.sums[index]
    return (x, y) if y or (x and metric.kind == "ratio") else None


def _shifted(
    record: UnitRecord, metrics: Sequence[Metric], outcome: Outcome, sign: int
) -> UnitRecord:
    sums = list(record.sums) + [(0.0, 0.0)] * (len(metrics) - len(record.sums))
    for i, metric in enumerate(metrics):
        if metric.name in outcome:
            x, y = _pair(metric, outcome[metric.name])
            sums[i] = (sums[i][0] + sign * x, sums[i][1] + sign * y)
    return record._replace(sums=tuple(sums))


def _pair(metric: Metric, value: float | Pair) -> Pair:
    if metric.kind == "ratio":
        if isinstance(value, tuple | list) and len(value) == 2:  # noqa: PLR2004 - a pair is two
            x, y = value
            if _is_finite(x) and _is_finite(y) and y >= 0:
                return metric.clip(float(x)), float(y)
        raise _invalid(
            metric, value, f"two numbers up to {OUTCOME_MAX:g} (numerator, denominator >= 0)"
        )
    if metric.kind == "proportion":
        if isinstance(value, int | float) and value in (0, 1):
            return float(value), 1.0
        raise _invalid(metric, value, "0 or 1")
    if _is_finite(value):
        assert isinstance(value, int | float)
        return metric.clip(float(value)), 1.0
    raise _invalid(metric, value, f"a number up to {OUTCOME_MAX:g}")


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and -OUTCOME_MAX <= value <= OUTCOME_MAX


def _invalid(metric: Metric, value: object, expected: str) -> ValidationError:
    found = f"outcome {repr(value)[:60]} of metric {metric.name!r} ({metric.kind})"
    return ValidationError(
        f"{found}, expected {expected}",
        code="invalid_outcome",
        hint="Send the label again with a value of the metric's kind.",
    )
