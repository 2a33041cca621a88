"""Joins larger than memory: spine and events in partitions by entity, the results in a file.

What fits is joined at once.  Otherwise, for each source and entity, the events of the spine's
entities are read once and put into temporary files by a hash of their key; each part is joined to
its rows of the spine as if it were all there is, and the rows' values go to their places in a
`SpilledBlock`.  That is read in the spine's order, and transforms run over one slice at a time.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from mlpd.core.columns import DType
from mlpd.core.specs import Closure
from mlpd.features.assemble import FeatureFrame, FrameLayout, ViewPart
from mlpd.features.block import Block
from mlpd.features.catalog import Catalog
from mlpd.features.offline import (
    Events,
    JoinOptions,
    Spine,
    join_history,
    join_parts,
    needed_columns,
    parts_by_entity,
    parts_by_source,
)
from mlpd.features.spilled import SpilledBlock
from mlpd.features.tombstones import DELETED
from mlpd.storage.arrow_stream import StreamFile
from mlpd.storage.frames import events_schema, series_of

if TYPE_CHECKING:
    import polars as pl

PARTITIONS_MAX = 256
"""Files that are open at once while events are put into partitions."""
STAMPS_BYTES, NUMBER_BYTES, TEXT_BYTES = 24, 8, 32
"""What an event takes: its stamps, and each column; texts are guessed."""
CELL_BYTES = 32
"""What a value of a spine row takes while its view is joined."""


@dataclass(frozen=True, slots=True)
class Budget:
    """How much is in memory at once.

    `whole_bytes`: of a source's events, and of the spine's values, up to which all is joined at
    once.  `part_bytes`: of a partition.  `batch_rows`: of the spine, in one slice of the result.
    `read_rows`: of events that are put into partitions.  An entity is never divided: one that alone
    has more events than a part may have needs the memory all the same.
    """

    whole_bytes: int = 256 << 20
    part_bytes: int = 48 << 20
    batch_rows: int = 65_536
    read_rows: int = 262_144


class EventSource(Protocol):
    """Where events come from."""

    def events(self, source: str, columns: tuple[str, ...]) -> Events:
        """Return all events of a source."""
        ...

    def count_events(self, source: str) -> int:
        """Return about how many there are, never too few."""
        ...

    def read_events(
        self, source: str, columns: tuple[str, ...], rows_max: int
    ) -> "Iterator[pl.DataFrame]":
        """Yield them in frames with stamps and DELETED, of about `rows_max` rows."""
        ...


def join_bounded(
    catalog: Catalog,
    closure: Closure,
    spine: Spine,
    source: EventSource,
    folder: Path,
    options: JoinOptions,
    budget: Budget | None = None,
) -> Iterator[FeatureFrame]:
    """Yield the features of the spine's rows, in order, in one frame or in slices.

    `folder`: empty; what is written there is its owner's to remove.  The values are those of
    `join_history`; event times are left out where there are slices.
    """
    budget = budget or Budget()
    layout = catalog.layout(closure)
    sources = parts_by_source(layout)
    schemas = {name: catalog.definitions.source(name).schema for name in sources}
    sizes = {
        name: source.count_events(name) * _width_bytes(schemas[name], parts)
        for name, parts in sources.items()
    }
    cells = len(spine) * len(layout.dtypes) * CELL_BYTES
    if max(cells, *sizes.values(), 0) <= budget.whole_bytes:
        yield join_history(catalog, closure, spine, source.events, options)
        return
    types = layout.dtypes[: layout.view_rows]
    spilled = SpilledBlock(folder, types, len(spine), with_state=layout.with_state)
    for name, parts in sources.items():
        for group in parts_by_entity(parts):
            wanted = len(spine) * sum(len(part.features) for part in group) * CELL_BYTES
            count = -(-max(wanted, sizes[name]) // budget.part_bytes)
            count = min(count, PARTITIONS_MAX)
            partition = _Partition(group, schemas[name], count, folder)
            partition.write(source.read_events(name, partition.columns, budget.read_rows), spine)
            for rows, events in partition.read(spine):
                block = Block.empty(len(types), len(rows), with_state=layout.with_state)
                join_parts(group, events, spine.take(rows), options, block)
                for part in group:
                    spilled.fill(part.rows, rows, block)
    yield from _slices(layout, spine, spilled, budget.batch_rows)


def _width_bytes(schema: Mapping[str, DType], parts: list[ViewPart]) -> int:
    types = [schema[name] for name in needed_columns(parts)]
    return STAMPS_BYTES + sum(NUMBER_BYTES if t.is_numeric else TEXT_BYTES for t in types)


def _slices(
    layout: FrameLayout, spine: Spine, spilled: SpilledBlock, batch_rows: int
) -> Iterator[FeatureFrame]:
    for start in range(0, max(len(spine), 1), batch_rows):
        part = spine.take(slice(start, start + batch_rows))
        block = layout.begin(part.given, rows=len(part))
        spilled.read_into(block, start)
        yield layout.finish(block, {})


class _Partition:
    """The events of one source, by a hash of one entity's key, in `count` files of a folder."""

    def __init__(
        self, parts: list[ViewPart], schema: Mapping[str, DType], count: int, folder: Path
    ) -> None:
        self.columns = needed_columns(parts)
        self._schema = {name: schema[name] for name in self.columns}
        self._keys = list(parts[0].view.entity.columns)
        self._count = count
        self._paths = [folder / f"part-{number}" for number in range(count)]

    def write(self, frames: "Iterator[pl.DataFrame]", spine: Spine) -> None:
        """Write the events of entities that the spine asks for."""
        asked = self._spine_keys(spine).unique()
        with ExitStack() as stack:
            files = [stack.enter_context(StreamFile(path)) for path in self._paths]
            for frame in frames:
                found = frame.join(asked, on=self._keys, how="semi")
                number = self._hash(found.select(self._keys))
                order = np.argsort(number, kind="stable")
                ordered = found[order]
                bounds = np.searchsorted(number[order], np.arange(self._count + 1)).tolist()
                for file, (start, stop) in zip(files, pairwise(bounds), strict=True):
                    if stop > start:
                        file.write(ordered[start:stop])

    def read(self, spine: Spine) -> Iterator[tuple[NDArray[np.int64], Events]]:
        """Yield, of each part with rows of the spine, their places and all their events."""
        import polars as pl  # noqa: PLC0415 - not in the daemon

        number = self._hash(self._spine_keys(spine))
        for part, path in enumerate(self._paths):
            rows = np.flatnonzero(number == part)
            if len(rows):
                there = path.stat().st_size > 0
                frame = (
                    pl.read_ipc_stream(path)
                    if there
                    else pl.DataFrame(schema=events_schema({**self._schema, DELETED: DType.BOOL}))
                )
                yield rows, Events.of(frame, self._schema)
            path.unlink()

    def _spine_keys(self, spine: Spine) -> "pl.DataFrame":
        import polars as pl  # noqa: PLC0415 - not in the daemon

        return pl.DataFrame([series_of(spine.given, name).alias(name) for name in self._keys])

    def _hash(self, keys: "pl.DataFrame") -> NDArray[np.int64]:
        """Return the part of each row: equal for equal keys within this process."""
        return (keys.hash_rows() % self._count).cast(int).to_numpy()
