"""What a data directory takes on the disk, part by part, for /metrics."""

import os
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from mlpd.monitoring.instruments import Descriptor
from mlpd.monitoring.metrics import Collected, Collector
from mlpd.storage.environment import Environment
from mlpd.storage.files import DataDirectory
from mlpd.storage.horizons import load_horizons
from mlpd.storage.segments import load_manifests, sizes_by_source
from mlpd.storage.tables import Table

WALK_S = 60.0
"""How long what was found stays: a walk over 10,000 files takes 60 ms of a thread."""

_KINDS = {
    "files": ("mlpd_segments", "Segment files by source.", ""),
    "rows": ("mlpd_segments_rows", "Rows in segments by source.", ""),
    "size_bytes": ("mlpd_segments_bytes", "What segments take, by source.", "bytes"),
}

Values = dict[tuple[str, ...], float]
"""Samples by the values of their labels."""


@dataclass(frozen=True, slots=True)
class DiskUse:
    """What was found at one moment, in bytes unless named otherwise.

    `log`: pages of the log's tail in LMDB.  `segments`: by source `files`, `rows`, `size_bytes`.
    `folders`: the other folders of the data directory.  `begins_us`: by source, where history
    begins that was let go.
    """

    log: int
    segments: dict[str, dict[str, int]]
    folders: dict[str, int]
    begins_us: dict[str, int]
    free: int


def measure_disk(environment: Environment, paths: DataDirectory) -> DiskUse:
    """Look at all of it; blocks: for a thread."""
    with environment.snapshot() as snapshot:
        log, manifests = snapshot.table_bytes(Table.LOG), load_manifests(snapshot)
        horizons = load_horizons(snapshot)
    folders = {"registry": paths.registry, "runs": paths.runs, "cache": paths.cache}
    disk = os.statvfs(paths.root)
    return DiskUse(
        log=log,
        segments=sizes_by_source(manifests),
        folders={name: _size_of(folder) for name, folder in folders.items()},
        begins_us={name: horizon.before_us for name, horizon in horizons.items()},
        free=disk.f_bavail * disk.f_frsize,
    )


def disk_collector(
    environment: Environment,
    paths: DataDirectory,
    monotonic: Callable[[], float] = time.monotonic,
) -> Collector:
    """Return a collector of what `measure_disk` finds, at most once a minute."""
    found: list[tuple[float, DiskUse]] = []

    def collect() -> Iterable[Collected]:
        if not found or monotonic() - found[0][0] >= WALK_S:
            found[:] = [(monotonic(), measure_disk(environment, paths))]
        return _samples(found[0][1])

    return collect


def _samples(use: DiskUse) -> list[Collected]:
    folders: Values = {(name,): float(size) for name, size in use.folders.items()}
    begins: Values = {(name,): time_us / 1e6 for name, time_us in use.begins_us.items()}
    segments = [
        _gauge(name, text, {(s,): float(n[kind]) for s, n in use.segments.items()}, "source", unit)
        for kind, (name, text, unit) in _KINDS.items()
    ]
    return [
        _gauge("mlpd_log_bytes", "The log's tail in LMDB.", {(): float(use.log)}, "", "bytes"),
        *segments,
        _gauge("mlpd_folder_bytes", "Other folders of the data.", folders, "folder", "bytes"),
        _gauge("mlpd_disk_free_bytes", "Free on the disk.", {(): float(use.free)}, "", "bytes"),
        _gauge(
            *("mlpd_history_begins_timestamp_seconds", "Since when history is kept.", begins),
            *("source", "seconds"),
        ),
    ]


def _gauge(name: str, text: str, values: Values, label: str, unit: str) -> Collected:
    labels = (label,) if label else ()
    return Collected(Descriptor(name, "gauge", text, labels, unit), [*values.items()])


def _size_of(folder: Path) -> int:
    """Return the bytes of all files below, as far as they stay: others may remove some meanwhile.

    Links are not followed.
    """
    total, waiting = 0, [os.fspath(folder)]
    while waiting:
        for entry in _entries(waiting.pop()):
            with suppress(FileNotFoundError):
                if entry.is_dir(follow_symlinks=False):
                    waiting.append(entry.path)
                else:
                    total += entry.stat(follow_symlinks=False).st_size
    return total


def _entries(folder: str) -> "list[os.DirEntry[str]]":
    try:
        with os.scandir(folder) as entries:
            return [*entries]
    except FileNotFoundError:
        return []
