"""Online reads: one snapshot, one time, a few gets per entity, one kernel call."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray

from mlpd.core.columns import Column
from mlpd.core.keys import online_keys
from mlpd.core.specs import Closure, EntitySpec
from mlpd.features.assemble import EntityParts, FeatureFrame, FrameLayout, LatestPart
from mlpd.features.block import Block
from mlpd.features.catalog import Catalog
from mlpd.features.entities import entity_codes
from mlpd.features.resident import Keyed, ResidentCells
from mlpd.storage.tables import Table

GetMany = Callable[[Table, Sequence[bytes]], Sequence[bytes | None]]
"""Returns a table's values at keys, from one snapshot."""
Stored = list[bytes | None]

CheckKeys = Callable[[EntitySpec, Sequence[bytes]], None]
"""Called with an entity and keys of the ONLINE table, which begin with their slot."""

_ONLINE, _TILES = Table.ONLINE, Table.TILES  # looking a member up in its enum costs 0.1 us


def read_online(
    catalog: Catalog,
    closure: Closure,
    given: Mapping[str, Column],
    get_many: GetMany,
    t_us: int,
    *,
    keep_stale: bool = False,
    check_keys: CheckKeys | None = None,
    resident: ResidentCells | None = None,
) -> FeatureFrame:
    """Return the features of every row of `given` as of `t_us`.

    `given`: key columns and request fields, equal lengths.  `t_us` must be later than every event
    and arrival in the snapshot behind `get_many`.  `keep_stale`: values older than their ttl stay,
    with the status STALE.  `check_keys`: sees the keys of each entity in one view, and raises for
    one that another shard owns.  `resident`: cells of this layout that were read before with the
    same `check_keys`, none with `keep_stale`.  Runs on the loop: about 50 us per call, 0.7 us per
    row, and 4 to 8 us per entity of two window views that isn't resident (docs/paths/read.md).
    """
    layout = catalog.layout(closure)
    block = layout.begin(given)
    event_us = np.empty((len(layout.latest), block.words.shape[1]), np.int64)
    keyed = [entity_codes(parts.entity, given) for parts in layout.entities]

    # A nested function's annotations would be evaluated with each read: 6 us.
    load = partial(_read_stored, layout, get_many, t_us, keep_stale, check_keys)
    if resident is None:
        load(keyed, block, event_us)
    else:
        resident.fill(keyed, t_us, block, event_us, load)
    names = (part.view.view.name for part in layout.latest)
    return layout.finish(block, dict(zip(names, event_us, strict=True)))


def _read_stored(
    layout: FrameLayout,
    get_many: GetMany,
    t_us: int,
    keep_stale: bool,
    check_keys: CheckKeys | None,
    keyed: Sequence[Keyed],
    block: Block,
    event_us: NDArray[np.int64],
) -> None:
    """Fill the views' features of a block from what is stored; `keyed`: the entities by group."""
    codes = np.empty((len(keyed), block.words.shape[1]), np.int64)
    groups: list[int] = []
    stored: Stored = []
    rows: list[tuple[EntityParts, Stored]] = []
    for number, (parts, (distinct, of_rows)) in enumerate(zip(layout.entities, keyed, strict=True)):
        codes[number] = of_rows
        keys = online_keys(parts.view_ids, distinct)
        if check_keys is not None:
            check_keys(parts.entity, keys[: len(distinct)])
        values = [*get_many(_ONLINE, keys)]
        groups += len(stored), len(distinct), len(stored) + len(values)
        stored += parts.fixed(values)
        stored += get_many(_TILES, keys[len(keys) - parts.split * len(distinct) :])
        rows.append((parts, values))
    extra = np.empty((layout.extra_rows, codes.shape[1]), np.int64)
    moment = np.array([t_us], np.int64)
    fault = layout.reader.read(
        groups, codes, stored, moment, block, extra=extra, event_us=event_us, keep_stale=keep_stale
    )
    if fault is not None:
        raise layout.parts[fault[0]].plan.failure(fault[1])
    _take_texts(layout, rows, codes, block)
    _take_lists(layout, block, extra)


def _take_texts(
    layout: FrameLayout,
    rows: Sequence[tuple[EntityParts, Stored]],
    codes: NDArray[np.int64],
    block: Block,
) -> None:
    """Set the texts of latest-value views: what is stored is bytes, which no kernel reads."""
    if not layout.has_texts:
        return
    for (parts, values), of_row in zip(rows, codes, strict=True):
        for number, part in enumerate(parts.latest):
            if part.query.texts:
                start = number * (len(values) // len(parts.parts))
                _take_texts_of(part, values[start:], of_row, block)


def _take_texts_of(
    part: LatestPart, values: Stored, codes: NDArray[np.int64], block: Block
) -> None:
    target = block.part(part.rows)
    of_row = [None if code < 0 else values[code] for code in codes.tolist()]
    part.plan.take_texts(part.query, of_row, target)
    block.fill_texts(part.rows, target)


def _take_lists(layout: FrameLayout, block: Block, extra: NDArray[np.int64]) -> None:
    for part in layout.windows:
        if part.query.lists:
            lists = part.query.lists_of(block.words[part.rows], extra[part.extra])
            for column, packed in lists.items():
                block.texts[part.rows.start + column] = packed
