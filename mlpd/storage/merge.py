"""The merging child: `python -m mlpd.storage.merge DATA_DIR --first SEQUENCE --last SEQUENCE`.

Writes the small files of neighbouring manifests anew, as fewer, and prints the manifest that takes
their place as JSON.  It changes nothing in LMDB: the daemon stores the manifest.  Exit code 3: the
disk failed.
"""

import argparse
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path

from mlpd.core.columns import DType
from mlpd.storage import compact
from mlpd.storage.compact import BYTES_MAX, ROWS_MAX, cut_days
from mlpd.storage.environment import Environment
from mlpd.storage.log import RecordKind
from mlpd.storage.segment_files import SegmentFiles
from mlpd.storage.segments import (
    EVENT_TIME,
    KNOWN_TIME,
    SEQUENCE,
    Manifest,
    Segment,
    load_manifests,
)

MANIFESTS_MIN, MANIFESTS_MAX = 8, 64
"""Manifests that one merging takes."""
SHARE = 3
"""A merged manifest has at least so many times the rows of each before: that bounds how often a row
is written anew, whatever the sizes of the compactions (3.5 times in a test of mixed ones)."""

Group = tuple[RecordKind, str, tuple[tuple[str, DType], ...]]
"""Files that can be one: their kind, source and columns."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one merging and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m mlpd.storage.merge", description=__doc__)
    parser.add_argument("--first", type=int, required=True)
    parser.add_argument("--last", type=int, required=True)
    return compact.run_child(parser, arguments, _merge)


def _merge(environment: Environment, directory: Path, options: argparse.Namespace) -> Manifest:
    return merge(environment, directory, options.first, options.last)


def find_mergeable(manifests: Sequence[Manifest]) -> list[Manifest]:
    """Return neighbours whose files are worth merging, the smallest first; empty if none are.

    At least `MANIFESTS_MIN` of fewer rows than a power of eight, none with more than a third of
    all, and in all at most a compaction's rows and bytes.
    """
    limit = MANIFESTS_MIN
    while limit < ROWS_MAX:
        for run in _runs(manifests, limit):
            balanced = _balance(run)
            if balanced:
                return balanced
        limit *= MANIFESTS_MIN
    return []


def _balance(run: list[Manifest]) -> list[Manifest]:
    """Return the newest part in which none has more than its share, empty if it is too short."""
    while len(run) >= MANIFESTS_MIN:
        largest = max(range(len(run)), key=lambda i: run[i].rows)
        if SHARE * run[largest].rows <= sum(manifest.rows for manifest in run):
            return run
        run = run[largest + 1 :]
    return []


def _runs(manifests: Iterable[Manifest], limit: int) -> Iterator[list[Manifest]]:
    """Yield runs of neighbours of fewer than `limit` rows, within the bounds of one merging."""
    run: list[Manifest] = []
    for manifest in manifests:
        if run and not (len(run) < MANIFESTS_MAX and _fit([*run, manifest])):
            yield run
            run = []
        if manifest.rows < limit:
            run.append(manifest)
        else:
            yield run
            run = []
    yield run


def _fit(run: Sequence[Manifest]) -> bool:
    size_bytes = sum(segment.size_bytes for manifest in run for segment in manifest.segments)
    return sum(manifest.rows for manifest in run) <= ROWS_MAX and size_bytes <= BYTES_MAX


def merge(environment: Environment, directory: Path, first: int, last: int) -> Manifest:
    """Write the small files of the manifests from sequence `first` to `last` anew.

    Returns the manifest in their place; every new file and its copy are on disk under their names.
    When it raises OSError, it has removed what it wrote.  Holds the rows of one source and schema.
    """
    with environment.snapshot() as snapshot:
        found = load_manifests(snapshot)
    manifests = [m for m in found if first <= m.first_sequence and m.last_sequence <= last]
    revision = 1 + max(manifest.revision for manifest in manifests)
    files = SegmentFiles(directory)
    try:
        groups = _groups(segment for manifest in manifests for segment in manifest.segments)
        merged = Manifest(
            manifests[0].first_sequence,
            manifests[-1].last_sequence,
            tuple(part for manifest in manifests for part in manifest.kept),
            tuple(s for group in groups for s in _merge_group(files, directory, group, revision)),
            tuple(part for manifest in manifests for part in manifest.removed),
            revision,
        )
        files.finish(merged)
    except OSError:
        files.discard()
        raise
    return merged


def _groups(segments: Iterable[Segment]) -> list[list[Segment]]:
    groups: dict[Group, list[Segment]] = {}
    for segment in segments:
        key = segment.kind, segment.source, tuple(segment.columns.items())
        groups.setdefault(key, []).append(segment)
    return [*groups.values()]


def _merge_group(
    files: SegmentFiles, directory: Path, group: Sequence[Segment], revision: int
) -> Iterator[Segment]:
    """Yield the files of one source and schema: large ones as they are, small ones as fewer."""
    import polars as pl  # noqa: PLC0415 - not in the daemon

    small = [segment for segment in group if segment.rows < compact.SEGMENT_ROWS_MIN]
    yield from (segment for segment in group if segment not in small)
    if len(small) < 2:  # noqa: PLR2004 - one is not merged
        yield from small
        return
    frame = pl.concat([pl.read_parquet(directory / s.path, glob=False) for s in small])
    frame = frame.sort(EVENT_TIME, KNOWN_TIME, SEQUENCE)
    kind, source, columns = small[0].kind, small[0].source, small[0].columns
    for start, stop in pairwise(cut_days(frame[EVENT_TIME].to_numpy())):
        yield files.write(kind, source, columns, frame[start:stop], revision=revision)


if __name__ == "__main__":
    os.nice(10)  # ingest and predictions go first
    sys.exit(main())
