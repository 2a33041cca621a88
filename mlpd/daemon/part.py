"""The part of all slots that a shard owns, and the refusal of what is in others."""

import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlpd.core.columns import Column, Columns
from mlpd.core.errors import MisdirectedError, UnavailableError
from mlpd.core.hashing import SLOTS
from mlpd.core.routing import NO_SLOT, Entities, Slots, key_slots
from mlpd.core.shards import ShardMap, decode_map
from mlpd.core.specs import EntitySpec
from mlpd.daemon.routing import concerned_slots
from mlpd.storage.map_store import Member
from mlpd.storage.moves_store import Arriving, Leaving

MOVING_RETRY_S = 0.1
"""When to come back to slots that move: as long as the pause should last."""

NOT_HERE = "Fetch the map (GET /v1/cluster/map) and ask the owner; mlpd.client does so by itself."


@dataclass(frozen=True, slots=True)
class Moves:
    """The moves under way: what leaves this shard, and what arrives."""

    leaving: Leaving | None = None
    arriving: Arriving | None = None


@dataclass(frozen=True)
class Part:
    """The part of all slots that a shard of several owns, at one epoch of the map."""

    shard: str
    shard_map: ShardMap
    flags: bytes = field(repr=False)
    """Per slot 1 if it is owned, else 0."""
    frozen: bytes | None = field(default=None, repr=False)
    """Per slot 1 if nothing may be written for now, as it is about to move; None for none."""

    def to_request(self) -> dict[str, Any]:
        """Return what a child makes the same part of: `part_of`."""
        return {"shard": self.shard, "map": self.shard_map.to_dict()}

    def check_keys(self, entity: EntitySpec, keys: Sequence[bytes]) -> None:
        """Raise MisdirectedError if a key of the ONLINE table is of another shard; 60 ns each."""
        flags = self.flags
        for key in keys:
            if not flags[key[0] << 8 | key[1]]:
                raise self._wrong(key[0] << 8 | key[1], f"a key of entity {entity.name!r}")

    def check_slots(self, slots: Iterable[int], what: str, *, writes: bool = False) -> None:
        """Raise MisdirectedError for the first slot of another shard.

        `writes`: UnavailableError(code="slots_moving") for one that takes nothing for now.
        """
        for index, slot in enumerate(slots):
            if slot != NO_SLOT and not self.flags[slot]:
                raise self._wrong(slot, f"{what} {index}", index)
            if writes and slot != NO_SLOT and self.frozen is not None and self.frozen[slot]:
                raise slots_moving(slot)

    def check_events(
        self,
        source: str,
        entities: Entities,
        columns: Columns,
        rows: int,
        *,
        split: bool,
        only: bytes | None = None,
    ) -> None:
        """Raise MisdirectedError for events that are not for this shard.

        `split`: their sender knows the map and sends each to all that it concerns; one of its slots
        must be here.  Otherwise all of them must be, as nobody would tell the others.  `only`: per
        slot 1 if the events are for it, None for all.  UnavailableError(code="slots_moving") if
        one of them takes nothing for now.  Blocks: 1 us per row and entity.
        """
        concerned = concerned_slots(source, entities, columns, rows)
        if only is not None:
            meant = np.frombuffer(only, np.uint8).astype(np.bool_)
            concerned = np.where(meant[concerned] & (concerned != NO_SLOT), concerned, NO_SLOT)
        if self.frozen is not None:
            frozen = np.frombuffer(self.frozen, np.uint8).astype(np.bool_)
            waits = frozen[concerned] & (concerned != NO_SLOT)
            if waits.any():
                raise slots_moving(int(concerned[waits][0]))
        self._check_concerned(concerned, split=split)

    def home_slots(self, entities: Entities, given: Mapping[str, Column], rows: int) -> list[int]:
        """Return a slot of this shard for each row's prediction.

        That of the first of its keys that is here (keys that no view reads may be elsewhere), and
        any for a row without one.
        """
        plain = {name: column.to_list() for name, column in given.items()}
        homes = np.array([secrets.choice(self._owned) for _ in range(rows)], np.int64)
        owned = np.frombuffer(self.flags, np.uint8).astype(np.bool_)
        for entity in reversed(entities):
            slots = key_slots(entity, plain, rows)
            homes = np.where((slots != NO_SLOT) & owned[slots], slots, homes)
        found: list[int] = homes.tolist()
        if self.frozen is not None:
            self.check_slots(found, "row", writes=True)
        return found

    @cached_property
    def _owned(self) -> list[int]:
        frozen = self.frozen or bytes(SLOTS)
        return [slot for slot in range(SLOTS) if self.flags[slot] and not frozen[slot]] or [
            self.shard_map.slots_of(self.shard)[0]
        ]

    def _check_concerned(self, concerned: NDArray[np.int64], *, split: bool) -> None:
        """Check slots [entity, row]."""
        owned = np.frombuffer(self.flags, np.uint8).astype(np.bool_)
        is_key = concerned != NO_SLOT
        here = is_key & owned[concerned]
        wrong = ~here.any(axis=0) if split else (is_key & ~here).any(axis=0)
        if not wrong.any():
            return
        row = int(np.argmax(wrong))
        slots: Slots = concerned[:, row]
        slot = int(slots[is_key[:, row] & ~here[:, row]][0])
        raise self._wrong(slot, f"a key of row {row}", row)

    def _wrong(
        self, slot: int, what: str, index: int | None = None
    ) -> MisdirectedError | UnavailableError:
        owner = self.shard_map.owner(slot)
        if owner.name == self.shard:
            return slots_moving(slot)
        return MisdirectedError(
            f"{what} is in slot {slot}, which shard {owner.name} owns, not {self.shard}",
            hint=NOT_HERE,
            details={
                "slot": slot,
                "shard": owner.name,
                "url": owner.url,
                "epoch": self.shard_map.epoch,
                **({} if index is None else {"index": index}),
            },
        )


