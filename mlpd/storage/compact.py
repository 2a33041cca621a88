"""The compaction child: `python -m mlpd.storage.compact DATA_DIR --through SEQUENCE`.

Reads the log's oldest rows, writes them as durable Parquet segments and prints the manifest as
JSON.  It changes nothing in LMDB: the daemon stores the manifest.  Exit code 3: the disk failed.
"""

import argparse
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np

from mlpd.core.columns import DType
from mlpd.core.time import DAY_US, system_clock
from mlpd.storage.environment import Environment
from mlpd.storage.files import DataDirectory
from mlpd.storage.frames import records_frame, schema_of
from mlpd.storage.log import (
    LogRecord,
    RecordKind,
    compacted_through,
    copy_records,
    decode_record,
    record_rows,
)
from mlpd.storage.segment_files import SegmentFiles
from mlpd.storage.segments import EVENT_TIME, KNOWN_TIME, SEQUENCE, Manifest, Segment

EXIT_DISK = 3
ROWS_MAX = 500_000
BYTES_MAX = 256 << 20
"""Bounds of one compaction, which bound the child's memory (about 1 GB at 256 MiB of log)."""

SEGMENT_ROWS_MIN = 50_000
"""Neighbouring days share a file until it has this many rows: a year of history imported at once
becomes 7 files instead of 365 (see docs/decisions/one-log.md)."""

Schema = tuple[tuple[str, DType], ...]


Write = Callable[[Environment, Path, argparse.Namespace], Manifest]
"""Writes segments below a directory, by the options of the command line."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one compaction and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m mlpd.storage.compact", description=__doc__)
    parser.add_argument("--through", type=int, required=True, help="last sequence to compact")
    parser.add_argument("--rows-max", type=int, default=ROWS_MAX)
    return run_child(parser, arguments, _compact)


def run_child(
    parser: argparse.ArgumentParser, arguments: Sequence[str] | None, write: Write
) -> int:
    """Run a child that writes segments: print the manifest and return the exit code."""
    parser.add_argument("data_directory", type=Path)
    parser.add_argument("--with-parent", action="store_true", help="end when stdin is closed")
    options = parser.parse_args(arguments)
    if options.with_parent:
        _end_with_parent()
    try:
        data = DataDirectory(options.data_directory)
        with Environment.open(data.lmdb, clock=system_clock, readonly=True) as environment:
            manifest = write(environment, data.segments, options)
    except OSError as error:
        sys.stderr.write(f"{error}\n")
        return EXIT_DISK
    sys.stdout.write(manifest.encode().decode())
    return 0


def _compact(environment: Environment, directory: Path, options: argparse.Namespace) -> Manifest:
    return compact(environment, directory, through=options.through, rows_max=options.rows_max)


def _end_with_parent() -> None:
    """Watch stdin in a thread: the process ends when the daemon does.

    The daemon holds the other end and never writes: it closes when the daemon dies, and no segment
    must be published after the next daemon has cleaned up.
    """
    threading.Thread(target=_wait_for_end, daemon=True).start()


def _wait_for_end() -> None:
    os.read(0, 1)  # not sys.stdin: its lock would be held at exit
    os._exit(1)


def compact(
    environment: Environment, directory: Path, *, through: int, rows_max: int = ROWS_MAX
) -> Manifest:
    """Write the oldest log rows up to `through` as segments below `directory`.

    Takes whole records, at least one, while they have at most `rows_max` rows and `BYTES_MAX`.
    When it returns the manifest, every file, the manifest's copy among them, is on disk under its
    name.  When it raises OSError, it has removed what it wrote.
    """
    first, records = _read_oldest(environment, through, rows_max)
    kept = tuple((int(r.first), int(r.last)) for r in records if r.kind is RecordKind.DEFINITIONS)
    last = int(records[-1].last) if records else first - 1
    files = SegmentFiles(directory)
    try:
        segments = [
            segment
            for (kind, source, schema), group in _groups(records).items()
            for segment in _write_segments(files, kind, source, schema, group)
        ]
        manifest = Manifest(first, last, kept, tuple(segments))
        files.finish(manifest)
    except OSError:
        files.discard()
        raise
    return manifest


def _read_oldest(
    environment: Environment, through: int, rows_max: int
) -> tuple[int, list[LogRecord]]:
    """Copy the records out in one short snapshot."""
    copies: list[tuple[int, bytes]] = []
    rows = size_bytes = 0
    with environment.snapshot() as snapshot:
        first = compacted_through(snapshot) + 1
        for start, value in copy_records(snapshot, first, through):
            rows += record_rows(value)
            size_bytes += len(value)
            if copies and (rows > rows_max or size_bytes > BYTES_MAX):
                break
            copies.append((start, value))
    return first, [decode_record(value, start) for start, value in copies]


def _groups(
    records: Sequence[LogRecord],
) -> dict[tuple[RecordKind, str, Schema], list[LogRecord]]:
    groups: dict[tuple[RecordKind, str, Schema], list[LogRecord]] = {}
    for record in records:
        if record.kind is not RecordKind.DEFINITIONS:
            key = record.kind, record.source, schema_of(record.columns())
            groups.setdefault(key, []).append(record)
    return groups


def _write_segments(
    files: SegmentFiles, kind: RecordKind, source: str, schema: Schema, records: Sequence[LogRecord]
) -> Iterator[Segment]:
    """Write the rows of one schema as one or more files, cut at midnights UTC."""
    decoded = [record.columns() for record in records]
    frame = records_frame(records, decoded).sort(EVENT_TIME, KNOWN_TIME, SEQUENCE)
    for start, stop in pairwise(cut_days(frame[EVENT_TIME].to_numpy())):
        yield files.write(kind, source, dict(schema), frame[start:stop])


def cut_days(event_us: np.ndarray[tuple[int], np.dtype[np.int64]]) -> list[int]:
    """Return row offsets, from 0 to the height, that cut sorted rows into files of whole days."""
    days = event_us // DAY_US
    midnights = np.flatnonzero(days[1:] != days[:-1]) + 1
    cuts = [0]
    for midnight in midnights.tolist():
        if midnight - cuts[-1] >= SEGMENT_ROWS_MIN:
            cuts.append(midnight)
    return [*cuts, len(event_us)]


if __name__ == "__main__":
    os.nice(10)  # ingest and predictions go first
    sys.exit(main())
