"""`mlpd runs`: training runs, their progress, log and end."""

import time
from collections.abc import Mapping
from typing import Any

import click

from mlpd.cli.lazy import OrderedGroup
from mlpd.cli.output import (
    note,
    print_lines,
    print_pairs,
    print_table,
    progress,
    show_duration,
    show_time,
    show_value,
)
from mlpd.cli.session import Session, connected
from mlpd.core.errors import MlpdError
from mlpd.core.time import parse_time

FOLLOW_TIMEOUT_S = 7 * 86_400.0
FINISHED = ("succeeded", "failed", "cancelled")


@click.group(cls=OrderedGroup)
def runs() -> None:
    """Follow, read, cancel and retry training runs."""


@runs.command("list")
@click.option("--limit", type=click.IntRange(1, 1000), default=20, show_default=True)
@connected
def list_runs(session: Session, *, limit: int) -> None:
    """List the newest runs."""
    session.show(session.client.runs.list(limit=limit), _print_runs)


@runs.command()
@click.argument("run")
@click.option("--follow", "-f", is_flag=True, help="Stay until it ended.")
@connected
def show(session: Session, run: str, *, follow: bool) -> None:
    """Show a run: state, progress, metrics, gate.  With --follow the exit code tells the end."""
    found = follow_run(session, run) if follow else session.client.runs.get(run)
    session.show(found, print_run)
    if follow:
        check_succeeded(found)


@runs.command()
@click.argument("run")
@connected
def log(session: Session, run: str) -> None:
    """Print the end of a run's log, at most 1 MiB."""
    text = session.client.runs.log(run)
    lines = text.splitlines() or ["Nothing was written to the log."]
    session.show({"run_id": run, "log": text}, lambda _: print_lines(*lines))


@runs.command()
@click.argument("run")
@connected
def cancel(session: Session, run: str) -> None:
    """Stop a queued or running run.

    Its processes are gone when this returns.
    """
    session.show(session.client.runs.cancel(run), print_run)


@runs.command()
@click.argument("run")
@connected
def retry(session: Session, run: str) -> None:
    """Queue a new run like one that failed or was cancelled."""
    session.show(session.client.runs.retry(run), print_run)


def follow_run(session: Session, run_id: str) -> dict[str, Any]:
    """Return a run once it ended, with a progress bar on the way; Ctrl-C leaves it running."""
    with progress(f"run {run_id}") as bar:

        def tell(run: Mapping[str, Any]) -> None:
            what = _progress(run["progress"]) if run["state"] == "running" else run["state"]
            bar.describe(f"{run['job']}: {what}")

        try:
            return session.client.runs.wait(run_id, on_progress=tell, timeout_s=FOLLOW_TIMEOUT_S)
        except KeyboardInterrupt:
            note(f"run {run_id} goes on: mlpd runs show {run_id}, or mlpd runs cancel {run_id}")
            raise


def check_succeeded(run: dict[str, Any]) -> None:
    """Raise the run's own error if it failed, and one if it was cancelled: the exit code is 1."""
    if run["state"] == "failed":
        error = run["error"] or {}
        raise MlpdError(
            f"run {run['run_id']} failed: {error.get('message', 'no reason was given')}",
            code=error.get("code", "run_failed"),
            hint=error.get("hint") or f"mlpd runs log {run['run_id']} tells more.",
        )
    if run["state"] == "cancelled":
        raise MlpdError(f"run {run['run_id']} was cancelled", code="run_cancelled")


def print_run(run: dict[str, Any]) -> None:
    """Write all about a run."""
    print_pairs(
        {
            "run": run["run_id"],
            "job": run["job"],
            "state": run["state"],
            "asked by": run["trigger"],
            "attempt": run["attempt"] if run["attempt"] > 1 else None,
            "queued": show_time(run["created"]),
            "took": _took(run),
            "progress": None if run["state"] in FINISHED else _progress(run["progress"]),
        }
    )
    if run["error"]:
        print_pairs({"error": run["error"].get("message"), "code": run["error"].get("code")})
    if run["result"]:
        _print_result(run["result"])


def _print_result(result: dict[str, Any]) -> None:
    parity, gate = result["parity"], result["gate"]
    print_pairs(
        {
            "model": f"{result['model']}@{result['version']}",
            "parity": f"{parity['bit_equal']:,} of {parity['rows']:,} rows bit-equal to LightGBM",
            "gate": "passed" if gate["passed"] else "failed",
            "deployed": result["deployed"],
        },
        title="Result",
    )
    print_table(["metric", "value"], sorted(result["metrics"].items()), title="Metrics")
    checks = [(c["metric"], c["bound"], c["value"], c["passed"]) for c in gate["checks"]]
    if checks:
        print_table(["metric", "bound", "value", "passed"], checks, title="Gate")


def _print_runs(answer: dict[str, Any]) -> None:
    rows = [
        (run["run_id"], run["job"], run["state"], _took(run), *_outcome(run))
        for run in answer["runs"]
    ]
    headers = ["run", "job", "state", "took", "outcome", "auc"]
    print_table(headers, rows, empty="No runs yet.  Start one: mlpd jobs run JOB --follow.")


def _outcome(run: dict[str, Any]) -> tuple[str | None, float | None]:
    """Return what became of a run, and its AUC if it has one."""
    if run["result"]:
        result = run["result"]
        return f"{result['model']}@{result['version']}", result["metrics"].get("auc")
    if run["error"]:
        return run["error"].get("code", "failed"), None
    return _progress(run["progress"]) if run["state"] == "running" else None, None


def _took(run: dict[str, Any]) -> str | None:
    if run["started"] is None:
        return None
    end_us = int(time.time() * 1e6) if run["finished"] is None else parse_time(run["finished"])
    return show_duration((end_us - parse_time(run["started"])) / 1e6)


def _progress(told: dict[str, Any]) -> str:
    """Return the last step told: `training round 40 of 200, auc 0.7412`."""
    if not told:
        return "waiting"
    known = dict(told)
    step = str(known.pop("step", known.pop("stage", "working")))
    done, total = known.pop("round", None), known.pop("rounds", None)
    if done is not None:
        step += f" round {done}" + (f" of {total}" if total else "")
    return ", ".join([step, *(f"{name} {show_value(value)}" for name, value in known.items())])
