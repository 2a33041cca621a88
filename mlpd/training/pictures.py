"""What people would rather look at: a version's importance, curves and contributions, as SVG."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from mlpd.core.svg import (
    BLUE,
    GREY,
    ORANGE,
    PALE,
    Panel,
    bar,
    document,
    dot,
    dust,
    line,
    text,
    ticks,
)
from mlpd.training.auc import Estimate, Floats, roc_curve
from mlpd.training.evaluate import CalibrationBin

PICTURES: Final = ("importance", "contributions", "learning", "calibration", "roc")
"""All that there are; a version has those that its objective allows."""

FEATURES_MAX: Final = 20
_CHARACTER: Final = 6.4
"""Width of a letter, at most, as sans-serif fonts of this size have it on average."""
_NAME_CHARS: Final = 60
_ROW: Final = 18.0
_LEFT, _TOP, _SIDE = 62.0, 34.0, 300.0
_SQUARE: Final = (_LEFT + _SIDE + 24, _TOP + _SIDE + 46)
_COLOURS: Final = 12
"""Steps from a feature's lowest values (blue) to its highest (orange)."""
_LANE: Final = 0.8
"""Share of a row that a swarm may fill."""


def draw_importance(shares: Mapping[str, float]) -> str:
    """Return bars of each feature's share of the gain, largest first, at most 20."""
    shown = sorted(shares.items(), key=lambda pair: -pair[1])[:FEATURES_MAX]
    largest = max((share for _, share in shown), default=0.0) or 1.0
    left, width = _room(name for name, _ in shown), 330.0
    parts = [text(12, 20, _heading("Share of the gain", len(shown), len(shares)), bold=True)]
    for row, (name, share) in enumerate(shown):
        y, long = _TOP + row * _ROW, share / largest * width
        parts.append(text(left - 8, y + 12, _short(name), anchor="end"))
        parts.append(bar(left, y + 2, long, _ROW - 5, BLUE, f"{name}: {share:.2%}"))
        parts.append(text(left + long + 6, y + 12, f"{share:.1%}"))
    height = _TOP + len(shown) * _ROW + 12
    return document(left + width + 60, height, "Share of the gain by feature", parts)


def draw_learning(history: Mapping[str, Sequence[float]], best: int) -> str:
    """Return the validation metrics after each round, one below the other; `best` is kept."""
    parts: list[str] = []
    top, width, high = _TOP, 520.0, 170.0
    for metric, values in history.items():
        rounds = len(values)
        panel = Panel(_LEFT + 10, top, width, high, (1, max(rounds, 2)), _ends(values))
        parts += panel.frame(f"{metric} on the validation rows", "round", "")
        parts.append(line(panel.place(enumerate(values, 1)), BLUE))
        ends = [(best, panel.y_ends[0]), (best, panel.y_ends[1])]
        parts.append(line(panel.place(ends), ORANGE, dash="4 4"))
        [(x, y)] = panel.place([(best, values[best - 1])])
        parts.append(dot(x, y, 4, ORANGE, f"round {best}: {values[best - 1]:.6g}"))
        parts.append(text(_LEFT + 10 + width, top - 8, f"round {best} is kept", anchor="end"))
        top += high + 76
    return document(width + _LEFT + 36, top - 26, "Validation metrics by round", parts)


