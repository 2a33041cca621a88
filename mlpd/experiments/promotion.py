"""Automatic promotion: an arm gets all traffic once it is shown to do no harm beyond a margin."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from mlpd.core.sequences import confidence_sequence
from mlpd.experiments.estimates import Combined
from mlpd.experiments.metric import Metric, at_least


@dataclass(frozen=True, slots=True)
class Promotion:
    """`metric` must not be worse than the control's by `margin` (its units) or more.

    None means the first metric.  A margin of 0 asks for an arm that is shown to be better.
    """

    metric: str | None = None
    margin: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return the definition as JSON and msgpack types; what is not set is left out."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    def problems(self, metrics: Sequence[str]) -> Iterator[tuple[bool, str, str]]:
        """Yield (whether it is right, what was found, what was expected) of every field."""
        right = self.metric is None or self.metric in metrics
        found = f"metric of the promotion is {self.metric!r}"
        yield right, found, f"one of {', '.join(metrics)}"
        found = f"margin of the promotion is {self.margin!r}"
        yield at_least(self.margin, 0), found, "a number >= 0"


class Gain(NamedTuple):
    """What an arm gains over the control, in the metric's direction, and its bounds.

    They hold at every look together, and are the two-sided sequence's; each is used on one side.
    """

    low: float
    estimate: float
    high: float


def gain_of(found: Combined, metric: Metric, *, planned_units: int, alpha: float) -> Gain:
    """Return the gain in a difference over phases."""
    low, high, _ = confidence_sequence(
        found.difference, found.std_error, found.units, planned_units=planned_units, alpha=alpha
    )
    if metric.sign > 0:
        return Gain(low, found.difference, high)
    return Gain(-high, -found.difference, -low)


def winner(gains: Mapping[str, Gain], margin: float) -> str | None:
    """Return the arm that gains most of those whose lower bound excludes a loss of `margin`."""
    able = [arm for arm, gain in gains.items() if gain.low > -margin]
    return max(able, key=lambda arm: gains[arm].estimate, default=None)
