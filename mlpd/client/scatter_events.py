"""Events over shards: each row to all shards that it concerns, counted at its home alone."""

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import Any

import numpy as np

from mlpd.client import requests as r
from mlpd.client.scatter import (
    Gathered,
    Piece,
    Scatter,
    Topology,
    moved,
    raise_unconfirmed,
    with_headers,
)
from mlpd.client.table import Table
from mlpd.core.errors import ConflictError
from mlpd.core.routing import (
    EPOCH_HEADER,
    NO_SLOT,
    ROUTING_HEADER,
    SLOTS_HEADER,
    Routing,
    Slots,
    home_slot,
    key_slots,
)
from mlpd.core.shards import Shard, format_runs

SLOTS_MAX = 800
"""Slots that one piece names: some 4 KB of a header."""


class EventRows(Scatter):
    """Events of one source, or of several in one call.

    A row's number counts on over the sources, in their order.  Pieces have a key of their own each,
    drawn from the call's key and their rows.
    """

    def __init__(
        self,
        sources: Mapping[str, r.Data],
        *,
        single: bool,
        all_or_nothing: bool | None,
        idempotency_key: str | None,
    ) -> None:
        self._data = sources
        self._single, self._whole = single, all_or_nothing
        self._key = idempotency_key or os.urandom(16).hex()
        self._sent: dict[str, Mapping[int, set[int]]] = {}

    def whole(self) -> r.Request:
        """Return it as one request."""
        return r.with_idempotency_key(self._build(self._data), self._key)

    def known(self, routing: Routing) -> bool:
        """Tell whether the routing has the sources."""
        return all(name in routing.sources for name in self._data)

    def split(self, topology: Topology, rows: Sequence[int] | None, done: Gathered) -> list[Piece]:
        """Return the pieces for each shard: rows at home there, and copies.

        Raises ConflictError(code="spans_shards") if there are several and it is all or nothing.
        """
        covered = self._covered(done)
        wanted = range(len(self)) if rows is None else rows
        concerned = self._concerned(topology.routing)
        packs: dict[tuple[bool, Shard], list[_Pack]] = {}
        for row in wanted:
            owners: dict[Shard, set[int]] = {}
            for slot in concerned[row]:
                owners.setdefault(topology.shard_map.owner(slot), set()).add(slot)
            for i, (shard, there) in enumerate(owners.items()):
                missing = there - covered.get(row, set())
                if missing:
                    is_copy = i > 0 or row in done.home
                    _put(packs.setdefault((is_copy, shard), []), row, missing, there - missing)
        if not packs and not done.answers:
            packs[False, topology.shard_map.arbiter] = [_Pack()]
        if self._whole and len({shard for _, shard in packs}) > 1:
            raise ConflictError(
                "the events concern several shards, which can't store all of them or nothing",
                code="spans_shards",
                hint="Leave all_or_nothing away, or send what concerns one shard.",
            )
        return [
            self._piece(topology, shard, pack, is_copy=is_copy)
            for is_copy, shard in sorted(packs, key=lambda key: (key[0], key[1].name))
            for pack in packs[is_copy, shard]
        ]

    def merge(self, done: Gathered) -> dict[str, Any]:
        """Return one answer, in which each row counts once; raises if one isn't confirmed."""
        raise_unconfirmed(done, len(self), "events", idempotency_key=self._key)
        answers = [answer for piece, answer in done.answers if not piece.is_copy]
        sequences: dict[str, int] = {}
        for piece, answer in done.answers:
            known = sequences.get(piece.shard.name, 0)
            sequences[piece.shard.name] = max(known, answer["sequence"])
        rejected = self._rejected(done)
        return {
            "accepted": sum(answer["accepted"] for answer in answers),
            "sequence": sequences,
            "rejected": [rejected[row] for row in sorted(rejected)],
            "clamped": sum(answer["clamped"] for answer in answers),
            "duplicates": sum(answer["duplicates"] for answer in answers),
            "known_us": max(answer["known_us"] for _, answer in done.answers),
            "replayed": all(answer["replayed"] for _, answer in done.answers),
        }

    def __len__(self) -> int:
        return sum(map(len, self._tables.values()))

    @cached_property
    def _tables(self) -> dict[str, Table]:
        return {name: Table(data) for name, data in self._data.items()}

    @cached_property
    def _starts(self) -> dict[str, int]:
        """Return the number of the first row of each source."""
        lengths = [len(table) for table in self._tables.values()]
        return dict(zip(self._data, accumulate(lengths, initial=0), strict=False))

    def slots(self, routing: Routing) -> set[int]:
        """Return the slots that the events concern."""
        found = [slots for _, columns in self._slots(routing) for slots in columns]
        return set(np.unique(np.concatenate(found)).tolist()) - {NO_SLOT} if found else set()

    def _concerned(self, routing: Routing) -> list[list[int]]:
        """Return the slots that each row concerns, its home first."""
        return [
            [slot for slot in of_row if slot != NO_SLOT]
            for _, slots in self._slots(routing)
            for of_row in zip(*(column.tolist() for column in slots), strict=True)
        ]

    def _slots(self, routing: Routing) -> Iterator[tuple[str, list[Slots]]]:
        """Yield sources with the slots of their rows, by entity and then of rows without a key."""
        for source, table in self._tables.items():
            entities = routing.sources.get(source, ())
            columns = table.columns(dict.fromkeys(c for e in entities for c in e.columns))
            slots = [key_slots(entity, columns, len(table)) for entity in entities]
            yield source, [*slots, _nowhere(slots, home_slot(source), len(table))]

    def _piece(self, topology: Topology, shard: Shard, pack: "_Pack", *, is_copy: bool) -> Piece:
        rows = [*pack.covers]
        parts = {source: self._tables[source].take(own) for source, own in self._own(rows)}
        headers = {EPOCH_HEADER: str(topology.shard_map.epoch)}
        headers[ROUTING_HEADER] = topology.routing.version
        if pack.others:
            headers[SLOTS_HEADER] = format_runs(sorted(pack.slots))
        key = f"{self._key}/{_digest(pack.covers)}"
        self._sent[key] = pack.covers
        request = r.with_idempotency_key(self._build(parts), key)
        return Piece(shard, with_headers(request, headers), rows, is_copy)

    def _covered(self, done: Gathered) -> dict[int, set[int]]:
        """Return the slots for which rows are stored, as far as that is known."""
        covered: dict[int, set[int]] = {}
        for piece, _ in done.answers:
            for row, slots in self._sent[piece.request.headers["Idempotency-Key"]].items():
                covered.setdefault(row, set()).update(slots)
        return covered

    def _own(self, rows: Sequence[int]) -> Iterator[tuple[str, list[int]]]:
        """Yield sources with their own numbers of some rows; those without any are left out."""
        for source, table in self._tables.items():
            start = self._starts[source]
            own = [row - start for row in rows if start <= row < start + len(table)]
            if own or self._single:
                yield source, own

    def _build(self, sources: Mapping[str, r.Data]) -> r.Request:
        options = {"all_or_nothing": self._whole}
        if self._single:
            ((source, data),) = sources.items()
            return r.batch("v1", "events", source, data=data, fields=options)
        parts = {
            name: {"columns" if isinstance(data, Mapping) else "rows": r.plain_table(data)}
            for name, data in sources.items()
        }
        return r.call("POST", "v1", "events", fields={"sources": parts, **options})

    def _rejected(self, done: Gathered) -> dict[int, dict[str, Any]]:
        """Return refused rows once, by number, with their indexes in their source."""
        found: dict[int, dict[str, Any]] = {}
        for piece, answer in done.answers:
            for source, own in self._own(piece.rows):
                refused = [row for row in answer["rejected"] if row["source"] == source]
                for row in moved(refused, own):
                    found.setdefault(self._starts[source] + row["index"], row)
        return found


