"""Point-in-time joins: the features of a spine as the daemon knew them, at any past moment.

The same codes, kernels, plans and transforms as online; runs in a child process.  A spine row at t
sees the events with known_time <= t (`as_known`), those with a sequence up to its own
(`as_of_sequence`), or, ignoring known_time, those with event_time <= t (`as_corrected`).
Height and order of the result are the spine's.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import numpy as np
from numpy.typing import NDArray

from mlpd.core.columns import Column, DType
from mlpd.core.routing import key_slots
from mlpd.core.specs import Closure, EntitySpec
from mlpd.features.assemble import FeatureFrame, FrameLayout, LatestPart, ViewPart, WindowPart
from mlpd.features.block import Block
from mlpd.features.catalog import Catalog
from mlpd.features.key_codes import shared_codes
from mlpd.features.latest import LatestPlan, empty_column
from mlpd.features.stamps import Stamps, stamps_of
from mlpd.features.tombstones import DELETED, deleted_rows
from mlpd.features.winners import Closed, Mode, find_winners
from mlpd.storage.frames import FrameColumns, from_series, series_of
from mlpd.storage.lineage import Lineage

if TYPE_CHECKING:
    import polars as pl

__all__ = ["Closed", "Events", "JoinOptions", "LoadEvents", "Mode", "Spine", "join_history"]

Codes = tuple[NDArray[np.int64], NDArray[np.int64]]
"""Codes of the entities of all events, and of all spine rows; -1 is none."""


@dataclass(frozen=True, slots=True)
class Events:
    """All events of a source, in any order: `columns` of its schema, and their stamps.

    DELETED is among the columns where there are tombstones.
    """

    columns: Mapping[str, Column]
    stamps: Stamps

    @classmethod
    def of(cls, frame: "pl.DataFrame", schema: Mapping[str, DType]) -> Self:
        """Return the events of a frame that has stamps, the columns of `schema`, and DELETED."""
        whole = frame.rechunk()
        types = dict(schema) if whole[DELETED].is_null().all() else {**schema, DELETED: DType.BOOL}
        return cls(FrameColumns(whole, types), stamps_of(whole))


@dataclass(frozen=True, slots=True)
class Spine:
    """Rows to join to.

    `given`: key columns and request fields.  `t_us`: the time of each row, int64 [n].
    `sequences`: for `as_of_sequence`, the last sequence that each row saw, int64 [n].
    """

    given: Mapping[str, Column]
    t_us: NDArray[np.int64]
    sequences: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.t_us)

    def take(self, index: slice | NDArray[np.int64]) -> "Spine":
        """Return the rows that `index` selects."""
        given, sequences = self.given, self.sequences
        if isinstance(given, FrameColumns):
            taken: Mapping[str, Column] = given.take(index)
        else:
            taken = {name: column.take(index) for name, column in given.items()}
        return Spine(taken, self.t_us[index], None if sequences is None else sequences[index])


@dataclass(frozen=True, slots=True)
class JoinOptions:
    """How a join looks at events.

    `closed`: whether latest-value views show events of a row's own time; windows declare it.
    `keep_stale`: values older than their ttl stay, with the status STALE.  `lineage`: for which
    slots events count.
    """

    mode: Mode = "as_known"
    closed: Closed = "right"
    keep_stale: bool = False
    lineage: Lineage | None = None


LoadEvents = Callable[[str, tuple[str, ...]], Events]
"""Loads the events of a source with the columns that are needed."""


def join_history(
    catalog: Catalog,
    closure: Closure,
    spine: Spine,
    load: LoadEvents,
    options: JoinOptions | None = None,
) -> FeatureFrame:
    """Return the features of every spine row; all events of a source at a time are in memory."""
    layout = catalog.layout(closure)
    block = layout.begin(spine.given, rows=len(spine))
    event_us: dict[str, NDArray[np.int64]] = {}
    for source, parts in parts_by_source(layout).items():
        events = load(source, needed_columns(parts))
        for group in parts_by_entity(parts):
            event_us |= join_parts(group, events, spine, options or JoinOptions(), block)
    return layout.finish(block, event_us)


def join_parts(
    parts: Sequence[ViewPart], events: Events, spine: Spine, options: JoinOptions, block: Block
) -> dict[str, NDArray[np.int64]]:
    """Fill a block with parts of one entity and source.

    Returns, per latest-value view, the event time behind each row, 0 where there is none.
    """
    entity = parts[0].view.entity
    codes = shared_codes(entity, events.columns, spine.given)
    if options.lineage is not None:
        codes = _only_counting(entity, codes, events, spine, options.lineage)
    event_us: dict[str, NDArray[np.int64]] = {}
    rows: NDArray[np.int64] | None = None
    for part in parts:
        if isinstance(part, LatestPart):
            if rows is None:
                rows = _find_rows(codes, events, spine, options)
            times = event_us[part.view.view.name] = _at(events.stamps.event_us, rows)
            _take_latest(part, events, rows, spine.t_us - times, block, options.keep_stale)
        elif isinstance(part, WindowPart):
            _join_windows(part, events, spine, codes, options.mode, block)
    return event_us


def _only_counting(
    entity: EntitySpec, codes: Codes, events: Events, spine: Spine, lineage: Lineage
) -> Codes:
    """Return the codes without those of events that don't count for their entity's slot."""
    of_events, of_spine = codes
    numbers, first_rows = np.unique(of_spine, return_index=True)
    keys = {name: spine.given[name].take(first_rows).to_list() for name in entity.columns}
    slots = np.zeros(max(int(numbers[-1]), int(of_events.max(initial=-1)), 0) + 1, np.int64)
    slots[numbers] = np.maximum(key_slots(entity, keys, len(numbers)), 0)
    counting = lineage.counts(slots[np.maximum(of_events, 0)], events.stamps.sequences)
    return np.where(counting, of_events, -1), of_spine


def parts_by_source(layout: FrameLayout) -> dict[str, list[ViewPart]]:
    """Return what a layout holds of views, by the source of their events."""
    found: dict[str, list[ViewPart]] = {}
    for part in (*layout.latest, *layout.windows):
        found.setdefault(part.view.view.source, []).append(part)
    return found


def parts_by_entity(parts: Iterable[ViewPart]) -> list[list[ViewPart]]:
    """Return parts of one source in groups that have one entity."""
    found: dict[str, list[ViewPart]] = {}
    for part in parts:
        found.setdefault(part.view.entity.name, []).append(part)
    return list(found.values())


def needed_columns(parts: Iterable[ViewPart]) -> tuple[str, ...]:
    """Return the columns of their source that parts read."""
    needed: set[str] = set()
    for part in parts:
        needed.update(part.view.entity.columns)
        plan = part.view.plan
        needed.update(part.features if isinstance(plan, LatestPlan) else plan.columns)
    return tuple(sorted(needed))


def _join_windows(
    part: WindowPart,
    events: Events,
    spine: Spine,
    codes: Codes,
    mode: Mode,
    block: Block,
) -> None:
    event_codes, spine_codes = codes
    deleted = deleted_rows(events.columns)
    if deleted is not None:
        event_codes = np.where(deleted, -1, event_codes)
    columns = part.plan.join(
        event_codes,
        *events.stamps,
        part.plan.inputs(_input_columns(part, events)),
        spine_codes,
        spine.t_us,
        part.features,
        mode=mode,
        spine_sequence=spine.sequences,
    )
    for row, feature in enumerate(part.features, part.rows.start):
        block.put(row, columns[feature])


def _input_columns(part: WindowPart, events: Events) -> Mapping[str, Column]:
    """Return what a view's inputs are made of; a column of the right height if that is nothing."""
    columns = {name: events.columns[name] for name in part.plan.columns}
    return columns or {"": Column(DType.INT64, events.stamps.event_us)}


