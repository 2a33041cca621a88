"""`mlpd models pictures` and `mlpd runs pictures`: what a training looks like, as SVG files."""

from pathlib import Path
from typing import Any

import click

from mlpd.cli.output import print_lines, print_table, show_bytes
from mlpd.cli.session import Session, connected, examples
from mlpd.cli.versions import version_argument
from mlpd.core.errors import NotFoundError

SUFFIX = ".svg"

folder_option = click.option(
    "--to",
    "folder",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path(),
    show_default="here",
    help="Folder to write them to; it is made if it isn't there.",
)


@click.command("pictures", epilog=examples("mlpd models pictures flight-risk@1 --to pictures"))
@version_argument
@folder_option
@connected
def model_pictures(session: Session, version: tuple[str, str], *, folder: Path) -> None:
    """Write a version's pictures as SVG files.

    Importance and contributions of the features, validation metrics by round, calibration, ROC.
    """
    _write(session, *version, folder)


@click.command("pictures", epilog=examples("mlpd runs pictures RUN --to pictures"))
@click.argument("run")
@folder_option
@connected
def run_pictures(session: Session, run: str, *, folder: Path) -> None:
    """Write the pictures of the version that a run made as SVG files."""
    result = session.client.runs.get(run)["result"]
    if result is None:
        raise NotFoundError(
            f"run {run} has made no version to look at",
            code="unknown_picture",
            hint="Its pictures come with its version.",
        )
    _write(session, result["model"], str(result["version"]), folder)


def _write(session: Session, model: str, version: str, folder: Path) -> None:
    found = session.client.models.version(model, version)
    names = [name.removesuffix(SUFFIX) for name in found["files"] if name.endswith(SUFFIX)]
    number = found["version"]["number"]
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name in names:
        path = folder / f"{model}-{number}-{name}{SUFFIX}"
        path.write_text(session.client.models.picture(model, number, name), encoding="utf-8")
        written.append({"picture": name, "path": str(path), "size_bytes": path.stat().st_size})
    answer = {"version": f"{model}@{number}", "pictures": written}
    session.show(answer, _print_written)


def _print_written(answer: dict[str, Any]) -> None:
    rows = [(p["picture"], p["path"], show_bytes(p["size_bytes"])) for p in answer["pictures"]]
    if rows:
        print_table(["picture", "file", "size"], rows)
    else:
        print_lines(f"{answer['version']} came without pictures.")
