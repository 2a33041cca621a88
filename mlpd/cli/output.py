"""What people read (tables and pairs by rich, imported when used) and what programs read (JSON).

Nothing of the data is taken for markup, and control characters are escaped; colours appear on a
terminal alone.  Where there is none, lines are as long as they need to be, for grep and awk.
"""

import json
import math
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import click

from mlpd.cli.lazy import printable

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress
    from rich.table import Table
    from rich.text import Text

PIPE_COLUMNS = 1_000
"""Width without a terminal: no cell is folded."""
UNBROKEN_CHARS = 28
"""Columns up to this width are never folded, so that names and times stay whole."""

_NUMBER = re.compile(r"-|-?[\d,.]+(e[+-]\d+)?%?|-?inf|nan")
_FOUR_DIGITS = 10_000
_GAP = "  "
_DURATIONS = ((86_400, "d", 3_600, "h"), (3_600, "h", 60, "m"), (60, "m", 1, "s"))
_STYLES = {
    "ok": "green", "ready": "green", "succeeded": "green", "match": "green", "passed": "green",
    "warn": "yellow", "running": "cyan", "queued": "cyan", "pending": "cyan",
    "alert": "red", "failed": "red", "mismatch": "red", "quarantined": "red", "broken": "red",
    "stale": "yellow", "missing": "yellow", "insufficient": "dim", "cancelled": "dim",
}  # fmt: skip
"""Words of state that are coloured wherever they fill a cell."""


def print_json(value: Any) -> None:
    """Write one strict JSON document to stdout: NaN and infinities, which JSON lacks, are null."""
    click.echo(json.dumps(_strict(value), ensure_ascii=False))


def print_table(
    headers: Sequence[str], rows: Iterable[Sequence[Any]], *, title: str = "", empty: str = "none"
) -> None:
    """Write a table to stdout, or a block of pairs per row where the terminal is too narrow.

    Columns that hold numbers alone are set flush right.
    """
    texts = [list(map(show_value, row)) for row in rows]
    if title:
        print_title(title)
    if not texts:
        click.echo(f"  {empty}" if title else empty)
        return
    columns = list(zip(*texts, strict=True))
    if _least_width(headers, columns) <= _console().width:
        _print_columns(headers, columns)
        return
    for row in texts:
        print_pairs(dict(zip(headers, row, strict=True)))
        click.echo()


def print_pairs(pairs: Mapping[str, Any], *, title: str = "") -> None:
    """Write names and values to stdout, one pair a line; pairs with None are left out."""
    from rich.table import Table

    if title:
        print_title(title)
    table = Table(box=None, pad_edge=False, padding=(0, len(_GAP), 0, 0), show_header=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in pairs.items():
        if value is not None:
            table.add_row(printable(name), _styled(show_value(value)))
    _print_trimmed(table)


def print_title(title: str) -> None:
    """Write a heading, with an empty line before it."""
    click.echo()
    click.secho(printable(title), bold=True)


def print_lines(*lines: str) -> None:
    """Write plain lines to stdout."""
    for line in lines:
        click.echo(printable(line))


def note(line: str) -> None:
    """Write a line to stderr: what a person should know and a program should not parse."""
    click.echo(printable(line), err=True)


def show_value(value: Any) -> str:
    """Return a value as a cell: numbers in four digits, None as `-`, lists with commas."""
    if value is None or value in ([], {}):
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float):
        return _show_number(value)
    if isinstance(value, list | tuple):
        return ", ".join(map(show_value, value))
    if isinstance(value, Mapping):
        return ", ".join(f"{key}={show_value(item)}" for key, item in value.items())
    return printable(str(_plain(value)))


def _show_number(value: float) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.0f}" if abs(value) >= _FOUR_DIGITS else f"{value:.4g}"


def show_time(time_us: int | str | None) -> str:
    """Return a UTC time in seconds, such as `2013-11-01 10:00:00Z`, from microseconds or text."""
    if time_us is None:
        return "-"
    if isinstance(time_us, str):
        return time_us.replace("T", " ")[:19] + "Z"
    return f"{datetime.fromtimestamp(time_us / 1e6, UTC):%Y-%m-%d %H:%M:%S}Z"


