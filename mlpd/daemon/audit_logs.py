"""Logs of an audit: which shard's tells what served rows saw, this one's or another's, fetched."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from mlpd.core.columns import DType
from mlpd.core.convert import column_of
from mlpd.core.routing import NO_SLOT, key_slots
from mlpd.core.specs import Closure, EntitySpec
from mlpd.daemon.offline import Offline
from mlpd.daemon.predictions import Prediction
from mlpd.features.assemble import FeatureFrame, ViewPart
from mlpd.features.block import Block
from mlpd.features.catalog import Catalog
from mlpd.features.horizon import find_gone
from mlpd.features.offline import (
    JoinOptions,
    Spine,
    join_parts,
    needed_columns,
    parts_by_entity,
    parts_by_source,
)
from mlpd.features.tombstones import DELETED
from mlpd.storage.horizons import Horizon
from mlpd.storage.lineage import Lineage, decode_lineage
from mlpd.storage.map_store import FileMapStore, Member
from mlpd.storage.segments import EVENT_TIME, KNOWN_TIME, SEQUENCE

if TYPE_CHECKING:
    import polars as pl

OWN: Final = 0
"""Number of this shard's own log; those of others are by their place in the map, from 1."""
NOBODY: Final = -1
"""No log tells any more what a row saw."""

Int64s = NDArray[np.int64]
Bools = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class FetchedLog(Offline):
    """Another shard's events, in files here by source, with its sequences and all copies.

    `through`: all that it had up to this one are in them.  `gone`: its horizons.  `past`: for which
    of its slots rows count.
    """

    files: Mapping[str, str] = field(default_factory=dict)
    gone: Mapping[str, Horizon] = field(default_factory=dict)
    past: Lineage | None = None

    def horizons(self) -> dict[str, Horizon]:
        """Return what is gone of which source on that shard."""
        return dict(self.gone)

    def lineage(self) -> Lineage | None:
        """Return for which slots rows count on that shard; None for all."""
        return self.past

    def scan(self, source: str, columns: Mapping[str, DType]) -> "pl.LazyFrame":
        """Return that shard's events of a source with DELETED."""
        import polars as pl  # noqa: PLC0415 - in the child alone

        names = [EVENT_TIME, KNOWN_TIME, SEQUENCE, *columns, DELETED]
        return pl.scan_parquet(self.files[source], glob=False).select(names)

    def has(self, source: str, columns: Sequence[str]) -> bool:
        """Tell whether the events were fetched, with these columns."""
        import polars as pl  # noqa: PLC0415 - in the child alone

        path = self.files.get(source)
        return path is not None and {*columns} <= pl.read_parquet_schema(path).keys()


@dataclass(frozen=True, slots=True)
class Logs:
    """The log of this shard, and those of others by number; None where they aren't fetched yet."""

    own: Offline
    others: Mapping[int, FetchedLog] | None = None
    member: Member | None = None

    def through(self, catalog: Catalog) -> "Logs":
        """Return them as seen through other definitions."""
        others = self.others
        if others is not None:
            others = {number: replace(log, catalog=catalog) for number, log in others.items()}
        return replace(self, own=replace(self.own, catalog=catalog), others=others)

    def by_number(self) -> dict[int, Offline]:
        """Return those that are here."""
        return {OWN: self.own, **(self.others or {})}

    def shard(self, number: int) -> str:
        """Return the name of the shard with this number."""
        assert self.member is not None
        return self.member.shard_map.shards[number - 1].name


@dataclass(frozen=True, slots=True)
class Seen:
    """What rows saw of one entity: in which log, int64 [n], and up to which sequence of it."""

    logs: Int64s
    sequences: Int64s


def open_logs(offline: Offline, found: Mapping[str, Mapping[str, Any]] | None) -> Logs:
    """Return this shard's log, and those of others as `Gathering.fetch_logs` told of them."""
    member = FileMapStore(offline.paths.root).load()
    if member is None or found is None:
        return Logs(offline, None, member)
    others = {
        1 + member.shard_map.index(shard): FetchedLog(
            *(offline.paths, offline.environment, offline.catalog, log["through"]),
            files=log["files"],
            gone={name: Horizon(*fields) for name, fields in log["horizons"].items()},
            past=decode_lineage(log["lineage"]),
        )
        for shard, log in found.items()
    }
    return Logs(offline, others, member)


