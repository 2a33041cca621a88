"""The demo's report: tables on stdout, a picture and a JSON file in the data directory."""

import json
from pathlib import Path
from typing import Any, Final

from mlpd.cli.demo.findings import Findings, experiment_form, shadow_form
from mlpd.cli.demo.pictures import draw_report
from mlpd.cli.output import print_lines, print_pairs, print_table, show_bytes, show_duration

PICTURE: Final = "report.svg"
JSON_FILE: Final = "report.json"


def save_report(findings: Findings) -> Path:
    """Write the picture and the JSON object into the data directory; returns the picture's path."""
    folder = Path(findings.data_dir)
    trained, observed = findings.trained, findings.observed
    references = {
        "offline": trained.champion["metrics"]["auc"],
        "without features": trained.ablation["metrics"]["auc"],
    }
    picture = draw_report(observed.cohorts, references, observed.drifted())
    (folder / PICTURE).write_text(picture, encoding="utf-8")
    text = json.dumps(findings.to_dict(), indent=2)
    (folder / JSON_FILE).write_text(f"{text}\n", encoding="utf-8")
    return folder / PICTURE


def print_report(findings: Findings) -> None:
    """Write the tables."""
    _print_work(findings)
    _print_models(findings)
    _print_live(findings)
    _print_shadow(findings)
    _print_experiment(findings)
    _print_drift(findings)
    _print_checks(findings)


def _print_work(findings: Findings) -> None:
    imported, replayed = findings.imported, findings.replayed
    print_pairs(
        {
            "events": f"{findings.events:,} ({imported.events:,} imported at "
            f"{imported.events / imported.duration_s:,.0f} a second, durable)",
            "predictions": f"{replayed.predictions:,} at {replayed.ticks:,} moments in "
            f"{show_duration(findings.replay_s)}, with {replayed.events:,} events and "
            f"{replayed.labels:,} labels between them",
            "one prediction": f"p50 {findings.latency_at_ms(0.5):.2f} ms, p99 "
            f"{findings.latency_at_ms(0.99):.2f} ms over TCP, features looked up",
            "all together": f"{show_duration(findings.duration_s)}, "
            f"at most {show_bytes(findings.memory_bytes or None)} of memory",
        },
        title="Work",
    )


def _print_models(findings: Findings) -> None:
    trained = findings.trained
    rows = [("first model", trained.champion), ("request fields alone", trained.ablation)]
    if trained.challenger is not None:
        rows.insert(1, ("retrained", trained.challenger))
    print_table(
        ("model", "version", "AUC", "log loss", "Brier", "parity"),
        [_model_row(name, result) for name, result in rows],
        title="Models (on the last 15 % of their training period)",
    )


def _model_row(name: str, result: Any) -> tuple[Any, ...]:
    metrics, parity = result["metrics"], result["parity"]
    return (
        *(name, f"{result['model']}@{result['version']}"),
        *(metrics["auc"], metrics["log_loss"], metrics["brier"]),
        f"{parity['bit_equal']:,} of {parity['rows']:,} rows bit-equal",
    )


def _print_live(findings: Findings) -> None:
    print_table(
        ("month", "arm", "version", "predictions", "labelled", "AUC", "log loss", "Brier", "ECE"),
        [
            (
                *(cohort["period"], cohort["arm"], cohort["version"]),
                *(cohort["predictions"], cohort["labelled"]),
                *(cohort["performance"][name] for name in ("auc", "log_loss", "brier")),
                cohort["performance"]["calibration_error"],
            )
            for cohort in findings.observed.cohorts
        ],
        title="Live performance by month and arm",
    )


def _print_shadow(findings: Findings) -> None:
    form = shadow_form(findings.observed.shadow)
    if form is None:
        print_lines("", "No shadow: it runs in November (--months 2).")
        return
    low, high = form["mean_interval"]
    print_pairs(
        {
            "scores": f"{form['shadow']} less {form['primary']} over {form['rows']:,} rows: "
            f"{form['mean_difference']:+.4f} ({low:+.4f} to {high:+.4f})",
            "standard deviation": form["sd"],
            "decisions differ": f"{form['disagreement_rate']:.2%}",
        },
        title="Shadow in November",
    )


def _print_experiment(findings: Findings) -> None:
    form = experiment_form(findings.observed.experiment)
    if form is None:
        print_lines("", "No experiment: it runs in December (--months 3).")
        return
    print_table(
        ("metric", "champion", "challenger", "difference", "from", "to", "verdict"),
        [
            (
                *(metric, lift["champion"], lift["challenger"], lift["difference"]),
                *lift["confidence_sequence"],
                lift["verdict"],
            )
            for metric, lift in form["lift"].items()
        ],
        title=f"Experiment in December: {form['units']:,} aircraft, each in one arm",
    )
    srm = form["srm"]
    state = "alarm: don't trust the split" if srm["alarm"] else "as it should be"
    print_lines(f"Sample ratio: {state} (e-value {srm['e_value']:.3g}; over 100 alarms)")


def _print_drift(findings: Findings) -> None:
    print_table(
        ("week of", "rows", "drifted features"),
        [
            (window["start"][:10], window["rows"], _few(window["drifted"]))
            for window in findings.observed.drift
        ],
        title="Drift against the training profile",
    )


def _few(names: list[str]) -> str:
    shown = ", ".join(names[:3]) or "-"
    return f"{shown} and {len(names) - 3} more" if len(names) > 3 else shown  # noqa: PLR2004 - few


def _print_checks(findings: Findings) -> None:
    audit, parity = findings.audit, findings.trained.parity()
    print_pairs(
        {
            "served features": f"{audit['values_compared']:,} values of "
            f"{audit['rows_compared']:,} predictions recomputed from the log: "
            f"{audit['mismatches']:,} differ",
            "served scores": f"{parity['bit_equal']:,} of {parity['rows']:,} rows "
            "bit-equal to LightGBM's",
            "picture": str(Path(findings.data_dir) / PICTURE),
        },
        title="Checks",
    )
