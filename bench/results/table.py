"""Tables of the saved results, in Markdown."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

UNITS = {
    "requests_per_s": "requests/s",
    "rows_per_s": "rows/s",
    "rows_per_s_core": "rows/s and core",
    "bytes": "B",
}
_SHOWN = ("p50_ms", "p99_ms", "rows_per_s", "rows_per_s_core", "idle_mb", "peak_mb", "stall_max_ms")
_HEAD = ("case", "figure", "ours", "against", "ratio (min to max)", "more: ours, against")
_WHOLE = 100
"""From here on a number has no decimals."""


def overview(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Return a table of every scenario: ours, what it is compared with, and the ratio."""
    parts = []
    for name, found in results.items():
        cases = {case: c for case, c in found["cases"].items() if "ratio" in c}
        if cases:
            rows = [_row(case, figures) for case, figures in cases.items()]
            parts.append(f"**{name}**\n\n{table(_HEAD, rows)}")
    return "\n\n".join(parts)


def machines(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Return where and when each scenario was run."""
    rows = [
        (
            name,
            found["at"],
            found["commit"],
            _box(found["machine"]),
            str(found["machine"]["load_before"]),
        )
        for name, found in results.items()
    ]
    return table(("scenario", "when", "commit", "machine", "load before"), rows)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def unit_of(figure: str) -> str:
    """Return the unit that the name of a figure ends with."""
    return UNITS.get(figure) or figure.rpartition("_")[2].replace("mb", "MB")


def number(value: float) -> str:
    """Return three digits, and thousands apart: `0.0123`, `4.56`, `12,300`."""
    rounded = float(f"{value:.3g}")
    if abs(rounded) >= _WHOLE:
        return f"{rounded:,.0f}"
    return f"{rounded:.12f}".rstrip("0").rstrip(".")


def median(case: Mapping[str, Any], figure: str, side: str = "ours") -> float:
    """Return the median of a figure."""
    return float(case[side][figure]["median"])


def _box(machine: Mapping[str, Any]) -> str:
    return f"{machine['cores']} x {machine['processor']}, {machine['filesystem']}"


def _row(name: str, case: Mapping[str, Any]) -> Sequence[str]:
    figure, ratio = case["measure"], case["ratio"]
    sides = [number(median(case, figure, side)) for side in ("ours", "against")]
    spread = f"{number(ratio['median'])} ({number(ratio['min'])} to {number(ratio['max'])})"
    more = [
        f"{_label(other)} {number(median(case, other))}, {number(median(case, other, 'against'))}"
        for other in _SHOWN
        if other in case["ours"] and other != figure
    ]
    return (name, _label(figure), *sides, spread, "; ".join(more))


def _label(figure: str) -> str:
    if figure in UNITS:
        return UNITS[figure]
    what, _, _ = figure.rpartition("_")
    return f"{what.replace('_', ' ')} {unit_of(figure)}".strip()
