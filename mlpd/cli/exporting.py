"""Stored events, or served rows, into a file: page by page, so that memory stays small."""

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from datetime import datetime
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Protocol

from mlpd.cli.output import progress
from mlpd.core.errors import ValidationError
from mlpd.core.time import system_clock

if TYPE_CHECKING:
    import polars as pl

    from mlpd.client import Client

FORMATS = ("parquet", "csv", "ndjson")
SUFFIXES = {".parquet": "parquet", ".pq": "parquet", ".csv": "csv", ".ndjson": "ndjson"}
SUFFIXES |= {".jsonl": "ndjson"}
PAGE_ROWS = 100_000
"""Rows in memory at once: some 10 MB."""
TIME_FORMAT = "%Y-%m-%dT%H:%M:%S%.6fZ"


class Pages(Protocol):
    """What is exported, page by page: `done` tells the figures, once all are read."""

    name: str
    """For the progress bar."""

    def frames(self) -> Iterator["pl.DataFrame"]:
        """Yield pages, the first even if it is empty."""

    def done(self) -> dict[str, Any]:
        """Return what to tell besides file and rows."""


class EventPages:
    """Stored events of one source as they are now."""

    def __init__(
        self, client: "Client", source: str, *, start: str | None = None, end: str | None = None
    ) -> None:
        self._client = client
        self.name = source
        self._span: dict[str, Any] = {"start": start, "end": end}
        self._through = 0

    def frames(self) -> Iterator["pl.DataFrame"]:
        """Yield pages in the order of the log."""
        self._through = self._client.events.page(self.name, limit=1)["through"]
        after, rows = 0, PAGE_ROWS
        while rows == PAGE_ROWS:
            page = self._client.events.page_frame
            span = {"through": self._through, **self._span}
            frame = page(self.name, after=after, limit=PAGE_ROWS, **span)
            rows = len(frame)
            if rows or not after:
                yield frame
            after = frame["__sequence"][-1] if rows else after

    def done(self) -> dict[str, Any]:
        """Return source and last sequence."""
        return {"source": self.name, "sequence": self._through}


class ServedPages:
    """The prediction log as it is now, with the labels that have come."""

    name = "predictions"

    def __init__(
        self,
        client: "Client",
        *,
        route: str | None = None,
        start: str | None = None,
        end: str | None = None,
    ) -> None:
        self._client = client
        self._query: dict[str, Any] = {"route": route, "start": start, "end": end or system_clock()}

    def frames(self) -> Iterator["pl.DataFrame"]:
        """Yield pages in the order in which rows were logged, without their positions."""
        after: str | None = None
        while True:
            frame = self._client.predictions(after=after, limit=PAGE_ROWS, **self._query)
            if not len(frame) and after is not None:
                return
            yield frame.drop("position")
            if not len(frame):
                return
            after = frame["position"][-1].hex()

    def done(self) -> dict[str, Any]:
        """Return nothing more."""
        return {}


class FileExport:
    """The export of pages to a file, or to stdout without a path; `run` once."""

    def __init__(self, pages: Pages, path: Path | None, form: str | None) -> None:
        self._pages = pages
        self._path = path
        self._form = form or _form_of(path)
        self._rows = 0
        if path is None and self._form == "parquet":
            raise ValidationError(
                "Parquet is written to a file, not to stdout",
                code="unknown_format",
                hint="Name a file, or take --format csv or ndjson.",
            )

    def run(self) -> dict[str, Any]:
        """Write the file, or stdout without a path; returns `file`, `rows`, and what pages tell.

        The file gets its name when it is whole.
        """
        if self._path is None:
            self._write_text(sys.stdout.buffer)
            return self._told()
        folder = Path(tempfile.mkdtemp(prefix=".mlpd-export-", dir=self._path.absolute().parent))
        try:
            whole = folder / "whole"
            if self._form == "parquet":
                self._write_parquet(folder, whole)
            else:
                with whole.open("wb") as file:
                    self._write_text(file)
            whole.chmod(0o666 & ~_umask())
            whole.replace(self._path)
        finally:
            shutil.rmtree(folder)
        return self._told()

    def _told(self) -> dict[str, Any]:
        return {"file": str(self._path or "-"), "rows": self._rows, **self._pages.done()}

    def _write_text(self, file: BinaryIO) -> None:
        for number, frame in enumerate(self._frames()):
            if self._form == "csv":
                _as_cells(frame).write_csv(file, include_header=number == 0)
            else:
                file.write(_as_lines(frame))
        file.flush()

    def _write_parquet(self, folder: Path, whole: Path) -> None:
        import polars as pl

        parts = []
        for number, frame in enumerate(self._frames()):
            parts.append(folder / f"{number}.parquet")
            frame.write_parquet(parts[-1])
        pl.scan_parquet(parts, glob=False).sink_parquet(whole, maintain_order=True)

    def _frames(self) -> Iterator["pl.DataFrame"]:
        """Yield pages and count them."""
        with progress(f"exporting {self._pages.name}", unit="rows") as bar:
            for frame in self._pages.frames():
                yield frame
                self._rows += len(frame)
                bar.advance(len(frame))


