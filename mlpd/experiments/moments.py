"""Means, spreads, skewness and ratios of exact sums: mergeable and replaceable without residue."""

import math
from collections.abc import Iterable
from typing import NamedTuple


class Moments(NamedTuple):
    """The sums of some values, their squares and their cubes, exact; an immutable value.

    `total`, `squares` and `cubes` are integers in units of 2^-scale, 4^-scale and 8^-scale: every
    float64 is such an integer for a scale large enough.  So nothing is rounded until something is
    read, and what is read is the correctly rounded answer: sums come out the same whatever the
    order, the parts they were added up in, and what was taken back on the way.  1 us per value.
    A proportion is the mean of zeros and ones.

    >>> Moments.of([1e9 + i for i in range(8)]).variance
    6.0
    """

    n: int = 0
    scale: int = 0
    total: int = 0
    squares: int = 0
    cubes: int = 0

    @classmethod
    def of(cls, values: Iterable[float]) -> "Moments":
        """Return the moments of the values."""
        found = cls()
        for value in values:
            found = found.add(value)
        return found

    @property
    def mean(self) -> float:
        """The mean; 0 of no values."""
        return _divided(self.total, self.n << self.scale) if self.n else 0.0

    @property
    def m2(self) -> float:
        """The sum of squared deviations from the mean."""
        if not self.n:
            return 0.0
        squares = self.n * self.squares - self.total**2
        return _divided(squares, self.n << 2 * self.scale)

    @property
    def m3(self) -> float:
        """The sum of cubed deviations from the mean."""
        n, total = self.n, self.total
        if not n:
            return 0.0
        cubes = n * n * self.cubes - 3 * n * total * self.squares + 2 * total**3
        return _divided(cubes, n * n << 3 * self.scale)

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
        return self._changed(value, 1)

    def remove(self, value: float) -> "Moments":
        """Return the moments without a value that was added before."""
        return self._changed(value, -1) if self.n > 1 else Moments()

    def replace(self, old: float, new: float) -> "Moments":
        """Return the moments with `new` in the place of `old`, which was added before."""
        return self.remove(old).add(new)

    def merge(self, other: "Moments") -> "Moments":
        """Return the moments of both sets of values."""
        scale = max(self.scale, other.scale)
        ours, theirs = self.at(scale), other.at(scale)
        return Moments(
            ours.n + theirs.n,
            scale,
            ours.total + theirs.total,
            ours.squares + theirs.squares,
            ours.cubes + theirs.cubes,
        )

    def at(self, scale: int) -> "Moments":
        """Return the same sums in the units of a scale that isn't smaller."""
        more = scale - self.scale
        if not more:
            return self
        return Moments(
            self.n, scale, self.total << more, self.squares << 2 * more, self.cubes << 3 * more
        )

    def _changed(self, value: float, weight: int) -> "Moments":
        whole, scale = _units(value)
        n, known, total, squares, cubes = self if self.scale >= scale else self.at(scale)
        whole <<= known - scale
        square = whole * whole
        return Moments(
            n + weight,
            known,
            total + weight * whole,
            squares + weight * square,
            cubes + weight * square * whole,
        )


class Products(NamedTuple):
    """The sum of products of two values each, exact: an integer in units of 2^-scale."""

    scale: int = 0
    total: int = 0

    def add(self, x: float, y: float, weight: int = 1) -> "Products":
        """Return it with one more product, or without it by a weight of -1."""
        (a, i), (b, j) = _units(x), _units(y)
        return self.merge(Products(i + j, weight * a * b))

    def merge(self, other: "Products") -> "Products":
        """Return the sum of both."""
        scale = max(self.scale, other.scale)
        ours, theirs = (p.total << (scale - p.scale) for p in (self, other))
        return Products(scale, ours + theirs)

    def about_means(self, x: Moments, y: Moments) -> float:
        """Return the sum of products of deviations, of the values that `x` and `y` are of."""
        if not x.n:
            return 0.0
        scale = max(self.scale, x.scale + y.scale)
        products = self.total << (scale - self.scale)
        means = x.total * y.total << (scale - x.scale - y.scale)
        return _divided(x.n * products - means, x.n << scale)


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
    products: Products = Products()

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
    def comoment(self) -> float:
        """The sum of products of deviations of x and y."""
        return self.products.about_means(self.x, self.y)

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
        return RatioMoments(self.x.add(x), self.y.add(y), self.products.add(x, y))

    def remove(self, x: float, y: float) -> "RatioMoments":
        """Return the moments without a pair that was added before."""
        if self.n == 1:
            return RatioMoments()
        return RatioMoments(self.x.remove(x), self.y.remove(y), self.products.add(x, y, -1))

    def replace(self, old: tuple[float, float], new: tuple[float, float]) -> "RatioMoments":
        """Return the moments with the pair `new` in the place of `old`, added before."""
        return self.remove(*old).add(*new)

    def merge(self, other: "RatioMoments") -> "RatioMoments":
        """Return the moments of both sets of pairs."""
        return RatioMoments(
            self.x.merge(other.x), self.y.merge(other.y), self.products.merge(other.products)
        )


def _units(value: float) -> tuple[int, int]:
    """Return the integer and the smallest scale so that value = integer * 2^-scale, exactly."""
    whole, denominator = float(value).as_integer_ratio()
    return whole, denominator.bit_length() - 1


def _divided(whole: int, part: int) -> float:
    """Return the quotient, infinite where no float64 holds it: cubes of 1e100 are near the end."""
    try:
        return whole / part
    except OverflowError:
        return math.inf if whole > 0 else -math.inf
