"""Child entry `moves`: what Parquet has of slots, chunk by chunk, into a file.

That is compacted history, and vectors of predictions.
"""

from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from mlpd.core.columns import Columns
from mlpd.core.shards import parse_runs
from mlpd.daemon.child import LENGTH, Send
from mlpd.daemon.moved_events import CHUNK_BYTES, Chunk, Wanted, record_rows, wanted_of
from mlpd.daemon.moved_predictions import TAIL, Served, base_chunk
from mlpd.daemon.offline import Offline, open_offline
from mlpd.daemon.predictions import prediction_key, with_vector
from mlpd.daemon.served_files import load_files
from mlpd.daemon.served_frames import from_frame
from mlpd.daemon.served_pages import read_file
from mlpd.features.stamps import Stamps, stamps_of
from mlpd.storage.frames import from_series
from mlpd.storage.log import RecordKind
from mlpd.storage.segments import Manifest, Segment, load_manifests


def run(request: dict[str, Any], send: Send) -> None:
    """Do what `work` says: `history` or `predictions`."""
    _WORK[request["work"]](request, send)


def write_predictions(request: dict[str, Any], send: Send) -> None:
    """Write all rows of the prediction log behind a position, those in files with their vectors.

    As `write_history`, but for `after` and `through`, which are positions.  Holds the vectors.
    """
    slots, after = parse_runs(request["slots"]), request["after"]
    with open_offline(request) as offline, Path(request["path"]).open("wb") as file:
        vectors = dict(_vectors(offline, slots))

        def restore(key: bytes, value: bytes) -> bytes:
            found = vectors.get(key)
            return value if found is None else with_vector(value, *found)

        while after != TAIL:
            chunk = base_chunk(offline.environment, slots, after, restore)
            _write(file, chunk, send)
            after = chunk.through


def _vectors(
    offline: Offline, slots: list[int]
) -> Iterator[tuple[bytes, tuple[bytes, Mapping[str, Any]]]]:
    """Yield vectors and requests of the slots' rows that lie in files, by key."""
    import polars as pl  # noqa: PLC0415 - in the child alone

    with offline.environment.snapshot() as snapshot:
        numbers = [file.number for file in load_files(snapshot)]
    slot = pl.col("prediction_id").str.slice(16, 4).str.to_integer(base=16)
    for number in numbers:
        frame = read_file(offline.environment, offline.paths.predictions, number)
        for p in () if frame is None else from_frame(frame.filter(slot.is_in(slots))):
            yield prediction_key(p.prediction_id), (p.vector.tobytes(), p.given)


def _write(file: BinaryIO, chunk: Chunk | Served, send: Send) -> None:
    data = chunk.encode()
    file.write(LENGTH.pack(len(data)) + data)
    offset = file.tell() - len(data)
    send({"kind": "chunk", "after": chunk.after, "through": chunk.through,
          "offset": offset, "size": len(data)})  # fmt: skip


def write_history(request: dict[str, Any], send: Send) -> None:
    """Write chunks after the sequence `after` to the file `path`, each after its u32le length.

    Sends a "chunk" message for each: `after`, `through`, `offset`, `size`.  Holds the wanted rows
    of one manifest.
    """
    with open_offline(request) as offline, Path(request["path"]).open("wb") as file:
        with offline.environment.snapshot() as snapshot:
            manifests = load_manifests(snapshot)
        wanted = wanted_of(offline.catalog, parse_runs(request["slots"]), offline.lineage())
        after = request["after"]
        for manifest in manifests:
            if manifest.last_sequence <= after:
                continue
            for chunk in _chunks(offline, manifest, wanted, after):
                _write(file, chunk, send)
                after = chunk.through


_WORK = {"history": write_history, "predictions": write_predictions}


Found = tuple[str, Columns, Stamps, int]
"""Wanted rows of a file, in sequence order: source, columns, stamps, how many make a record."""


def _chunks(offline: Offline, manifest: Manifest, wanted: Wanted, after: int) -> Iterator[Chunk]:
    """Yield the chunks of a manifest; the last one reaches to its end."""
    files = [
        found
        for segment in manifest.segments
        if segment.kind is RecordKind.EVENTS and segment.last_sequence > after
        for found in _read(offline, segment, wanted, after)
    ]
    chunk = Chunk(after, after)
    parts = [(stamps.sequences, at_once) for *_, stamps, at_once in files]
    for number, rows in _in_order(parts):
        source, columns, stamps, _ = files[number]
        taken = {name: column.take(rows) for name, column in columns.items()}
        kept = stamps.take(rows)
        chunk.add(source, taken, (kept.event_us, kept.known_us), kept.sequences)
        if chunk.size_bytes >= CHUNK_BYTES:
            yield chunk
            chunk = Chunk(chunk.through, chunk.through)
    chunk.through = manifest.last_sequence
    yield chunk


def _read(offline: Offline, segment: Segment, wanted: Wanted, after: int) -> Iterator[Found]:
    """Yield the wanted rows of a file, all columns, in sequence order; none if there are none."""
    import polars as pl  # noqa: PLC0415 - in the child alone

    frame = pl.read_parquet(offline.paths.segments / segment.path, glob=False)
    frame = frame.filter(pl.col("__sequence") > after).sort("__sequence")
    stamps = stamps_of(frame)
    keys = {
        name: from_series(frame[name], segment.columns[name])
        for entity in wanted.entities.get(segment.source, ())
        for name in entity.columns
        if name in segment.columns
    }
    rows = wanted.rows(segment.source, keys, stamps.sequences)
    if len(rows):
        kept = frame[rows]
        columns = {name: from_series(kept[name], t) for name, t in segment.columns.items()}
        at_once = record_rows(kept.estimated_size() / len(rows))
        yield segment.source, columns, stamps.take(rows), at_once


def _in_order(
    parts: list[tuple[NDArray[np.int64], int]],
) -> Iterator[tuple[int, NDArray[np.int64]]]:
    """Yield (part, its rows) such that all sequences ascend.

    `parts`: sequences, and how many rows of a part may come at once.
    """
    if not parts:
        return
    found = [sequences for sequences, _ in parts]
    of = np.repeat(np.arange(len(found)), [len(part) for part in found])
    rows = np.concatenate([np.arange(len(part)) for part in found])
    order = np.argsort(np.concatenate(found), kind="stable")
    of, rows = of[order], rows[order]
    cuts = np.flatnonzero(np.diff(of)) + 1
    for start, stop in pairwise([0, *cuts.tolist(), len(of)]):
        number = int(of[start])
        at_once = parts[number][1]
        for at in range(start, stop, at_once):
            yield number, rows[at : min(at + at_once, stop)]
