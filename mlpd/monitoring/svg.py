"""Small pictures as SVG text: two histograms over each other, and a line over time.

Self-contained: no script, no font, no style sheet; colours from attributes, so that a strict
content security policy shows them, and names escaped, so that a feature can't inject markup.
"""

import math
from collections.abc import Sequence
from html import escape
from itertools import pairwise
from typing import Final

from mlpd.monitoring.counting import ColumnCounts
from mlpd.monitoring.reference import ColumnProfile

REFERENCE_COLOUR: Final = "#9aa5b1"
LIVE_COLOUR: Final = "#d9480f"
_WIDTH, _HEIGHT = 480.0, 200.0
_TOP, _BASE = 30.0, 160.0
_TEXT: Final = 'font-family="sans-serif" font-size="10" fill="#343a40"'


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
