"""Ownership: which slots this daemon answers for, and the refusal of what belongs elsewhere.

Without a map, or with one that gives it everything, it owns all and nothing is looked at.  Why it
is as it is: docs/decisions/shards.md.
"""

import asyncio
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlpd.core.errors import (
    ConflictError,
    DefinitionError,
    InvalidRequestError,
    MisdirectedError,
    UnavailableError,
)
from mlpd.core.hashing import SLOTS
from mlpd.core.shards import EPOCH_MAX, Shard, ShardMap, decode_map, parse_runs
from mlpd.core.specs import EntitySpec, ViewSpec
from mlpd.daemon.part import NOT_HERE, Moves, Part, make_part, make_whole, slots_moving
from mlpd.daemon.routing import concerned_by, source_routing
from mlpd.daemon.state import CatalogState
from mlpd.features.catalog import Catalog
from mlpd.features.ingest import Batch
from mlpd.storage.lineage import load_lineage
from mlpd.storage.map_store import MapStore, Member, check_next
from mlpd.storage.moved_keys import OUTCOME, note_changed
from mlpd.storage.moves_store import (
    flags_of,
    load_arriving,
    load_leaving,
)
from mlpd.storage.tables import ROWS_PREFIX, Table
from mlpd.storage.transactions import Snapshot, WriteTransaction
from mlpd.storage.writer import Writer

BEHIND_RETRY_S = 0.05
"""When to come back to a member that hasn't heard of a map: it is told within milliseconds."""

_STILL, _NONE = Moves(), bytes(SLOTS)


@dataclass(frozen=True, slots=True)
class Sender:
    """What the sender of a request says: that it goes `by_map`, and by which routing.

    `slots`: runs of those that its events count for alone, None for all that they concern.
    """

    by_map: bool = False
    routing: str | None = None
    slots: str | None = None


@dataclass(frozen=True, slots=True)
class Checked:
    """Proof that events were found to be for this daemon, by a part and a version of the views."""

    part: Part | None
    catalog_key: tuple[int, int]
    only: bytes | None = None
    """Per slot 1 if the events are for it; None for all."""


