"""Scatter: how a call is split over shards, and its answers made one; no I/O.

A call that can be split knows how it looks whole, for a daemon that owns everything; so a client
without a map pays nothing.  What is read is answered row by row, what is written is whole or an
error: docs/decisions/shards.md.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from mlpd.client import requests as r
from mlpd.core.errors import MlpdError
from mlpd.core.hashing import SLOTS
from mlpd.core.routing import EPOCH_HEADER, NO_SLOT, Routing
from mlpd.core.shards import Shard, ShardMap

Sequences = Mapping[str, int]
"""A sequence by shard: there is no order between shards."""


@dataclass(frozen=True, slots=True)
class Topology:
    """The newest map and routing that a client knows."""

    shard_map: ShardMap
    routing: Routing

    def owners(self, slots: Sequence[int]) -> list[Shard | None]:
        """Return the owner of each slot, None for NO_SLOT."""
        owner = self.shard_map.owner
        return [None if slot == NO_SLOT else owner(slot) for slot in slots]


@dataclass(frozen=True, slots=True)
class Ask:
    """What a shard is asked for before `rows` that live elsewhere can be sent there.

    `places`: per group of keys in the request, by row the place of its key.
    """

    shard: Shard
    request: r.Request
    rows: Sequence[int]
    places: Sequence[Mapping[int, int]]


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a call: the `rows` that one shard gets, as it was `request`ed.

    One that `needs` answers first is sent as `Scatter.fill` returns it.
    """

    shard: Shard
    request: r.Request
    rows: Sequence[int]
    is_copy: bool = False
    needs: tuple[Ask, ...] = ()


@dataclass(slots=True)
class Gathered:
    """What came of a call so far: answers, and why rows have none.

    `confirmed`: rows of pieces that were answered, by shard; `home`: those of them that are no
    copies.
    """

    answers: list[tuple[Piece, Any]] = field(default_factory=list)
    failures: dict[int, MlpdError] = field(default_factory=dict)
    confirmed: dict[str, set[int]] = field(default_factory=dict)
    home: set[int] = field(default_factory=set)

    def add(self, piece: Piece, answer: Any) -> None:
        """Note a good answer."""
        self.answers.append((piece, answer))
        self.confirmed.setdefault(piece.shard.name, set()).update(piece.rows)
        if not piece.is_copy:
            self.home.update(piece.rows)

    def fail(self, rows: Sequence[int], error: MlpdError) -> None:
        """Note why rows have no answer; the first reason counts."""
        for row in rows:
            self.failures.setdefault(row, error)


class Scatter(ABC):
    """A call that can be split."""

    @abstractmethod
    def whole(self) -> r.Request:
        """Return it as one request."""

    @abstractmethod
    def known(self, routing: Routing) -> bool:
        """Tell whether the routing has what the call names."""

    @abstractmethod
    def split(self, topology: Topology, rows: Sequence[int] | None, done: Gathered) -> list[Piece]:
        """Return the pieces of some rows, None for all; rows that can't be sent fail in `done`."""

    def fill(self, topology: Topology, piece: Piece, answers: Mapping[str, Any]) -> Piece:
        """Return a piece with what it needs, by shard; without rows of which something is lost."""
        raise NotImplementedError

    @abstractmethod
    def merge(self, done: Gathered) -> Any:
        """Return the one answer; raises where nothing, or not all of a write, came back."""


class Labels(Scatter):
    """Labels: each goes to the shard in whose slot its prediction is, which the id tells."""

    def __init__(self, labels: Sequence[Any]) -> None:
        self._labels = labels

    def whole(self) -> r.Request:
        """Return it as one request."""
        return self._build(self._labels)

    def known(self, routing: Routing) -> bool:  # noqa: ARG002 - ids need none
        """Return True."""
        return True

    def split(
        self,
        topology: Topology,
        rows: Sequence[int] | None,
        done: Gathered,  # noqa: ARG002 - no label can't be sent
    ) -> list[Piece]:
        """Return a piece per shard; what is no id goes anywhere, to be refused."""
        by_shard: dict[Shard, list[int]] = {}
        for row in range(len(self._labels)) if rows is None else rows:
            slot = _slot_of_id(self._labels[row])
            shard_map = topology.shard_map
            shard = shard_map.arbiter if slot is None else shard_map.owner(slot)
            by_shard.setdefault(shard, []).append(row)
        headers = {EPOCH_HEADER: str(topology.shard_map.epoch)}
        return [
            Piece(shard, with_headers(self._build([self._labels[i] for i in rows]), headers), rows)
            for shard, rows in sorted(by_shard.items(), key=lambda item: item[0].name)
        ]

    def merge(self, done: Gathered) -> Any:
        """Return the counts' sums; raises the first failure, naming its labels."""
        raise_unconfirmed(done, len(self._labels), "labels")
        merged: dict[str, Any] = dict.fromkeys(_COUNTS, 0) | {"rejected": []}
        for piece, answer in done.answers:
            for name in _COUNTS:
                merged[name] += answer[name]
            merged["rejected"] += moved(answer["rejected"], piece.rows)
        merged["rejected"].sort(key=lambda row: row["index"])
        return merged

    def _build(self, labels: Sequence[Any]) -> r.Request:
        return r.call("POST", "v1", "feedback", fields={"labels": list(labels)})


_COUNTS = ("accepted", "joined", "orphans", "revised", "stale", "late", "conflicts")
_ID_CHARS = 32


def raise_unconfirmed(done: Gathered, rows: int, what: str, **details: Any) -> None:
    """Raise the first failure of a write in its class, saying which rows are not confirmed."""
    if not done.failures:
        return
    failed = sorted(done.failures)
    error = done.failures[failed[0]]
    raise type(error)(
        f"{len(failed)} of {rows} {what} are not confirmed by all their shards: {error.message}",
        code=error.code,
        hint="Send the same call again: what is stored counts once.",
        details={**error.details, "failed_rows": failed, **details},
    )


def moved(rejected: Sequence[Mapping[str, Any]], rows: Sequence[int]) -> list[dict[str, Any]]:
    """Return refused rows of a piece with their places in the call."""
    return [{**row, "index": rows[row["index"]]} for row in rejected]


def with_headers(request: r.Request, headers: Mapping[str, str]) -> r.Request:
    """Return the request with more headers."""
    return replace(request, headers={**request.headers, **headers})


def sorted_by_name(shards: Mapping[Shard, Any]) -> list[Shard]:
    """Return shards by name: the order of calls and answers doesn't depend on the rows."""
    return sorted(shards, key=lambda shard: shard.name)


def _slot_of_id(label: Any) -> int | None:
    prediction_id = label.get("prediction_id") if isinstance(label, Mapping) else None
    if not isinstance(prediction_id, str) or len(prediction_id) != _ID_CHARS:
        return None
    try:
        slot = int.from_bytes(bytes.fromhex(prediction_id)[8:10], "big")
    except ValueError:
        return None
    return slot if slot < SLOTS else None
