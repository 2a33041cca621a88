"""Means, spreads, skewness and ratios in one pass: mergeable, replaceable, exact far from zero."""

import math
from collections.abc import Iterable
from typing import NamedTuple


class Moments(NamedTuple):
    """Count, mean and sums of squared and cubed deviations of some values; an immutable value.

    Welford's recurrence keeps deviations instead of a sum of squares, so 1e9 + 0..7 has variance 6
    (a sum of squares in float64 says 0).  A proportion is the mean of zeros and ones.
    `merge` is Chan, Golub & LeVeque's (1979), the cubes are Pebay's (SAND2008-6212); order changes
    the result by rounding only.

    >>> Moments.of([1e9 + i for i in range(8)]).variance
    6.0
    """

    n: int = 0
    mean: float = 0.0
    m2: float = 0.0
    m3: float = 0.0

    @classmethod
    def of(cls, values: Iterable[float]) -> "Moments":
        """Return the moments of the values."""
        found = cls()
        for value in values:
            found = found.add(value)
        return found

    @property
    def variance(self) -> float:
        """Unbiased variance, m2 / (n - 1); 0 below two values."""
        return self.m2 / (self.n - 1) if self.n > 1 else 0.0

    @property
    def skewness(self) -> float:
        """The third standardised moment, sqrt(n) m3 / m2^1.5; 0 where nothing varies.

        >>> round(Moments.of([0.0] * 99 + [1.0]).skewness, 2)
        9.85
        """
        spread = self.m2**1.5
        return math.sqrt(self.n) * self.m3 / spread if spread else 0.0

    def add(self, value: float) -> "Moments":
        """Return the moments with one more value."""
        n = self.n + 1
        step = (value - self.mean) / n
        square = (value - self.mean) * step * self.n
        m3 = self.m3 + square * step * (n - 2) - 3 * step * self.m2
        return Moments(n, self.mean + step, self.m2 + square, m3)

    def remove(self, value: float) -> "Moments":
        """Return the moments without a value that was added before."""
        n = self.n - 1
        if n == 0:
            return Moments()
        mean = self.mean - (value - self.mean) / n
        step = (value - mean) / self.n
        square = (value - mean) * step * n
        m2 = max(0.0, self.m2 - square)
        return Moments(n, mean, m2, self.m3 - square * step * (self.n - 2) + 3 * step * m2)

    def replace(self, old: float, new: float) -> "Moments":
        """Return the moments with `new` in the place of `old`, which was added before."""
        return self.remove(old).add(new)

    def merge(self, other: "Moments") -> "Moments":
        """Return the moments of both sets of values."""
        n = self.n + other.n
        if n == 0:
            return self
        step = other.mean - self.mean
        m2 = self.m2 + other.m2 + step * step * self.n * other.n / n
        cubes = step**3 * self.n * other.n * (self.n - other.n) / n**2
        m3 = self.m3 + other.m3 + cubes + 3 * step * (self.n * other.m2 - other.n * self.m2) / n
        return Moments(n, self.mean + step * other.n / n, m2, m3)


class RatioMoments(NamedTuple):
    """Moments of pairs (x, y), one per randomisation unit, for the ratio sum(x) / sum(y).

    With x = sum of a unit's outcomes and y = their number, the ratio is the mean outcome, and the
    delta method's variance is right although the outcomes of one unit are correlated: the unit is
    what was randomised.  With y = 1 everywhere both are exactly those of the plain mean.
    Reference: Deng, Knoblich & Lu, "Applying the delta method in metric analytics" (KDD 2018).

    >>> RatioMoments.of([(1.0, 2.0), (2.0, 4.0), (3.0, 6.0)]).ratio
    0.5
    """

    x: Moments = Moments()
    y: Moments = Moments()
    comoment: float = 0.0

    @classmethod
    def of(cls, pairs: Iterable[tuple[float, float]]) -> "RatioMoments":
        """Return the moments of the pairs."""
        found = cls()
        for x, y in pairs:
            found = found.add(x, y)
        return found

    @property
    def n(self) -> int:
        """Number of pairs."""
        return self.x.n

    @property
    def ratio(self) -> float:
        """sum(x) / sum(y); 0 while sum(y) is 0."""
        return self.x.mean / self.y.mean if self.y.mean else 0.0

    @property
    def ratio_variance(self) -> float:
        """Variance of the ratio's estimate by the delta method; 0 below two pairs."""
        n, ratio = self.n, self.ratio
        if n <= 1 or not self.y.mean:
            return 0.0
        spread = self.x.m2 - 2 * ratio * self.comoment + ratio * ratio * self.y.m2
        return max(0.0, spread) / ((n - 1) * n * self.y.mean**2)

    def add(self, x: float, y: float) -> "RatioMoments":
        """Return the moments with one more pair."""
        y_moments = self.y.add(y)
        change = (x - self.x.mean) * (y - y_moments.mean)
        return RatioMoments(self.x.add(x), y_moments, self.comoment + change)

    def remove(self, x: float, y: float) -> "RatioMoments":
        """Return the moments without a pair that was added before."""
        if self.n == 1:
            return RatioMoments()
        y_moments = self.y.remove(y)
        change = (x - self.x.mean) * (y - y_moments.mean)
        return RatioMoments(self.x.remove(x), y_moments, self.comoment - change)

    def replace(self, old: tuple[float, float], new: tuple[float, float]) -> "RatioMoments":
        """Return the moments with the pair `new` in the place of `old`, added before."""
        a_old, b_old = old[0] - self.x.mean, old[1] - self.y.mean
        a_new, b_new = new[0] - self.x.mean, new[1] - self.y.mean
        drift = (new[0] - old[0]) * (new[1] - old[1]) / self.n
        return RatioMoments(
            self.x.replace(old[0], new[0]),
            self.y.replace(old[1], new[1]),
            self.comoment + a_new * b_new - a_old * b_old - drift,
        )

    def merge(self, other: "RatioMoments") -> "RatioMoments":
        """Return the moments of both sets of pairs."""
        n = self.n + other.n
        if n == 0:
            return self
        shift = (other.x.mean - self.x.mean) * (other.y.mean - self.y.mean)
        comoment = self.comoment + other.comoment + shift * self.n * other.n / n
        return RatioMoments(self.x.merge(other.x), self.y.merge(other.y), comoment)
