"""`mlpd models reproduce`: train a version again from its lineage and compare the trees."""

from typing import Any

import click

from mlpd.cli.output import print_lines, print_pairs, print_table, progress, show_duration
from mlpd.cli.session import Session, connected, examples
from mlpd.cli.versions import version_argument

DIGEST_CHARS = 19
"""`sha256:` and the first twelve digits."""


@click.command(epilog=examples("mlpd models reproduce flight-risk@1"))
@version_argument
@connected
def reproduce(session: Session, version: tuple[str, str]) -> None:
    """Train a version again from its lineage and compare.

    The same events, definitions, split, parameters and threads, whatever has arrived since: rows,
    features, trees, test metrics and golden rows must come out to the bit.  Takes as long as the
    training took; nothing is kept.  Exit code 1 if anything differs.
    """
    with progress(f"training {'@'.join(version)} again"):
        found = session.patient_client.models.reproduce(*version)
    session.show(found, _print_found)
    if found["verdict"] != "reproduced":
        click.get_current_context().exit(1)


def _print_found(found: dict[str, Any]) -> None:
    print_pairs(
        {
            "version": found["version"],
            "verdict": found["verdict"],
            "took": show_duration(found["took_s"]),
        }
    )
    rows = [
        (check["what"], _short(check["expected"]), _short(check["found"]), _same(check))
        for check in found["checks"]
    ]
    print_table(["compared", "then", "now", ""], rows, title="Checks")
    if found["packages"]:
        changed = [(p["name"], p["from"], p["to"]) for p in found["packages"]]
        print_table(["package", "then", "now"], changed, title="Packages with another version now")
    if found["cpu_flags"]:
        print_lines("", f"The processors differ in: {', '.join(found['cpu_flags'])}")
    _print_reason(found)


def _print_reason(found: dict[str, Any]) -> None:
    """Say what the first difference means, since what comes after it follows from it."""
    first = next((c["what"] for c in found["checks"] if not c["same"]), None)
    reason = {
        "feature service": "These definitions mean other features to this version of mlpd.",
        "rows": "Events are gone: mlpd features erase removes them from the log.",
        "events and labels": "The log holds other events; mlpd fsck --online checks it.",
        "features": "The same events give other features: a defect, or another package.",
        "rounds": "The same vectors give other trees.",
        "trees": "The same vectors give other trees.",
    }.get(first or "")
    if reason:
        print_lines("", reason)


def _same(check: dict[str, Any]) -> str:
    return "same" if check["same"] else "DIFFERENT"


def _short(value: Any) -> Any:
    return value[:DIGEST_CHARS] if isinstance(value, str) else value
