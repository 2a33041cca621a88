"""Child entry `home`: the events of a source that have their home on this shard, as a file.

An event lies whole on every shard that it concerns; its home is one of them, so that the files of
all shards have each event once.  Or all that lie here, for who looks at one shard's log alone.
"""

from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlpd.core.columns import DType
from mlpd.core.media import PARQUET
from mlpd.daemon.at_home import Home
from mlpd.daemon.child import Send
from mlpd.daemon.frame_files import write_frames
from mlpd.daemon.offline import event_columns, open_offline
from mlpd.daemon.part import part_of
from mlpd.daemon.routing import concerned_by
from mlpd.features.tombstones import DELETED
from mlpd.storage.frames import events_schema
from mlpd.storage.segments import SEQUENCE

if TYPE_CHECKING:
    import polars as pl

FRAME_ROWS = 200_000


def run(request: Mapping[str, Any], _: Send) -> int:
    """Write the events of `source` to the file `answer`, all columns and stamps; return rows.

    With `copies` all of the log's, also those that have their home elsewhere.  Otherwise it raises
    ConflictError(code="several_shards") where they can't be told from their copies.
    """
    import polars as pl  # noqa: PLC0415 - in the child alone

    with open_offline(request) as offline:
        name = request["source"]
        schema = offline.catalog.definitions.source(name).schema
        entities, part = concerned_by(offline.catalog, name), part_of(request["part"])
        home = Home(name, entities, part, offline.lineage())

        def frames() -> "Iterator[pl.DataFrame]":
            for frame in offline.read_events(name, tuple(schema), FRAME_ROWS):
                if request["copies"]:
                    yield frame
                    continue
                columns = event_columns(frame, schema, home.keys)
                yield frame.filter(home.find(columns, frame[SEQUENCE].to_numpy()))

        empty = pl.DataFrame(schema=events_schema({**schema, DELETED: DType.BOOL}))
        return write_frames(chain((empty,), frames()), PARQUET, Path(request["answer"]))
