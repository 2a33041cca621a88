"""`mlpd drift`, `performance`, `quality` and `consistency`: what is served, watched."""

from pathlib import Path
from typing import Any

import click

from mlpd.cli.analysis import print_analysis
from mlpd.cli.drift import print_drift, save_pictures
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


@click.command()
@click.argument("model")
@click.option("--version", help="Number or alias.  [default: champion]")
@click.option("--route", help="Only what this route served.")
@click.option("--start", metavar="TIME", help="From here.  [default: the last day of its counts]")
@click.option("--end", metavar="TIME", help="Up to here.")
@click.option("--step", metavar="DURATION", help="One report per 1d, 7d ...")
@click.option(
    "--reference",
    type=click.Choice(["training", "rolling", "same_hour", "previous"]),
    help="What to compare with.  [default: training]",
)
@click.option("--count", type=click.IntRange(min=1), help="Windows of rolling, weeks of same_hour.")
@click.option("--svg", type=click.Path(path_type=Path), help="Folder for a picture per feature.")
@click.option("--check", is_flag=True, help="Check features together now, in a child process.")
@click.option("--all", "everything", is_flag=True, help="Every feature, not only drifted ones.")
@connected
def drift(  # noqa: PLR0913  one of each option
    session: Session,
    model: str,
    *,
    version: str | None,
    route: str | None,
    start: str | None,
    end: str | None,
    reference: str | None,
    count: int | None,
    step: str | None,
    svg: Path | None,
    check: bool,
    everything: bool,
) -> None:
    """Compare what a model sees with its training.

    Feature by feature, live counts against the profile of the training rows; or against the
    windows before, the same hour of the weeks before, or what the version before this one saw.
    """
    window: dict[str, Any] = {"version": version, "start": start, "end": end, "count": count}
    asked = {**window, "route": route, "reference": reference}
    if check:
        with progress("checking features together"):
            session.patient_client.check_drift(model, **window)
    report = session.client.drift(model, step=step, **asked)
    session.show(report, lambda found: print_drift(found, everything=everything))
    if svg is not None:
        save_pictures(session.client, report, svg, asked, everything=everything)


@click.command()
@click.argument("model")
@click.option("--by", type=click.Choice(["all", "month", "day"]), default="all", show_default=True)
@click.option("--analysis", is_flag=True, help="By day with estimates; whether the concept drifts.")
@click.option("--slice", "slice_by", metavar="NAME", help="The same by a key, field or feature.")
@click.option("--start", metavar="TIME", help="Analyse predictions from here.")
@click.option("--end", metavar="TIME", help="Up to here.")
@connected
def performance(
    session: Session,
    model: str,
    *,
    by: str,
    analysis: bool,
    slice_by: str | None,
    start: str | None,
    end: str | None,
) -> None:
    """Show a model's live quality.

    How well its labelled predictions did, per version, route and arm.  With --analysis or --slice
    a child process joins all predictions with their labels, some seconds for a million, and also
    estimates what labels to come will say.
    """
    if not (analysis or slice_by or start or end):
        session.show(session.client.performance(model), lambda found: _print_performance(found, by))
        return
    with progress("joining predictions and labels"):
        found = session.patient_client.analysis(model, by=slice_by, start=start, end=end)
    session.show(found, print_analysis)


@click.command()
@click.option("--samples", is_flag=True, help="Refused rows, their values masked.")
@click.option("--all", "everything", is_flag=True, help="Every feature, not only bad ones.")
@connected
def quality(session: Session, *, samples: bool, everything: bool) -> None:
    """Show what is wrong with data.

    By source since the daemon's start, by feature in the last window of the alerts.
    """
    session.show(
        session.client.quality(),
        lambda found: _print_quality(found, samples=samples, everything=everything),
    )


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


def _print_quality(found: dict[str, Any], *, samples: bool, everything: bool) -> None:
    sources = [
        (
            *(s["source"], s["rows"], s["rejected"], show_share(s["rejected_share"])),
            s["clamped"],
            _counts(s["rows_by_code"] | s["requests_by_code"]),
        )
        for s in found["sources"]
    ]
    headers = ["source", "rows", "refused", "share", "clamped", "why"]
    print_table(headers, sources, title="Sources", empty="none is defined")
    if samples:
        rows = [
            (s["source"], show_time(sample["at"]), sample["code"], _counts(sample["row"]))
            for s in found["sources"]
            for sample in s["samples"]
        ]
        print_table(["source", "at", "why", "values"], rows, title="Refused rows, masked")
    features = [
        (
            *(f"{f['model']}@{f['version']}", f["feature"], problem),
            *(show_share(p[name]) for name in ("share", "training", "threshold")),
        )
        for f in found["features"]
        for problem, p in f["problems"].items()
        if everything or p["share"] >= p["threshold"]
    ]
    headers = ["version", "feature", "problem", "share", "in training", "threshold"]
    empty = "nothing is wrong" if found["window"] else "No window with rows enough has closed."
    print_table(headers, features, title="Features", empty=empty)


def _counts(values: dict[str, Any]) -> str | None:
    return ", ".join(f"{name}: {value}" for name, value in values.items()) or None


def _print_consistency(found: dict[str, Any] | None) -> None:
    if found is None:
        print_lines("No audit since the daemon's start.  mlpd consistency --run does one.")
        return
    print_pairs(
        {
            "at": show_time(found.get("at")),
            "result": "mismatch" if found["mismatches"] else "match",
            "window": found["window"] and " to ".join(map(show_time, found["window"])),
            "served in it": found["served"],
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
        events = [
            (
                *(e["prediction_id"], e["feature"], event["source"], event["sequence"]),
                show_time(event["event_time"]),
                _counts(event["values"]),
            )
            for e in found["examples"][:EXAMPLES_SHOWN]
            for event in e["events"] or ()
        ]
        headers = ["prediction", "feature", "source", "sequence", "event time", "values"]
        print_table(headers, events, title="Events behind them, newest first")
