"""`mlpd models diff`: what changes from one version to another."""

from typing import Any

import click

from mlpd.cli.output import print_lines, print_table, print_title, show_share, show_value
from mlpd.cli.session import Session, connected, examples
from mlpd.cli.versions import version_argument

GAINS_SHOWN = 10
TEXT_CHARS_MAX = 60


@click.command(
    epilog=examples("mlpd models diff risk@1 risk@2", "mlpd models diff risk@challenger")
)
@version_argument
@click.argument("to", required=False, metavar="[MODEL@VERSION]")
@connected
def diff(session: Session, version: tuple[str, str], to: str | None) -> None:
    """Show what changes from a version to another.

    The other is the model's champion by default.  What both were made from, parameters, features
    and their share of the gain, metrics, trees.
    """
    session.show(session.client.models.diff(*version, to), print_diff)


def print_diff(found: dict[str, Any]) -> None:
    """Write what changes from a version to another."""
    print_lines(f"{found['from']} -> {found['to']}")
    if found["same"]:
        print_lines("", "They are the same.")
        return
    _print_metrics(found["metrics"])
    _print_trees(found["trees"])
    _print_features(found["features"])
    for title, name in (
        ("Parameters", "parameters"),
        ("Made from", "lineage"),
        ("Packages", "packages"),
    ):
        _print_changes(title, found[name])
    names = [file["name"] for file in found["files"]]
    print_lines("", f"Files that differ: {', '.join(names) or 'none'}")


def _print_changes(title: str, changes: list[dict[str, Any]]) -> None:
    if changes:
        rows = [
            (change["name"], *map(_short, (change["from"], change["to"]))) for change in changes
        ]
        print_table(["name", "from", "to"], rows, title=title)


def _print_metrics(metrics: list[dict[str, Any]]) -> None:
    if metrics:
        rows = [(m["name"], m["from"], m["to"], _signed(m["difference"])) for m in metrics]
        print_table(["metric", "from", "to", "difference"], rows, title="Metrics")


def _print_trees(trees: dict[str, Any] | None) -> None:
    if trees is None:
        return
    print_title("Trees")
    if trees["same"]:
        print_lines(f"All {trees['from']:,} are equal.")
        return
    sides = (f"{trees[s]:,} with {trees[f'leaves_{s}']:,} leaves" for s in ("from", "to"))
    print_lines(f"{' -> '.join(sides)}; the first {trees['equal']:,} are equal")


def _print_features(features: dict[str, Any]) -> None:
    rows: list[tuple[str, str, str | None]] = [("+", name, None) for name in features["added"]]
    rows += [("-", name, None) for name in features["removed"]]
    rows += [("~", c["name"], f"{c['from']} -> {c['to']}") for c in features["retyped"]]
    if rows:
        print_table(["", "feature", "type"], rows, title="Features")
    if features["reordered"]:
        print_lines("", "The features stand in another order.")
    moved = [gain for gain in features["gain"] if gain["from"] != gain["to"]]
    shown = [
        (g["name"], show_share(g["from"]), show_share(g["to"]), f"{g['to'] - g['from']:+.1%}")
        for g in moved[:GAINS_SHOWN]
    ]
    if shown:
        title = f"Gain, the {len(shown)} largest changes of {len(moved)}"
        print_table(["feature", "from", "to", "difference"], shown, title=title)


def _signed(difference: float | None) -> str:
    return "-" if difference is None else f"{difference:+.4g}"


def _short(value: Any) -> str:
    text = show_value(value)
    return text if len(text) <= TEXT_CHARS_MAX else f"{text[:TEXT_CHARS_MAX]}..."
