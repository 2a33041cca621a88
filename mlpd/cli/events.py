"""`mlpd events`: send single events, import and export files, follow what comes."""

import json
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import click

from mlpd.cli.lazy import OrderedGroup
from mlpd.cli.output import note, print_json, print_lines, print_pairs, print_table
from mlpd.cli.session import Session, connected, examples
from mlpd.core.errors import ValidationError

REASONS_SHOWN = 5
SEND_ROWS = 5_000
"""Rows of stdin sent in one request: well below the daemon's body limit."""


TAIL_ROWS = 1_000
TAIL_PAUSE_S = 0.3
"""Between two looks at what is new."""


@click.group(cls=OrderedGroup)
def events() -> None:
    """Send events, import and export files, follow what comes."""


@events.command(
    epilog=examples(
        """mlpd events send departures '{"event_time": "2013-10-01T10:00:00Z", "carrier": "UA"}'""",
        "mlpd events send departures < events.ndjson",
    )
)
@click.argument("source")
@click.argument("event", nargs=-1)
@click.option("--key", metavar="KEY", help="Idempotency key: the same one again stores nothing.")
@connected
def send(session: Session, source: str, event: tuple[str, ...], *, key: str | None) -> None:
    """Send events as JSON objects, or one per line on stdin."""
    texts: Iterable[str] = event or (() if sys.stdin.isatty() else sys.stdin)
    rows = [_parse(text, number) for number, text in enumerate(texts, 1) if text.strip()]
    if not rows:
        raise click.UsageError("there is no event to send; see mlpd events send --help")
    total: dict[str, Any] = {}
    for start in range(0, len(rows), SEND_ROWS):
        part = rows[start : start + SEND_ROWS]
        part_key = key if key is None or len(rows) <= SEND_ROWS else f"{key}:{start}"
        answer = session.client.events.send(source, part, idempotency_key=part_key)
        for refused in answer["rejected"]:
            refused["index"] += start
        total = _add(total, answer)
    session.show(total, lambda answer: _print_sent(source, answer))
    _exit(total["rejected"])


@events.command("import")
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--source", required=True, help="The source that the rows are events of.")
@click.option("--timestamp", metavar="COLUMN", help="Column of the event time, if named otherwise.")
@click.option("--known-at", metavar="COLUMN", help="Column that says when each row became known.")
@click.option("--known-now", is_flag=True, help="The rows are news: known as they arrive.")
@connected
def import_(
    session: Session,
    file: Path,
    *,
    source: str,
    timestamp: str | None,
    known_at: str | None,
    known_now: bool,
) -> None:
    """Import a Parquet, CSV or NDJSON file.

    History needs to say when it became known, so that training never sees the future: name a
    column with --known-at, or declare the source's delay.  Columns that the source doesn't have are
    left out.  Stopped half-way?  Run it again within a day: what is stored is not stored twice.
    """
    from mlpd.cli.importing import FileImport

    if known_at and known_now:
        raise click.UsageError("--known-at and --known-now contradict each other")
    done = FileImport(
        session.client, file, source, timestamp=timestamp, known_at=known_at, known_now=known_now
    ).run()
    session.show(done, _print_imported)
    _exit(done["rejected"])


@events.command(
    epilog=examples(
        "mlpd events export departures departures.parquet --start 2013-10-01T00:00:00Z",
        "mlpd events export departures - --format csv | gzip > departures.csv.gz",
    )
)
@click.argument("source")
@click.argument("file", type=click.Path(dir_okay=False, allow_dash=True))
@click.option("--format", "form", type=click.Choice(["parquet", "csv", "ndjson"]))
@click.option("--start", metavar="TIME", help="Only events from this time on.")
@click.option("--end", metavar="TIME", help="Only events before this time.")
@connected
def export(
    session: Session,
    source: str,
    file: str,
    *,
    form: str | None,
    start: str | None,
    end: str | None,
) -> None:
    """Write the stored events of a source to a file.

    Parquet, CSV or NDJSON, by the file's name or --format; - is stdout.  In the order of the log,
    with known_at and __sequence; mlpd events import takes the file again.  It is written page by
    page and gets its name when it is whole.
    """
    from mlpd.cli.exporting import EventPages, FileExport

    path = None if file == "-" else Path(file)
    if path is None and session.as_json:
        raise click.UsageError("--json and the events would both go to stdout")
    pages = EventPages(session.patient_client, source, start=start, end=end)
    done = FileExport(pages, path, form).run()
    if path is not None:
        session.show(done, print_pairs)