class Ownership:
    """What this daemon owns; one instance per daemon.

    `member`: its name and map, None while it has none.  `part`: what it owns of the slots, None if
    that is all of them.  Both are replaced as a whole, by the writer thread; any thread reads them.
    """

    def __init__(self, store: MapStore, writer: Writer, state: CatalogState) -> None:
        self._store = store
        self._writer = writer
        self._state = state
        self._version: tuple[Catalog, str] | None = None
        self.member = store.load()
        self.moves, self.has_lineage = Moves(), False
        self.part = self.homes = make_part(self.member)
        self._leaving_flags: bytes | None = None
        self.changed = asyncio.Event()
        """Set when another map is in force; for whoever has to follow it."""
        self._lock = asyncio.Lock()

    def load(self, snapshot: Snapshot) -> None:
        """Go by the moves that a snapshot knows of."""
        self.has_lineage = load_lineage(snapshot) is not None
        self.go_by(Moves(load_leaving(snapshot), load_arriving(snapshot)))

    def go_by(self, moves: Moves) -> None:
        """Go by these moves from now on; called on the writer thread, or before it has work."""
        self._leaving_flags = None if moves.leaving is None else moves.leaving.flags
        self.moves = moves
        self.has_lineage |= moves.arriving is not None
        self.part = make_part(self.member, moves)
        self.homes = self.part or make_whole(self.member)

    @property
    def flags(self) -> bytes | None:
        """Per slot whether it is owned, None for all."""
        return None if self.part is None else self.part.flags

    @property
    def mapped(self) -> bytes | None:
        """Per slot whether the map gives it to this shard, None for all."""
        member = self.member
        return None if member is None or all(member.flags) else member.flags

    @property
    def is_moving(self) -> bool:
        """Whether slots leave or arrive."""
        return self.moves != _STILL

    def note_changed(self, txn: WriteTransaction, kind: bytes, keys: Iterable[bytes]) -> None:
        """Note, while slots leave, what changes of their predictions, labels and outcomes.

        On the writer thread, in the transaction of the change.
        """
        flags = self._leaving_flags
        if flags is not None:
            of_slots = (k for k in keys if kind == OUTCOME or flags[k[0] << 8 | k[1]])
            note_changed(txn, kind, of_slots)

    def check_open(self, slots: Sequence[int] | None) -> None:
        """Raise UnavailableError(code="slots_moving") if a slot takes nothing any more, or for now.

        `slots`: of what was begun under an earlier part, None for any.  On the loop or the writer
        thread, just before it is stored; 50 ns each.
        """
        part = self.part
        if part is None:
            return
        if slots is None:
            raise slots_moving(None)
        frozen = part.frozen or _NONE
        for slot in slots:
            if frozen[slot] or not part.flags[slot]:
                raise slots_moving(slot)

    def owns(self, slots: Iterable[int]) -> bool:
        """Tell whether the map gives all of these slots to this shard."""
        flags = None if self.member is None else self.member.flags
        return flags is None or all(flags[slot] for slot in slots)

    def owns_any(self, slots: Iterable[int]) -> bool:
        """Tell whether the map gives one of these slots to this shard."""
        flags = None if self.member is None else self.member.flags
        return flags is None or any(flags[slot] for slot in slots)

    def others(self) -> list[Shard]:
        """Return the other shards of the map."""
        member = self.member
        if member is None:
            return []
        return [shard for shard in member.shard_map.shards if shard.name != member.shard]

    def check_member(self, shard: str) -> None:
        """Raise unless this daemon has a map, and `shard` is another one in it."""
        if self.member is None:
            raise ConflictError(
                "this daemon is no member of a cluster",
                code="no_cluster",
                hint="mlpd shard init makes one.",
            )
        if self.member.shard_map.shard(shard).name == self.member.shard:
            raise ConflictError(f"{shard} is this shard itself", code="same_shard")

    @property
    def epoch(self) -> int:
        """Of the map, 0 without one."""
        return 0 if self.member is None else self.member.shard_map.epoch

    def to_dict(self) -> dict[str, Any]:
        """Return what `GET /v1/cluster/map` answers."""
        member = self.member
        return {
            "shard": None if member is None else member.shard,
            "epoch": self.epoch,
            "digest": None if member is None else member.shard_map.digest,
            "map": None if member is None else member.shard_map.to_dict(),
        }

    def check_epoch(self, text: str | None, *, changes: bool) -> bool:
        """Tell whether a request's sender says that it goes by the map, and by this one.

        Raises MisdirectedError(code="stale_epoch") for something that `changes` what is stored and
        is sent by an older map, UnavailableError(code="map_behind") for a newer one, and
        InvalidRequestError(code="invalid_epoch").
        """
        if text is None:
            return False
        if not (text.isascii() and text.isdecimal() and len(text) <= len(str(EPOCH_MAX))):
            raise InvalidRequestError(f"{text[:40]!r} is no epoch", code="invalid_epoch")
        given, found = int(text), self.epoch
        if given > found:
            raise UnavailableError(
                f"the map of epoch {given} hasn't come here yet; this daemon goes by {found}",
                code="map_behind",
                hint="Try again shortly; mlpd shard status shows who is behind.",
                details={"epoch": found, "retry_after_s": BEHIND_RETRY_S},
            )
        if given < found and changes:
            raise MisdirectedError(
                f"the map of epoch {given} is old; this daemon goes by {found}",
                code="stale_epoch",
                hint=NOT_HERE,
                details={"epoch": found},
            )
        return given == found

    def check_events(self, batches: Iterable[Batch], sender: Sender) -> Checked | None:
        """Return proof that events are for this daemon, None if it owns everything.

        Blocks as `Part.check_events`, and raises as that; and MisdirectedError(
        code="stale_routing") for events split by other views than those that run.
        """
        part, catalog = self.part, self._state.catalog
        only = None if sender.slots is None else flags_of(tuple(parse_runs(sender.slots)))
        if part is None:
            return None if only is None else Checked(None, catalog.key, only)
        if sender.by_map and sender.routing != (found := self._routing_version(catalog)):
            raise MisdirectedError(
                "the events were split by other views than those that run",
                code="stale_routing",
                hint="Fetch the routing (GET /v1/cluster/routing) and split them again.",
                details={"epoch": self.epoch, "routing": found},
            )
        for batch in batches:
            entities = concerned_by(catalog, batch.source.name)
            rows = batch.source.name, entities, batch.columns, batch.rows
            part.check_events(*rows, split=sender.by_map, only=only)
        return Checked(part, catalog.key, only)

    def check_still(self, checked: Checked | None, catalog: Catalog) -> None:
        """Raise unless `checked` holds in the transaction that sees `catalog`: send it again."""
        if checked is None and self.part is None:
            return
        if checked is None and self.member is not None and all(self.member.flags):
            raise slots_moving(None)  # they began to leave while the request was read
        self.check_same(None if checked is None else checked.part)
        if checked is not None and checked.catalog_key != catalog.key:
            raise ConflictError(
                "the definitions changed while events arrived",
                code="definitions_changed",
                hint="Send the request again.",
            )

    def _routing_version(self, catalog: Catalog) -> str:
        if self._version is None or self._version[0] is not catalog:
            self._version = catalog, source_routing(catalog).version
        return self._version[1]

    def check_views(self, catalog: Catalog, new: Iterable[tuple[ViewSpec, EntitySpec]]) -> None:
        """Raise DefinitionError(code="new_entity") for views that this shard can't build.

        `new`: views of sources that have events.  Also once all slots are here, if some came from
        elsewhere: events came with the slots of entities that were known then.
        """
        if self.part is None and not self.has_lineage:
            return
        for view, wanted in new:
            source, known = view.source, concerned_by(catalog, view.source)
            if all(wanted.keys != entity.keys for entity in known):
                names = ", ".join(entity.name for entity in known) or "none"
                raise DefinitionError(
                    f"view {view.name!r}: no view of source {source!r} has the entity "
                    f"{wanted.name!r} yet, so events of its keys lie on other shards, or came "
                    "from there for other entities",
                    code="new_entity",
                    hint=f"Known here: {names}. Views of new entities need a source without "
                    "events on a cluster of several shards.",
                )

    def check_whole(self, what: str) -> None:
        """Raise ConflictError(code="several_shards") for what needs all events in one place.

        Also once all slots are here, if some came from elsewhere: the log has copies then, and
        other sequences than the runs that gathered events.
        """
        if self.part is not None or self.has_lineage:
            where = "slots came here from other shards"
            if self.part is not None:
                where = f"this is one of {len(self.part.shard_map.shards)} shards"
            raise ConflictError(
                f"{what} needs all events, each once under one sequence, and {where}",
                code="several_shards",
                hint="It doesn't go over several shards yet; do it on one that always had all.",
            )

    def check_same(self, part: Part | None) -> None:
        """Raise MisdirectedError(code="stale_epoch") if `part` isn't what is owned any more."""
        if self.part is not part:
            member = self.member
            if part is not None and member is not None and part.shard_map is member.shard_map:
                raise slots_moving(None)
            raise MisdirectedError(
                "the map changed while the request was read",
                code="stale_epoch",
                hint=NOT_HERE,
                details={"epoch": self.epoch},
            )

    async def install(
        self, value: object, shard: str, expected_epoch: int, *, dry_run: bool = False
    ) -> dict[str, Any]:
        """Go by a map from now on, as `shard`; durable on return.  Returns `to_dict`.

        The same map may come again.  `dry_run`: change nothing, raise what would be raised:
        ValidationError for no map, NotFoundError(code="unknown_shard"), and ConflictError: what
        `MapStore.store` raises, `slots_hold_data` for a first map that takes slots from a daemon
        that has data, `slots_not_moved` for a later one that changes what it owns.
        """
        new = Member(shard, await asyncio.to_thread(decode_map, value))
        async with self._lock:
            if new != self.member:
                await self._writer.write(
                    lambda txn: self._install(txn, new, expected_epoch, dry_run=dry_run)
                )
                self.changed.set()
        return self.to_dict()

    def adopt(self, shard_map: ShardMap) -> None:
        """Go by a later map of the same cluster, whatever it says of this shard; durable, blocks.

        For a daemon that writes nothing: what it holds is another one's.  Raises what
        `MapStore.store` raises.
        """
        assert self.member is not None, "it has no map"
        new = Member(self.member.shard, shard_map)
        if new != self.member:
            self._store.store(new, self.epoch)
            self.member = new
            self.go_by(self.moves)

    def _install(
        self, txn: WriteTransaction, new: Member, expected_epoch: int, *, dry_run: bool
    ) -> None:
        """On the writer thread, so that no event comes in between; may be called twice."""
        if new == self.member:
            return
        if self.member is None:
            _check_empty(txn, new.flags)
        elif self.member.shard == new.shard and new.flags != self.member.flags:
            check_next(self.member, new, expected_epoch)
            _check_moved(self.member, new, self.moves)
        if dry_run:
            check_next(self.member, new, expected_epoch)
            return
        self._store.store(new, expected_epoch)
        self.member = new
        self.go_by(self.moves)


