"""`mlpd runs`: training runs, their progress, log and end."""

import time
from collections.abc import Mapping
from typing import Any

import click

from mlpd.cli.diff import print_diff
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
from mlpd.cli.pictures import run_pictures
from mlpd.cli.session import Session, connected, examples
from mlpd.core.errors import MlpdError, NotFoundError
from mlpd.core.time import parse_time

FOLLOW_TIMEOUT_S = 7 * 86_400.0
FINISHED = ("succeeded", "failed", "cancelled")
LOG_POLL_S = 1.0
LOG_OVERLAP_CHARS = 4096


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
@click.option("--follow", "-f", is_flag=True, help="Go on as the run writes, until it ended.")
@connected
def log(session: Session, run: str, *, follow: bool) -> None:
    """Print the end of a run's log, at most 1 MiB."""
    if follow:
        _follow_log(session, run)
        return
    text = session.client.runs.log(run)
    lines = text.splitlines() or ["Nothing was written to the log."]
    session.show({"run_id": run, "log": text}, lambda _: print_lines(*lines))


def _follow_log(session: Session, run_id: str) -> None:
    """Write the log as it grows, as it is, also with --json."""
    seen, state = "", ""
    while state not in FINISHED:
        if state:
            time.sleep(LOG_POLL_S)
        state = session.client.runs.get(run_id)["state"]  # first: what it wrote at last is read
        text = session.client.runs.log(run_id)
        click.echo(_grown(seen, text), nl=False)
        seen = text


def _grown(seen: str, text: str) -> str:
    """Return what came after `seen`; `text` may have lost its beginning meanwhile."""
    if text.startswith(seen):
        return text[len(seen) :]
    end = seen[-LOG_OVERLAP_CHARS:]
    at = text.rfind(end)
    return text if at < 0 else text[at + len(end) :]


@runs.command(epilog=examples("mlpd runs diff 20261201-050655-b610a5 20261201-051013-e1ff50"))
@click.argument("run")
@click.argument("other")
@connected
def diff(session: Session, run: str, other: str) -> None:
    """Show what changes from what a run made to what another did.

    As mlpd models diff does: what both were made from, parameters, features, metrics, trees.
    """
    (model, version), (to_model, to_version) = (_version_of(session, r) for r in (run, other))
    found = session.client.models.diff(model, version, f"{to_model}@{to_version}")
    session.show(found, print_diff)


def _version_of(session: Session, run_id: str) -> tuple[str, int]:
    found = session.client.runs.get(run_id)
    if found["result"] is None:
        raise NotFoundError(
            f"run {run_id} is {found['state']} and has made no version",
            code="unknown_version",
            hint="mlpd runs list shows which runs have.",
        )
    return found["result"]["model"], found["result"]["version"]


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


runs.add_command(run_pictures)


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
            "parity": _parity(parity),
            "gate": _verdict(gate["passed"], waiting=gate.get("waiting", False)),
            "deployed": result["deployed"],
            "on routes": ", ".join(result.get("routes") or []) or None,
        },
        title="Result",
    )
    print_table(["metric", "value"], sorted(result["metrics"].items()), title="Metrics")
    checks = [
        (
            *(check["metric"], check["bound"], check["value"]),
            *(_verdict(check["passed"], waiting=check["passed"] is None), _reason(check)),
        )
        for check in gate["checks"]
    ]
    if checks:
        print_table(["metric", "bound", "value", "verdict", "why"], checks, title="Gate")


def _verdict(passed: bool | None, *, waiting: bool) -> str:
    return "waits" if waiting else "passed" if passed else "failed"


def _reason(check: Mapping[str, Any]) -> str | None:
    """Return why a check has no value, or which features its value counts."""
    drifted = check.get("drifted")
    return ", ".join(drifted) if drifted else check.get("why")


def _parity(parity: Mapping[str, Any]) -> str:
    """Return what the certificate says, in the trainer's name."""
    trainer = parity["trainer"].partition(" ")[0].replace("lightgbm", "LightGBM")
    if parity["verdict"] == "bit_equal":
        return f"{parity['bit_equal']:,} of {parity['rows']:,} rows bit-equal to {trainer}"
    bound = parity["bound"]
    return (
        f"{parity['rows']:,} rows within {bound['absolute']:g} + {bound['relative']:g} x score "
        f"of {trainer}'s, {parity['bit_equal']:,} bit-equal"
    )


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
