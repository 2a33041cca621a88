"""`mlpd status`: the daemon at one glance."""

from typing import Any

import click

from mlpd.cli.output import (
    print_lines,
    print_pairs,
    print_table,
    show_bytes,
    show_duration,
    show_share,
    show_time,
    show_value,
)
from mlpd.cli.session import Session, connected


@click.command()
@connected
def status(session: Session) -> None:
    """Show how the daemon is doing.

    What it holds, what it serves, and how long it has been up.
    """
    session.show(session.client.status(), lambda found: _print_status(session.url, found))


def _files(found: dict[str, Any]) -> str | None:
    if not found["files"]:
        return None
    return f"{found['files']:,}, {found['rows']:,} rows, {show_bytes(found['size_bytes'])}"


def _print_status(url: str, found: dict[str, Any]) -> None:
    predictions, used = found["predictions"], found["lmdb_bytes"]
    print_pairs(
        {
            "daemon": f"mlpd {found['version']} at {url}",
            "state": "ready" if found["ready"] else "starting or stopping",
            "up for": show_duration(found["uptime_s"]),
            "data directory": found["data_directory"],
            "store": f"{show_bytes(used)}, {show_share(used / found['lmdb_map_bytes'])} of its map",
            "log": f"sequence {found['sequence']:,}, {found['log_tail_rows']:,} rows not yet in "
            "segments",
            "newest event known": show_time(found["newest_known"]),
            "events since start": found["events"] or None,
            "predictions": f"{predictions['logged']:,} logged"
            + (f", {predictions['left_out']:,} left out" if predictions["left_out"] else "")
            + (f", {predictions['dropped']:,} DROPPED" if predictions["dropped"] else ""),
            "prediction files": _files(predictions),
        }
    )
    if found["segments"]:
        segments = [
            (
                *(name, sizes["files"], sizes["rows"], show_bytes(sizes["size_bytes"])),
                *_history(found["history"].get(name, {})),
            )
            for name, sizes in found["segments"].items()
        ]
        header = ["source", "files", "rows", "size", "kept for", "begins"]
        print_table(header, segments, title="Segments")
    if found["canaries"]:
        canaries = [
            (name, trial["arm"], f"{trial['step']} of {trial['steps']}", show_share(trial["share"]))
            for name, trial in found["canaries"].items()
        ]
        print_table(["route", "arm", "step", "share"], canaries, title="Canaries")
    kinds = ("sources", "views", "services", "jobs", "models", "routes", "experiments")
    held = {kind: f"{len(found[kind])}: {show_value(found[kind])}" for kind in kinds if found[kind]}
    if held:
        print_pairs(held, title=f"Definitions version {found['definitions_version']}")
    else:
        print_lines("", "Nothing is defined yet.  Write definitions and run mlpd apply DIR.")


def _history(declared: dict[str, str | None]) -> tuple[str, str]:
    begins = declared.get("begins")
    return declared.get("retention") or "-", show_time(begins) if begins else "-"
