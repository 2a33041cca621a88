"""`mlpd drift`, `performance` and `consistency`: what is served, watched."""

from typing import Any

import click

from mlpd.cli.output import (
    print_lines,
    print_pairs,
    print_table,
    progress,
    show_share,
    show_time,
    show_value,
)
from mlpd.cli.session import Session, connected

EXAMPLES_SHOWN = 10
WORST_SHOWN = 3


@click.command()
@click.argument("model")
@click.option("--version", help="Number or alias.  [default: champion]")
@click.option("--route", help="Only what this route served.")
@click.option("--start", metavar="TIME", help="From here.  [default: the last day of its counts]")
@click.option("--end", metavar="TIME", help="Up to here.")
@click.option("--step", metavar="DURATION", help="One report per 1d, 7d ...")
@click.option("--all", "everything", is_flag=True, help="Every feature, not only drifted ones.")
@connected
def drift(
    session: Session,
    model: str,
    *,
    version: str | None,
    route: str | None,
    start: str | None,
    end: str | None,
    step: str | None,
    everything: bool,
) -> None:
    """Compare what a model sees with its training.

    Feature by feature, live counts against the profile of the training rows.
    """
    report = session.client.drift(
        model, version=version, route=route, start=start, end=end, step=step
    )
    session.show(report, lambda found: _print_drift(found, everything=everything))


@click.command()
@click.argument("model")
@click.option("--by", type=click.Choice(["all", "month", "day"]), default="all", show_default=True)
@connected
def performance(session: Session, model: str, *, by: str) -> None:
    """Show a model's live quality.

    How well its labelled predictions did, per version, route and arm.
    """
    session.show(session.client.performance(model), lambda found: _print_performance(found, by))


@click.command()
@click.option("--run", is_flag=True, help="Run the audit now, in a child process of the daemon.")
@click.option("--limit", type=click.IntRange(min=1), help="Predictions to compare at most.")
@connected
def consistency(session: Session, *, run: bool, limit: int | None) -> None:
    """Compare served features with the log.

    Every logged prediction's vector is recomputed and compared bit for bit.  Without --run: what
    the last audit since the daemon's start found.  A mismatch gives exit code 1.
    """
    if run or limit is not None:
        with progress("recomputing served features from the log"):
            found = session.patient_client.run_consistency(limit=limit)
    else:
        found = session.client.consistency()["last"]
    session.show(found, _print_consistency)
    if found and found["mismatches"]:
        click.get_current_context().exit(1)


def _print_drift(report: dict[str, Any], *, everything: bool) -> None:
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
        _print_columns(window, everything=everything)
    if not windows:
        print_lines("Nothing was served in this time.")


def _print_windows(windows: list[dict[str, Any]]) -> None:
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


def _worst(window: dict[str, Any]) -> str | None:
    drifted = [f for f in window["features"] if f["name"] in window["drifted"]]
    drifted.sort(key=lambda feature: -feature["psi_adjusted"])
    return "\n".join(feature["name"] for feature in drifted[:WORST_SHOWN]) or None


def _print_columns(window: dict[str, Any], *, everything: bool) -> None:
    columns = sorted(window["features"], key=lambda feature: -feature["psi_adjusted"])
    if window["prediction"]:
        columns.insert(0, {**window["prediction"], "name": "(score)"})
    shown = [c for c in columns if everything or c["state"] in ("warn", "alert")]
    rows = [
        (
            *(c["name"], c["state"], f"{c['psi_adjusted']:.3f}"),
            f"{show_value(c['reference_mean'])} -> {show_value(c['mean'])}",
            f"{show_share(c['reference_missing_share'])} -> {show_share(c['missing_share'])}",
        )
        for c in shown
    ]
    headers = ["feature", "state", "psi", "mean", "missing"]
    hidden = len(columns) - len(shown)
    print_table(headers, rows, title="Features, training -> now", empty="none drifted")
    if hidden:
        print_lines("", f"{hidden} more are as they were; --all shows them.")


def _print_performance(found: dict[str, Any], by: str) -> None:
    length = {"all": 3, "month": 7, "day": 10}[by]
    cohorts = [c for c in found["cohorts"] if len(c["period"]) == length]
    cohorts.sort(key=lambda c: (c["period"], c["route"], c["arm"], c["version"]))
    rows = [
        (
            *(c["period"], c["route"], c["arm"], c["version"], c["predictions"]),
            show_share(c["coverage"]),
            *(c["performance"][name] for name in ("auc", "log_loss", "brier")),
        )
        for c in cohorts
    ]
    headers = [
        *("period", "route", "arm", "version", "rows", "labels"),
        *("auc", "log loss", "brier"),
    ]
    print_table(headers, rows, empty="Nothing was predicted yet.")


def _print_consistency(found: dict[str, Any] | None) -> None:
    if found is None:
        print_lines("No audit since the daemon's start.  mlpd consistency --run does one.")
        return
    print_pairs(
        {
            "at": show_time(found.get("at")),
            "result": "mismatch" if found["mismatches"] else "match",
            "predictions compared": found["rows_compared"],
            "values compared": found["values_compared"],
            "values that differ": found["mismatches"],
            "not comparable": found["unavailable"] or None,
        }
    )
    if found["mismatches"]:
        by_feature = sorted(found["by_feature"].items(), key=lambda pair: -pair[1])
        print_table(["feature", "differs"], by_feature, title="By feature")
        examples = [
            (e["prediction_id"], e["feature"], show_value(e["served"]), e["recomputed"])
            for e in found["examples"][:EXAMPLES_SHOWN]
        ]
        headers = ["prediction", "feature", "served", "recomputed"]
        print_table(headers, examples, title="Examples")