def part_of(request: Mapping[str, Any] | None) -> Part | None:
    """Return the part in a child's request, from `Part.to_request`; None stays None."""
    if request is None:
        return None
    return make_part(Member(request["shard"], decode_map(request["map"])))


def slots_moving(slot: int | None) -> UnavailableError:
    """Return the error for what can't be answered in the short while in which slots move."""
    which = "the slots of the request" if slot is None else f"slot {slot}"
    return UnavailableError(
        f"{which} moves to another shard just now",
        code="slots_moving",
        hint="Send it again shortly; mlpd shard status shows a move that stands still.",
        details={"retry_after_s": MOVING_RETRY_S},
    )


def make_whole(member: Member | None) -> Part | None:
    """Return the part of a member that owns everything among others that own nothing, else None.

    By it predictions live in the slots of their keys, and so move with them.
    """
    if member is None or len(member.shard_map.shards) == 1:
        return None
    return Part(member.shard, member.shard_map, member.flags)


def make_part(member: Member | None, moves: Moves | None = None) -> Part | None:
    """Return what a member answers for while slots move, None if that is everything."""
    if member is None:
        return None
    flags, frozen = member.flags, None
    for note in () if moves is None else (moves.leaving, moves.arriving):
        if note is None or note.state in ("copying", "importing"):
            continue
        own = [flags[slot] for slot in note.slots]
        if all(own) if isinstance(note, Leaving) else not any(own):  # the map is still the old one
            held = np.frombuffer(note.flags, np.bool_)
            frozen = (held if frozen is None else np.frombuffer(frozen, np.bool_) | held).tobytes()
            if note.state in ("leaving", "cancelling"):
                flags = (np.frombuffer(flags, np.bool_) & ~held).tobytes()
    if all(flags) and frozen is None:
        return None
    return Part(member.shard, member.shard_map, flags, frozen)
