"""Pieces of small pictures as SVG text: a document, texts, lines, a panel with two axes.

Self-contained: no script, no font, no style sheet, no link; names are escaped, so that a feature
can't inject markup; a white ground, so that they read on dark pages, too.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Final

BLUE: Final = "#1c7ed6"
ORANGE: Final = "#d9480f"
GREY: Final = "#868e96"
PALE: Final = "#dee2e6"
INK: Final = "#343a40"

_TICKS: Final = 5
_TICK_STEPS: Final = (1, 2, 5, 10)

Points = Iterable[tuple[float, float]]


def document(width: float, height: float, title: str, parts: Iterable[str]) -> str:
    """Return a whole picture of `width` x `height` units; `title` is what a reader aloud says."""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:g}" height="{height:g}" '
        f'viewBox="0 0 {width:g} {height:g}" role="img" font-family="sans-serif" font-size="11" '
        f'fill="{INK}"><title>{escape(title)}</title>'
        f'<rect width="{width:g}" height="{height:g}" fill="#fff"/>{"".join(parts)}</svg>'
    )


def text(
    x: float,
    y: float,
    content: str,
    *,
    anchor: str = "start",
    bold: bool = False,
    colour: str = "",
) -> str:
    """Return a line of text whose `anchor` (start, middle, end) is at x; y is its base line."""
    weight = ' font-weight="bold"' if bold else ""
    fill = f' fill="{colour}"' if colour else ""
    where = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"'
    return f"<text {where}{weight}{fill}>{escape(content)}</text>"


def line(points: Points, colour: str, *, width: float = 1.5, dash: str = "") -> str:
    """Return a line through points in units of the picture."""
    drawn = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    dashes = f' stroke-dasharray="{dash}"' if dash else ""
    return (
        f'<polyline points="{drawn}" fill="none" stroke="{colour}" stroke-width="{width:g}"'
        f"{dashes}/>"
    )


def bar(x: float, y: float, width: float, height: float, colour: str, told: str) -> str:
    """Return a rectangle that says `told` when it is pointed at."""
    return (
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" '
        f'fill="{colour}"><title>{escape(told)}</title></rect>'
    )


def dot(x: float, y: float, radius: float, colour: str, told: str) -> str:
    """Return a disc that says `told` when it is pointed at."""
    return (
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius:.1f}" fill="{colour}">'
        f"<title>{escape(told)}</title></circle>"
    )


def dust(points: Points, colour: str, *, size: float = 4.0) -> str:
    """Return many discs of one colour, 12 bytes each: ends of lines without a length."""
    drawn = "".join(f"M{x:.1f} {y:.1f}h0" for x, y in points)
    return (
        f'<path d="{drawn}" stroke="{colour}" stroke-width="{size:g}" '
        'stroke-linecap="round" fill="none"/>'
    )


def ticks(low: float, high: float) -> list[float]:
    """Return about five round numbers within [low, high].

    >>> ticks(0.0, 1.0)
    [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    """
    if not high > low:
        return [low]
    rough = (high - low) / _TICKS
    power = 10.0 ** math.floor(math.log10(rough))
    step = power * next(s for s in _TICK_STEPS if s * power >= rough * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [float(f"{i * step:.12g}") for i in range(first, last + 1)]


@dataclass(frozen=True, slots=True)
class Panel:
    """A frame at (left, top), `width` x `height`, whose axes run over `x_ends` and `y_ends`."""

    left: float
    top: float
    width: float
    height: float
    x_ends: tuple[float, float]
    y_ends: tuple[float, float]

    def place(self, points: Points) -> list[tuple[float, float]]:
        """Return points of the axes in units of the picture; y runs upwards on the axis."""
        return [(self._x(x), self._y(y)) for x, y in points]

    def frame(self, heading: str, x: str, y: str) -> Sequence[str]:
        """Return heading, border, ticks with their numbers, and the axes' names."""
        bottom, middle = self.top + self.height, self.left + self.width / 2
        edge = f'x="{self.left:g}" y="{self.top:g}" width="{self.width:g}" height="{self.height:g}"'
        parts = [
            f'<rect {edge} fill="none" stroke="{GREY}"/>',
            text(self.left, self.top - 8, heading, bold=True),
            text(middle, bottom + 32, x, anchor="middle"),
            self._upright(y),
        ]
        for tick in ticks(*self.x_ends):
            parts.append(line([(self._x(tick), bottom), (self._x(tick), bottom + 4)], GREY))
            parts.append(text(self._x(tick), bottom + 16, f"{tick:g}", anchor="middle"))
        for tick in ticks(*self.y_ends):
            ends = [(self.left, self._y(tick)), (self.left + self.width, self._y(tick))]
            parts.append(line(ends, PALE, width=1))
            parts.append(text(self.left - 6, self._y(tick) + 4, f"{tick:g}", anchor="end"))
        return parts

    def _x(self, value: float) -> float:
        return self.left + self._share(value, self.x_ends) * self.width

    def _y(self, value: float) -> float:
        return self.top + (1 - self._share(value, self.y_ends)) * self.height

    def _share(self, value: float, ends: tuple[float, float]) -> float:
        low, high = ends
        return (value - low) / (high - low) if high > low else 0.5

    def _upright(self, content: str) -> str:
        x, y = self.left - 44, self.top + self.height / 2
        return (
            f'<text transform="translate({x:.1f},{y:.1f}) rotate(-90)" text-anchor="middle">'
            f"{escape(content)}</text>"
        )
