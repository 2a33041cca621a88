"""`mlpd predictions`: what was served, out of the prediction log."""

from pathlib import Path

import click

from mlpd.cli.lazy import OrderedGroup
from mlpd.cli.output import print_pairs
from mlpd.cli.session import Session, connected, examples


@click.group(cls=OrderedGroup)
def predictions() -> None:
    """Export the prediction log."""


@predictions.command(
    epilog=examples(
        "mlpd predictions export served.parquet --route flight-risk",
        "mlpd predictions export - --format ndjson --start 2026-11-01T00:00:00Z | head",
    )
)
@click.argument("file", type=click.Path(dir_okay=False, allow_dash=True))
@click.option("--format", "form", type=click.Choice(["parquet", "csv", "ndjson"]))
@click.option("--route", help="Only what this route served.")
@click.option("--start", metavar="TIME", help="Only what was served from this time on.")
@click.option("--end", metavar="TIME", help="Only what was served before this time.")
@connected
def export(
    session: Session,
    file: str,
    *,
    form: str | None,
    route: str | None,
    start: str | None,
    end: str | None,
) -> None:
    """Write served rows to a file.

    With the vectors served and the labels so far, in the order in which they were logged.  Parquet,
    CSV or NDJSON, by the file's name or --format; - is stdout.  It is written page by page and gets
    its name when it is whole.
    """
    from mlpd.cli.exporting import FileExport, ServedPages

    path = None if file == "-" else Path(file)
    if path is None and session.as_json:
        raise click.UsageError("--json and the rows would both go to stdout")
    pages = ServedPages(session.patient_client, route=route, start=start, end=end)
    done = FileExport(pages, path, form).run()
    if path is not None:
        session.show(done, print_pairs)
