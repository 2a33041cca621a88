"""The compaction child: `python -m mlpd.storage.compact DATA_DIR --through SEQUENCE`.

Reads the log's oldest rows, writes them as durable Parquet segments and prints the manifest as
JSON.  It changes nothing in LMDB: the daemon stores the manifest.  Exit code 3: the disk failed.
"""

import argparse
import hashlib
import os
import re
import secrets
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mlpd.core.columns import DType
from mlpd.core.time import DAY_US, system_clock
from mlpd.storage.environment import Environment
from mlpd.storage.files import DataDirectory, atomic_write, fsync_dir, fsync_file, make_dirs
from mlpd.storage.frames import records_frame, schema_of
from mlpd.storage.log import (
    LogRecord,
    RecordKind,
    compacted_through,
    copy_records,
    decode_record,
    record_rows,
)
from mlpd.storage.segments import (
    EVENT_TIME,
    FEEDBACK,
    KNOWN_TIME,
    MANIFESTS,
    SEQUENCE,
    TEMPORARY,
    Manifest,
    Segment,
)

if TYPE_CHECKING:
    import polars as pl

EXIT_DISK = 3
ROWS_MAX = 500_000
BYTES_MAX = 256 << 20
"""Bounds of one compaction, which bound the child's memory (about 1 GB at 256 MiB of log)."""

SEGMENT_ROWS_MIN = 50_000
"""Neighbouring days share a file until it has this many rows: a year of history imported at once
becomes 7 files instead of 365 (see docs/decisions/one-log.md)."""

ROW_GROUP_ROWS = 65_536

Schema = tuple[tuple[str, DType], ...]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one compaction and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m mlpd.storage.compact", description=__doc__)
    parser.add_argument("data_directory", type=Path)
    parser.add_argument("--through", type=int, required=True, help="last sequence to compact")
    parser.add_argument("--rows-max", type=int, default=ROWS_MAX)
    parser.add_argument("--with-parent", action="store_true", help="end when stdin is closed")
    options = parser.parse_args(arguments)
    if options.with_parent:
        threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        data = DataDirectory(options.data_directory)
        with Environment.open(data.lmdb, clock=system_clock, readonly=True) as environment:
            manifest = compact(
                environment, data.segments, through=options.through, rows_max=options.rows_max
            )
    except OSError as error:
        sys.stderr.write(f"{error}\n")
        return EXIT_DISK
    sys.stdout.write(manifest.encode().decode())
    return 0


def _end_with_parent() -> None:
    # The daemon holds the other end of stdin and never writes: it closes when the daemon dies,
    # and no segment must be published after the next daemon has cleaned up.
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
    output = _Output(directory)
    try:
        segments = [
            segment
            for (kind, source, schema), group in _groups(records).items()
            for segment in output.write_segments(kind, source, schema, group)
        ]
        manifest = Manifest(first, last, kept, tuple(segments))
        output.finish(manifest)
    except OSError:
        output.discard()
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


class _Output:
    """Writes files so that a name implies a whole, durable file; remembers folders to flush."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._temporary = directory / TEMPORARY
        self._folders: set[Path] = set()
        self._written: list[Path] = []
        make_dirs(self._temporary)
        make_dirs(directory / MANIFESTS)

    def write_segments(
        self, kind: RecordKind, source: str, schema: Schema, records: Sequence[LogRecord]
    ) -> Iterator[Segment]:
        """Write the rows of one schema as one or more files, cut at midnights UTC."""
        decoded = [record.columns() for record in records]
        frame = records_frame(records, decoded).sort(EVENT_TIME, KNOWN_TIME, SEQUENCE)
        for start, stop in pairwise(_cuts(frame[EVENT_TIME].to_numpy())):
            yield self._write_segment(kind, source, schema, frame[start:stop])

    def _write_segment(
        self, kind: RecordKind, source: str, schema: Schema, frame: "pl.DataFrame"
    ) -> Segment:
        temporary = self._temporary / f"{os.getpid()}-{secrets.token_hex(8)}.parquet"
        self._written.append(temporary)
        _write_parquet(frame, temporary)
        fsync_file(temporary)
        sequences, event_us, known_us = (
            frame[name].to_numpy() for name in (SEQUENCE, EVENT_TIME, KNOWN_TIME)
        )
        first, last = int(sequences.min()), int(sequences.max())
        folder = Path(source if kind is RecordKind.EVENTS else f"{FEEDBACK}/{source}")
        path = folder / _day(int(event_us[0])) / f"{first}-{last}.parquet"
        segment = Segment(
            path=str(path),
            kind=kind,
            source=source,
            columns=dict(schema),
            rows=len(frame),
            size_bytes=temporary.stat().st_size,
            digest=_digest(temporary),
            first_sequence=first,
            last_sequence=last,
            min_event_us=int(event_us[0]),
            max_event_us=int(event_us[-1]),
            min_known_us=int(known_us.min()),
            max_known_us=int(known_us.max()),
        )
        self._publish(temporary, path)
        return segment

    def _publish(self, temporary: Path, path: Path) -> None:
        target = self._directory / path
        make_dirs(target.parent)
        self._written.append(target)
        temporary.replace(target)
        self._folders.add(target.parent)

    def finish(self, manifest: Manifest) -> None:
        """Make all names durable, then write the manifest's copy."""
        for folder in self._folders:
            fsync_dir(folder)
        atomic_write(self._directory / MANIFESTS / manifest.name, manifest.encode())

    def discard(self) -> None:
        """Remove what was written: on a full disk the next try needs the room."""
        for path in self._written:
            with suppress(OSError):
                path.unlink(missing_ok=True)


def _write_parquet(frame: "pl.DataFrame", path: Path) -> None:
    """Write the file; raises OSError where polars wraps one in an error of its own."""
    import polars as pl  # noqa: PLC0415 - not in the daemon

    try:
        frame.write_parquet(path, compression="zstd", row_group_size=ROW_GROUP_ROWS)
    except pl.exceptions.PolarsError as error:
        found = re.search(r"os error (\d+)", str(error))
        if found is None:
            raise
        raise OSError(int(found[1]), str(error), str(path)) from error


def _cuts(event_us: np.ndarray[tuple[int], np.dtype[np.int64]]) -> list[int]:
    """Return row offsets, from 0 to the height, that cut sorted rows into files of whole days."""
    days = event_us // DAY_US
    midnights = np.flatnonzero(days[1:] != days[:-1]) + 1
    cuts = [0]
    for midnight in midnights.tolist():
        if midnight - cuts[-1] >= SEGMENT_ROWS_MIN:
            cuts.append(midnight)
    return [*cuts, len(event_us)]


def _day(event_us: int) -> str:
    epoch = datetime(1970, 1, 1, tzinfo=UTC)
    return (epoch + timedelta(microseconds=event_us)).strftime("%Y-%m-%d")


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"


if __name__ == "__main__":
    os.nice(10)  # ingest and predictions go first
    sys.exit(main())
