"""The small record kept per unit: first exposure, and its sums of outcomes; updates are pure."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from mlpd.core.errors import ValidationError
from mlpd.experiments.spec import Metric

Pair = tuple[float, float]
"""(sum of numerators, sum of denominators) of one unit and metric."""

Outcome = Mapping[str, float | Pair]
"""Values of one prediction by metric name: a number, or (numerator, denominator) for a ratio."""


class UnitRecord(NamedTuple):
    """What one unit did in one experiment: a few dozen bytes, whatever its number of predictions.

    `phase` and `arm` are those of the first exposure and never change; `switched` says that a later
    exposure had another arm; `sums` has one pair per metric, in the order of the definition, and is
    shorter before the first outcome.
    """

    phase: int
    arm: str
    switched: bool = False
    sums: tuple[Pair, ...] = ()

    def to_row(self) -> list[Any]:
        """Return the record as msgpack and JSON types."""
        return [self.phase, self.arm, self.switched, [list(pair) for pair in self.sums]]

    @classmethod
    def from_row(cls, row: Sequence[Any]) -> "UnitRecord":
        """Return the record that `to_row` wrote."""
        phase, arm, switched, sums = row
        return cls(phase, arm, switched, tuple((x, y) for x, y in sums))


def expose(record: UnitRecord | None, *, phase: int, arm: str) -> UnitRecord:
    """Return the unit's record after an exposure to `arm` in `phase`.

    The very same object where nothing is to be written: all but the first exposure of a unit that
    stays in its arm.  Only assignments with reason `assigned` are exposures.
    """
    if record is None:
        return UnitRecord(phase, arm)
    if record.arm == arm or record.switched:
        return record
    return record._replace(switched=True)


def observe(record: UnitRecord, metrics: Sequence[Metric], outcome: Outcome) -> UnitRecord:
    """Return the unit's record after the outcome of one prediction.

    Metrics that the outcome doesn't name stay as they are, names that are no metric are not read:
    one feedback may serve several experiments.  Raises ValidationError for a value that is no
    finite number, a proportion other than 0 or 1, or a negative denominator.
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
                return float(x), float(y)
        raise _invalid(metric, value, "a pair of finite numbers (numerator, denominator >= 0)")
    if metric.kind == "proportion":
        if isinstance(value, int | float) and value in (0, 1):
            return float(value), 1.0
        raise _invalid(metric, value, "0 or 1")
    if _is_finite(value):
        assert isinstance(value, int | float)
        return float(value), 1.0
    raise _invalid(metric, value, "a finite number")


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _invalid(metric: Metric, value: object, expected: str) -> ValidationError:
    return ValidationError(
        f"outcome {value!r} of metric {metric.name!r} ({metric.kind}), expected {expected}",
        code="invalid_outcome",
        hint="Send the label again with a value of the metric's kind.",
    )
