"""One file into one source: batches as columns, idempotent by the file's digest and row range."""

import hashlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlpd.cli.output import Bar, progress
from mlpd.core.errors import NotFoundError, ValidationError

if TYPE_CHECKING:
    import polars as pl

    from mlpd.client import Client

BATCH_ROWS = 20_000
"""Rows of one request, hence of one transaction: about 100 ms of the daemon's writer."""
PART_ROWS = 25 * BATCH_ROWS
"""Rows read from the file at once: 50 to 200 MB."""
REASONS_MAX = 100
KNOWN_AT = "known_at"
"""The daemon's name for the time at which a row became known."""


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

    def run(self) -> dict[str, Any]:
        """Send the file and return what became of its rows.

        `rows`, `accepted`, `replayed` (of these, stored by an earlier run), `clamped` (to their
        known_at), `rejected`, `reasons` (the first 100; `index` counts rows from 0), `ignored`
        columns, `digest`, `rows_per_s`.
        Raises ValidationError or NotFoundError before anything is sent.
        """
        started = time.monotonic()
        lazy = _scan(self._path, self._spec["schema"])
        names = lazy.collect_schema().names()
        columns = self._columns(names)
        total = _count(lazy)
        done: dict[str, Any] = {
            "file": str(self._path),
            "source": self._source,
            "rows": total,
            "accepted": 0,
            "replayed": 0,
            "clamped": 0,
            "rejected": 0,
            "reasons": [],
            "ignored": [name for name in names if name not in columns],
            "digest": _digest(self._path),
        }
        with progress(f"importing {self._path.name}", total, unit="rows") as bar:
            for start, frame in _batches(lazy.select(columns), total):
                self._send(start, frame, done, bar)
        done["rows_per_s"] = total / max(time.monotonic() - started, 1e-9)
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
        taken = {*self._renames, *self._spec["schema"]}
        return [name for name in names if name in taken]

    def _send(self, start: int, frame: "pl.DataFrame", done: dict[str, Any], bar: Bar) -> None:
        columns = {self._renames.get(s.name, s.name): _values(s) for s in frame}
        if KNOWN_AT not in columns and not self._known_now:
            columns[KNOWN_AT] = [None] * len(frame)  # the source's delay says when
        key = self._key(done["digest"], start, len(frame))
        answer = self._client.events.send(self._source, columns, idempotency_key=key)
        if answer["replayed"] and not answer["accepted"]:
            # Nothing of it is stored, so nothing can be doubled: other definitions may take it now.
            key = f"{key}:{self._version}"
            answer = self._client.events.send(self._source, columns, idempotency_key=key)
        done["accepted"] += answer["accepted"]
        done["replayed"] += answer["accepted"] if answer["replayed"] else 0
        done["clamped"] += answer["clamped"]
        done["rejected"] += len(answer["rejected"])
        room = REASONS_MAX - len(done["reasons"])
        done["reasons"] += [
            {**refused, "index": refused["index"] + start} for refused in answer["rejected"][:room]
        ]
        bar.advance(len(frame))

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


def _scan(path: Path, schema: dict[str, str]) -> "pl.LazyFrame":
    import polars as pl

    match path.suffix.lower():
        case ".parquet" | ".pq":
            return pl.scan_parquet(path)
        case ".csv":
            # The source's types, not guesses: a tail number of digits alone is text all the same.
            kinds = {"string": pl.String, "int64": pl.Int64, "float64": pl.Float64}
            kinds |= {"float32": pl.Float32, "bool": pl.Boolean}
            known = {name: kinds[dtype] for name, dtype in schema.items() if dtype in kinds}
            header = pl.scan_csv(path, infer_schema=False).collect_schema().names()
            overrides = {name: dtype for name, dtype in known.items() if name in header}
            return pl.scan_csv(path, schema_overrides=overrides, infer_schema_length=10_000)
        case ".ndjson" | ".jsonl":
            return pl.scan_ndjson(path, infer_schema_length=10_000)
    raise ValidationError(
        f"{path.name} is no file that can be imported",
        code="unknown_format",
        hint="Its name ends with .parquet, .csv, .ndjson or .jsonl.",
    )


def _count(lazy: "pl.LazyFrame") -> int:
    import polars as pl

    return int(lazy.select(pl.len()).collect().item())


def _batches(lazy: "pl.LazyFrame", total: int) -> Iterator[tuple[int, "pl.DataFrame"]]:
    """Yield (first row, frame): the same ranges whatever the file's own row groups are."""
    for part in range(0, total, PART_ROWS):
        frame = lazy.slice(part, PART_ROWS).collect()
        for start in range(0, len(frame), BATCH_ROWS):
            yield part + start, frame.slice(start, BATCH_ROWS)


def _values(series: "pl.Series") -> list[Any]:
    """Return plain values; times with a zone as microseconds UTC."""
    import polars as pl

    if series.dtype == pl.Date or isinstance(series.dtype, pl.Datetime):
        if getattr(series.dtype, "time_zone", None) is None:
            raise ValidationError(
                f"the times in column {series.name!r} have no UTC offset",
                code="naive_time",
                hint="Store them with a time zone; with polars: "
                f'pl.col("{series.name}").dt.replace_time_zone("UTC").',
            )
        return series.dt.epoch("us").to_list()
    return series.to_list()


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
