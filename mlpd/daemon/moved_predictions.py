"""The prediction log of slots as chunks: served rows with their labels, outcomes of their units.

First come all rows of the slots in the order of their keys, then what changed since the move began,
in the order of the changes and as it is by then: so the last word on a row is always the newest.  A
position tells how far that is; positions sort as bytes.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from heapq import merge
from itertools import groupby
from operator import itemgetter
from typing import Any

import msgpack
from xxhash import xxh64_intdigest

from mlpd.daemon.moved_rows import SERVED, runs_of
from mlpd.daemon.predictions import (
    EXPERIMENT,
    KEY_BYTES,
    SEQUENCE,
    UNIT,
    VECTOR,
    prediction_facts,
)
from mlpd.daemon.unit_outcomes import unit_prefix
from mlpd.storage.environment import Environment
from mlpd.storage.moved_keys import OUTCOME, PREDICTION, read_changed
from mlpd.storage.tables import Table
from mlpd.storage.transactions import Snapshot

CHUNK_BYTES = 256 << 10
"""A chunk is closed when it has so many: some 20 ms of the target's writer thread."""
CHUNK_ROWS = 1_000
BASE, TAIL = b"b", b"t"
"""What positions begin with: then a key of the table, or a position of the list of changes."""
POSITION_BYTES_MAX = 26

Item = tuple[bytes, bytes | None]
"""Key and value, None where there is none."""
Row = tuple[bytes, bytes | None, bytes | None]
"""Key, prediction, label.  Of the tail, a row whose label alone changed has no prediction."""
Restore = Callable[[bytes, bytes], bytes]
"""Given a row's key and value without vector and request, returns the value that has them."""


@dataclass
class Served:
    """Rows behind the position `after` and up to `through`, and outcomes of units among them.

    `needs`: the newest sequence that one of the predictions saw.  `done`: nothing is behind it yet.
    """

    after: bytes
    through: bytes
    rows: list[Row] = field(default_factory=list)
    outcomes: list[Item] = field(default_factory=list)
    needs: int = 0
    done: bool = False

    def encode(self) -> bytes:
        """Return what `decode_served` reads."""
        body: bytes = msgpack.packb((self.after, self.through, self.rows, self.outcomes))
        packed: bytes = msgpack.packb(
            {
                "served": body,
                "needs": self.needs,
                "done": self.done,
                "new": self.after != self.through,
                "digest": xxh64_intdigest(body),
            }
        )
        return packed


def decode_served(fields: Mapping[str, Any]) -> Served:
    """Return a chunk; raises ValueError, KeyError or TypeError for what is none."""
    body = fields["served"]
    if xxh64_intdigest(body) != fields["digest"]:
        raise ValueError("its checksum differs")
    after, through, rows, outcomes = msgpack.unpackb(body)
    found = [(bytes(key), value, label) for key, value, label in rows]
    if after > through or any(len(key) != KEY_BYTES for key, _, _ in found):
        raise ValueError("its positions or keys are wrong")
    items = [(bytes(key), value) for key, value in outcomes]
    return Served(after, through, found, items, int(fields["needs"]), bool(fields["done"]))


def peek(chunk: bytes) -> tuple[int, bool, bool]:
    """Return of an encoded chunk what it `needs`, whether it is `done`, and is new at all."""
    fields = msgpack.unpackb(chunk)
    return fields["needs"], fields["done"], fields["new"]


def base_chunk(
    environment: Environment, slots: Sequence[int], after: bytes, restore: Restore | None = None
) -> Served:
    """Return the next chunk of all rows of the slots; blocks for some 10 ms.

    The last one's `through` is TAIL.  `restore`: for rows whose vector lies in a file.
    """
    chunk, size_bytes = Served(after, TAIL), 0
    with environment.snapshot() as snapshot:
        outcomes = _Outcomes(snapshot)
        for key, value, label in _rows(snapshot, slots, after.removeprefix(BASE)):
            whole = value
            if value is not None:
                facts = prediction_facts(value)
                if facts[VECTOR] is None and restore is not None:
                    whole = restore(key, value)
                chunk.needs = max(chunk.needs, facts[SEQUENCE])
                chunk.outcomes += outcomes.of(facts)
            chunk.rows.append((key, whole, label))
            size_bytes += len(whole or b"")
            if size_bytes >= CHUNK_BYTES or len(chunk.rows) >= CHUNK_ROWS:
                chunk.through = BASE + key
                break
    return chunk


