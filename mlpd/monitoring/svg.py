"""Small pictures as SVG text: histograms over each other, a line, an interval over time.

Self-contained: no script, no font, no style sheet; colours from attributes, so that a strict
content security policy shows them, and names escaped, so that a feature can't inject markup.
"""

import math
from collections.abc import Sequence
from html import escape
from itertools import pairwise
from typing import Final, NamedTuple

from mlpd.monitoring.counting import ColumnCounts
from mlpd.monitoring.reference import ColumnProfile

REFERENCE_COLOUR: Final = "#9aa5b1"
LIVE_COLOUR: Final = "#d9480f"
_WIDTH, _HEIGHT = 480.0, 200.0
_TOP, _BASE, _LEFT = 30.0, 160.0, 52.0
_TEXT: Final = 'font-family="sans-serif" font-size="10" fill="#343a40"'


def draw_feature(
    column: ColumnProfile, live: ColumnCounts, trend: Sequence[float | None] = ()
) -> str:
    """Return the histograms, with a line of psi over the window's parts in the corner."""
    picture = draw_histogram(column, live)
    if sum(value is not None for value in trend) < 2:  # noqa: PLR2004 - a line has two ends
        return picture
    line = draw_sparkline(trend, "psi in the parts of the window")
    placed = line.replace("<svg ", f'<svg x="{_WIDTH - 124:g}" y="2" ', 1)
    return picture.removesuffix("</svg>") + placed + "</svg>"


def draw_histogram(column: ColumnProfile, live: ColumnCounts) -> str:
    """Return the shares of reference and live rows in each bin, side by side on one scale.

    Bins that are empty on both sides are left out; the last bin is `missing`.
    """
    shares = zip(_shares(column.counts), _shares(live.bins.tolist()), strict=True)
    bars = [(label, *pair) for label, pair in zip(bin_labels(column), shares, strict=True)]
    bars = [bar for bar in bars if bar[1] or bar[2]]
    tallest = max((max(bar[1:]) for bar in bars), default=1.0)
    step = _WIDTH / max(len(bars), 1)
    drawn = [_draw_bin(index * step, step, bar, tallest) for index, bar in enumerate(bars)]
    name = escape(column.name)
    legend = (
        f'<text x="4" y="14" {_TEXT}>{name}: '
        f'<tspan fill="{REFERENCE_COLOUR}">reference</tspan> and '
        f'<tspan fill="{LIVE_COLOUR}">live</tspan>, at most {tallest:.1%} in a bin</text>'
    )
    return _svg(_WIDTH, _HEIGHT, f"{column.name}: reference and live", [legend, *drawn])


def draw_sparkline(
    values: Sequence[float | None], title: str, *, width: float = 120.0, height: float = 24.0
) -> str:
    """Return a line through `values`, equally spaced, lowest to highest; None leaves a gap."""
    known = [value for value in values if value is not None and math.isfinite(value)]
    low, high = min(known, default=0.0), max(known, default=0.0)
    step, span = width / max(len(values) - 1, 1), (high - low) or 1.0
    lines: list[list[str]] = [[]]
    for index, value in enumerate(values):
        if value is None or not math.isfinite(value):
            lines.append([])
        else:
            lines[-1].append(
                f"{index * step:.1f},{height - 2 - (value - low) / span * (height - 4):.1f}"
            )
    return _svg(width, height, title, [_polyline(points) for points in lines if points])


class IntervalPoint(NamedTuple):
    """An estimate with its interval at `x`; `label` names x where the axis begins and ends."""

    x: float
    low: float
    value: float
    high: float
    label: str


def draw_interval(points: Sequence[IntervalPoint], title: str, *, unit: str = "") -> str:
    """Return the course of an estimate within the band of its interval, and the line of 0.

    The scale shows the newer half of the points whole; what is beyond it before is cut off, as
    first intervals are ten times as wide as last ones.  `unit` stands after the numbers: %.
    """
    low, high = _scale(points)
    width = _WIDTH - _LEFT - 10

    def place(x: float, y: float) -> str:
        span = (points[-1].x - points[0].x) or 1.0
        left = _LEFT + (x - points[0].x) / span * width
        inside = min(max(y, low), high)
        return f"{left:.1f},{_BASE - (inside - low) / (high - low) * (_BASE - _TOP):.1f}"

    parts = [f'<text x="4" y="14" {_TEXT}>{escape(title)}</text>']
    if points:
        band = [place(p.x, p.high) for p in points] + [place(p.x, p.low) for p in points[::-1]]
        parts += [
            *_marks(low, high, unit),
            f'<polygon points="{" ".join(band)}" fill="{LIVE_COLOUR}" fill-opacity="0.15"/>',
            _polyline([place(p.x, p.value) for p in points]),
            *_ends(points, unit),
        ]
    return _svg(_WIDTH, _HEIGHT, title, parts)


