"""The growth scenario as a table and as a picture: what more entities change."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from bench.results.table import median, number, table

Results = Mapping[str, Mapping[str, Any]]
Case = Mapping[str, Any]

PANELS = (
    ("read", "p50_ms", "read of one entity, median ms"),
    ("ingest", "rows_per_s", "ingest, rows/s"),
    ("start", "ready_s", "start to ready, s"),
    ("fill", "online_page_bytes", "online bytes of an entity, on pages"),
)
"""Scenario's part, its figure, and what a panel says."""

_WIDTH, _HEIGHT, _MARGIN = 250, 150, 50
_OURS, _SMALL, _AXIS = "#d9480f", "#9aa5b1", "#adb5bd"
_TEXT = 'font-family="sans-serif" font-size="11" fill="#343a40"'


def entities_table(results: Results) -> str:
    """Return a row per number of entities; in brackets the smallest, measured in turns with it."""
    cases = results["growth"]["cases"]
    rows = []
    for size in _sizes(cases):
        fill, memory = (cases[f"{what}, {size:,} entities"] for what in ("fill", "memory"))
        rows.append(
            (
                f"{size:,}",
                *(_both(cases, what, figure, size) for what, figure, _ in PANELS[:3]),
                number(median(fill, "online_bytes")),
                number(median(fill, "online_page_bytes")),
                number(median(memory, "resident_mb")),
            )
        )
    head = (
        *("entities", "read p50 ms", "ingest rows/s", "start s"),
        *("bytes of an entity", "on pages", "resident MB"),
    )
    return table(head, rows)


def draw(results: Results) -> str:
    """Return an SVG of four panels: medians and ranges by number of entities, from zero on.

    Grey: the smallest, measured in turns with each, so that a machine that slows down shows.
    """
    cases = results["growth"]["cases"]
    width, height = 2 * (_WIDTH + 2 * _MARGIN), 2 * (_HEIGHT + 2 * _MARGIN)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img">',
        "<title>Growth with the number of entities</title>",
        f'<rect width="{width}" height="{height}" fill="#fff"/>',
    ]
    for i, (what, figure, heading) in enumerate(PANELS):
        left = (i % 2) * (_WIDTH + 2 * _MARGIN) + _MARGIN
        top = (i // 2) * (_HEIGHT + 2 * _MARGIN) + _MARGIN
        parts.append(f'<g transform="translate({left},{top})">')
        parts += _panel(cases, what, figure, heading)
        parts.append("</g>")
    return "\n".join([*parts, "</svg>"]) + "\n"


def _sizes(cases: Mapping[str, Case]) -> list[int]:
    names = (name.partition(", ")[2].split()[0] for name in cases if name.startswith("fill, "))
    return sorted(int(name.replace(",", "")) for name in names)


def _spread(cases: Mapping[str, Case], what: str, figure: str, size: int, side: str) -> Any:
    """Return a figure's spread; the smallest size is the other side of the next one."""
    case = cases.get(f"{what}, {size:,} entities")
    if case is None:
        case, side = cases[f"{what}, {size * 10:,} entities"], "against"
    return case.get(side, {}).get(figure)


def _both(cases: Mapping[str, Case], what: str, figure: str, size: int) -> str:
    ours, small = (_spread(cases, what, figure, size, side) for side in ("ours", "against"))
    shown = number(ours["median"])
    return shown if ours == small else f"{shown} ({number(small['median'])})"


def _panel(cases: Mapping[str, Case], what: str, figure: str, heading: str) -> Iterator[str]:
    sizes = _sizes(cases)
    ours = [_spread(cases, what, figure, size, "ours") for size in sizes]
    small = [_spread(cases, what, figure, size, "against") for size in sizes]
    top = max(spread["max"] for spread in (*ours, *small) if spread)
    yield f'<text y="-12" font-weight="bold" {_TEXT}>{heading}</text>'
    yield f'<path d="M0 0V{_HEIGHT}H{_WIDTH}" fill="none" stroke="{_AXIS}"/>'
    for share in (0.0, 0.5, 1.0):
        y = _HEIGHT * (1 - share)
        label = number(top * share)
        yield f'<text x="-6" y="{y + 4:g}" text-anchor="end" {_TEXT}>{label}</text>'
    places = [_WIDTH * (i + 0.5) / len(sizes) for i in range(len(sizes))]
    for x, size in zip(places, sizes, strict=True):
        yield f'<text x="{x:.1f}" y="{_HEIGHT + 16}" text-anchor="middle" {_TEXT}>{size:,}</text>'
    if all(small):
        yield from _line(places, small, top, _SMALL)
    yield from _line(places, ours, top, _OURS)


def _line(
    places: Sequence[float], spreads: Sequence[Any], top: float, colour: str
) -> Iterator[str]:
    def y(value: float) -> str:
        return f"{_HEIGHT * (1 - value / top):.1f}"

    for x, spread in zip(places, spreads, strict=True):
        ends = f"M{x:.1f} {y(spread['min'])}V{y(spread['max'])}"
        yield f'<path d="{ends}" stroke="{colour}"/>'
        yield f'<circle cx="{x:.1f}" cy="{y(spread["median"])}" r="3" fill="{colour}"/>'
    points = (f"{x:.1f},{y(s['median'])}" for x, s in zip(places, spreads, strict=True))
    yield f'<polyline points="{" ".join(points)}" fill="none" stroke="{colour}"/>'