def tail_of_changes(environment: Environment, flags: bytes, after: bytes) -> Served:
    """Return the next chunk of what changed in slots (per slot 1) since the move began; blocks."""
    chunk, size_bytes = Served(after, after), 0
    with environment.snapshot() as snapshot:
        outcomes = _Outcomes(snapshot)
        changed = read_changed(snapshot, after.removeprefix(TAIL), CHUNK_ROWS)
        for position, kind, key in changed:
            if kind == OUTCOME:
                chunk.outcomes.append((key, snapshot.get(Table.UNITS, key)))
            elif flags[key[0] << 8 | key[1]]:
                value = snapshot.get(Table.PREDICTIONS, key) if kind == PREDICTION else None
                chunk.rows.append((key, value, snapshot.get(Table.LABELS, key)))
                if value is not None:
                    facts = prediction_facts(value)
                    chunk.needs = max(chunk.needs, facts[SEQUENCE])
                    chunk.outcomes += outcomes.of(facts)
                    size_bytes += len(value)
            chunk.through = TAIL + position
            if size_bytes >= CHUNK_BYTES:
                return chunk
    chunk.done = len(changed) < CHUNK_ROWS
    return chunk


def digest_served(snapshot: Snapshot, slots: Sequence[int]) -> tuple[str, int]:
    """Return 16 hex digits over the keys of all predictions and all labels, and how many there are.

    What else a prediction has was checked on the way.  About 1 us each.
    """
    total, count = 0, 0
    for start, stop in runs_of(slots):
        for table in SERVED:
            for key, value in snapshot.scan(table, start, stop):
                total += xxh64_intdigest(key + (value if table is Table.LABELS else b""))
                count += 1
    return f"{total % 2**64:016x}", count


def outcomes_of(environment: Environment, slots: Sequence[int]) -> list[bytes]:
    """Return the keys of all outcomes of units with predictions in slots, in `units`; blocks."""
    found: list[bytes] = []
    after = b""
    with environment.snapshot() as snapshot:
        if not snapshot.count(Table.UNITS):
            return []
    while after != TAIL:
        chunk = base_chunk(environment, slots, after)
        found += (key for key, _ in chunk.outcomes)
        after = chunk.through
    return [*dict.fromkeys(found)]


class _Outcomes:
    """Looks up outcomes of units, of each once."""

    def __init__(self, snapshot: Snapshot) -> None:
        self._snapshot = snapshot
        self._has_any = bool(snapshot.count(Table.UNITS))
        self._seen: set[tuple[str, str]] = set()

    def of(self, facts: Sequence[Any]) -> list[Item]:
        experiment, unit = facts[EXPERIMENT], facts[UNIT]
        if not self._has_any or experiment is None or unit is None:
            return []
        if (experiment, unit) in self._seen:
            return []
        self._seen.add((experiment, unit))
        return unit_outcomes(self._snapshot, experiment, unit)


def unit_outcomes(snapshot: Snapshot, experiment: str, unit: str) -> list[Item]:
    """Return the outcomes of a unit in an experiment, as the table has them."""
    start = unit_prefix(experiment, unit)
    return [*snapshot.scan(Table.UNITS, start, start[:-1] + b"\x01")]


def _rows(snapshot: Snapshot, slots: Sequence[int], after: bytes) -> Iterator[Row]:
    """Yield the rows of slots behind a key: those of either table."""
    for start, stop in runs_of(slots):
        if stop <= after[:2]:
            continue
        at = max(start, after + b"\x00" if after else b"")
        tables = (_numbered(snapshot, number, at, stop) for number in range(len(SERVED)))
        found = merge(*tables, key=itemgetter(0, 1))
        for key, parts in groupby(found, key=itemgetter(0)):
            by_table = {number: value for _, number, value in parts}
            yield key, by_table.get(0), by_table.get(1)


def _numbered(
    snapshot: Snapshot, number: int, start: bytes, stop: bytes
) -> Iterator[tuple[bytes, int, bytes]]:
    return ((key, number, value) for key, value in snapshot.scan(SERVED[number], start, stop))
