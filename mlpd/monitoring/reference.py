"""The reference profile: how a model's features and scores looked in training, frozen with it.

Binning (Edges): at most 10 distinct values are atoms `[v, nextafter(v))`; otherwise the inverted
distribution function's deciles, where a value hit by two or more quantiles becomes an atom.  The
bin of x is `searchsorted(edges, x, side="right")`, the number of edges <= x; gaps beside atoms are
bins of their own.  Categories: the 100 most frequent codes, then `other`, then `new`.  The last
bin of every feature is `missing`, so that a feed that breaks off is drift like any other.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from mlpd.core.errors import ValidationError
from mlpd.core.hashing import canonical_json, sha256_digest
from mlpd.core.time import DAY_US
from mlpd.monitoring.thresholds import WIDTHS_US, calibrate, number_windows, window_drifts

FeatureKind = Literal["numeric", "categorical"]
_Drifts = Mapping[int, NDArray[np.float64]]
"""By width of window in us, psi_adj of each window."""

FORMAT_VERSION: Final = 2
_OF_DAYS: Final = 1
"""Format of profiles whose thresholds are of days alone, as all were once: their digest, by which
counts know the profile that they are of, stays what it was."""
ATOMS_MAX: Final = 10
QUANTILES: Final = 10
CATEGORIES_MAX: Final = 100
KNOWN_CODES_MAX: Final = 65_536
"""Codes of rarer categories kept to tell `other` from `new`; beyond them all is `other`."""
SCORE: Final = "score"


@dataclass(frozen=True, slots=True)
class ColumnProfile:
    """One feature (or the score): its bins, how often training data fell in each, and its shape.

    `keys` are a numeric column's ascending edges, or a categorical one's ascending known codes,
    whose bins `slots` names.  `counts` has `bins` entries, the last one for missing values.
    `low`, `high`, `mean` and `deviation` (population) are of the finite values: None without any,
    or when a moment overflows.  `thresholds` are pairs of a window's width in us, ascending, and
    the calibrated psi_adj of windows of that width; of which there were fewer than 20, it has none.
    """

    name: str
    kind: FeatureKind
    keys: tuple[float, ...]
    slots: tuple[int, ...]
    counts: tuple[int, ...]
    low: float | None
    high: float | None
    mean: float | None
    deviation: float | None
    thresholds: tuple[tuple[int, float], ...]
    gain: float

    def threshold(self, width_us: int) -> float | None:
        """Return the calibrated psi_adj that a window of this width is held against.

        That of the widest windows that are no wider, else of the narrowest; None without any.
        """
        narrower = [found for width, found in self.thresholds if width <= width_us]
        narrowest = [found for _, found in self.thresholds[:1]]
        return next(iter([*narrower[-1:], *narrowest]), None)

    @property
    def bins(self) -> int:
        """Number of bins: every value falls in exactly one; missing is the last."""
        return len(self.counts)

    @property
    def other_bin(self) -> int:
        """The bin of known codes too rare for one of their own; the next is `new`."""
        return len(self.counts) - 3


@dataclass(frozen=True, slots=True)
class ReferenceProfile:
    """A model version's reference: `features` in vector order, `score` if it was scored."""

    rows: int
    features: tuple[ColumnProfile, ...]
    score: ColumnProfile | None

    @property
    def columns(self) -> tuple[ColumnProfile, ...]:
        """The features, then the score if there is one."""
        return self.features if self.score is None else (*self.features, self.score)

    def to_dict(self) -> dict[str, Any]:
        """Return JSON- and msgpack-able values; floats are finite and keep every bit."""
        of_days = all(width == DAY_US for c in self.columns for width, _ in c.thresholds)
        return {
            "format": _OF_DAYS if of_days else FORMAT_VERSION,
            "rows": self.rows,
            "features": [_column_to_dict(column) for column in self.features],
            "score": None if self.score is None else _column_to_dict(self.score),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "ReferenceProfile":
        """Return the profile that `to_dict` wrote; raises ValidationError on another format."""
        if data.get("format") not in (_OF_DAYS, FORMAT_VERSION):
            raise ValidationError(
                f"reference profile has format {data.get('format')!r}, expected {_OF_DAYS} or "
                f"{FORMAT_VERSION}",
                code="profile_format",
                hint="train the model again, or read it with the mlpd that wrote it",
            )
        features = tuple(_column_from_dict(column) for column in data["features"])
        score = None if data["score"] is None else _column_from_dict(data["score"])
        return cls(data["rows"], features, score)

    def digest(self) -> str:
        """Return `sha256:<hex>` of the canonical JSON: equal profiles, equal digests."""
        return sha256_digest(canonical_json(self.to_dict()))


def build_reference(
    vectors: NDArray[np.float64],
    *,
    names: Sequence[str],
    kinds: Sequence[FeatureKind],
    scores: NDArray[np.float64] | None = None,
    gains: Sequence[float] | None = None,
    t_us: NDArray[np.int64] | None = None,
) -> ReferenceProfile:
    """Return the profile of a training set; runs in the training process.

    `vectors` is float64 [n, F] with NaN for missing and whole codes for categories; `scores` [n]
    are the model's outputs on the same rows; `gains` are its F split gains (equal weights without);
    `t_us` int64 [n] is each row's time: for each width of window of which there are at least 20
    with 100 rows each column gets a threshold, the score as well (`thresholds.calibrate`).  Cost:
    about one sort per column.
    """
    _check_shapes(vectors, names, kinds, scores, gains, t_us)
    weights = gains if gains is not None else [1.0] * len(names)
    windows = {} if t_us is None else {w: number_windows(t_us, w) for w in WIDTHS_US}
    profiled = [
        _profile_column(
            name, kind, np.ascontiguousarray(vectors[:, index]), weights[index], windows
        )
        for index, (name, kind) in enumerate(zip(names, kinds, strict=True))
    ]
    if scores is not None:
        profiled.append(_profile_column(SCORE, "numeric", scores, 0.0, windows))
    columns = _with_thresholds(profiled, windows)
    score = None if scores is None else columns.pop()
    return ReferenceProfile(len(vectors), tuple(columns), score)


def build_edges(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the ascending, finite edges of a numeric column; empty without a finite value.

    >>> build_edges(np.array([1.0, 1.0, 2.0])).tolist()
    [1.0, 1.0000000000000002, 2.0, 2.0000000000000004]
    """
    ordered = np.sort(values[np.isfinite(values)])
    if not len(ordered):
        return ordered
    distinct = _first_distinct(ordered, ATOMS_MAX + 1)
    if len(distinct) <= ATOMS_MAX:
        atoms, cuts = distinct, distinct[:0]
    else:
        cuts, hits = np.unique(_deciles(ordered), return_counts=True)
        atoms = cuts[hits > 1]
    with np.errstate(over="ignore"):  # above the largest float comes inf, which is no edge
        ends = np.nextafter(atoms, np.inf)
    edges = np.union1d(cuts, np.concatenate([atoms, ends]))
    return np.asarray(edges[np.isfinite(edges)] + 0.0)  # + 0.0 makes -0.0 the zero it equals


def bin_index(column: ColumnProfile, values: NDArray[np.float64]) -> NDArray[np.int64]:
    """Return the bin, 0 to bins - 1, of each value.  The counting kernel gives the same counts."""
    missing = np.isnan(values)
    keys = np.asarray(column.keys, dtype=np.float64)
    if column.kind == "numeric":
        found = keys.searchsorted(values, side="right")
    else:
        found = _category_bins(keys, np.asarray(column.slots, dtype=np.int64), values, column)
    return np.where(missing, column.bins - 1, found).astype(np.int64)


def _category_bins(
    keys: NDArray[np.float64],
    slots: NDArray[np.int64],
    values: NDArray[np.float64],
    column: ColumnProfile,
) -> NDArray[np.int64]:
    unknown = unknown_bin(column)
    if not len(keys):
        return np.full(len(values), unknown, dtype=np.int64)
    at = np.minimum(keys.searchsorted(values), len(keys) - 1)
    return np.where(keys[at] == values, slots[at], unknown)


def unknown_bin(column: ColumnProfile) -> int:
    """Return the bin of a code that isn't among `keys`: `new`, or `other` when keys are full."""
    return column.other_bin if len(column.keys) >= KNOWN_CODES_MAX else column.other_bin + 1


def _first_distinct(ordered: NDArray[np.float64], limit: int) -> NDArray[np.float64]:
    starts = np.flatnonzero(ordered[1:] != ordered[:-1])[: limit - 1] + 1
    return np.asarray(ordered[np.concatenate([[0], starts])])


def _deciles(ordered: NDArray[np.float64]) -> NDArray[np.float64]:
    # The smallest x with F(x) >= i/10, in whole numbers: 0.1 * n would round.
    ranks = (np.arange(1, QUANTILES) * len(ordered) + QUANTILES - 1) // QUANTILES
    return ordered[ranks - 1]


def _with_thresholds(
    profiled: Sequence[tuple[ColumnProfile, _Drifts]], widths_us: Iterable[int]
) -> list[ColumnProfile]:
    found: list[list[tuple[int, float]]] = [[] for _ in profiled]
    for width_us in widths_us:
        of_width = calibrate([drifts[width_us] for _, drifts in profiled])
        for pairs, threshold in zip(found, of_width, strict=False):
            pairs.append((width_us, threshold))
    return [
        replace(column, thresholds=tuple(pairs))
        for (column, _), pairs in zip(profiled, found, strict=True)
    ]


def _profile_column(
    name: str,
    kind: FeatureKind,
    values: NDArray[np.float64],
    gain: float,
    windows: Mapping[int, NDArray[np.int64]],
) -> tuple[ColumnProfile, _Drifts]:
    """Return the profile without thresholds, and by width how far windows drift from it."""
    empty = _empty_column(name, kind, values, gain)
    index = bin_index(empty, values)
    counts = np.bincount(index, minlength=empty.bins)
    drifts = {width: window_drifts(index, counts, number) for width, number in windows.items()}
    return _with_shape(replace(empty, counts=tuple(counts.tolist())), values), drifts


def _with_shape(measured: ColumnProfile, values: NDArray[np.float64]) -> ColumnProfile:
    finite = values[np.isfinite(values)]
    if not len(finite):
        return measured
    with np.errstate(over="ignore", invalid="ignore"):
        mean, deviation = float(finite.mean()), float(finite.std())
    return replace(
        measured,
        low=float(finite.min()),
        high=float(finite.max()),
        mean=mean if np.isfinite(mean) else None,
        deviation=deviation if np.isfinite(deviation) else None,
    )


def _empty_column(
    name: str, kind: FeatureKind, values: NDArray[np.float64], gain: float
) -> ColumnProfile:
    keys, slots, bins = _categories(values) if kind == "categorical" else _intervals(values)
    return ColumnProfile(
        name,
        kind,
        keys=tuple(keys),
        slots=tuple(slots),
        counts=(0,) * bins,
        low=None,
        high=None,
        mean=None,
        deviation=None,
        thresholds=(),
        gain=float(gain),
    )


def _intervals(values: NDArray[np.float64]) -> tuple[list[float], list[int], int]:
    edges = build_edges(values)
    return edges.tolist(), [], len(edges) + 2


def _categories(values: NDArray[np.float64]) -> tuple[list[float], list[int], int]:
    codes, hits = np.unique(values[np.isfinite(values)] + 0.0, return_counts=True)
    by_frequency = np.lexsort((codes, -hits))[:KNOWN_CODES_MAX]
    own = min(len(by_frequency), CATEGORIES_MAX)
    slots = np.minimum(np.arange(len(by_frequency)), own)
    order = np.argsort(codes[by_frequency])
    return codes[by_frequency][order].tolist(), slots[order].tolist(), own + 3


def _check_shapes(
    vectors: NDArray[np.float64],
    names: Sequence[str],
    kinds: Sequence[FeatureKind],
    scores: NDArray[np.float64] | None,
    gains: Sequence[float] | None,
    t_us: NDArray[np.int64] | None,
) -> None:
    if vectors.ndim != 2 or vectors.dtype != np.float64:  # noqa: PLR2004  a matrix
        raise ValidationError(
            f"vectors must be float64 [n, F], got {vectors.dtype} {vectors.shape}"
        )
    rows, width = vectors.shape
    wanted = {
        "names": (names, width),
        "kinds": (kinds, width),
        "gains": (gains, width),
        "scores": (scores, rows),
        "t_us": (t_us, rows),
    }
    for what, (values, expected) in wanted.items():
        if values is not None and len(values) != expected:
            raise ValidationError(f"{what} has {len(values)} entries, expected {expected}")


def _column_to_dict(column: ColumnProfile) -> dict[str, Any]:
    data = asdict(column)
    thresholds = dict(data.pop("thresholds"))
    data["threshold"] = thresholds.pop(DAY_US, None)
    data = {key: list(value) if isinstance(value, tuple) else value for key, value in data.items()}
    others = [list(pair) for pair in thresholds.items()]
    return {**data, "thresholds": others} if others else data


def _column_from_dict(data: Mapping[str, Any]) -> ColumnProfile:
    fields: dict[str, Any] = dict(data)
    for name in ("keys", "slots", "counts"):
        fields[name] = tuple(fields[name])
    of_day, others = fields.pop("threshold"), fields.pop("thresholds", [])
    pairs = [(width_us, threshold) for width_us, threshold in others]
    if of_day is not None:
        pairs.append((DAY_US, of_day))
    return ColumnProfile(**fields, thresholds=tuple(sorted(pairs)))
