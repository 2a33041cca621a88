"""Segment files: written so that a name implies a whole, durable file; for child processes only."""

import hashlib
import os
import re
import secrets
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from mlpd.core.columns import DType
from mlpd.storage.files import atomic_write, fsync_dir, fsync_file, make_dirs
from mlpd.storage.log import RecordKind
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

ROW_GROUP_ROWS = 65_536


class SegmentFiles:
    """Writes the files of one compaction, or of one rewriting; remembers folders to flush."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._temporary = directory / TEMPORARY
        self._folders: set[Path] = set()
        self._written: list[Path] = []
        make_dirs(self._temporary)
        make_dirs(directory / MANIFESTS)

    def write(
        self,
        kind: RecordKind,
        source: str,
        columns: Mapping[str, DType],
        frame: "pl.DataFrame",
        *,
        revision: int = 0,
    ) -> Segment:
        """Write rows, sorted by event time, as one file; `revision`: of its manifest."""
        temporary = self._temporary / f"writing-{os.getpid()}-{secrets.token_hex(8)}.parquet"
        self._written.append(temporary)
        write_parquet(frame, temporary)
        fsync_file(temporary)
        sequences, event_us, known_us = (
            frame[name].to_numpy() for name in (SEQUENCE, EVENT_TIME, KNOWN_TIME)
        )
        first, last = int(sequences.min()), int(sequences.max())
        folder = Path(source if kind is RecordKind.EVENTS else f"{FEEDBACK}/{source}")
        name = f"{first}-{last}.{revision}.parquet" if revision else f"{first}-{last}.parquet"
        path = folder / _day(int(event_us[0])) / name
        segment = Segment(
            path=str(path),
            kind=kind,
            source=source,
            columns=dict(columns),
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

    def finish(self, *manifests: Manifest) -> None:
        """Make all names durable, then write the manifests' copies."""
        for folder in self._folders:
            fsync_dir(folder)
        for manifest in manifests:
            path = self._directory / MANIFESTS / manifest.name
            self._written.append(path)
            atomic_write(path, manifest.encode())

    def discard(self) -> None:
        """Remove what was written: on a full disk the next try needs the room."""
        for path in self._written:
            with suppress(OSError):
                path.unlink(missing_ok=True)


def write_parquet(frame: "pl.DataFrame", path: Path) -> None:
    """Write the file; raises OSError where polars wraps one in an error of its own."""
    import polars as pl  # noqa: PLC0415 - not in the daemon

    try:
        frame.write_parquet(path, compression="zstd", row_group_size=ROW_GROUP_ROWS)
    except pl.exceptions.PolarsError as error:
        found = re.search(r"os error (\d+)", str(error))
        if found is None:
            raise
        raise OSError(int(found[1]), str(error), str(path)) from error


def _day(event_us: int) -> str:
    epoch = datetime(1970, 1, 1, tzinfo=UTC)
    return (epoch + timedelta(microseconds=event_us)).strftime("%Y-%m-%d")


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"