def draw_calibration(
    bins: Sequence[CalibrationBin], what: str, before: Sequence[CalibrationBin] = ()
) -> str:
    """Return what was promised against what came, by bin of score; `what` names the outcome.

    A disc's area follows its number of rows.  The bar through it is Wilson's 95 % interval where
    outcomes are shares.  `before`: of the scores before they were calibrated, drawn behind.
    """
    shares = all(0 <= end <= 1 for b in bins for end in (b.mean_score, b.observed))
    ends = (0.0, 1.0) if shares else _ends([v for b in bins for v in (b.mean_score, b.observed)])
    panel = Panel(_LEFT, _TOP, _SIDE, _SIDE, ends, ends)
    rows = sum(b.rows for b in bins)
    parts = [
        *panel.frame("Calibration on the test rows", "mean score", what),
        line(panel.place([(ends[0], ends[0]), (ends[1], ends[1])]), GREY, dash="4 4"),
        *_uncalibrated(panel, before, rows),
        *(_spread(panel, b) for b in bins if shares),
        line(panel.place((b.mean_score, b.observed) for b in bins), BLUE),
        *(_promise(panel, b, rows) for b in bins),
    ]
    return document(*_SQUARE, "Calibration", parts)


def draw_roc(labels: Floats, scores: Floats, area: Estimate) -> str:
    """Return the ROC curve of 0/1 labels, both of which must be there."""
    panel = Panel(_LEFT, _TOP, _SIDE, _SIDE, (0.0, 1.0), (0.0, 1.0))
    curve = zip(*(side.tolist() for side in roc_curve(labels, scores)), strict=True)
    heading = f"ROC, AUC {area.value:.4f} ({area.low:.4f} to {area.high:.4f})"
    parts = [
        *panel.frame(heading, "false positive rate", "true positive rate"),
        line(panel.place([(0, 0), (1, 1)]), GREY, dash="4 4"),
        line(panel.place(curve), BLUE, width=2),
    ]
    return document(*_SQUARE, "ROC curve", parts)


def draw_contributions(
    names: Sequence[str],
    contributions: Floats,
    vectors: Floats,
    categorical: Sequence[int] = (),
) -> str:
    """Return a swarm per feature of what it added to the raw scores of a sample of rows.

    `contributions` and `vectors` float64 [n, F].  Features by their mean size, at most 20, a disc
    per row: its place is what the feature added (SHAP), its colour the feature's value, from blue
    (lowest) to orange; grey for categories and for null.
    """
    sizes = np.abs(contributions).mean(axis=0)
    order = np.argsort(-sizes, kind="stable")[:FEATURES_MAX]
    reach = 1.02 * float(np.abs(contributions[:, order]).max()) or 1.0
    left, width, height = _room(names[i] for i in order), 380.0, len(order) * _ROW
    panel = Panel(left, _TOP, width, height, (-reach, reach), (0.0, 1.0))
    what = _heading(f"Added to the raw score of {len(vectors)} test rows", len(order), len(names))
    parts = [text(12, 20, what, bold=True), *_zero_line(panel)]
    for row, feature in enumerate(order.tolist()):
        middle = _TOP + (row + 0.5) * _ROW
        parts.append(text(left - 8, middle + 4, _short(names[feature]), anchor="end"))
        parts.append(text(left + width + 6, middle + 4, f"{sizes[feature]:.3g}"))
        ranks = _ranks(vectors[:, feature], is_category=feature in categorical)
        parts += _swarm(panel, contributions[:, feature], ranks, middle)
    parts.append(text(left + width + 6, _TOP + height + 16, "mean size", colour=GREY))
    return document(left + width + 70, _TOP + height + 28, "Contributions by feature", parts)


def _room(names: Iterable[str]) -> float:
    """Return how far to the right what is named begins."""
    return max(150.0, 20 + _CHARACTER * max(map(len, map(_short, names)), default=0))


def _short(name: str) -> str:
    return name if len(name) <= _NAME_CHARS else f"{name[: _NAME_CHARS - 1]}\u2026"


def _heading(what: str, shown: int, total: int) -> str:
    return what if shown == total else f"{what}: first {shown} of {total} features"


def _ends(values: Sequence[float]) -> tuple[float, float]:
    """Return ends a little outside of the values."""
    low, high = min(values, default=0.0), max(values, default=1.0)
    margin = (high - low) * 0.05 or abs(low) * 0.05 or 1.0
    return low - margin, high + margin


