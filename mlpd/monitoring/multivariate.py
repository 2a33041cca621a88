"""Drift of features together: how well the training rows' principal components still fit.

One number per row: what the components leave of it.  Features whose distributions stay as they are
may stop going together, which no feature by itself shows, and which this does.  Rows are made of
numbers by standardizing, missing being the mean, and of categories by the share that each has in
training.  The idea is NannyML's reconstruction error.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from mlpd.core.errors import ValidationError
from mlpd.monitoring.reference import ColumnProfile, ReferenceProfile, bin_index
from mlpd.monitoring.thresholds import ROWS_MIN, WINDOWS_MIN

Floats = NDArray[np.float64]

FORMAT_VERSION: Final = 1
EXPLAINED: Final = 0.65
"""Share of the variance that the kept components explain, NannyML's default."""
CLIP: Final = 10.0
"""Deviations beyond which a value counts as this far: one outlier must not be a window's mean."""
DEVIATIONS: Final = 3.0
BLOCK_ROWS: Final = 8_192
"""Rows that are computed with at once: a training set of 190,000 x 43 would take 400 MB."""


@dataclass(frozen=True, slots=True)
class Components:
    """Frozen in training: means and deviations float64 [F], components [k, F].

    `error_mean` and `error_deviation` are of the mean errors of time-ordered windows of the
    training rows; None with fewer than 20 windows of 100 rows.
    """

    means: Floats
    deviations: Floats
    components: Floats
    error_mean: float | None
    error_deviation: float | None

    def errors(self, rows: Floats) -> Floats:
        """Return float64 [n], what the components leave of each encoded row [n, F]."""
        found = np.empty(len(rows))
        for part in _blocks(len(rows)):
            centred = self.centre(rows[part])
            left = centred - centred @ self.components.T @ self.components
            found[part] = np.sqrt((left**2).sum(axis=1))
        return found

    def centre(self, rows: Floats) -> Floats:
        """Return encoded rows in deviations from the means, clipped."""
        return np.clip((rows - self.means) / self.deviations, -CLIP, CLIP)

    @property
    def threshold(self) -> float | None:
        """The mean error of a window from which on it drifted: 3 deviations over training's."""
        if self.error_mean is None or self.error_deviation is None:
            return None
        return self.error_mean + DEVIATIONS * self.error_deviation

    def to_dict(self) -> dict[str, Any]:
        """Return JSON- and msgpack-able values."""
        return {
            "format": FORMAT_VERSION,
            "means": self.means.tolist(),
            "deviations": self.deviations.tolist(),
            "components": self.components.tolist(),
            "error_mean": self.error_mean,
            "error_deviation": self.error_deviation,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Components":
        """Return what `to_dict` wrote; raises ValidationError on another format."""
        if data.get("format") != FORMAT_VERSION:
            raise ValidationError(
                f"components have format {data.get('format')!r}, expected {FORMAT_VERSION}",
                code="components_format",
                hint="train the model again, or read it with the mlpd that wrote it",
            )
        width = len(data["means"])
        return cls(
            np.array(data["means"], np.float64),
            np.array(data["deviations"], np.float64),
            np.array(data["components"], np.float64).reshape(-1, width),
            data["error_mean"],
            data["error_deviation"],
        )


def encode(profile: ReferenceProfile, vectors: Floats) -> Floats:
    """Return vectors [n, F] as numbers without gaps: see the module."""
    found = np.empty((len(vectors), len(profile.features)))
    for index, column in enumerate(profile.features):
        found[:, index] = _encode(column, vectors[:, index])
    return found


def fit_components(
    profile: ReferenceProfile, vectors: Floats, windows: NDArray[np.int64]
) -> Components:
    """Return the components of training rows [n, F], n >= 1, of time-ordered `windows` [n].

    Works in blocks, as encoded rows would take as much memory again as the vectors.
    """
    n, width = len(vectors), len(profile.features)

    def blocks() -> Iterator[Floats]:
        return (encode(profile, vectors[part]) for part in _blocks(n))

    means = sum((rows.sum(axis=0) for rows in blocks()), np.zeros(width)) / n
    squares = sum((((rows - means) ** 2).sum(axis=0) for rows in blocks()), np.zeros(width))
    deviations = np.sqrt(squares / n)
    deviations[deviations == 0.0] = 1.0
    found = Components(means, deviations, np.empty((0, width)), None, None)
    centred = map(found.centre, blocks())
    spread = sum((rows.T @ rows for rows in centred), np.zeros((width, width)))
    values, axes = np.linalg.eigh(spread / n)
    shares = np.cumsum(values[::-1]) / max(float(values.sum()), np.finfo(np.float64).tiny)
    kept = int(np.searchsorted(shares, EXPLAINED)) + 1
    found = replace(found, components=axes[:, ::-1][:, :kept].T.copy())
    errors = np.concatenate([found.errors(rows) for rows in blocks()])
    return _calibrate(found, errors, windows)


def _blocks(rows: int) -> list[slice]:
    return [slice(start, start + BLOCK_ROWS) for start in range(0, rows, BLOCK_ROWS)]


def _encode(column: ColumnProfile, values: Floats) -> Floats:
    if column.kind == "categorical":
        shares = np.array(column.counts, np.float64) / max(sum(column.counts), 1)
        found: Floats = shares[bin_index(column, values)]
        return found
    usual = column.mean or 0.0
    return np.where(np.isfinite(values), values, usual)


def _calibrate(found: Components, errors: Floats, windows: NDArray[np.int64]) -> Components:
    _, number = np.unique(windows, return_inverse=True)
    rows = np.bincount(number)
    means = (np.bincount(number, errors) / rows)[rows >= ROWS_MIN]
    if len(means) < WINDOWS_MIN:
        return found
    mean, deviation = float(means.mean()), float(means.std(ddof=1))
    return replace(found, error_mean=mean, error_deviation=deviation)
