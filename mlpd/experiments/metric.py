"""One metric of an experiment: what an outcome of it may be, and how its variance is reduced."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from mlpd.core.numbers import is_number

MetricKind = Literal["proportion", "mean", "ratio"]
Better = Literal["higher", "lower"]


@dataclass(frozen=True, slots=True)
class Metric:
    """One outcome by name, compared between arms per randomisation unit.

    Outcomes arrive per prediction, or per unit.  A unit's value is (sum of numerators, sum of
    denominators): `proportion` counts outcomes of 0 or 1 over their number, `mean` sums finite
    numbers over their number, `ratio` takes a pair (numerator, denominator >= 0) per outcome.  All
    three are therefore ratio metrics clustered by unit; with one outcome per unit, the first two
    are plain means.

    - `low` and `high` winsorise: an outcome of a mean, or a numerator, beyond them counts as them.
    - `covariate` names a request field or feature whose value at a unit's first exposure explains
      some of the outcome (CUPED); units without a number there are left out of this metric.
    - `prior_sd` is the standard deviation, around 0, of the differences believed in beforehand,
      for the Bayesian answer; None for a flat prior.
    """

    name: str
    kind: MetricKind = "proportion"
    better: Better = "higher"
    covariate: str | None = None
    low: float | None = None
    high: float | None = None
    prior_sd: float | None = None

    @property
    def sign(self) -> int:
        """1 where more is better, -1 where less is."""
        return 1 if self.better == "higher" else -1

    def clip(self, value: float) -> float:
        """Return an outcome, or a numerator, within `low` and `high`."""
        if self.low is not None and value < self.low:
            return self.low
        return self.high if self.high is not None and value > self.high else value

    def to_dict(self) -> dict[str, Any]:
        """Return the definition as JSON and msgpack types; what is not set is left out."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    def problems(self) -> Iterator[tuple[bool, str, str]]:
        """Yield (whether it is right, what was found, what was expected) of every field."""
        what = f"of metric {self.name!r} is"
        choices: tuple[tuple[str, object, tuple[str, ...]], ...] = (
            ("kind", self.kind, get_args(MetricKind)),
            ("better", self.better, get_args(Better)),
        )
        for name, value, known in choices:
            yield value in known, f"{name} {what} {value!r}", f"one of {', '.join(known)}"
        named = self.covariate is None or (isinstance(self.covariate, str) and self.covariate != "")
        yield named, f"covariate {what} {self.covariate!r}", "the name of a field or feature"
        for name, bound in (("low", self.low), ("high", self.high), ("prior_sd", self.prior_sd)):
            yield bound is None or is_number(bound), f"{name} {what} {bound!r}", "a finite number"
        bounds = f"low and high of metric {self.name!r} are {self.low!r} and {self.high!r}"
        plain = self.low is None and self.high is None
        yield plain or self.kind != "proportion", bounds, "none for a proportion"
        ordered = self.low is None or self.high is None or self.low < self.high
        yield ordered, bounds, "low < high"
        positive = self.prior_sd is None or self.prior_sd > 0
        yield positive, f"prior_sd {what} {self.prior_sd!r}", "a number > 0"


def at_least(value: float, low: float) -> bool:
    """Tell whether a value is a finite number from `low` on."""
    return is_number(value) and value >= low
