"""`mlpd plan` and `mlpd apply`: a definitions folder against what the daemon runs."""

from pathlib import Path
from typing import Any

import click

from mlpd.cli.output import print_lines, print_table, progress, show_bytes, show_duration
from mlpd.cli.session import Session, confirm, connected, yes_option

FOLDER = click.Path(exists=True, path_type=Path)

_SIGNS = (("added", "+", "green"), ("changed", "~", "yellow"), ("removed", "-", "red"))
_SINGULAR = {
    "entities": "entity",
    "sources": "source",
    "views": "view",
    "transforms": "transform",
    "services": "feature service",
    "jobs": "job",
}


@click.command()
@click.argument("folder", type=FOLDER)
@connected
def plan(session: Session, folder: Path) -> None:
    """Show what a definitions folder would change.

    It changes nothing.  With --json the answer also holds the document that describes the folder.
    """
    document = _load(folder)
    session.show({**session.client.plan(document), "document": document}, print_plan)


@click.command()
@click.argument("folder", type=FOLDER)
@yes_option
@connected
def apply(session: Session, folder: Path, *, yes: bool) -> None:
    """Make a definitions folder what runs.

    All of it or nothing.  Shows the plan first and asks; if somebody else applies meanwhile,
    nothing happens.
    """
    document = _load(folder)
    planned = session.client.plan(document)
    if not planned["changes"]:
        session.show(planned, print_plan)
        return
    if not session.as_json:
        print_plan(planned)
    confirm(session, "Apply this?", yes=yes)
    with progress(_work(planned)):
        done = session.patient_client.apply(document, expected_version=planned["version"])
    session.show(done, _print_applied)


def print_plan(planned: dict[str, Any]) -> None:
    """Write a plan: one line per definition, then the views to be built from the log."""
    if not planned["changes"]:
        print_lines(f"Nothing to change: version {planned['version']} is what the folder says.")
        return
    for kind, changes in planned["changes"].items():
        for change, sign, colour in _SIGNS:
            for name in changes[change]:
                click.secho(f"{sign} {_SINGULAR.get(kind, kind)} {name}", fg=colour)
    if planned["cost"]:
        print_cost(planned["cost"])
    if planned["pinned"]:
        print_pinned(planned["pinned"])


def print_cost(cost: dict[str, dict[str, Any]]) -> None:
    """Write what building views from the log takes; time and disk are estimates."""
    rows = [
        (name, c["events"], c["entities"], show_duration(c["seconds"]), show_bytes(c["bytes"]))
        for name, c in cost.items()
    ]
    if len(cost) > 1:
        seconds, size = (sum(c[unit] for c in cost.values()) for unit in ("seconds", "bytes"))
        rows.append(("all", "", "", show_duration(seconds), show_bytes(size)))
    headers = ["view", "events", "entities", "about", "on disk"]
    print_table(headers, rows, title="Built from the log, while serving goes on")


def print_pinned(pinned: list[dict[str, Any]]) -> None:
    """Write the former versions of services that go on running, and for whom."""
    rows = [(p["service"], p["hash"][:8], p["views"] or "none of its own", p["by"]) for p in pinned]
    headers = ["service", "version", "views", "pinned by"]
    print_table(headers, rows, title="Go on running, until nothing pins them")


def _print_applied(done: dict[str, Any]) -> None:
    counts = {"added": 0, "changed": 0, "removed": 0}
    for changes in done["changes"].values():
        for change in counts:
            counts[change] += len(changes[change])
    told = ", ".join(f"{count} {change}" for change, count in counts.items() if count)
    print_lines(f"Version {done['version']} runs: {told or 'nothing changed'}.")


def _work(planned: dict[str, Any]) -> str:
    events = sum(planned["backfill"].values())
    return f"building views from {events:,} events" if events else "compiling"


def _load(folder: Path) -> dict[str, Any]:
    from mlpd.cli.definitions import load_folder

    return load_folder(folder)
