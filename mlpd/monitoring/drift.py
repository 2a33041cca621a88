"""Drift: live counts against a reference profile, feature by feature, with a state for each.

A feature drifted when the window has at least 100 rows, psi_adj reaches both the fixed and the
calibrated threshold, and the chi-square p-value, adjusted over the window's features after
Benjamini and Hochberg, is at most 0.01.  Effect size alone flags noise in small windows, p-values
alone flag everything in large ones.  JS, KS and W1/sigma are shown and decide nothing.
"""

import math
from dataclasses import asdict, dataclass, replace
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from mlpd.core.errors import ValidationError
from mlpd.core.time import DAY_US
from mlpd.monitoring.counting import ColumnCounts, Counts
from mlpd.monitoring.divergence import (
    adjust_benjamini_hochberg,
    chi_square_p,
    jensen_shannon,
    knots_of,
    kolmogorov_smirnov,
    psi,
    psi_noise,
    wasserstein,
)
from mlpd.monitoring.reference import ColumnProfile, ReferenceProfile
from mlpd.monitoring.thresholds import ALERT_PSI, ROWS_MIN, WARN_PSI

State = Literal["ok", "warn", "alert", "insufficient"]
Look = Literal[
    "usual",
    "empty",
    "no_reference",
    "all_missing",
    "constant",
    "stuck",
    "out_of_range",
    "new_categories",
]
"""What is odd about a column beside its distances, the first of these that holds.

`empty`: no rows.  `no_reference`: the reference has no value.  `all_missing`: the window has none.
`constant`: both sides are one same value.  `stuck`: the window is one value, the reference isn't.
`out_of_range`, `new_categories`: most rows are values that the reference never reached or saw, as
are ids that count up; such a column tells a time, and models should not have it.
"""

P_MAX: Final = 0.01


@dataclass(frozen=True, slots=True)
class ColumnDrift:
    """One feature (or the score) of a report.

    `psi`, `psi_adjusted`, `js` (base 2 distance, 0 to 1) and `p` take every bin, missing included;
    `ks` and `w1_sigma` (Wasserstein distance in reference standard deviations) are of finite
    numbers: None for categories, when one side has none, or when sigma is 0.  `threshold` is the
    calibrated psi_adj of windows so wide.  Shares are of the rows of each side.
    """

    name: str
    kind: str
    state: State
    look: Look
    psi: float
    psi_adjusted: float
    threshold: float | None
    p: float
    p_adjusted: float
    js: float
    ks: float | None
    w1_sigma: float | None
    gain: float
    missing_share: float
    reference_missing_share: float
    new_share: float
    out_of_range_share: float
    infinite_share: float
    stale_share: float
    defaulted_share: float
    mean: float | None
    reference_mean: float | None

    @property
    def is_drifted(self) -> bool:
        """Whether it crossed the warning or the alert threshold."""
        return self.state in ("warn", "alert")


@dataclass(frozen=True, slots=True)
class DriftReport:
    """Drift of one window.  `prediction` is the score's, None if the profile has no scores.

    `drifted_share` is the drifted features' share of all split gain, 0 to 1; None without enough
    rows.  `state` is the worst among features and prediction.
    """

    state: State
    rows: int
    reference_rows: int
    drifted_share: float | None
    features: tuple[ColumnDrift, ...]
    prediction: ColumnDrift | None

    @property
    def drifted(self) -> list[str]:
        """Names of the drifted features, in vector order."""
        return [feature.name for feature in self.features if feature.is_drifted]

    def to_dict(self) -> dict[str, Any]:
        """Return JSON- and msgpack-able values; all floats are finite."""
        return {**asdict(self), "features": [asdict(f) for f in self.features],
                "drifted": self.drifted}  # fmt: skip


def report(profile: ReferenceProfile, counts: Counts, *, width_us: int = DAY_US) -> DriftReport:
    """Compare a window's counts with the profile they were counted against, or one `rebased` on it.

    `width_us`: how long the window is, which says what thresholds hold.  Pure; about 0.1 ms per
    feature.  Raises ValidationError if the bins are another profile's.
    """
    _check_same_bins(profile, counts)
    measured = [
        _measure(column, counts.column(index), counts.rows, column.threshold(width_us))
        for index, column in enumerate(profile.columns)
    ]
    count = len(profile.features)
    rows = counts.rows if profile.rows else 0  # against nothing any window says nothing
    features = _judge(measured[:count], rows)
    prediction = _judge(measured[count:], rows)
    return DriftReport(
        state=_worst([*features, *prediction], rows),
        rows=counts.rows,
        reference_rows=profile.rows,
        drifted_share=_drifted_share(features),
        features=tuple(features),
        prediction=prediction[0] if prediction else None,
    )


def rebased(profile: ReferenceProfile, counts: Counts) -> ReferenceProfile:
    """Return the profile with live counts as its reference: the last weeks, the same hour of week.

    Bins, their range, gains and calibrated thresholds stay; counts, mean and deviation are those
    of `counts`.
    """
    _check_same_bins(profile, counts)
    columns = [_rebase(c, counts.column(i)) for i, c in enumerate(profile.columns)]
    count = len(profile.features)
    score = columns[count] if profile.score is not None else None
    return ReferenceProfile(counts.rows, tuple(columns[:count]), score)


