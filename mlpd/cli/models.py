"""`mlpd models`: versions, what they were made from, and the aliases that point to them."""

from typing import Any

import click

from mlpd.cli.diff import diff
from mlpd.cli.lazy import OrderedGroup
from mlpd.cli.metrics import print_metrics
from mlpd.cli.output import (
    print_lines,
    print_pairs,
    print_table,
    print_title,
    show_bytes,
    show_time,
    show_value,
)
from mlpd.cli.pictures import model_pictures
from mlpd.cli.reproduce import reproduce
from mlpd.cli.session import Session, confirm, connected, examples, yes_option
from mlpd.cli.signing import keygen, sign
from mlpd.cli.versions import (
    delete,
    export,
    gc,
    import_version,
    pin,
    register,
    state,
    unpin,
    why_option,
)

CHAMPION = "champion"
FEATURES_SHOWN = 15


@click.group(cls=OrderedGroup)
def models() -> None:
    """List and keep models, move aliases."""


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
@click.option("--force", is_flag=True, help="Move it although it is protected.")
@why_option
@yes_option
@connected
def alias(
    session: Session,
    /,
    model: str,
    alias: str,
    version: int | None,
    *,
    remove: bool,
    yes: bool,
    **options: Any,
) -> None:
    """Point an alias at a version; routes that name it follow at once."""
    if remove == (version is not None):
        raise click.UsageError("give a version, or --remove")
    if version is None:
        confirm(session, f"Take the alias {model}@{alias} away?", yes=yes)
        session.show(session.client.models.delete_alias(model, alias), _print_alias)
        return
    expected = "any" if options["expected"] is None else options["expected"]
    moved = session.client.models.move_alias(
        *(model, alias, version), expected=expected, why=options["why"], force=options["force"]
    )
    session.show(moved, _print_alias)


@models.command()
@click.argument("model")
@click.argument("alias", default=CHAMPION)
@why_option
@connected
def rollback(session: Session, model: str, alias: str, *, why: str) -> None:
    """Point an alias (champion by default) back at the version before."""
    session.show(session.client.models.roll_back(model, alias, why=why), _print_alias)


@models.command()
@click.argument("model")
@click.argument("alias", default=CHAMPION)
@click.option("--off", is_flag=True, help="Take the protection off.")
@why_option
@connected
def protect(session: Session, model: str, alias: str, *, off: bool, why: str) -> None:
    """Let an alias (champion by default) move only with --force.

    Rollback needs none.
    """
    done = session.client.models.protect(model, alias, not off, why=why)
    session.show(done, _print_protection)


@models.command()
@click.argument("model")
@connected
def load(session: Session, model: str) -> None:
    """Keep a model's champion loaded, so that it answers under /v2.

    A route does that by itself; an uploaded model has none.
    """
    session.show(session.client.models.load(model), _print_loaded)


@models.command()
@click.argument("model")
@connected
def unload(session: Session, model: str) -> None:
    """Let go of a loaded model."""
    session.show(session.client.models.load(model, loaded=False), _print_loaded)


for command in (
    *(
        diff,
        reproduce,
        model_pictures,
        register,
        export,
        import_version,
        state,
        delete,
        pin,
        unpin,
        gc,
    ),
    *(keygen, sign),
):
    models.add_command(command)


def _print_loaded(answer: dict[str, Any]) -> None:
    name = answer["model"]
    where = f"answers at /v2/models/{name}/infer" if answer["loaded"] else "isn't kept loaded"
    print_lines(f"{name} {where}")


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
    pinned = set(model["pinned"])
    rows = [
        (
            *(version["number"], version["state"], pointing.get(version["number"])),
            "pinned" if version["number"] in pinned else None,
            *(show_time(version["created"]), _short(version["digest"])),
        )
        for version in model["versions"]
    ]
    headers = ["version", "state", "aliases", "kept", "registered", "digest"]
    print_table(headers, rows)
    protected = [alias["alias"] for alias in model["aliases"] if alias["protected"]]
    if protected:
        print_lines("", f"Protected: {', '.join(protected)}")


def _print_version(found: dict[str, Any]) -> None:
    version, lineage = found["version"], found["lineage"]
    print_pairs(
        {
            "version": f"{version['name']}@{version['number']}",
            "state": version["state"],
            "registered": f"{show_time(version['created'])} by {version['created_by']}",
            "digest": version["digest"],
            "signed by": [key[:12] for key in found["signatures"]] or None,
            **(_describe_upload(lineage) if "source" in lineage else _describe_training(lineage)),
        }
    )
    report = found["report"] or {}
    print_metrics(lineage.get("metrics") or {}, report)
    _print_importance(report.get("importance"))
    files = [
        (name, show_bytes(file["size_bytes"]), _short(file["digest"]))
        for name, file in found["files"].items()
    ]
    print_table(["file", "size", "digest"], files, title="Files")


def _describe_training(lineage: dict[str, Any]) -> dict[str, Any]:
    return {
        "job": lineage["job"],
        "service": f"{lineage['service']} ({str(lineage['service_hash'])[:12]})",
        "label": lineage["label"],
        "rows": lineage["rows"],
        "as of sequence": lineage["as_of_sequence"],
        "trainer": lineage["trainer"],
        "trees": lineage["best_iteration"],
        "calibration": (lineage["calibration"] or {}).get("method"),
    }


def _describe_upload(lineage: dict[str, Any]) -> dict[str, Any]:
    return {
        "made by": " ".join(filter(None, [lineage["producer"], lineage["producer_version"]])),
        "operators": lineage["nodes"],
        "parameters": lineage["parameters"],
        "opsets": lineage["opsets"],
    }


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
    version, alias = event.get("version"), event.get("alias")
    match event["kind"]:
        case "registered":
            what = f"version {version} registered"
        case "state":
            what = f"version {version}: {event['from']} -> {event['to']}"
        case "signed":
            what = f"version {version} signed by {event['key'][:12]}"
        case "pin":
            what = f"version {version} {_now(event['pinned'])}pinned"
        case "alias":
            what = f"alias {alias} {_move(event)}"
        case "protection":
            what = f"alias {alias} {_now(event['protected'])}protected"
        case kind:
            what = str(kind)
    return what


def _now(holds: bool) -> str:
    return "" if holds else "no longer "


def _move(event: dict[str, Any]) -> str:
    if event["from"] is None:
        return f"set to {event['to']}"
    if event["to"] is None:
        return f"taken from {event['from']}"
    verb = "rolled back" if event.get("rollback") else "moved"
    verb = f"{verb} by force" if event["force"] else verb
    return f"{verb} from {event['from']} to {event['to']}"


def _short(digest: str) -> str:
    return digest.removeprefix("sha256:")[:12]


def _print_alias(alias: dict[str, Any]) -> None:
    where = (
        "points nowhere" if alias["version"] is None else f"points to version {alias['version']}"
    )
    before = f" (before: {show_value(alias['trail'])})" if alias["trail"] else ""
    print_lines(f"{alias['model']}@{alias['alias']} {where}{before}")


def _print_protection(alias: dict[str, Any]) -> None:
    how = "is protected" if alias["protected"] else "moves freely"
    print_lines(f"{alias['model']}@{alias['alias']} {how}")
