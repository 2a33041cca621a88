"""The history of slots as chunks of records, in the order of the log: what a move brings over.

A chunk covers the sequences after one and through another; its records hold the rows of them that
count for the slots.  The log's tail is read in the daemon, segments in a child (`moves_child`).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import msgpack
import numpy as np
from numpy.typing import NDArray

from mlpd.core.columns import Columns
from mlpd.core.hashing import SLOTS
from mlpd.core.routing import NO_SLOT, Entities
from mlpd.daemon.routing import concerned_by, concerned_slots
from mlpd.features.catalog import Catalog
from mlpd.storage.environment import Environment
from mlpd.storage.lineage import Lineage
from mlpd.storage.log import (
    LogRecord,
    RecordKind,
    compacted_through,
    copy_records,
    decode_record,
    encode_record,
)
from mlpd.storage.moves_store import flags_of
from mlpd.storage.transactions import Snapshot

CHUNK_BYTES = 256 << 10
"""A chunk is closed when it has so many: some 50 ms of the target's writer thread."""
RECORD_ROWS = 2_000
"""At most; fewer where they are large, as a daemon takes no body over 32 MiB."""
TAIL_RECORDS = 5_000
"""Records of the tail that one chunk looks at: some 20 ms."""

_EVENTS = frozenset({RecordKind.EVENTS})


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which rows: those that count for `slots` (per slot True), by `entities` of their source."""

    slots: NDArray[np.bool_]
    entities: Mapping[str, Entities]
    lineage: Lineage | None

    def rows(
        self, source: str, columns: Columns, sequences: NDArray[np.int64]
    ) -> NDArray[np.int64]:
        """Return the numbers of the rows that are wanted, ascending."""
        entities = self.entities.get(source, ())
        wanted = np.zeros(len(sequences), np.bool_)
        for slots in concerned_slots(source, entities, columns, len(sequences)):
            found = (slots != NO_SLOT) & self.slots[slots]
            if self.lineage is not None:
                found &= self.lineage.counts(np.maximum(slots, 0), sequences)
            wanted |= found
        return np.flatnonzero(wanted)


def wanted_of(catalog: Catalog, slots: Sequence[int], lineage: Lineage | None) -> Wanted:
    """Return which rows count for these slots."""
    flags = np.frombuffer(flags_of(tuple(slots)), np.uint8).astype(np.bool_)
    entities = {name: concerned_by(catalog, name) for name in catalog.views_by_source}
    return Wanted(flags, entities, lineage)


@dataclass
class Chunk:
    """Records that are gathered, of sequences after `after` and through `through`."""

    after: int
    through: int
    records: list[bytes] = field(default_factory=list)
    sequences: list[bytes] = field(default_factory=list)
    """Of each record's rows, int64 little-endian."""
    size_bytes: int = 0
    rows: int = 0

    def add(
        self,
        source: str,
        columns: Columns,
        times: tuple[NDArray[np.int64], NDArray[np.int64]],
        sequences: NDArray[np.int64],
    ) -> None:
        """Add rows of one source as a record; `times`: event times, known times."""
        record = encode_record(RecordKind.EVENTS, source, int(sequences[0]), columns, *times)
        self.records.append(record)
        self.sequences.append(sequences.astype("<i8").tobytes())
        self.size_bytes += len(record)
        self.rows += len(sequences)
        self.through = int(sequences[-1])

    def encode(self) -> bytes:
        """Return what `decode_chunk` reads."""
        fields = {
            "after": self.after,
            "through": self.through,
            "records": self.records,
            "sequences": self.sequences,
        }
        packed: bytes = msgpack.packb(fields)
        return packed


@dataclass(frozen=True, slots=True)
class Received:
    """A chunk as it came; each record's checksum is verified.

    `sequences`: those that all rows had at the source, ascending.
    """

    after: int
    through: int
    records: Sequence[tuple[LogRecord, Columns]]
    sequences: NDArray[np.int64]


def record_rows(row_bytes: float) -> int:
    """Return how many rows make a record, if they have so many bytes on average."""
    return max(1, min(RECORD_ROWS, int(CHUNK_BYTES / max(row_bytes, 1.0))))


def decode_chunk(fields: Mapping[str, Any]) -> Received:
    """Return a chunk; raises ValueError, KeyError, TypeError or MlpdError for what is none."""
    after, through = int(fields["after"]), int(fields["through"])
    records = [decode_record(r, int.from_bytes(r[8:16], "little")) for r in fields["records"]]
    if not 0 <= after <= through or any(r.kind is not RecordKind.EVENTS for r in records):
        raise ValueError("its sequences or kinds are wrong")
    sequences = np.frombuffer(b"".join(fields["sequences"]), "<i8").astype(np.int64)
    if len(sequences) != sum(record.count for record in records) or not (
        np.all(np.diff(sequences) > 0) and np.all((sequences > after) & (sequences <= through))
    ):
        raise ValueError("its rows' sequences are wrong")
    found = [(record, record.columns()) for record in records]
    return Received(after, through, found, sequences)


def tail_chunk(environment: Environment, wanted: Wanted, after: int) -> Chunk | None:
    """Return the first chunk of the log's tail after a sequence; None if it is compacted; blocks.

    One that ends before the newest sequence is followed by others.
    """
    with environment.snapshot() as snapshot:
        if after < compacted_through(snapshot):
            return None
        newest = int(snapshot.sequence)
        found = copy_records(snapshot, after + 1, newest, kinds=_EVENTS)
        copies = list(islice(found, TAIL_RECORDS))
    chunk = Chunk(after, after)
    for start, value in copies:
        record = decode_record(value, start)
        for through in _add_record(chunk, wanted, record, record_rows(len(value) / record.count)):
            chunk.through = through
            if chunk.size_bytes >= CHUNK_BYTES:
                return chunk
    if len(copies) < TAIL_RECORDS:
        chunk.through = newest
    return chunk


def touched_slots(snapshot: Snapshot, wanted: Wanted, after: int) -> NDArray[np.bool_] | None:
    """Return per slot whether an event behind a sequence concerns it, of the wanted slots.

    None where that can't be told: if the tail is compacted, or too long.
    """
    if after < compacted_through(snapshot):
        return None
    touched = np.zeros(SLOTS, np.bool_)
    found = copy_records(snapshot, after + 1, int(snapshot.sequence), kinds=_EVENTS)
    copies = list(islice(found, TAIL_RECORDS + 1))
    if len(copies) > TAIL_RECORDS:
        return None
    for start, value in copies:
        record = decode_record(value, start)
        entities = wanted.entities.get(record.source, ())
        slots = concerned_slots(record.source, entities, record.columns(), record.count)
        touched[slots[slots != NO_SLOT]] = True
    return touched & wanted.slots


def _add_record(chunk: Chunk, wanted: Wanted, record: LogRecord, at_once: int) -> Iterator[int]:
    """Add a record's wanted rows, of `at_once` each; yields the last sequence of each part."""
    columns = record.columns()
    for start in range(max(0, chunk.after + 1 - record.first), record.count, at_once):
        part = np.arange(start, min(start + at_once, record.count))
        taken = {name: column.take(part) for name, column in columns.items()}
        rows = wanted.rows(record.source, taken, part + record.first)
        if len(rows):
            kept = {name: column.take(rows) for name, column in taken.items()}
            times = record.event_us[part][rows], record.known_us[part][rows]
            chunk.add(record.source, kept, times, part[rows] + record.first)
        yield int(part[-1]) + record.first
