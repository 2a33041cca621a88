"""Data directories with so many events that sending them would take minutes: segments as they are.

A daemon applies the definitions; after it has stopped, segments and their manifest are written as
compaction writes them, in one transaction that takes the rows' sequences.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.daemon import serve
from mlpd.client import Client
from mlpd.core.columns import DType
from mlpd.core.time import system_clock
from mlpd.storage.compact import ROWS_MAX
from mlpd.storage.environment import Environment
from mlpd.storage.files import DataDirectory
from mlpd.storage.log import RecordKind, compacted_through
from mlpd.storage.segment_files import write_parquet
from mlpd.storage.segments import (
    EVENT_TIME,
    KNOWN_TIME,
    SEQUENCE,
    Manifest,
    Segment,
    store_manifest,
)
from mlpd.storage.transactions import WriteTransaction
from mlpd.storage.writer import Writer

if TYPE_CHECKING:
    import polars as pl

MakeFrame = Callable[[int, int], "pl.DataFrame"]
"""Makes the events of the places start to stop: `event_time` and the source's columns, in order."""


def fill_segments(
    directory: Path,
    definitions: Sequence[Any],
    source: str,
    schema: dict[str, str],
    rows: int,
    make: MakeFrame,
) -> int:
    """Fill a data directory with events known as they happened; return the last sequence."""
    with serve(directory) as daemon, Client(daemon.url) as client:
        client.apply(definitions)
    paths = DataDirectory(directory)
    columns = {name: DType(dtype) for name, dtype in schema.items()}
    with Environment.open(paths.lmdb, clock=system_clock) as environment:
        with environment.snapshot() as snapshot:
            first = snapshot.sequence + 1
        segments = [
            _write(paths.segments, source, columns, first + start, make(start, stop))
            for start, stop in _ranges(rows)
        ]
        last = first + rows - 1
        writer = Writer(environment)

        def store(txn: WriteTransaction) -> None:
            begin = compacted_through(txn) + 1
            kept = ((begin, first - 1),) if begin < first else ()
            txn.take_sequences(rows)
            store_manifest(txn, Manifest(begin, last, kept, tuple(segments)))

        try:
            writer.write_blocking(store)
        finally:
            writer.close()
    return last


def _ranges(rows: int) -> list[tuple[int, int]]:
    return [(start, min(start + ROWS_MAX, rows)) for start in range(0, rows, ROWS_MAX)]


def _write(
    directory: Path, source: str, columns: dict[str, DType], first: int, frame: "pl.DataFrame"
) -> Segment:
    import polars as pl  # noqa: PLC0415

    event_us = frame["event_time"].to_physical()
    stamps = [event_us.alias(EVENT_TIME), event_us.alias(KNOWN_TIME)]
    stamps.append(pl.int_range(first, first + len(frame), eager=True).alias(SEQUENCE))
    last = first + len(frame) - 1
    path = Path(source) / f"{first}-{last}" / f"{first}-{last}.parquet"
    (directory / path).parent.mkdir(parents=True)
    write_parquet(pl.DataFrame([*stamps, *frame.select(list(columns))]), directory / path)
    begin, end = int(event_us[0]), int(event_us[-1])
    return Segment(
        *(str(path), RecordKind.EVENTS, source, columns, len(frame)),
        size_bytes=(directory / path).stat().st_size,
        digest="",
        first_sequence=first,
        last_sequence=last,
        min_event_us=begin,
        max_event_us=end,
        min_known_us=begin,
        max_known_us=end,
    )
