"""Files as batches of columns: Parquet and CSV through polars, NDJSON by the rules of JSON."""

import json
from collections.abc import Callable, Collection, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from mlpd.core.errors import ValidationError

if TYPE_CHECKING:
    import polars as pl

Columns = dict[str, list[Any]]

PART_BATCHES = 25
"""Batches that are read from a Parquet or CSV file at once: 50 to 200 MB."""


class Table(Protocol):
    """The rows of a file."""

    names: list[str]
    """Of its columns, in order."""
    rows: int

    def batches(self, columns: Collection[str], size: int) -> Iterator[tuple[int, Columns]]:
        """Yield (first row, columns) of `size` rows each: the same ranges every time."""
        ...


def open_table(path: Path, schema: Mapping[str, str]) -> Table:
    """Return the table in a file; `schema`: the source's types, by which text is read.

    Raises ValidationError: `unknown_format`, `malformed_event`.
    """
    match path.suffix.lower():
        case ".parquet" | ".pq":
            return _parquet(path)
        case ".csv":
            return _csv(path, schema)
        case ".ndjson" | ".jsonl":
            return _JsonTable(path)
    raise ValidationError(
        f"{path.name} is no file that can be imported",
        code="unknown_format",
        hint="Its name ends with .parquet, .csv, .ndjson or .jsonl.",
    )


class _FrameTable:
    """A file that polars reads; `values` makes the cells of a column plain.

    `texts`: the same file without types, for the parts where a cell has another one.
    """

    def __init__(
        self,
        lazy: "pl.LazyFrame",
        values: "Callable[[pl.Series], list[Any]]",
        texts: "pl.LazyFrame | None" = None,
    ) -> None:
        import polars as pl

        self._lazy, self._values, self._texts = lazy, values, texts
        self.names = lazy.collect_schema().names()
        self.rows = int(lazy.select(pl.len()).collect().item())

    def batches(self, columns: Collection[str], size: int) -> Iterator[tuple[int, Columns]]:
        part = PART_BATCHES * size
        for first in range(0, self.rows, part):
            frame = self._part(columns, first, part)
            for start in range(0, len(frame), size):
                batch = frame.slice(start, size)
                yield first + start, {series.name: self._values(series) for series in batch}

    def _part(self, columns: Collection[str], first: int, rows: int) -> "pl.DataFrame":
        import polars as pl

        try:
            return self._lazy.select(columns).slice(first, rows).collect()
        except pl.exceptions.ComputeError:
            if self._texts is None:
                raise
            return self._texts.select(columns).slice(first, rows).collect()


class _JsonTable:
    """A file of JSON objects, one a line.

    Every value is taken as it stands.  polars would guess one type for a column from its first rows
    and bend the others: 1 beside "x" becomes "1", and a name that comes late is lost.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        names: dict[str, None] = {}
        self.rows = 0
        for row in self._read():
            if not row.keys() <= names.keys():
                names.update(dict.fromkeys(row))
            self.rows += 1
        self.names = list(names)

    def batches(self, columns: Collection[str], size: int) -> Iterator[tuple[int, Columns]]:
        rows = self._read()
        for first in range(0, self.rows, size):
            batch = list(islice(rows, size))
            yield first, {name: [row.get(name) for row in batch] for name in columns}

    def _read(self) -> Iterator[dict[str, Any]]:
        decode = json.JSONDecoder().raw_decode  # json.loads takes 1.6 times as long
        with self._path.open("rb") as file:
            for number, raw in enumerate(file, 1):
                try:
                    line = raw.strip().decode()
                    row, end = decode(line) if line else ({}, 0)
                except (ValueError, RecursionError):
                    raise self._malformed(number, raw) from None
                if not line:
                    continue
                if end < len(line) or not isinstance(row, dict):
                    raise self._malformed(number, raw)
                yield row

    def _malformed(self, number: int, line: bytes) -> ValidationError:
        problem = "is no JSON object"
        try:
            json.loads(line)
        except (ValueError, RecursionError) as error:
            problem = f"is not JSON: {error}"
        return ValidationError(
            f"line {number} of {self._path.name} {problem}",
            code="malformed_event",
            hint='Each line is one object: {"event_time": "2013-01-01T00:00:00Z", ...}.',
        )


def _parquet(path: Path) -> Table:
    import polars as pl

    return _FrameTable(pl.scan_parquet(path), _typed_values)


def _csv(path: Path, schema: Mapping[str, str]) -> Table:
    import polars as pl

    def values(series: "pl.Series") -> list[Any]:
        return _cells(series, schema.get(series.name, "timestamp"))

    texts = pl.scan_csv(path, infer_schema=False)
    kinds = {"int64": pl.Int64, "float64": pl.Float64, "float32": pl.Float64, "bool": pl.Boolean}
    header = texts.collect_schema().names()
    types = {name: kinds[schema[name]] for name in header if schema.get(name) in kinds}
    typed = pl.scan_csv(path, infer_schema=False, schema_overrides=types)
    return _FrameTable(typed, values, texts)


def _typed_values(series: "pl.Series") -> list[Any]:
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


def _cells(series: "pl.Series", dtype: str) -> list[Any]:
    """Return cells as the source's type reads them, not as guessed: `007` may be a name.

    What can't be read stays text, for the daemon to refuse with its row.
    """
    import polars as pl

    if series.dtype != pl.String or dtype in ("string", "bytes"):
        return series.to_list()
    if dtype == "bool":
        return [_BOOLS.get(text, text) for text in series.to_list()]
    if dtype.endswith("]"):
        return [_list(text) for text in series.to_list()]
    real = dtype in ("float32", "float64")
    numbers = series.cast(pl.Float64 if real else pl.Int64, strict=False)
    found = numbers.to_list()
    if numbers.null_count() == series.null_count():
        return found
    if numbers.null_count() == len(numbers):
        return series.to_list()
    return [text if n is None else n for n, text in zip(found, series.to_list(), strict=True)]


_BOOLS: dict[str | None, bool] = dict.fromkeys(("true", "True", "TRUE"), True)
_BOOLS |= dict.fromkeys(("false", "False", "FALSE"), False)


def _list(text: str | None) -> Any:
    try:
        return None if text is None else json.loads(text)
    except ValueError:
        return text
