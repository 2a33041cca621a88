"""The scaling scenario as a picture of four panels, on logarithmic axes."""

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from bench.results.scaling import TYPICAL, exponents, relative
from bench.results.table import number

Results = Mapping[str, Mapping[str, Any]]

_WIDTH, _HEIGHT, _LEFT, _RIGHT, _MARGIN = 250, 190, 48, 112, 44
_COLOURS = ("#1864ab", "#2b8a3e", "#d9480f", "#862e9c")
_AXIS = "#adb5bd"
_TEXT = 'font-family="sans-serif" font-size="11" fill="#343a40"'
_APART = 12.0
"""Between two labels, in pixels."""


class Line(NamedTuple):
    """A curve: its label, values over the panel's, colour, and whether it is dashed."""

    label: str
    values: Sequence[float]
    colour: str
    is_dashed: bool = False


def draw(results: Results) -> str:
    """Return an SVG: throughput by shards, of keys and of requests; the busiest shard; tails."""
    cases = results["scaling"]["cases"]
    counts = cases[f"growth, {TYPICAL:g}, 1 row"]["notes"]["shards"]
    known = exponents(results)
    by_key = [
        Line(f"{e:g}{', cached' if kept else ''}", relative(results, e, name), colour, bool(kept))
        for e, colour in zip(known, _COLOURS, strict=False)
        for kept, name in ((0, "1 row"), (1, "1 row, cached"))
        if e or not kept
    ]
    asked = ("1 row", "16 rows", "100 rows", "100 rows, tagged", "16 rows, cached")
    by_rows = [
        Line(name, relative(results, TYPICAL, name), colour, ", " in name)
        for name, colour in zip(asked, (*_COLOURS[:3], _COLOURS[2], _COLOURS[1]), strict=True)
    ]
    skews = [
        Line(f"{e:g}", cases[f"growth, {e:g}, 1 row"]["notes"]["skew"], colour)
        for e, colour in zip(known, _COLOURS, strict=False)
    ]
    tails = {name.removeprefix("tail, "): c["notes"] for name, c in cases.items() if "tail" in name}
    late = [
        Line(used, notes["plain, p99_ms"], colour)
        for (used, notes), colour in zip(tails.items(), _COLOURS, strict=False)
    ]
    fan_outs = next(iter(tails.values()))["fan_outs"]
    panels = (
        ("1 row: times one shard, by exponent", counts, by_key, "shards"),
        (f"exponent {TYPICAL:g}: times one shard, by rows", counts, by_rows, "shards"),
        ("1 row: busiest shard over mean, by exponent", counts, skews, "shards"),
        ("p99 in ms, by share of the loops that is used", fan_outs, late, "shards asked"),
    )
    wide, high = _LEFT + _WIDTH + _RIGHT, _HEIGHT + 2 * _MARGIN
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {2 * wide} {2 * high}" role="img">',
        "<title>Growth with the number of shards, by the model</title>",
        f'<rect width="{2 * wide}" height="{2 * high}" fill="#fff"/>',
    ]
    for i, (heading, along, lines, what) in enumerate(panels):
        left, top = (i % 2) * wide + _LEFT, (i // 2) * high + _MARGIN
        parts.append(f'<g transform="translate({left},{top})">')
        parts += _panel(heading, along, lines, what)
        parts.append("</g>")
    return "\n".join([*parts, "</svg>"]) + "\n"


def _panel(heading: str, along: Sequence[float], lines: Sequence[Line], what: str) -> Iterator[str]:
    values = [value for line in lines for value in line.values]
    low, high = _bound(min(values), up=False), _bound(max(values), up=True)
    right = max(along)

    def x(value: float) -> float:
        return _WIDTH * math.log(value) / math.log(right)

    def y(value: float) -> float:
        return _HEIGHT * (1 - math.log(value / low) / math.log(high / low))

    yield f'<text x="-30" y="-14" font-weight="bold" {_TEXT}>{heading}</text>'
    yield f'<path d="M0 0V{_HEIGHT}H{_WIDTH}" fill="none" stroke="{_AXIS}"/>'
    for tick in _ticks(low, high):
        yield f'<path d="M0 {y(tick):.1f}H{_WIDTH}" stroke="#e9ecef"/>'
        yield f'<text x="-6" y="{y(tick) + 4:.1f}" text-anchor="end" {_TEXT}>{number(tick)}</text>'
    for tick in (value for value in (1, 4, 16, 100, 1_000) if value <= right):
        place = f'x="{x(tick):.1f}" y="{_HEIGHT + 15}" text-anchor="middle"'
        yield f"<text {place} {_TEXT}>{tick:,}</text>"
    yield f'<text x="{_WIDTH / 2}" y="{_HEIGHT + 29}" text-anchor="middle" {_TEXT}>{what}</text>'
    for line in lines:
        points = " ".join(
            f"{x(at):.1f},{y(value):.1f}" for at, value in zip(along, line.values, strict=True)
        )
        dash = ' stroke-dasharray="5 3"' if line.is_dashed else ""
        shape = f'fill="none" stroke="{line.colour}" stroke-width="1.6"{dash}'
        yield f'<polyline points="{points}" {shape}/>'
    ends = _spread_out([y(line.values[-1]) for line in lines])
    for line, end in zip(lines, ends, strict=True):
        text = _TEXT.replace("#343a40", line.colour)
        yield f'<text x="{_WIDTH + 6}" y="{end + 4:.1f}" {text}>{line.label}</text>'


def _bound(value: float, *, up: bool) -> float:
    """Return the next of 1, 2, 5, 10 ... above or below."""
    steps = [base * 10.0**power for power in range(-3, 6) for base in (1, 2, 5)]
    if up:
        return min(step for step in steps if step >= value * 0.999)
    return max(step for step in steps if step <= value * 1.001)


def _ticks(low: float, high: float) -> list[float]:
    bases = (1,) if high / low > 50 else (1, 2, 5)  # noqa: PLR2004 - more would touch
    steps = [base * 10.0**power for power in range(-3, 6) for base in bases]
    return [step for step in steps if low * 0.999 <= step <= high * 1.001]


def _spread_out(places: Sequence[float]) -> list[float]:
    """Return places of labels that don't touch, in the same order from top to bottom."""
    found = list(places)
    order = sorted(range(len(found)), key=lambda i: found[i])
    for above, below in pairwise(order):
        found[below] = max(found[below], found[above] + _APART)
    limit = float(_HEIGHT)
    for i in reversed(order):
        found[i] = min(found[i], limit)
        limit = found[i] - _APART
    return found