def _uncalibrated(panel: Panel, bins: Sequence[CalibrationBin], rows: int) -> Iterator[str]:
    if not bins:
        return
    yield line(panel.place((b.mean_score, b.observed) for b in bins), ORANGE, dash="3 3")
    yield from (_promise(panel, b, rows, ORANGE, ", before calibration") for b in bins)
    for row, (told, colour) in enumerate((("calibrated", BLUE), ("before", ORANGE))):
        yield text(panel.left + 8, panel.top + 16 + 14 * row, told, colour=colour)


def _spread(panel: Panel, found: CalibrationBin) -> str:
    hits = round(found.observed * found.rows)
    share = Estimate.of_share(hits, found.rows, confidence=0.95)
    ends = (found.observed, found.observed) if share is None else (share.low, share.high)
    return line(panel.place((found.mean_score, end) for end in ends), BLUE, width=1)


def _promise(
    panel: Panel, found: CalibrationBin, rows: int, colour: str = BLUE, more: str = ""
) -> str:
    [(x, y)] = panel.place([(found.mean_score, found.observed)])
    told = f"{found.rows} rows, mean score {found.mean_score:.4g}, observed {found.observed:.4g}"
    return dot(x, y, 2 + 10 * (found.rows / rows) ** 0.5, colour, told + more)


def _zero_line(panel: Panel) -> Iterator[str]:
    bottom = panel.top + panel.height
    for tick in ticks(*panel.x_ends):
        [(x, _)] = panel.place([(tick, 0.0)])
        yield line([(x, panel.top), (x, bottom)], GREY if tick == 0 else PALE, width=1)
        yield text(x, bottom + 16, f"{tick:g}", anchor="middle")


def _ranks(column: Floats, *, is_category: bool) -> NDArray[np.intp]:
    """Return each value's step of colour from 0 to 11 by its rank, -1 for grey."""
    found = np.full(len(column), -1, np.intp)
    known = ~np.isnan(column)
    if is_category or not known.any():
        return found
    values = column[known]
    below = np.searchsorted(np.sort(values), values, side="left")
    above = np.searchsorted(np.sort(values), values, side="right")
    middle = (below + above) / (2 * len(values))
    found[known] = np.minimum((middle * _COLOURS).astype(np.intp), _COLOURS - 1)
    return found


def _swarm(panel: Panel, added: Floats, ranks: NDArray[np.intp], middle: float) -> Iterator[str]:
    """Yield the discs of one feature, by colour: as wide as many rows have that contribution."""
    places = np.array([x for x, _ in panel.place((value, 0.0) for value in added.tolist())])
    offsets = _offsets(np.round(places / 3).astype(np.intp))
    largest = max(1.0, float(np.abs(offsets).max()))
    heights = middle + offsets * min(2.5, _ROW * _LANE / 2 / largest)
    for rank in np.unique(ranks).tolist():
        mine = ranks == rank
        colour = GREY if rank < 0 else _mix(rank / (_COLOURS - 1))
        points = zip(places[mine].tolist(), heights[mine].tolist(), strict=True)
        yield dust(points, colour, size=3.5)


def _offsets(columns: NDArray[np.intp]) -> Floats:
    """Return 0, 1, -1, 2, -2 ... within each column, in the order of the rows."""
    order = np.argsort(columns, kind="stable")
    ranked = columns[order]
    starts = np.searchsorted(ranked, ranked, side="left")
    number = np.arange(len(columns)) - starts
    found = np.empty(len(columns))
    found[order] = np.where(number % 2, (number + 1) // 2, -(number // 2))
    return found


def _mix(share: float) -> str:
    """Return a colour between BLUE and ORANGE."""
    ends = [[int(colour[i : i + 2], 16) for i in (1, 3, 5)] for colour in (BLUE, ORANGE)]
    mixed = (round(a + (b - a) * share) for a, b in zip(*ends, strict=True))
    return "#" + "".join(f"{value:02x}" for value in mixed)