def event_types(document: dict[str, Any], source: str) -> dict[str, str]:
    """Return the type of every column of a page; raises NotFoundError for an unknown source."""
    from mlpd.core.document import parse_document

    spec = parse_document(document).source(source)
    times = dict.fromkeys((spec.timestamp, "known_at"), "timestamp")
    schema = {name: str(dtype) for name, dtype in spec.schema.items()}
    return {**times, "__sequence": "int64", **schema, "__deleted": "bool"}


def plain(value: Any, dtype: str = "") -> Any:
    """Return a value as JSON has it: times as RFC 3339, bytes as 0x and digits, no NaN.

    `dtype`: of the column, where a timestamp is a number.
    """
    from mlpd.core.convert import bytes_text
    from mlpd.core.time import format_time

    if dtype == "timestamp" and value is not None:
        return format_time(value)
    if isinstance(value, datetime):
        return value.isoformat().replace("+00:00", "Z")
    if isinstance(value, bytes):
        return bytes_text(value)
    if isinstance(value, list):
        return [plain(element) for element in value]
    return None if isinstance(value, float) and not isfinite(value) else value


def _form_of(path: Path | None) -> str:
    if path is None:
        return "ndjson"
    found = SUFFIXES.get(path.suffix.lower())
    if found is None:
        raise ValidationError(
            f"{path.name} doesn't say what it is to be",
            code="unknown_format",
            hint=f"Name it {', '.join(SUFFIXES)}, or give --format.",
        )
    return found


def _as_lines(frame: "pl.DataFrame") -> bytes:
    rows = ({name: plain(value) for name, value in row.items()} for row in _rows(frame))
    return "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows).encode()


def _rows(frame: "pl.DataFrame") -> Iterator[dict[str, Any]]:
    """Yield rows; vectors are lists."""
    import polars as pl

    vectors = [name for name, dtype in frame.schema.items() if isinstance(dtype, pl.Array)]
    return frame.with_columns(pl.col(name).arr.to_list() for name in vectors).iter_rows(named=True)


def _as_cells(frame: "pl.DataFrame") -> "pl.DataFrame":
    """Return what CSV can hold: times and bytes as text, lists as JSON arrays."""
    import polars as pl

    names = [name for name, dtype in frame.schema.items() if dtype == pl.Binary]
    cells = frame.with_columns(
        pl.selectors.datetime().dt.strftime(TIME_FORMAT),
        *((pl.lit("0x") + pl.col(name).bin.encode("hex")).alias(name) for name in names),
    )
    lists = [s for s in frame if isinstance(s.dtype, pl.List | pl.Array)]
    return cells.with_columns(
        pl.Series(s.name, [None if v is None else _cell(v) for v in s], pl.String) for s in lists
    )


def _cell(values: "pl.Series") -> str:
    return json.dumps(plain(values.to_list()), ensure_ascii=False)


def _umask() -> int:
    found = os.umask(0o077)
    os.umask(found)
    return found
