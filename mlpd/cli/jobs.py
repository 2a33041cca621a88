"""`mlpd jobs`: training jobs, and starting one."""

from typing import Any

import click

from mlpd.cli.lazy import OrderedGroup
from mlpd.cli.output import print_lines, print_table, show_time
from mlpd.cli.runs import check_succeeded, follow_run, print_run
from mlpd.cli.session import Session, connected


@click.group(cls=OrderedGroup)
def jobs() -> None:
    """List training jobs and run them."""


@jobs.command("list")
@connected
def list_jobs(session: Session) -> None:
    """List jobs with their schedules and when they run next."""
    session.show(session.client.runs.jobs(), _print_jobs)


@jobs.command("next")
@connected
def next_runs(session: Session) -> None:
    """List when jobs run next, the earliest first, and what others wait for."""
    session.show(session.client.runs.jobs(), _print_next)


@jobs.command()
@click.argument("name")
@click.option("--follow", "-f", is_flag=True, help="Stay and show progress until it ended.")
@click.option(
    "--deploy",
    type=str,
    metavar="STEP",
    help='none, shadow, "canary 5%" or champion, instead of what the job says.',
)
@connected
def run(session: Session, name: str, *, follow: bool, deploy: str | None) -> None:
    """Start a run of a job; it is on disk when this returns.

    With --follow the exit code tells whether it succeeded; Ctrl-C leaves it running.
    """
    started = session.client.runs.start(name, deploy=deploy)
    if follow:
        ended = follow_run(session, started["run_id"])
        session.show(ended, print_run)
        check_succeeded(ended)
        return
    session.show(started, _print_started)


def _print_jobs(answer: dict[str, Any]) -> None:
    rows = [
        (
            *(job["name"], job["model"], job["service"], job["label"]),
            *(job["schedule"] or "by hand", show_time(job["next_run"]) or job["waits_for"]),
            *(job["gate"], job["deploy"]),
        )
        for job in answer["jobs"]
    ]
    headers = ["job", "model", "service", "label", "schedule", "next run", "gate", "deploy"]
    print_table(headers, rows, empty="No jobs yet.  Define one and run mlpd apply DIR.")


def _print_next(answer: dict[str, Any]) -> None:
    timed = [
        (show_time(due), job["name"], job["schedule"], job["timezone"], job["catch_up"])
        for job in answer["jobs"]
        for due in job["next_runs"]
    ]
    headers = ["next run", "job", "schedule", "time zone", "if missed"]
    print_table(headers, sorted(timed), empty="No job runs by the clock.")
    waiting = [(j["name"], j["schedule"], j["waits_for"]) for j in answer["jobs"] if j["waits_for"]]
    if waiting:
        print_table(["job", "schedule", "waits for"], waiting, title="Others")


def _print_started(run: dict[str, Any]) -> None:
    print_lines(f"queued run {run['run_id']} of {run['job']}")
    print_lines(f"mlpd runs show {run['run_id']} tells how it goes")
