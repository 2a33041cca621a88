"""Child entry `home`: the events of a source that have their home on this shard, as a file.

An event lies whole on every shard that it concerns; its home is one of them, so that the files of
all shards have each event once.
"""

from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mlpd.core.columns import DType
from mlpd.core.errors import ConflictError
from mlpd.core.media import PARQUET
from mlpd.core.routing import NO_SLOT
from mlpd.daemon.child import Send
from mlpd.daemon.frame_files import write_frames
from mlpd.daemon.offline import event_columns, open_offline
from mlpd.daemon.part import Part, part_of
from mlpd.daemon.routing import concerned_by, concerned_slots
from mlpd.features.tombstones import DELETED
from mlpd.storage.frames import events_schema
from mlpd.storage.lineage import Lineage
from mlpd.storage.segments import SEQUENCE

if TYPE_CHECKING:
    import polars as pl

FRAME_ROWS = 200_000


def run(request: Mapping[str, Any], _: Send) -> int:
    """Write the events of `source` to the file `answer`, all columns and stamps; return rows.

    Raises ConflictError(code="several_shards") where they can't be told from their copies.
    """
    import polars as pl  # noqa: PLC0415 - in the child alone

    with open_offline(request) as offline:
        name = request["source"]
        schema = offline.catalog.definitions.source(name).schema
        entities, part = concerned_by(offline.catalog, name), part_of(request["part"])
        lineage = offline.lineage()
        keys = {column for entity in entities for column in entity.columns}

        def frames() -> "Iterator[pl.DataFrame]":
            for frame in offline.read_events(name, tuple(schema), FRAME_ROWS):
                columns = event_columns(frame, schema, sorted(keys))
                concerned = concerned_slots(name, entities, columns, len(frame))
                sequences = frame[SEQUENCE].to_numpy()
                if is_stray(concerned, sequences, part, lineage).any():
                    raise _stray(name)
                at_home = is_home(concerned, sequences, part, lineage)
                yield frame.filter(at_home)

        empty = pl.DataFrame(schema=events_schema({**schema, DELETED: DType.BOOL}))
        return write_frames(chain((empty,), frames()), PARQUET, Path(request["answer"]))


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
