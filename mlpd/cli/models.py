"""`mlpd models`: versions, what they were made from, and the aliases that point to them."""

from typing import Any

import click

from mlpd.cli.lazy import OrderedGroup
from mlpd.cli.output import (
    print_lines,
    print_pairs,
    print_table,
    print_title,
    show_bytes,
    show_time,
    show_value,
)
from mlpd.cli.session import Session, confirm, connected, examples, yes_option

CHAMPION = "champion"
FEATURES_SHOWN = 15


@click.group(cls=OrderedGroup)
def models() -> None:
    """List models, move their aliases."""


@models.command("list")
@connected
def list_models(session: Session) -> None:
    """List models with their newest version and aliases."""
    session.show(session.client.models.list(), _print_models)


@models.command()
@click.argument("model")
@connected
def show(session: Session, model: str) -> None:
    """Show a model, or one of its versions.

    MODEL@3 or MODEL@champion tells what that version was made from.
    """
    name, at, selector = model.partition("@")
    if at:
        session.show(session.client.models.version(name, selector), _print_version)
    else:
        session.show(session.client.models.get(name), _print_model)


@models.command()
@click.argument("model")
@click.option("--alias", help="Only what concerns this alias.")
@connected
def history(session: Session, model: str, *, alias: str | None) -> None:
    """Show what changed, newest first, by whom and why."""
    session.show(session.client.models.history(model, alias=alias), _print_history)


@models.command(epilog=examples("mlpd models alias flight-risk champion 3"))
@click.argument("model")
@click.argument("alias")
@click.argument("version", type=int, required=False)
@click.option("--remove", is_flag=True, help="Take the alias away.")
@click.option(
    "--expected", type=int, metavar="VERSION", help="Only if it points there now; 0 for nowhere."
)
@click.option("--why", default="", help="For the history.")
@yes_option
@connected
def alias(
    session: Session,
    model: str,
    alias: str,
    version: int | None,
    *,
    remove: bool,
    expected: int | None,
    why: str,
    yes: bool,
) -> None:
    """Point an alias at a version; routes that name it follow at once."""
    if remove == (version is not None):
        raise click.UsageError("give a version, or --remove")
    if version is None:
        confirm(session, f"Take the alias {model}@{alias} away?", yes=yes)
        session.show(session.client.models.delete_alias(model, alias), _print_alias)
        return
    moved = session.client.models.move_alias(
        model, alias, version, expected="any" if expected is None else expected, why=why
    )
    session.show(moved, _print_alias)


@models.command()
@click.argument("model")
@click.argument("alias", default=CHAMPION)
@click.option("--why", default="", help="For the history.")
@connected
def rollback(session: Session, model: str, alias: str, *, why: str) -> None:
    """Point an alias (champion by default) back at the version before."""
    session.show(session.client.models.roll_back(model, alias, why=why), _print_alias)


def _print_models(answer: dict[str, Any]) -> None:
    rows = [
        (
            *(model["name"], model["version_count"]),
            *_newest(model["newest"]),
            [f"{alias} -> {version}" for alias, version in model["aliases"].items()],
        )
        for model in answer["models"]
    ]
    headers = ["model", "versions", "newest", "state", "registered", "aliases"]
    print_table(headers, rows, empty="No models yet.  Train one: mlpd jobs run JOB --follow.")


def _newest(version: dict[str, Any] | None) -> tuple[Any, ...]:
    if version is None:
        return (None, None, None)
    return version["number"], version["state"], show_time(version["created"])


def _print_model(model: dict[str, Any]) -> None:
    pointing: dict[int, list[str]] = {}
    for alias in model["aliases"]:
        pointing.setdefault(alias["version"], []).append(alias["alias"])
    rows = [
        (
            *(version["number"], version["state"], pointing.get(version["number"])),
            *(show_time(version["created"]), _short(version["digest"])),
        )
        for version in model["versions"]
    ]
    headers = ["version", "state", "aliases", "registered", "digest"]
    print_table(headers, rows)


def _print_version(found: dict[str, Any]) -> None:
    version, lineage = found["version"], found["lineage"]
    print_pairs(
        {
            "version": f"{version['name']}@{version['number']}",
            "state": version["state"],
            "registered": f"{show_time(version['created'])} by {version['created_by']}",
            "digest": version["digest"],
            "job": lineage.get("job"),
            "service": f"{lineage['service']} ({str(lineage['service_hash'])[:12]})",
            "label": lineage.get("label"),
            "rows": lineage.get("rows"),
            "as of sequence": lineage.get("as_of_sequence"),
            "trainer": lineage.get("trainer"),
            "trees": lineage.get("best_iteration"),
        }
    )
    if lineage.get("metrics"):
        print_table(["metric", "value"], sorted(lineage["metrics"].items()), title="Test metrics")
    _print_importance((found["report"] or {}).get("importance"))
    files = [
        (name, show_bytes(file["size_bytes"]), _short(file["digest"]))
        for name, file in found["files"].items()
    ]
    print_table(["file", "size", "digest"], files, title="Files")


def _print_importance(importance: dict[str, float] | None) -> None:
    if not importance:
        return
    total = sum(importance.values()) or 1.0
    ranked = sorted(importance.items(), key=lambda pair: -pair[1])
    rows = [(name, f"{gain / total:.1%}") for name, gain in ranked[:FEATURES_SHOWN]]
    more = len(ranked) - len(rows)
    title = f"Gain, first {len(rows)} of {len(ranked)} features" if more > 0 else "Gain"
    print_table(["feature", "share"], rows, title=title)


def _print_history(answer: dict[str, Any]) -> None:
    for event in answer["events"]:
        print_title(f"{show_time(event['time'])}  {_what(event)}")
        print_lines("  " + ": ".join(filter(None, [event["by"], event["why"]])))


def _what(event: dict[str, Any]) -> str:
    match event["kind"]:
        case "registered":
            return f"version {event['version']} registered"
        case "state":
            return f"version {event['version']}: {event['from']} -> {event['to']}"
        case "alias":
            return f"alias {event['alias']} {_move(event)}"
        case "protection":
            return f"alias {event['alias']} {'' if event['protected'] else 'no longer '}protected"
    return str(event["kind"])


def _move(event: dict[str, Any]) -> str:
    if event["from"] is None:
        return f"set to {event['to']}"
    if event["to"] is None:
        return f"taken from {event['from']}"
    verb = "rolled back" if event.get("rollback") else "moved"
    return f"{verb} from {event['from']} to {event['to']}"


def _short(digest: str) -> str:
    return digest.removeprefix("sha256:")[:12]


def _print_alias(alias: dict[str, Any]) -> None:
    where = (
        "points nowhere" if alias["version"] is None else f"points to version {alias['version']}"
    )
    before = f" (before: {show_value(alias['trail'])})" if alias["trail"] else ""
    print_lines(f"{alias['model']}@{alias['alias']} {where}{before}")
