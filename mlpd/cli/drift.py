"""What `mlpd drift` prints, and the pictures that it saves."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mlpd.cli.output import (
    note,
    print_lines,
    print_pairs,
    print_table,
    show_share,
    show_time,
    show_value,
)

WORST_SHOWN = 3
BARS = "▁▂▃▄▅▆▇█"
FULL_PSI = 0.2
"""A bar is full at this psi, the alert's least threshold, or at the largest one if that is more."""


def sparkline(values: Sequence[float | None]) -> str:
    """Return one bar a value, from 0 up; a dot where nothing is known.

    >>> sparkline([0.0, 0.1, None, 0.2])
    '▁▅·█'
    """
    top = max((value for value in values if value is not None), default=0.0)
    scale = (len(BARS) - 1) / max(top, FULL_PSI)
    return "".join("·" if v is None else BARS[round(v * scale)] for v in values)


def save_pictures(
    client: Any,
    report: Mapping[str, Any],
    folder: Path,
    asked: Mapping[str, Any],
    *,
    everything: bool,
) -> None:
    """Write one SVG a drifted feature, or every one, into a folder that is made."""
    folder.mkdir(parents=True, exist_ok=True)
    columns = [
        column
        for window in report["windows"]
        for column in (*window["features"], *filter(None, [window["prediction"]]))
        if everything or column["state"] in ("warn", "alert")
    ]
    for name in dict.fromkeys(column["name"] for column in columns):
        picture = client.drift_picture(report["model"], name, **asked)
        (folder / f"{name.replace('/', '_')}.svg").write_text(picture, "utf-8")
    note(f"{len({column['name'] for column in columns})} pictures in {folder}")


def print_drift(report: dict[str, Any], *, everything: bool) -> None:
    """Print one window feature by feature, or a table of windows."""
    route = f" on route {report['route']}" if report["route"] else ""
    print_lines(f"{report['model']}@{report['version']}{route} against {report['reference']}")
    windows = report["windows"]
    if len(windows) > 1:
        _print_windows(windows)
        return
    for window in windows:
        print_pairs(
            {
                "from": show_time(window["start"]),
                "rows": window["rows"],
                "state": window["state"],
                "drifted share of gain": show_share(window["drifted_share"]),
            }
        )
        _print_columns(window, report["reference"], everything=everything)
    if not windows:
        print_lines("Nothing was served in this time.")
    if report["not_compared"]:
        print_lines("", f"The reference has no {', '.join(report['not_compared'])}.")
    if report["multivariate"]:
        _print_check(report["multivariate"])


def _print_windows(windows: list[dict[str, Any]]) -> None:
    trend = [max((f["psi_adjusted"] for f in w["features"]), default=None) for w in windows]
    rows = [
        (
            *(show_time(window["start"])[:10], window["rows"], window["state"]),
            *(show_share(window["drifted_share"]), len(window["drifted"])),
            _worst(window),
        )
        for window in windows
    ]
    headers = ["from", "rows", "state", "of gain", "features", "most drifted"]
    print_table(headers, rows, title="Windows")
    print_lines("", f"Largest psi by window: {sparkline(trend)}")


def _worst(window: dict[str, Any]) -> str | None:
    drifted = [f for f in window["features"] if f["name"] in window["drifted"]]
    drifted.sort(key=lambda feature: -feature["psi_adjusted"])
    return "\n".join(feature["name"] for feature in drifted[:WORST_SHOWN]) or None


def _print_columns(window: dict[str, Any], reference: str, *, everything: bool) -> None:
    columns = sorted(window["features"], key=lambda feature: -feature["psi_adjusted"])
    if window["prediction"]:
        columns.insert(0, {**window["prediction"], "name": "(score)"})
    shown = [c for c in columns if everything or c["state"] in ("warn", "alert")]
    rows = [
        (
            *(c["name"], c["state"], f"{c['psi_adjusted']:.3f}", sparkline(c.get("trend") or ())),
            f"{show_value(c['reference_mean'])} -> {show_value(c['mean'])}",
            f"{show_share(c['reference_missing_share'])} -> {show_share(c['missing_share'])}",
            c["look"].replace("_", " "),
        )
        for c in shown
    ]
    headers = ["feature", "state", "psi", "over time", "mean", "missing", "looks"]
    hidden = len(columns) - len(shown)
    print_table(headers, rows, title=f"Features, {reference} -> now", empty="none drifted")
    if hidden:
        print_lines("", f"{hidden} more are as they were; --all shows them.")


def _print_check(found: Mapping[str, Any]) -> None:
    fit, told = found["reconstruction"], found["classifier"]
    auc = told["auc"]
    print_pairs(
        {
            "window": f"{show_time(found['start'])} to {show_time(found['end'])}",
            "rows": found["rows"],
            "left by training's components": f"{fit['state']}: {show_value(fit['error'])}, "
            f"in training {show_value(fit['reference_error'])}, "
            f"threshold {show_value(fit['threshold'])}",
            "told from the windows before": told["state"]
            if auc is None
            else f"{told['state']}: AUC {show_value(auc['value'])} "
            f"[{show_value(auc['low'])}, {show_value(auc['high'])}]",
        },
        title="Features together",
    )
