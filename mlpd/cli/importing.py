"""One file into one source: batches as columns, idempotent by the file's digest and row range."""

import hashlib
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlpd.cli.output import Bar, progress
from mlpd.cli.tables import Columns, open_table
from mlpd.core.errors import NotFoundError, ValidationError

if TYPE_CHECKING:
    from mlpd.client import Client

BATCH_ROWS = 20_000
"""Rows of one request, hence of one transaction: about 100 ms of the daemon's writer."""
REASONS_MAX = 100
KNOWN_AT = "known_at"
"""The daemon's name for the time at which a row became known."""
DELETED = "__deleted"
"""The daemon's name for the mark of tombstones."""


class FileImport:
    """The import of one file; `run` once.  Reading happens here, not in the daemon."""

    def __init__(
        self,
        client: "Client",
        path: Path,
        source: str,
        *,
        timestamp: str | None = None,
        known_at: str | None = None,
        known_now: bool = False,
    ) -> None:
        self._client = client
        self._path = path
        self._source = source
        self._known_now = known_now
        running = client.definitions()
        self._version = running["version"]
        self._spec = _source_of(running["document"], source)
        self._event_time: str = self._spec["timestamp"]
        self._renames = {timestamp or self._event_time: self._event_time}
        if known_at is not None:
            self._renames[known_at] = KNOWN_AT
        self._kept = {*self._spec["schema"], DELETED}
        """Columns that go by their own names, also if they tell a time besides."""

    def run(self) -> dict[str, Any]:
        """Send the file and return what became of its rows.

        `rows`, `accepted`, `replayed` (of these, stored by an earlier run), `clamped` (to their
        known_at), `duplicates` (left out: their event ids came before), `rejected`, `reasons` (the
        first 100; `index` counts rows from 0), `ignored` columns, `digest`, `rows_per_s`.
        Raises ValidationError or NotFoundError before anything is sent.
        """
        started = time.monotonic()
        table = open_table(self._path, {**self._spec["schema"], DELETED: "bool"})
        columns = self._columns(table.names)
        done: dict[str, Any] = {
            "file": str(self._path),
            "source": self._source,
            "rows": table.rows,
            "accepted": 0,
            "replayed": 0,
            "clamped": 0,
            "duplicates": 0,
            "rejected": 0,
            "reasons": [],
            "ignored": [name for name in table.names if name not in columns],
            "digest": _digest(self._path),
        }
        with progress(f"importing {self._path.name}", table.rows, unit="rows") as bar:
            for start, batch in table.batches(columns, BATCH_ROWS):
                self._send(start, batch, done, bar)
        done["rows_per_s"] = table.rows / max(time.monotonic() - started, 1e-9)
        return done

    def _columns(self, names: list[str]) -> list[str]:
        """Return the columns to send, by their names in the file."""
        for name in self._renames:
            if name not in names:
                raise ValidationError(
                    f"{self._path.name} has no column {name!r}; it has: {', '.join(names)}",
                    code="unknown_column",
                    hint="Name the columns with --timestamp and --known-at.",
                )
        if KNOWN_AT in names and not self._known_now:
            self._renames.setdefault(KNOWN_AT, KNOWN_AT)
        if not (self._known_now or KNOWN_AT in self._renames.values() or self._spec.get("delay")):
            raise ValidationError(
                f"nothing says when the rows of {self._path.name} became known",
                code="missing_known_at",
                hint=f"Add --known-at COLUMN, declare the delay of source {self._source!r}, or say "
                "--known-now if the rows are news.",
            )
        taken = {*self._renames, *self._kept}
        return [name for name in names if name in taken]

    def _send(self, start: int, batch: Columns, done: dict[str, Any], bar: Bar) -> None:
        columns = {n: values for n, values in batch.items() if n in self._kept}
        columns |= {self._renames[n]: batch[n] for n in self._renames}
        rows = len(columns[self._event_time])
        if KNOWN_AT not in columns and not self._known_now:
            columns[KNOWN_AT] = [None] * rows  # the source's delay says when
        key = self._key(done["digest"], start, rows)
        answer = self._client.events.send(self._source, columns, idempotency_key=key)
        if answer["replayed"] and not answer["accepted"]:
            # Nothing of it is stored, so nothing can be doubled: other definitions may take it now.
            key = f"{key}:{self._version}"
            answer = self._client.events.send(self._source, columns, idempotency_key=key)
        done["accepted"] += answer["accepted"]
        done["replayed"] += answer["accepted"] if answer["replayed"] else 0
        done["clamped"] += answer["clamped"]
        done["duplicates"] += answer["duplicates"]
        done["rejected"] += len(answer["rejected"])
        room = REASONS_MAX - len(done["reasons"])
        done["reasons"] += [
            {**refused, "index": refused["index"] + start} for refused in answer["rejected"][:room]
        ]
        bar.advance(rows)

    def _key(self, digest: str, start: int, rows: int) -> str:
        """Return the batch's idempotency key: another mapping of columns is another import."""
        mapping = f"{self._source} {sorted(self._renames.items())} {self._known_now}"
        tag = hashlib.sha256(mapping.encode()).hexdigest()[:16]
        return f"import:{digest}:{tag}:{start}+{rows}"


def _source_of(document: dict[str, Any], source: str) -> dict[str, Any]:
    sources = document.get("sources", {})
    if source not in sources:
        raise NotFoundError(
            f"unknown source {source!r}; known: {', '.join(sorted(sources)) or 'none'}",
            code="unknown_source",
            hint="Check the spelling, or add it to your definitions and run mlpd apply.",
        )
    found: dict[str, Any] = sources[source]
    return found


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