def _rebase(column: ColumnProfile, live: ColumnCounts) -> ColumnProfile:
    return replace(
        column,
        counts=tuple(live.bins.tolist()),
        mean=live.mean,
        deviation=live.deviation,
    )


def _check_same_bins(profile: ReferenceProfile, counts: Counts) -> None:
    ours = [(c.name, c.keys, c.slots) for c in profile.columns]
    if ours != [(c.name, c.keys, c.slots) for c in counts.layout.columns]:
        raise ValidationError(
            "the counts have other bins than the reference profile",
            code="drift_bins",
            hint="compare counts with the profile of the model version that served them",
        )


def _measure(
    column: ColumnProfile, live: ColumnCounts, rows: int, threshold: float | None
) -> ColumnDrift:
    reference = np.array(column.counts, np.int64)
    raw = float(psi(reference, live.bins))
    of_rows = 1.0 / max(rows, 1)
    ks, w1_sigma = _numeric_distances(column, reference, live)
    return ColumnDrift(
        name=column.name,
        kind=column.kind,
        state="insufficient",
        look=_look(reference, live, rows),
        psi=raw,
        psi_adjusted=max(0.0, raw - float(psi_noise(reference, live.bins))),
        threshold=threshold,
        p=chi_square_p(reference, live.bins),
        p_adjusted=1.0,
        js=jensen_shannon(reference, live.bins),
        ks=ks,
        w1_sigma=w1_sigma,
        gain=column.gain,
        missing_share=live.missing * of_rows,
        reference_missing_share=column.counts[-1] / max(sum(column.counts), 1),
        new_share=live.new * of_rows,
        out_of_range_share=(live.below + live.above) * of_rows,
        infinite_share=(live.negative_infinite + live.positive_infinite) * of_rows,
        stale_share=live.stale * of_rows,
        defaulted_share=live.defaulted * of_rows,
        mean=live.mean,
        reference_mean=column.mean,
    )


def _look(reference: NDArray[np.int64], live: ColumnCounts, rows: int) -> Look:
    """Return what is odd; bins tell, so that a value between two others counts as theirs."""
    used, had = np.flatnonzero(live.bins).tolist(), np.flatnonzero(reference).tolist()
    one = len(used) == 1 and live.low == live.high
    looks: dict[Look, bool] = {
        "empty": rows == 0,
        "no_reference": all(place >= len(reference) - 1 for place in had),
        "all_missing": live.missing == rows,
        "new_categories": 2 * live.new > rows,
        "out_of_range": 2 * (live.below + live.above) > rows,
        "constant": one and used == had,
        "stuck": one,
    }
    return next((look for look, holds in looks.items() if holds), "usual")


def _numeric_distances(
    column: ColumnProfile, reference: NDArray[np.int64], live: ColumnCounts
) -> tuple[float | None, float | None]:
    """Return (KS, W1/sigma) of the finite values."""
    shapes = (column.low, column.high, live.low, live.high)
    if column.kind == "categorical" or None in shapes:
        return None, None
    low, high, live_low, live_high = (float(shape or 0.0) for shape in shapes)
    edges = np.asarray(column.keys)
    # The reference's own range cuts the outer bins: without it, one far outlier would stretch a
    # tenth of the live rows out to itself.
    at = np.concatenate([[low], edges, [math.nextafter(high, math.inf)]])
    ours = np.concatenate([[0], reference[:-1], [0]])
    theirs = np.concatenate([[live.below], live.bins[:-1], [live.above]])
    theirs[1] -= live.below + live.negative_infinite
    theirs[-2] -= live.above + live.positive_infinite
    distance = wasserstein(ours, theirs, knots_of(at, low, high), knots_of(at, live_low, live_high))
    w1_sigma = distance / column.deviation if column.deviation else math.inf
    return kolmogorov_smirnov(ours, theirs), w1_sigma if math.isfinite(w1_sigma) else None


def _judge(columns: list[ColumnDrift], rows: int) -> list[ColumnDrift]:
    """Return the columns with adjusted p-values and states; `columns` are one family of tests."""
    adjusted = adjust_benjamini_hochberg([column.p for column in columns])
    return [
        replace(column, p_adjusted=p, state=_state(column, p, rows))
        for column, p in zip(columns, adjusted, strict=True)
    ]


def _state(column: ColumnDrift, p_adjusted: float, rows: int) -> State:
    if rows < ROWS_MIN:
        return "insufficient"
    calibrated = column.threshold or 0.0
    if p_adjusted <= P_MAX and column.psi_adjusted >= max(ALERT_PSI, calibrated):
        return "alert"
    if p_adjusted <= P_MAX and column.psi_adjusted >= max(WARN_PSI, calibrated):
        return "warn"
    return "ok"


def _worst(columns: list[ColumnDrift], rows: int) -> State:
    if rows < ROWS_MIN:
        return "insufficient"
    states = {column.state for column in columns}
    return "alert" if "alert" in states else "warn" if "warn" in states else "ok"


def _drifted_share(features: list[ColumnDrift]) -> float | None:
    if not features or features[0].state == "insufficient":
        return None
    gains = [max(feature.gain, 0.0) for feature in features]
    if not any(gains):  # a model that never split: every feature counts the same
        gains = [1.0] * len(features)
    drifted = sum(g for g, feature in zip(gains, features, strict=True) if feature.is_drifted)
    return drifted / sum(gains)
