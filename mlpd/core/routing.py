"""Routing: which entities rows concern, and the slots of their keys; the same for all who split.

A daemon tells it from what runs there; clients split events and rows by it.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlpd.core.columns import DType
from mlpd.core.convert import convert_value
from mlpd.core.errors import MlpdError
from mlpd.core.hashing import definition_hash, slot_of
from mlpd.core.keys import encode_entity
from mlpd.core.specs import EntitySpec

EPOCH_HEADER = "x-mlpd-epoch"
"""Epoch of the map that the sender of a request goes by."""

ROUTING_HEADER = "x-mlpd-routing"
"""Version of the routing by which events were split."""

SLOTS_HEADER = "x-mlpd-slots"
"""Runs of the slots that events count for, where that isn't all of those that are here."""

MAX_STALENESS_HEADER = "x-mlpd-max-staleness-ms"
"""How stale the answer of a follower may be, milliseconds."""

STALENESS_HEADER = "x-mlpd-staleness-ms"
"""How stale it is at most."""

NO_SLOT = -1
"""Of a row without a key."""

Entities = tuple[EntitySpec, ...]
Slots = NDArray[np.int64]
Named = Mapping[str, Entities]


@dataclass(frozen=True)
class Routing:
    """Entities that matter, by name of a source, a service, a route, and of a view or transform.

    Each list is in order of the entities' names and has every set of key columns once.
    """

    sources: Named
    services: Named
    routes: Named
    features: Named

    @cached_property
    def version(self) -> str:
        """32 hex digits that tell how events are split: over `sources` alone."""
        return definition_hash(_plain(self.sources))

    def to_dict(self) -> dict[str, Any]:
        """Return what a daemon answers; `decode_routing` reads it."""
        named = {kind: _plain(getattr(self, kind)) for kind in _KINDS}
        return {"version": self.version, **named}


_KINDS = ("sources", "services", "routes", "features")


def decode_routing(value: Mapping[str, Any]) -> Routing:
    """Return the routing in a daemon's answer."""
    return Routing(**{kind: _named(value[kind]) for kind in _KINDS})


def distinct(entities: Iterable[EntitySpec]) -> Entities:
    """Return entities by name, without those whose key columns another one has."""
    found: dict[tuple[tuple[str, DType], ...], EntitySpec] = {}
    for entity in sorted(entities, key=lambda entity: entity.name):
        found.setdefault(entity.keys, entity)
    return tuple(found.values())


def home_slot(source: str) -> int:
    """Return the slot in which events of a source live that concern no entity."""
    return slot_of(source.encode())


def key_slots(entity: EntitySpec, columns: Mapping[str, Sequence[Any]], rows: int) -> Slots:
    """Return the slot of each row's key, int64 [rows]; NO_SLOT for a null or one that is no key.

    `columns`: plain values.  0.2 us per row and 1 us per distinct key.
    """
    slots = np.full(rows, NO_SLOT, np.int64)
    if not all(name in columns for name in entity.columns):
        return slots
    known: dict[Any, int] = {}
    keys = zip(*(columns[name] for name in entity.columns), strict=True)
    for row, key in enumerate(keys):
        try:
            slot = known.get(key)
        except TypeError:  # a list, say: its daemon refuses the row
            continue
        if slot is None and (slot := _slot(entity, key)) is not None:
            known[key] = slot
        slots[row] = NO_SLOT if slot is None else slot
    return slots


def _slot(entity: EntitySpec, key: tuple[Any, ...]) -> int | None:
    try:
        if DType.BYTES in entity.types:  # which JSON has as text
            key = tuple(map(_plain_key, entity.types, key))
        encoded = encode_entity(entity.types, key, entity.name)
    except (MlpdError, UnicodeEncodeError):
        return None
    return None if encoded is None else slot_of(encoded)


def _plain_key(dtype: DType, part: Any) -> Any:
    return convert_value(dtype, part, "key") if isinstance(part, str) else part


def _plain(named: Named) -> dict[str, list[Any]]:
    return {
        name: [[e.name, [[column, str(dtype)] for column, dtype in e.keys]] for e in entities]
        for name, entities in named.items()
    }


def _named(value: Mapping[str, Any]) -> dict[str, Entities]:
    return {
        name: tuple(
            EntitySpec(entity, tuple((column, DType(dtype)) for column, dtype in keys))
            for entity, keys in entities
        )
        for name, entities in value.items()
    }