class AuditedRows:
    """Served rows that one version of a service was read for, and which logs tell what they saw.

    A key's events are in the log of the shard that owns it, and were when the row was served: this
    one, up to the row's sequence, or another one, up to that of the cells which it gave.
    """

    def __init__(self, logs: Logs, closure: Closure, rows: Sequence[Prediction]) -> None:
        """`logs`: through the definitions that have `closure`."""
        self.rows = rows
        self._logs, self._closure = logs, closure
        self._layout = logs.own.catalog.layout(closure)
        self._t_us = np.array([p.t_us for p in rows], np.int64)
        entities = [parts.entity for parts in self._layout.entities]
        self._seen = {entity.name: find_seen(logs, entity, rows) for entity in entities}

    def elsewhere(self) -> Bools:
        """Tell of which rows another shard's log tells a part, and none is untold; bool [n]."""
        found = np.zeros(len(self.rows), np.bool_)
        for seen in self._seen.values():
            found |= seen.logs > OWN
        for seen in self._seen.values():
            found &= seen.logs > NOBODY
        return found

    def needs(self, rows: Bools) -> dict[str, set[str]]:
        """Return, by the names of other shards, the sources of which some rows need their log."""
        found: dict[str, set[str]] = {}
        for part in self._layout.parts:
            numbers = np.unique(self._seen[part.view.entity.name].logs[rows])
            for number in numbers[numbers > OWN].tolist():
                found.setdefault(self._logs.shard(number), set()).add(part.view.view.source)
        return found

    def is_newer(self) -> Bools:
        """Tell which rows saw something that came after a log was looked at; bool [n]."""
        newer = np.zeros(len(self.rows), np.bool_)
        for number, log in self._logs.by_number().items():
            for seen in self._seen.values():
                newer |= (seen.logs == number) & (seen.sequences > log.through)
        return newer

    def kept(self) -> Bools:
        """Tell of which rows the logs that are here still have all that they saw; bool [n]."""
        catalog, logs = self._logs.own.catalog, self._logs.by_number()
        kept = np.ones(len(self.rows), np.bool_)
        for name, seen in self._seen.items():
            kept &= np.isin(seen.logs, [*logs])
            for number, log in logs.items():
                asked = log.horizons(), self._t_us, seen.sequences
                for view, gone in find_gone(catalog, self._closure, *asked).items():
                    if catalog.views[view].entity.name == name:
                        kept &= ~gone | (seen.logs != number)
        for part in self._layout.parts:
            for number, log in (self._logs.others or {}).items():
                if not log.has(part.view.view.source, needed_columns([part])):
                    kept &= self._seen[part.view.entity.name].logs != number
        return kept

    def take(self, rows: Bools) -> "AuditedRows":
        """Return the rows that are marked."""
        return AuditedRows(
            self._logs, self._closure, [self.rows[i] for i in np.flatnonzero(rows).tolist()]
        )

    def recompute(self) -> FeatureFrame:
        """Return the features of rows that are kept; all events of a source and log at a time."""
        types = {**self._closure.key_columns, **self._closure.service.request}
        given = {
            name: column_of(dtype, [p.given[name] for p in self.rows], name)
            for name, dtype in types.items()
        }
        spine = Spine(given, self._t_us)
        block = self._layout.begin(given, rows=len(spine))
        for source, parts in parts_by_source(self._layout).items():
            for number, log in self._logs.by_number().items():
                self._join(source, parts, number, log, spine, block)
        return self._layout.finish(block, {})

    def log_of(self, row: int, view: str) -> tuple[Offline, int]:
        """Return the log that tells what a row saw of a view, and up to which sequence."""
        seen = self._seen[self._logs.own.catalog.views[view].entity.name]
        return self._logs.by_number()[int(seen.logs[row])], int(seen.sequences[row])

    def _join(
        self,
        source: str,
        parts: Sequence[ViewPart],
        number: int,
        log: Offline,
        spine: Spine,
        block: Block,
    ) -> None:
        """Fill a block with what a log tells of a source, for the rows whose keys it has."""
        asked = []
        for group in parts_by_entity(parts):
            seen = self._seen[group[0].view.entity.name]
            rows = np.flatnonzero(seen.logs == number)
            if len(rows):
                some = replace(spine.take(rows), sequences=seen.sequences[rows])
                asked.append((group, some, rows))
        if not asked:
            return
        events = log.events(source, needed_columns(parts))
        options = JoinOptions("as_of_sequence", lineage=log.lineage())
        for group, some, rows in asked:
            if len(rows) == len(spine):
                join_parts(group, events, some, options, block)
            else:
                found = Block.empty(len(block.words), len(rows), with_state=len(block.state))
                join_parts(group, events, some, options, found)
                for part in group:
                    block.place(part.rows, rows, found)


def find_seen(logs: Logs, entity: EntitySpec, rows: Sequence[Prediction]) -> Seen:
    """Return which log tells what rows saw of an entity; the own one of a row without a key."""
    member = logs.member
    numbers = np.zeros(len(rows), np.int64)
    sequences = np.array([p.sequence for p in rows], np.int64)
    if member is None:
        return Seen(numbers, sequences)
    columns = {name: [p.given[name] for p in rows] for name in entity.columns}
    slots = key_slots(entity, columns, len(rows))
    of, shards = np.maximum(slots, 0), member.shard_map.shards
    owners, own = np.array(member.shard_map.owners)[of], member.shard_map.index(member.shard)
    brought, lineage = np.array([p.brought for p in rows], np.int64), logs.own.lineage()
    came = np.zeros(len(rows), np.int64) if lineage is None else lineage.came_by(of)
    together = (owners == own) & (brought > 0) & (came == brought)
    here = together | ((owners == own) & (brought == 0)) | (slots == NO_SLOT)
    for row in np.flatnonzero(~here).tolist():
        owner = int(owners[row])
        told = rows[row].others.get(shards[owner].name)
        numbers[row] = NOBODY if told is None else OWN if owner == own else 1 + owner
        sequences[row] = told or 0
    for number, log in logs.by_number().items():
        asked = (numbers == number) & ~together & (slots != NO_SLOT)
        lineage = log.lineage()
        if lineage is not None:
            # A row with cells that saw the very end of an import may have been before it.
            seen = [s - bool(p.others) for s, p in zip(sequences.tolist(), rows, strict=True)]
            whole = lineage.is_whole(of, np.maximum(np.array(seen, np.int64), 0))
            numbers[asked & ~whole] = NOBODY
    return Seen(numbers, sequences)
