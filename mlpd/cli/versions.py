"""`mlpd models register, export, import, state, delete, pin, gc`: versions and their files."""

import json
from pathlib import Path
from typing import Any

import click

from mlpd.cli.output import (
    print_lines,
    print_pairs,
    print_table,
    progress,
    show_bytes,
    show_time,
)
from mlpd.cli.session import Session, confirm, connected, examples, yes_option

STATES = ("ready", "archived", "quarantined")


def _split(_: click.Context, __: click.Parameter, text: str) -> tuple[str, str]:
    """Return model and version of MODEL@3 or MODEL@alias."""
    model, at, version = text.partition("@")
    if not (model and at and version):
        raise click.BadParameter(f"{text!r} names no version: write model@3 or model@alias")
    return model, version


version_argument = click.argument("version", metavar="MODEL@VERSION", callback=_split)
why_option = click.option("--why", default="", help="For the history.")


@click.command(
    epilog=examples(
        "mlpd models register fraud model.onnx --golden rows.json --why 'from research'"
    )
)
@click.argument("model")
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False, exists=True))
@click.option(
    "--golden",
    type=click.Path(path_type=Path, dir_okay=False, exists=True),
    help="JSON with inputs, outputs and rtol that every load must reproduce.",
)
@why_option
@connected
def register(session: Session, model: str, file: Path, *, golden: Path | None, why: str) -> None:
    """Register an ONNX file as a model's next version.

    The daemon looks at it in a child process under limits; external data, operators of somebody's
    own and loops without an end are refused.  It is then served under /v2, like any model.
    """
    with progress("the daemon looks at the file"):
        done = session.patient_client.models.register(
            model, file.read_bytes(), golden=None if golden is None else _read(golden), why=why
        )
    session.show(done, _print_registered)


@click.command(epilog=examples("mlpd models export flight-risk@champion flight-risk.tar"))
@version_argument
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
@connected
def export(session: Session, version: tuple[str, str], file: Path) -> None:
    """Write a version to FILE, an OCI archive.

    skopeo and other tools for OCI images read it (oci-archive:FILE), and mlpd models import.
    """
    data = session.patient_client.models.archive(*version)
    file.write_bytes(data)
    done = {"version": "@".join(version), "file": str(file), "size_bytes": len(data)}
    session.show(
        done, lambda _: print_lines(f"{done['version']} is in {file} ({show_bytes(len(data))})")
    )


@click.command("import", epilog=examples("mlpd models import flight-risk.tar"))
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False, exists=True))
@why_option
@connected
def import_version(session: Session, file: Path, *, why: str) -> None:
    """Register the version in an OCI archive.

    It keeps its model's name and its digest, and gets the next number here.
    """
    with progress("the daemon looks at the archive"):
        done = session.patient_client.models.adopt(file.read_bytes(), why=why)
    session.show(done, _print_registered)


@click.command(epilog=examples("mlpd models state flight-risk@2 archived --why 'superseded'"))
@version_argument
@click.argument("new", type=click.Choice(STATES), metavar=f"[{'|'.join(STATES)}]")
@why_option
@connected
def state(session: Session, version: tuple[str, str], new: str, *, why: str) -> None:
    """Archive a version, quarantine it, or make it ready again.

    Only ready versions carry aliases.  Out of quarantine all files are verified first.
    """
    session.show(session.client.models.set_state(*version, new, why=why), _print_version)


@click.command()
@version_argument
@why_option
@yes_option
@connected
def delete(session: Session, version: tuple[str, str], *, why: str, yes: bool) -> None:
    """Delete a version for good.

    Its number isn't used again; its files stay until mlpd models gc removes them.
    """
    confirm(session, f"Delete {'@'.join(version)} for good?", yes=yes)
    deleted = session.client.models.set_state(*version, "deleted", why=why)
    session.show(deleted, _print_version)


@click.command()
@version_argument
@why_option
@connected
def pin(session: Session, version: tuple[str, str], *, why: str) -> None:
    """Keep a version: nothing deletes it until it is unpinned."""
    session.show(session.client.models.pin(*version, why=why), _print_version)


@click.command()
@version_argument
@why_option
@connected
def unpin(session: Session, version: tuple[str, str], *, why: str) -> None:
    """Let a version be deleted again."""
    session.show(session.client.models.pin(*version, pinned=False, why=why), _print_version)


@click.command(epilog=examples("mlpd models gc", "mlpd models gc --keep 20 --grace 30d --delete"))
@click.option("--grace", help="Leave what was needed within this time (7d by default).")
@click.option(
    "--keep",
    type=click.IntRange(min=1),
    metavar="N",
    help="Delete versions, too, but for the newest N of each model.",
)
@click.option("--delete", is_flag=True, help="Do it; otherwise only tell what would go.")
@connected
def gc(session: Session, *, grace: str | None, keep: int | None, delete: bool) -> None:
    """Remove the files of deleted versions.

    With --keep surplus versions are deleted first: none that is pinned, served, under an alias, or
    among the last ten that an alias left.
    """
    done = session.patient_client.models.collect(grace=grace, keep=keep, delete=delete)
    session.show(done, _print_collection)


def _read(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_bytes())
    except ValueError as error:
        raise click.BadParameter(f"{path} is not JSON: {error}", param_hint="--golden") from None
    if not isinstance(document, dict):
        raise click.BadParameter(f"{path} holds no object", param_hint="--golden")
    return document


def _print_registered(answer: dict[str, Any]) -> None:
    version = answer["version"]
    reference = f"{version['name']}@{version['number']}"
    print_pairs(
        {
            "version": reference,
            "state": version["state"],
            "registered": show_time(version["created"]),
            "digest": version["digest"],
        }
    )


def _print_version(answer: dict[str, Any]) -> None:
    version = answer["version"]
    pinned = ", pinned" if answer["pinned"] else ""
    print_lines(f"{version['name']}@{version['number']} is {version['state']}{pinned}")


def _print_collection(done: dict[str, Any]) -> None:
    gone = "removed" if done["deleted"] else "would go"
    if done["versions"]:
        rows = [
            (f"{v['name']}@{v['number']}", v["state"], show_time(v["created"]))
            for v in done["versions"]
        ]
        title = "Deleted" if done["deleted"] else "Would be deleted"
        print_table(
            ["version", "state" if not done["deleted"] else "was", "registered"], rows, title=title
        )
    print_pairs(
        {
            "files": f"{done['blobs']:,} ({show_bytes(done['size_bytes'])}) {gone}",
            "in their grace": f"{done['waiting_blobs']:,} ({show_bytes(done['waiting_bytes'])})",
        }
    )
    if not done["deleted"] and (done["blobs"] or done["versions"]):
        print_lines("", "Nothing was changed; --delete does it.")