@events.command(epilog=examples("mlpd events tail departures", "mlpd events tail departures -n 10"))
@click.argument("source")
@click.option("--after", type=click.IntRange(0), help="Begin after this sequence, not with news.")
@click.option("-n", "--number", type=click.IntRange(1), help="End after so many events.")
@connected
def tail(session: Session, source: str, *, after: int | None, number: int | None) -> None:
    """Follow new events of a source.

    One JSON object per line; Ctrl-C ends it.
    """
    from mlpd.cli.exporting import event_types, plain

    types = event_types(session.client.definitions()["document"], source)
    if after is None:
        after = session.client.status()["sequence"]
    while number is None or number > 0:
        limit = TAIL_ROWS if number is None else min(number, TAIL_ROWS)
        page = session.client.events.page(source, after=after, limit=limit)
        after, columns = page["sequence"], page["columns"]
        rows = [*zip(*columns.values(), strict=True)]
        for row in rows:
            cells = zip(columns, row, strict=True)
            print_json({name: plain(value, types[name]) for name, value in cells})
        if number is not None:
            number -= len(rows)
        if after == page["through"] and number != 0:
            time.sleep(TAIL_PAUSE_S)


def _parse(text: str, number: int) -> dict[str, Any]:
    try:
        row = json.loads(text)
    except ValueError as error:
        raise ValidationError(
            f"event {number} is not JSON: {error}",
            code="malformed_event",
            hint='Each event is one object: {"event_time": "2013-01-01T10:00:00Z", ...}.',
        ) from None
    if not isinstance(row, dict):
        raise ValidationError(f"event {number} is not a JSON object", code="malformed_event")
    return row


def _add(total: dict[str, Any], answer: dict[str, Any]) -> dict[str, Any]:
    """Return the sum of two answers; the later one's sequence."""
    if not total:
        return answer
    sums = {name: total[name] + answer[name] for name in _SUMMED}
    return {**answer, **sums, "replayed": total["replayed"] and answer["replayed"]}


_SUMMED = ("accepted", "rejected", "clamped", "duplicates")


def _print_sent(source: str, answer: dict[str, Any]) -> None:
    again = ", as before: this key was used already" if answer["replayed"] else ""
    print_lines(f"{answer['accepted']:,} stored in {source} (sequence {answer['sequence']}){again}")
    if answer["clamped"]:
        print_lines(f"{answer['clamped']:,} lay ahead and got the time at which they were known")
    if answer["duplicates"]:
        print_lines(f"{answer['duplicates']:,} were left out: their event id came before")
    _print_reasons(answer["rejected"], len(answer["rejected"]))


def _print_imported(done: dict[str, Any]) -> None:
    if done["ignored"]:
        note(f"left out, as {done['source']} has no such columns: {', '.join(done['ignored'])}")
    print_pairs(
        {
            "file": done["file"],
            "rows": done["rows"],
            "stored": done["accepted"],
            "of which before": done["replayed"] or None,
            "of which clamped": done["clamped"] or None,
            "left out, as their event id came before": done["duplicates"] or None,
            "refused": done["rejected"] or None,
            "rows per second": done["rows_per_s"],
        }
    )
    _print_reasons(done["reasons"], done["rejected"])


def _print_reasons(reasons: list[dict[str, Any]], total: int) -> None:
    if total:
        shown = reasons[:REASONS_SHOWN]
        rows = [(r["index"], r["code"], r["message"], r["hint"]) for r in shown]
        print_table(["row", "code", "why", "what to do"], rows, title=f"Refused: {total:,}")


def _exit(rejected: Any) -> None:
    """End with exit code 1 if rows were refused: a script must not miss it."""
    if rejected:
        click.get_current_context().exit(1)
