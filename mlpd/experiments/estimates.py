"""Estimates of an arm with their variances, and of arms' differences over phases; CUPED."""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from mlpd.experiments.moments import Moments, Products, RatioMoments
from mlpd.experiments.records import Pair


class CovariateMoments(NamedTuple):
    """Moments of a covariate c; the sums of its products with the pairs' x and y."""

    c: Moments = Moments()
    x: Products = Products()
    y: Products = Products()

    def add(self, pair: Pair, value: float) -> "CovariateMoments":
        """Return them with one more unit."""
        x, y = pair
        return CovariateMoments(self.c.add(value), self.x.add(x, value), self.y.add(y, value))

    def remove(self, pair: Pair, value: float) -> "CovariateMoments":
        """Return them without a unit that was added."""
        if self.c.n == 1:
            return CovariateMoments()
        x, y = self.x.add(pair[0], value, -1), self.y.add(pair[1], value, -1)
        return CovariateMoments(self.c.remove(value), x, y)

    def merge(self, other: "CovariateMoments") -> "CovariateMoments":
        """Return the moments of the units of both."""
        c, x, y = self
        return CovariateMoments(c.merge(other.c), x.merge(other.x), y.merge(other.y))


class Cell(NamedTuple):
    """One metric in one arm and phase: moments over units that have an outcome.

    `events` counts units with a numerator other than 0, `non_events` units with a numerator other
    than the denominator: for a proportion, units with a 1 and units with a 0 among their outcomes.
    `covariate` stays empty for a metric without one.
    """

    moments: RatioMoments = RatioMoments()
    events: int = 0
    non_events: int = 0
    covariate: CovariateMoments = CovariateMoments()

    def change(self, old: Pair | None, new: Pair | None, value: float | None = None) -> "Cell":
        """Return the cell after a unit's pair went from `old` to `new`; None means not in here.

        `value`: the unit's covariate, which is the same for both.
        """
        cell = self if old is None else self.remove(old, value)
        return cell if new is None else cell.add(new, value)

    def add(self, pair: Pair, value: float | None = None) -> "Cell":
        """Return the cell with one more unit."""
        moments, events, non_events, covariate = self
        if value is not None:
            covariate = covariate.add(pair, value)
        x, y = pair
        return Cell(moments.add(x, y), events + (x != 0), non_events + (x != y), covariate)

    def remove(self, pair: Pair, value: float | None = None) -> "Cell":
        """Return the cell without a unit that was added."""
        moments, events, non_events, covariate = self
        if value is not None:
            covariate = covariate.remove(pair, value)
        x, y = pair
        return Cell(moments.remove(x, y), events - (x != 0), non_events - (x != y), covariate)

    def merge(self, other: "Cell") -> "Cell":
        """Return the cell of the units of both, of which none is in both."""
        return Cell(
            self.moments.merge(other.moments),
            self.events + other.events,
            self.non_events + other.non_events,
            self.covariate.merge(other.covariate),
        )


class Estimate(NamedTuple):
    """A metric's value in one arm, from `n` units; `variance` is that of the estimate."""

    n: int
    value: float
    variance: float


class Stratum(NamedTuple):
    """Control and treated arm of one phase: randomised with one split at one time."""

    control: Estimate
    treated: Estimate

    @property
    def n(self) -> int:
        """Units of both arms."""
        return self.control.n + self.treated.n


class Combined(NamedTuple):
    """A difference over phases, each weighted by its traffic; `parts` as `welch_df` takes them."""

    units: int
    control_value: float
    value: float
    parts: Sequence[tuple[float, int]]

    @property
    def difference(self) -> float:
        """Treated minus control."""
        return self.value - self.control_value

    @property
    def std_error(self) -> float:
        """Standard error of the difference."""
        return math.sqrt(sum(variance for variance, _ in self.parts))


def combine(strata: Sequence[Stratum]) -> Combined:
    """Return the difference over strata, of which there is at least one."""
    units = sum(stratum.n for stratum in strata)
    shares = [stratum.n / units for stratum in strata]
    weighted = list(zip(shares, strata, strict=True))
    parts = [(s * s * arm.variance, arm.n) for s, stratum in weighted for arm in stratum]
    return Combined(
        units,
        sum(s * stratum.control.value for s, stratum in weighted),
        sum(s * stratum.treated.value for s, stratum in weighted),
        parts,
    )


def strata_of(pairs: Sequence[tuple[Cell, Cell]], *, theta: float | None) -> list[Stratum]:
    """Return the strata of (control, treated) cells, adjusted by `theta` where it is given."""
    if theta is None:
        return [Stratum(_plain(control), _plain(treated)) for control, treated in pairs]
    found = []
    for control, treated in pairs:
        middle = control.covariate.c.merge(treated.covariate.c).mean
        arms = [_adjusted(cell, theta, middle) for cell in (control, treated)]
        found.append(Stratum(*arms))
    return found


def pooled_theta(cells: Iterable[Cell]) -> float:
    """Return the slope of the outcome on the covariate, from deviations within each cell.

    It is one slope for all arms and phases: a slope of each arm's own would take a part of the
    effect with it.  0 where the covariate doesn't vary.  Reference: Deng, Xu, Kohavi & Walker,
    "Improving the sensitivity of online controlled experiments by utilizing pre-experiment data"
    (WSDM 2013); the outcome is linearised as in the delta method.
    """
    listed = list(cells)
    spread = sum(cell.covariate.c.m2 for cell in listed)
    return sum(map(_product, listed)) / spread if spread > 0 else 0.0


def _product(cell: Cell) -> float:
    """Return the sum of products of deviations of the linearised outcome and the covariate."""
    pair, covariate = cell.moments, cell.covariate
    if not pair.y.mean:
        return 0.0
    x = covariate.x.about_means(pair.x, covariate.c)
    y = covariate.y.about_means(pair.y, covariate.c)
    return (x - pair.ratio * y) / pair.y.mean


def _plain(cell: Cell) -> Estimate:
    pair = cell.moments
    return Estimate(pair.n, pair.ratio, pair.ratio_variance)


def _adjusted(cell: Cell, theta: float, middle: float) -> Estimate:
    n, value, variance = _plain(cell)
    covariate = cell.covariate
    saved = 2 * theta * _product(cell) - theta * theta * covariate.c.m2
    variance = max(0.0, variance - saved / ((n - 1) * n))
    return Estimate(n, value - theta * (covariate.c.mean - middle), variance)