@dataclass(slots=True)
class _Pack:
    """Rows that go to one shard together, each for some slots.

    `slots`: all of these; `others`: slots there for which a row is stored already, so that it is
    for the `slots` alone.
    """

    covers: dict[int, set[int]] = field(default_factory=dict)
    slots: set[int] = field(default_factory=set)
    others: set[int] = field(default_factory=set)


def _put(packs: list[_Pack], row: int, slots: set[int], others: set[int]) -> None:
    """Put a row where it is for its slots, and for none of the others, whatever else is there."""
    for pack in packs:
        is_plain = not others and not pack.others
        fits = len(pack.slots) < SLOTS_MAX and not (slots & pack.others or others & pack.slots)
        if is_plain or (fits and bool(others) == bool(pack.others)):
            break
    else:
        packs.append(pack := _Pack())
    pack.covers[row] = slots
    pack.slots |= slots
    pack.others |= others


def _nowhere(slots: Sequence[Slots], home: int, rows: int) -> Slots:
    """Return `home` for rows without any key, NO_SLOT for others."""
    if not slots:
        return np.full(rows, home)
    return np.where(np.all([s == NO_SLOT for s in slots], axis=0), home, NO_SLOT)


def _digest(covers: Mapping[int, Iterable[int]]) -> str:
    """Return digits that tell rows, and for which slots they are."""
    flat = [number for row, slots in covers.items() for number in (-1 - row, *sorted(slots))]
    return hashlib.blake2b(np.array(flat, "<i8").tobytes(), digest_size=8).hexdigest()
