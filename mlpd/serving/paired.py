"""Paired differences of two models' scores on the same rows: one-pass, mergeable, as JSON."""

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
    A row where a score isn't finite counts in `not_finite` alone.  `m2` is the sum of squared
    deviations from the mean (Welford 1962; merged as in Chan, Golub, LeVeque 1979), so that it
    survives a large common offset.

    >>> pairs = PairedDifference(threshold=0.5)
    >>> pairs.add(np.array([[0.2], [0.4]]), np.array([[0.3], [0.7]]))
    >>> round(pairs.mean, 12), pairs.disagreement_rate
    (0.2, 0.5)
    """

    threshold: float = 0.5
    n: int = 0
    mean: float = 0.0
    m2: float = 0.0
    max_abs: float = 0.0
    disagreements: int = 0
    not_finite: int = 0

    def add(self, primary: Floats, shadow: Floats) -> None:
        """Add rows of scores, both float64 [n, K]."""
        finite = np.isfinite(primary).all(axis=1) & np.isfinite(shadow).all(axis=1)
        self.not_finite += int((~finite).sum())
        primary, shadow = primary[finite], shadow[finite]
        if not len(primary):
            return
        if primary.shape[1] == 1:
            differ = (primary >= self.threshold) != (shadow >= self.threshold)
            d = (shadow - primary)[:, 0]
        else:
            chosen = primary.argmax(axis=1)
            differ = chosen != shadow.argmax(axis=1)
            d = (shadow - primary)[np.arange(len(primary)), chosen]
        self.disagreements += int(differ.sum())
        self.max_abs = max(self.max_abs, float(np.abs(d).max()))
        mean = float(d.mean())
        self._merge_moments(len(d), mean, float(((d - mean) ** 2).sum()))

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
        self._merge_moments(other.n, other.mean, other.m2)

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
        """Return the state as JSON values, for `from_dict`."""
        return asdict(self)

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> "PairedDifference":
        """Return the state that `to_dict` gave."""
        return cls(**{field.name: document[field.name] for field in fields(cls)})

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

    def _merge_moments(self, n: int, mean: float, m2: float) -> None:
        if not n:
            return
        total = self.n + n
        delta = mean - self.mean
        self.m2 += m2 + delta * delta * self.n * n / total
        self.mean += delta * n / total
        self.n = total