def _find_rows(
    codes: Codes, events: Events, spine: Spine, options: JoinOptions
) -> NDArray[np.int64]:
    """Return the index of the event behind each spine row, -1 for none or a tombstone."""
    rows = find_winners(
        *(codes[0], events.stamps, codes[1], spine.t_us, spine.sequences),
        mode=options.mode,
        closed=options.closed,
    )
    deleted = deleted_rows(events.columns)
    return rows if deleted is None else np.where((rows >= 0) & deleted[rows], -1, rows)


def _take_latest(
    part: LatestPart,
    events: Events,
    rows: NDArray[np.int64],
    age_us: NDArray[np.int64],
    block: Block,
    keep_stale: bool,
) -> None:
    target, features = block.part(part.rows), part.view.view.features
    index = np.maximum(rows, 0)
    for row, name in enumerate(part.features):
        dtype = features[name]
        if not len(events.stamps.sequences):
            target.put(row, empty_column(dtype, len(rows)))
        elif dtype.is_numeric:
            target.gather(row, events.columns[name], index)
        else:  # only the texts that are taken become Python objects
            texts = series_of(events.columns, name).gather(index)
            target.put(row, from_series(texts, dtype))
    part.plan.settle(part.query, target, rows < 0, age_us, keep_stale=keep_stale)
    block.fill_texts(part.rows, target)


def _at(values: NDArray[np.int64], index: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return `values[index]`, 0 where the index is negative."""
    if len(values) == 0:
        return np.zeros(len(index), np.int64)
    return np.where(index < 0, 0, values[np.maximum(index, 0)])
