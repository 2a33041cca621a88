"""The drift_days scenario as tables: rates by kind of day, and the days themselves."""

from collections.abc import Mapping
from typing import Any

from bench.results.table import table

Results = Mapping[str, Mapping[str, Any]]

FEW = 3
"""Names of drifted features that a row shows."""


def rates(results: Results) -> str:
    """Return how many days of each kind are called drifted, with thresholds of both sorts."""
    rows = [
        (
            name,
            kind,
            str(days),
            *(_share(case["notes"][of].get(kind, 0), days) for of in ("flagged", "flagged_alone")),
        )
        for name, case in _of_days(results).items()
        for kind, days in sorted(case["notes"]["days"].items())
    ]
    return table(("served against", "days", "of these", "flagged", "each column alone"), rows)


def days(results: Results) -> str:
    """Return every storm and every flagged day, against the other months and the demo's rows."""
    others, demo = (_shown(case) for case in _of_days(results).values())
    rows = [
        (
            day,
            one["kind"],
            f"{one['failed_share']:.0%}",
            _few(one["drifted"]) if day in others else "-",
            "" if day < min(demo) else _few(demo[day]["drifted"]) if day in demo else "-",
        )
        for day, one in sorted({**demo, **others}.items())
    ]
    head = ("day", "is", "flights that failed", "against the other months", "as in the demo")
    return table(head, rows)


def widths(results: Results) -> str:
    """Return how many windows of other widths are called drifted, by which thresholds."""
    rows = [
        (
            name.rpartition(", ")[2],
            f"{notes['windows']:,}",
            *(_share(notes[of], notes["windows"]) for of in ("flagged", "flagged_by_days")),
        )
        for name, notes in _notes(results).items()
        if "windows" in notes
    ]
    return table(("width", "windows", "flagged", "by thresholds of days"), rows)


def _notes(results: Results) -> Mapping[str, Mapping[str, Any]]:
    return {name: case["notes"] for name, case in results["drift_days"]["cases"].items()}


def _of_days(results: Results) -> Mapping[str, Mapping[str, Any]]:
    cases = results["drift_days"]["cases"]
    return {name: case for name, case in cases.items() if "days" in case["notes"]}


def _shown(case: Mapping[str, Any]) -> Mapping[str, Mapping[str, Any]]:
    return {one["day"]: one for one in case["notes"]["shown"]}


def _share(count: int, days: int) -> str:
    return f"{count:,} ({count / days:.1%})"


def _few(names: list[str]) -> str:
    shown = ", ".join(f"`{name}`" for name in names[:FEW]) or "-"
    return f"{shown} and {len(names) - FEW} more" if len(names) > FEW else shown
