"""Events at home: which of those that lie on several shards count here, so that each does once."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlpd.core.columns import Column
from mlpd.core.errors import ConflictError
from mlpd.core.routing import NO_SLOT, Entities, Routing, decode_routing
from mlpd.daemon.part import Part, part_of
from mlpd.daemon.routing import concerned_slots
from mlpd.storage.lineage import Lineage


@dataclass(frozen=True, slots=True)
class Home:
    """What tells the home of a source's events: the entities that they concern, and what is here.

    `part`: None for all slots; `lineage`: None where every event came for these.
    """

    source: str
    entities: Entities
    part: Part | None
    lineage: Lineage | None

    @property
    def keys(self) -> list[str]:
        """Return the columns that are looked at."""
        return sorted({column for entity in self.entities for column in entity.columns})

    def find(
        self, columns: Mapping[str, Column], sequences: NDArray[np.int64]
    ) -> NDArray[np.bool_]:
        """Return which events have their home here, bool [rows]; 1 us per row and entity.

        Home is the slot of the first entity, by name, that has a key.  Raises ConflictError(
        code="several_shards") where events can't be told from their copies.
        """
        concerned = concerned_slots(self.source, self.entities, columns, len(sequences))
        if is_stray(concerned, sequences, self.part, self.lineage).any():
            raise _stray(self.source)
        return is_home(concerned, sequences, self.part, self.lineage)

    def to_request(self) -> dict[str, Any]:
        """Return what a child makes the same of, with its own look at the lineage: `home_of`."""
        routing = Routing({self.source: self.entities}, {}, {}, {})
        part = None if self.part is None else self.part.to_request()
        return {"source": self.source, "routing": routing.to_dict(), "part": part}


def home_of(request: Mapping[str, Any], lineage: Lineage | None) -> Home:
    """Return the home in a child's request."""
    source = request["source"]
    entities = decode_routing(request["routing"]).sources[source]
    return Home(source, entities, part_of(request["part"]), lineage)


def is_home(
    concerned: NDArray[np.int64],
    sequences: NDArray[np.int64],
    part: Part | None,
    lineage: Lineage | None,
) -> NDArray[np.bool_]:
    """Tell of events that concern slots [entity, row] which have their home here, bool [rows].

    Home is the slot of the first entity, by name, that has a key.
    """
    first = np.argmax(concerned != NO_SLOT, axis=0)
    homes = concerned[first, np.arange(concerned.shape[1])]
    found = np.ones(len(homes), np.bool_)
    if part is not None:
        found &= np.frombuffer(part.flags, np.uint8).astype(np.bool_)[homes]
    if lineage is not None:
        found &= lineage.counts(homes, sequences)
    return found


def is_stray(
    concerned: NDArray[np.int64],
    sequences: NDArray[np.int64],
    part: Part | None,
    lineage: Lineage | None,
) -> NDArray[np.bool_]:
    """Tell of events that concern slots [entity, row] which came for an entity of before.

    Bool [rows].  They concern no entity now, so that their home is the slot of the source's name,
    and yet they were moved here for other slots, or sent here though that slot never was here.
    Of the latter only the first map tells: later ones may have taken the slot away.
    """
    homes = concerned[-1]
    found: NDArray[np.bool_] = np.zeros(len(homes), np.bool_)
    if part is not None and part.shard_map.epoch == 1:
        found |= ~np.frombuffer(part.flags, np.uint8).astype(np.bool_)[homes]
    if lineage is not None:
        found |= lineage.brought_for_others(homes, sequences)
    found &= homes != NO_SLOT
    return found


def _stray(source: str) -> ConflictError:
    return ConflictError(
        f"events of source {source!r} came for entities that none of its views has any more",
        code="several_shards",
        hint="Which of their copies on several shards to count can't be told. Send them to a new "
        "source, and keep a view of each entity there.",
    )
