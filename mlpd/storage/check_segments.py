"""Checks of what segments hold, against their manifests; polars reads them, so in a child alone."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from mlpd.storage.check import Problem, check_digest
from mlpd.storage.environment import Environment
from mlpd.storage.files import DataDirectory
from mlpd.storage.frames import polars_type
from mlpd.storage.offline import RESCANS
from mlpd.storage.segments import (
    EVENT_TIME,
    KNOWN_TIME,
    MANIFESTS,
    SEQUENCE,
    Manifest,
    Segment,
    load_manifests,
)
from mlpd.storage.unnamed import find_beyond, find_unnamed

if TYPE_CHECKING:
    import polars as pl

Sequences = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class SegmentsReport:
    """What was looked at and what is wrong; `unnamed` files belong to no manifest: leftovers."""

    problems: list[Problem]
    segments: int
    rows: int
    size_bytes: int
    unnamed: list[Path]


def check_segments(environment: Environment, data: DataDirectory) -> SegmentsReport:
    """Verify every segment's digest, schema, rows and ranges, and the manifests' copies.

    Reads everything once and the stamps twice; holds the stamps of one manifest at a time.  Begins
    anew if a daemon wrote files anew meanwhile, and so took the former ones away.
    """
    for _ in range(RESCANS):
        manifests = _load(environment)
        problems = [p for manifest in manifests for p in _check_manifest(data.segments, manifest)]
        if not problems or _are_current(manifests, environment):
            break
    segments = [segment for manifest in manifests for segment in manifest.segments]
    unnamed = find_unnamed(manifests, data.segments)
    return SegmentsReport(
        problems=[*problems, *_check_unnamed(unnamed, environment, data.segments)],
        segments=len(segments),
        rows=sum(segment.rows for segment in segments),
        size_bytes=sum(segment.size_bytes for segment in segments),
        unnamed=unnamed,
    )


def _load(environment: Environment) -> list[Manifest]:
    with environment.snapshot() as snapshot:
        return load_manifests(snapshot)


def _are_current(manifests: list[Manifest], environment: Environment) -> bool:
    now = {manifest.name for manifest in _load(environment)}
    return all(manifest.name in now for manifest in manifests)


def _check_unnamed(
    paths: list[Path], environment: Environment, directory: Path
) -> Iterator[Problem]:
    """A file that nobody names is harmless, unless it has rows that the log never had."""
    with environment.snapshot() as snapshot:  # after the files: a daemon may be compacting
        sequence = snapshot.sequence
    for path in find_beyond(paths, sequence):
        subject = str(path.relative_to(directory))
        what = f"no manifest names it, and it has rows after {sequence}, where the log ends"
        yield Problem("log_behind_segments", subject, what)


def _check_manifest(directory: Path, manifest: Manifest) -> Iterator[Problem]:
    copy = directory / MANIFESTS / manifest.name
    if not copy.is_file() or copy.read_bytes() != manifest.encode():
        subject = f"{MANIFESTS}/{manifest.name}"
        yield Problem("manifest_copy", subject, "it is not the manifest that LMDB has")
    found: list[Sequences] = [np.arange(a, b + 1, dtype=np.int64) for a, b in manifest.kept]
    readable = True
    for segment in manifest.segments:
        damage = [*check_digest(directory, segment)]
        if not damage:
            sequences, damage = _check_contents(directory / segment.path, segment)
            found.append(sequences)
        readable = readable and not damage
        yield from damage
    if readable:
        yield from _check_coverage(manifest, np.sort(np.concatenate([*found, _NONE])))


_NONE = np.empty(0, np.int64)


def _check_contents(path: Path, segment: Segment) -> tuple[Sequences, list[Problem]]:
    import polars as pl  # noqa: PLC0415 - not in the daemon

    stamps = [EVENT_TIME, KNOWN_TIME, SEQUENCE]
    try:
        schema = dict(pl.read_parquet_schema(path))
        frame = pl.read_parquet(path, columns=stamps, glob=False)
    except (pl.exceptions.PolarsError, OSError) as error:
        return _NONE, [Problem("segment_corrupt", segment.path, f"it can't be read: {error}")]
    wanted: dict[str, pl.DataType] = {name: pl.Int64() for name in stamps}
    wanted |= {name: polars_type(dtype) for name, dtype in segment.columns.items()}
    differences = [*_differences(frame, segment)]
    if schema != wanted:
        differences.append(f"its columns are {', '.join(schema)}")
    problems = [Problem("segment_differs", segment.path, found) for found in differences]
    return frame[SEQUENCE].to_numpy(), problems


def _differences(frame: "pl.DataFrame", segment: Segment) -> Iterator[str]:
    """Yield in what way a file is not what its manifest says."""
    if len(frame) != segment.rows:
        yield f"it has {len(frame)} rows, its manifest says {segment.rows}"
        return
    event_us, known_us, sequences = (
        frame[name].to_numpy() for name in (EVENT_TIME, KNOWN_TIME, SEQUENCE)
    )
    ranges = (
        ("sequences", sequences, segment.first_sequence, segment.last_sequence),
        ("event times", event_us, segment.min_event_us, segment.max_event_us),
        ("known times", known_us, segment.min_known_us, segment.max_known_us),
    )
    for what, values, least, greatest in ranges:
        if (int(values.min()), int(values.max())) != (least, greatest):
            yield (
                f"its {what} lie from {values.min()} to {values.max()}, its manifest says "
                f"{least} to {greatest}"
            )


def _removed(manifest: Manifest, sequences: Sequences) -> NDArray[np.bool_]:
    """Return which sequences lie where rows were removed."""
    covered = np.zeros(len(sequences), np.bool_)
    for removal in manifest.removed:
        covered |= (sequences >= removal.first_sequence) & (sequences <= removal.last_sequence)
    return covered


def _check_coverage(manifest: Manifest, found: Sequences) -> Iterator[Problem]:
    """Every sequence of the manifest's range lies in one file or record, or was removed."""
    wanted = np.arange(manifest.first_sequence, manifest.last_sequence + 1, dtype=np.int64)
    missing, foreign = np.setdiff1d(wanted, found), np.setdiff1d(found, wanted)
    twice = found[1:][found[1:] == found[:-1]]
    removed = sum(removal.rows for removal in manifest.removed)
    if len(missing) == removed:
        missing = missing[~_removed(manifest, missing)]
    examples = [*(f"{s} is in no file" for s in missing[:3].tolist())]
    examples += [f"{s} is there twice" for s in twice[:3].tolist()]
    examples += [f"{s} belongs elsewhere" for s in foreign[:3].tolist()]
    if removed and not len(missing) and found.size + removed != wanted.size:
        examples.append(f"... {removed} were removed, {wanted.size - found.size} are gone")
    if not examples:
        return
    yield Problem("segment_coverage", manifest.name, f"sequence {', '.join(examples)}")