def _check_moved(old: Member, new: Member, moves: Moves) -> None:
    """Raise ConflictError(code="slots_not_moved") unless a map changes what is ready to move."""
    had, has = (np.frombuffer(one.flags, np.bool_) for one in (old, new))
    lost, gained = (tuple(np.flatnonzero(one).tolist()) for one in (had & ~has, has & ~had))
    leaving, arriving = moves.leaving, moves.arriving
    # While it is cancelled as well: the map that the arbiter took before it heard of that counts.
    may_lose = leaving is not None and (
        leaving.slots == lost
        and leaving.state in ("leaving", "cancelling")
        and {new.shard_map.owner(slot).name for slot in lost} == {leaving.shard}
    )
    may_gain = arriving is not None and (arriving.slots, arriving.state) == (gained, "sealed")
    if (lost and not may_lose) or (gained and not may_gain):
        raise ConflictError(
            f"the map changes which slots shard {new.shard} owns",
            code="slots_not_moved",
            hint="Slots don't change hands without what they hold: mlpd shard move brings it over.",
        )


def _check_empty(txn: WriteTransaction, flags: bytes) -> None:
    """Raise ConflictError(code="slots_hold_data") if slots that aren't kept may hold something."""
    if all(flags):
        return
    found = next(iter(txn.scan(Table.META, ROWS_PREFIX)), None)
    has_events = found is not None and found[0].startswith(ROWS_PREFIX)
    if has_events or txn.count(Table.PREDICTIONS) or txn.count(Table.LABELS):
        raise ConflictError(
            "this daemon holds events or predictions, and the map takes slots from it",
            code="slots_hold_data",
            hint="Make the cluster of empty daemons, or give this one all slots and move them with "
            "mlpd shard move.",
        )
