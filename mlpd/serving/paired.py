"""Paired differences of two models' scores on the same rows: exact sums, mergeable, as JSON."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlpd.core.errors import ValidationError

Floats = NDArray[np.float64]


@dataclass(slots=True)
class PairedDifference:
    """Moments of d = shadow - primary over rows, and how often their decisions differ.

    With one output d is the difference of the scores, and the decisions differ where only one of
    them reaches `threshold`.  With several, d is taken at the output that the primary chose (its
    largest, the first of equals), and the decisions differ where the shadow's largest is another.
    A row where a score, or d, isn't finite counts in `not_finite` alone.  `total` and `squares` are
    the sums of d and its squares in units of 2^-scale and 4^-scale, which every float64 is a whole
    number of for a scale large enough: nothing is rounded until something is read, so that parts
    merge to the very state of the whole, in whatever order.  1 us per row.

    >>> pairs = PairedDifference(threshold=0.5)
    >>> pairs.add(np.array([[0.2], [0.4]]), np.array([[0.3], [0.7]]))
    >>> round(pairs.mean, 12), pairs.disagreement_rate
    (0.2, 0.5)
    """

    threshold: float = 0.5
    n: int = 0
    scale: int = 0
    total: int = 0
    squares: int = 0
    max_abs: float = 0.0
    disagreements: int = 0
    not_finite: int = 0

    def add(self, primary: Floats, shadow: Floats) -> None:
        """Add rows of scores, both float64 [n, K]."""
        finite = np.isfinite(primary).all(axis=1) & np.isfinite(shadow).all(axis=1)
        with np.errstate(over="ignore", invalid="ignore"):
            differences = shadow - primary
        if primary.shape[1] == 1:
            differ = ((primary >= self.threshold) != (shadow >= self.threshold))[:, 0]
            d = differences[:, 0]
        else:
            chosen = primary.argmax(axis=1)
            differ = chosen != shadow.argmax(axis=1)
            d = differences[np.arange(len(primary)), chosen]
        finite &= np.isfinite(d)
        self.not_finite += int((~finite).sum())
        self.disagreements += int(differ[finite].sum())
        self.max_abs = max(self.max_abs, float(np.abs(d[finite]).max(initial=0.0)))
        self._take(d[finite].tolist())

    def merge(self, other: "PairedDifference") -> None:
        """Add what another one has seen; raises ValidationError if its threshold differs."""
        if other.threshold != self.threshold:
            raise ValidationError(
                f"differences at threshold {self.threshold} and {other.threshold} can't be merged",
                code="threshold_mismatch",
            )
        self.disagreements += other.disagreements
        self.not_finite += other.not_finite
        self.max_abs = max(self.max_abs, other.max_abs)
        self._refine(other.scale)
        shift = self.scale - other.scale
        self.n += other.n
        self.total += other.total << shift
        self.squares += other.squares << 2 * shift

    @property
    def mean(self) -> float:
        """Mean of d, correctly rounded; 0 without rows."""
        return self.total / (self.n << self.scale) if self.n else 0.0

    @property
    def m2(self) -> float:
        """Sum of squared deviations of d from its mean, correctly rounded; infinite if too large.

        Exact until then, so that it survives a large common offset.
        """
        if not self.n:
            return 0.0
        try:
            return (self.n * self.squares - self.total**2) / (self.n << 2 * self.scale)
        except OverflowError:
            return math.inf

    @property
    def sd(self) -> float:
        """Standard deviation of d with ddof 1; NaN below two rows."""
        return math.sqrt(self.m2 / (self.n - 1)) if self.n > 1 else math.nan

    @property
    def disagreement_rate(self) -> float:
        """Share of rows on which the decisions differ; NaN without rows."""
        return self.disagreements / self.n if self.n else math.nan

    def mean_interval(self, confidence: float = 0.95) -> tuple[float, float]:
        """Return the normal confidence interval of the mean of d: for one look, not for peeking."""
        half = NormalDist().inv_cdf((1 + confidence) / 2) * self.sd / math.sqrt(max(self.n, 1))
        return self.mean - half, self.mean + half

    def disagreement_interval(self, confidence: float = 0.95) -> tuple[float, float]:
        """Return Wilson's confidence interval of the disagreement rate (Wilson 1927)."""
        if not self.n:
            return math.nan, math.nan
        z = NormalDist().inv_cdf((1 + confidence) / 2)
        p, shrink = self.disagreement_rate, 1 + z * z / self.n
        centre = (p + z * z / (2 * self.n)) / shrink
        half = z / shrink * math.sqrt(p * (1 - p) / self.n + z * z / (4 * self.n**2))
        return max(0.0, centre - half), min(1.0, centre + half)

    def to_dict(self) -> dict[str, Any]:
        """Return the state as JSON values, for `from_dict`; sums of any length as text."""
        return {**asdict(self), "total": str(self.total), "squares": str(self.squares)}

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> "PairedDifference":
        """Return the state that `to_dict` gave."""
        sums = {name: int(document[name]) for name in ("total", "squares")}
        return cls(**{field.name: document[field.name] for field in fields(cls)} | sums)

    def summary(self) -> dict[str, Any]:
        """Return what a report shows, as JSON values; None where too few rows were seen."""
        known = self.n > 1
        return {
            "n": self.n,
            "mean": self.mean if self.n else None,
            "mean_interval": list(self.mean_interval()) if known else None,
            "sd": self.sd if known else None,
            "max_abs": self.max_abs if self.n else None,
            "threshold": self.threshold,
            "disagreement_rate": self.disagreement_rate if self.n else None,
            "disagreement_interval": list(self.disagreement_interval()) if self.n else None,
            "not_finite": self.not_finite,
        }

    def _take(self, values: list[float]) -> None:
        ratios = [value.as_integer_ratio() for value in values]
        scales = [denominator.bit_length() - 1 for _, denominator in ratios]
        self._refine(max(scales, default=0))
        units = [
            whole << self.scale - scale for (whole, _), scale in zip(ratios, scales, strict=True)
        ]
        self.n += len(units)
        self.total += sum(units)
        self.squares += sum(unit * unit for unit in units)

    def _refine(self, scale: int) -> None:
        """Count in units of 2^-scale at least."""
        if scale > self.scale:
            self.total <<= scale - self.scale
            self.squares <<= 2 * (scale - self.scale)
            self.scale = scale