def show_duration(duration_s: float | None) -> str:
    """Return a duration in its two largest units, such as `3h 12m`."""
    if duration_s is None:
        return "-"
    for size, unit, part, smaller in _DURATIONS:
        if duration_s >= size:
            whole, rest = divmod(duration_s, size)
            least = f" {rest // part:.0f}{smaller}" if rest >= part else ""
            return f"{whole:.0f}{unit}{least}"
    return f"{duration_s:.3g}s" if duration_s >= 1 else f"{duration_s * 1e3:.3g}ms"


def show_bytes(size: float | None) -> str:
    """Return a size in binary units."""
    if size is None:
        return "-"
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:  # noqa: PLR2004 - binary units
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def show_share(share: float | None) -> str:
    """Return a share of one in percent."""
    return "-" if share is None else f"{share:.1%}"


class Bar:
    """A progress bar; this one, for where stderr is no terminal, shows nothing."""

    def advance(self, amount: float) -> None:
        """Count `amount` more as done."""

    def restart(self, total: float) -> None:
        """Begin once more, with `total` to do."""

    def describe(self, text: str) -> None:
        """Say what is being done now."""


class _TerminalBar(Bar):
    def __init__(self, display: "Progress", text: str, total: float | None) -> None:
        self._display = display
        self._task = display.add_task(printable(text), total=total)

    def advance(self, amount: float) -> None:
        self._display.advance(self._task, amount)

    def restart(self, total: float) -> None:
        self._display.reset(self._task, total=total)

    def describe(self, text: str) -> None:
        self._display.update(self._task, description=printable(text))


@contextmanager
def progress(text: str, total: float | None = None, *, unit: str = "") -> Iterator[Bar]:
    """A progress bar on stderr while the block runs; gone afterwards.

    `total` None: how much there is isn't known, so it shows that something moves, and for how long.
    """
    if not sys.stderr.isatty():
        yield Bar()
        return
    from rich import progress as parts

    columns: list[parts.ProgressColumn] = [
        parts.TextColumn("{task.description}", markup=False),
        parts.BarColumn(),
        parts.TimeElapsedColumn(),
    ]
    if total is not None:
        counts = "{task.completed:,.0f} of {task.total:,.0f} " + unit
        columns[2:2] = [parts.TextColumn(counts), parts.TimeRemainingColumn()]
    with parts.Progress(*columns, console=_console(stderr=True), transient=True) as display:
        yield _TerminalBar(display, text, total)


def _least_width(headers: Sequence[str], columns: Sequence[Sequence[str]]) -> int:
    """Return the width below which a table would have to cut what isn't folded."""
    widths = [max(map(len, (header, *c))) for header, c in zip(headers, columns, strict=True)]
    return sum(min(width, UNBROKEN_CHARS) for width in widths) + len(_GAP) * (len(widths) - 1)


def _print_columns(headers: Sequence[str], columns: Sequence[Sequence[str]]) -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, len(_GAP), 0, 0), header_style="bold")
    for header, column in zip(headers, columns, strict=True):
        table.add_column(
            header,
            justify="right" if all(map(_NUMBER.fullmatch, column)) else "left",
            overflow="fold",
            no_wrap=max(map(len, column)) <= UNBROKEN_CHARS,
        )
    for row in zip(*columns, strict=True):
        table.add_row(*map(_styled, row))
    _print_trimmed(table)


def _print_trimmed(table: "Table") -> None:
    """Write a table without the blanks that fill up its last column."""
    console = _console()
    with console.capture() as capture:
        console.print(table)
    click.echo("\n".join(line.rstrip() for line in capture.get().splitlines()))


def _console(*, stderr: bool = False) -> "Console":
    from rich.console import Console

    file = sys.stderr if stderr else sys.stdout
    terminal = file.isatty()
    width = None if terminal else int(os.environ.get("COLUMNS") or PIPE_COLUMNS)
    return Console(
        file=file, width=width, force_terminal=terminal, highlight=False, markup=False, emoji=False
    )


def _styled(text: str) -> "Text":
    from rich.text import Text

    return Text(text, style=_STYLES.get(text, ""))


def _strict(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(item) for item in value]
    return _plain(value)


def _plain(value: Any) -> Any:
    """Return bytes as text, other values as they are."""
    from mlpd.core.convert import bytes_text

    return bytes_text(value) if isinstance(value, bytes) else value
