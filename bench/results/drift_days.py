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
        for name, case in results["drift_days"]["cases"].items()
        for kind, days in sorted(case["notes"]["days"].items())
    ]
    return table(("served against", "days", "of these", "flagged", "each column alone"), rows)


def days(results: Results) -> str:
    """Return every storm and every flagged day, against the other months and the demo's rows."""
    others, demo = (_shown(case) for case in results["drift_days"]["cases"].values())
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


def _shown(case: Mapping[str, Any]) -> Mapping[str, Mapping[str, Any]]:
    return {one["day"]: one for one in case["notes"]["shown"]}


def _share(count: int, days: int) -> str:
    return f"{count} ({count / days:.1%})"


def _few(names: list[str]) -> str:
    shown = ", ".join(f"`{name}`" for name in names[:FEW]) or "-"
    return f"{shown} and {len(names) - FEW} more" if len(names) > FEW else shown