def _scale(points: Sequence[IntervalPoint]) -> tuple[float, float]:
    """Return what the picture shows: the newer half of the points, 0, and a little room."""
    shown = points[len(points) // 2 :]
    low = min([0.0, *(p.low for p in shown)])
    high = max([0.0, *(p.high for p in shown)])
    room = 0.08 * (high - low) or 1.0
    return low - room, high + room


def _marks(low: float, high: float, unit: str) -> list[str]:
    """Return lines across at round numbers, that of 0 in dark."""
    step = 10 ** math.floor(math.log10(high - low))
    for finer in (0.5, 0.4, 0.5):  # at least three lines
        if (high - low) / step < 3:  # noqa: PLR2004 - said
            step *= finer
    drawn = []
    for number in range(math.ceil(low / step), math.floor(high / step) + 1):
        y = _BASE - (number * step - low) / (high - low) * (_BASE - _TOP)
        colour = "#343a40" if number == 0 else "#dee2e6"
        drawn.append(
            f'<line x1="{_LEFT:g}" x2="{_WIDTH - 10:g}" y1="{y:.1f}" y2="{y:.1f}" '
            f'stroke="{colour}"/><text x="{_LEFT - 4:g}" y="{y + 3:.1f}" text-anchor="end" '
            f"{_TEXT}>{number * step:g}{unit}</text>"
        )
    return drawn


def _ends(points: Sequence[IntervalPoint], unit: str) -> list[str]:
    first, last = points[0], points[-1]
    now = f"{last.value:.3g}{unit} [{last.low:.3g}, {last.high:.3g}]"
    right, y = _WIDTH - 10, _BASE + 14
    return [
        f'<text x="{_LEFT:g}" y="{y:g}" {_TEXT}>{escape(first.label)}</text>',
        f'<text x="{right:g}" y="{y:g}" text-anchor="end" {_TEXT}>{escape(last.label)}</text>',
        f'<text x="{right:g}" y="{y + 16:g}" text-anchor="end" {_TEXT}>now {escape(now)}</text>',
    ]


def bin_labels(column: ColumnProfile) -> list[str]:
    """Return a short name for each bin of a column, missing last.

    >>> from mlpd.monitoring.reference import build_reference
    >>> import numpy as np
    >>> profile = build_reference(np.array([[1.0], [2.0]]), names=["x"], kinds=["numeric"])
    >>> bin_labels(profile.features[0])
    ['< 1', '1', '1 - 2', '2', '> 2', 'missing']
    """
    if column.kind == "categorical":
        own: list[str] = [""] * column.other_bin
        for key, slot in zip(column.keys, column.slots, strict=True):
            if slot < column.other_bin:
                own[slot] = f"{key:g}"
        return [*own, "other", "new", "missing"]
    return [*_interval_labels(column.keys), "missing"]


def _interval_labels(edges: Sequence[float]) -> list[str]:
    """Name the bins between edges; an edge just above its neighbour ends that neighbour's atom."""
    if not edges:
        return ["any"]
    labels = [f"< {edges[0]:g}"]
    for left, right in pairwise(edges):
        is_atom = right == math.nextafter(left, math.inf)
        labels.append(f"{left:g}" if is_atom else f"{left:g} - {right:g}")
    was_atom = len(edges) > 1 and edges[-1] == math.nextafter(edges[-2], math.inf)
    return [*labels, f"> {edges[-1]:g}" if was_atom else f">= {edges[-1]:g}"]


def _shares(counts: Sequence[int]) -> list[float]:
    total = sum(counts) or 1
    return [count / total for count in counts]


def _draw_bin(left: float, width: float, bar: tuple[str, float, float], tallest: float) -> str:
    label, reference, live = bar
    half = width * 0.4
    middle = left + width / 2
    columns = _rectangle(middle - half, half, reference / tallest, REFERENCE_COLOUR)
    columns += _rectangle(middle, half, live / tallest, LIVE_COLOUR)
    name = escape(label)
    return (
        f"<g><title>{name}: reference {reference:.2%}, live {live:.2%}</title>{columns}"
        f'<text x="{middle:.1f}" y="{_BASE + 12:.0f}" text-anchor="end" '
        f'transform="rotate(-30 {middle:.1f} {_BASE + 12:.0f})" {_TEXT}>{name}</text></g>'
    )


def _rectangle(left: float, width: float, share: float, colour: str) -> str:
    height = share * (_BASE - _TOP)
    return (
        f'<rect x="{left:.1f}" y="{_BASE - height:.1f}" width="{width:.1f}" '
        f'height="{height:.1f}" fill="{colour}"/>'
    )


def _polyline(points: list[str]) -> str:
    if len(points) == 1:
        x, y = points[0].split(",")
        return f'<circle cx="{x}" cy="{y}" r="1.5" fill="{LIVE_COLOUR}"/>'
    return f'<polyline points="{" ".join(points)}" fill="none" stroke="{LIVE_COLOUR}"/>'


def _svg(width: float, height: float, title: str, parts: Sequence[str]) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:g}" height="{height:g}" '
        f'viewBox="0 0 {width:g} {height:g}" role="img"><title>{escape(title)}</title>'
        f"{''.join(parts)}</svg>"
    )
