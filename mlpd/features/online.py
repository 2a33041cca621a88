"""Online reads: one snapshot, one time, a few gets per entity, one kernel call per view."""

from collections.abc import Callable, Mapping, Sequence
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from mlpd.core.columns import Column
from mlpd.core.keys import online_keys
from mlpd.core.specs import Closure
from mlpd.features.assemble import FeatureFrame, LatestPart, WindowPart
from mlpd.features.block import Block
from mlpd.features.catalog import Catalog
from mlpd.features.entities import entity_codes
from mlpd.features.windows import join_values
from mlpd.storage.tables import Table

GetMany = Callable[[Table, Sequence[bytes]], Sequence[bytes | None]]
"""Returns a table's values at keys, from one snapshot."""

_ONLINE, _TILES = Table.ONLINE, Table.TILES  # looking a member up in its enum costs 0.1 us


def read_online(
    catalog: Catalog,
    closure: Closure,
    given: Mapping[str, Column],
    get_many: GetMany,
    t_us: int,
    *,
    keep_stale: bool = False,
) -> FeatureFrame:
    """Return the features of every row of `given` as of `t_us`.

    `given`: key columns and request fields, equal lengths.  `t_us` must be later than every event
    and arrival in the snapshot behind `get_many`.  `keep_stale`: values older than their ttl stay,
    with the status STALE.  Runs on the loop: about 10 us per view and call
    and 1 us per view and entity.
    """
    layout = catalog.layout(closure)
    block = layout.begin(given)
    event_us: dict[str, NDArray[np.int64]] = {}
    for parts in layout.entities:
        distinct, codes = entity_codes(parts.entity, given)
        keys = online_keys(parts.view_ids, distinct)
        m, index = len(distinct), None
        values = get_many(_ONLINE, keys)
        older = get_many(_TILES, keys[len(keys) - parts.split * m :])
        if m < len(codes):
            # Rows without a key read one more entity, which no view has seen.
            values = _spread(values, m, len(parts.view_ids))
            older = _spread(older, m, parts.split)
            index = np.where(codes < 0, m, codes)
            m += 1
        for i, part in enumerate(parts.latest):
            events = _read_latest(part, values[i * m : (i + 1) * m], t_us, block, index, keep_stale)
            event_us[part.view.view.name] = events
        _read_windows(parts.windows, values[len(parts.latest) * m :], older, t_us, block, index)
    return layout.finish(block, event_us)


def _spread(values: Sequence[bytes | None], m: int, views: int) -> list[bytes | None]:
    """Return m values and a None for each view."""
    parts = ([*values[view * m : (view + 1) * m], None] for view in range(views))
    return list(chain.from_iterable(parts))


def _read_latest(
    part: LatestPart,
    values: Sequence[bytes | None],
    t_us: int,
    block: Block,
    index: NDArray[np.int64] | None,
    keep_stale: bool,
) -> NDArray[np.int64]:
    """Fill a view's part of the block; `index`: the value of each row, None for one each."""
    target = block.part(part.rows)
    if index is None:
        events = part.plan.read(values, t_us, part.query, target, keep_stale=keep_stale)
        block.fill_texts(part.rows, target)
        return events
    each = Block.empty(len(part.features), len(values), with_state=len(part.features))
    events = part.plan.read(values, t_us, part.query, each, keep_stale=keep_stale)
    block.fill(part.rows, each.take(index))
    return events[index]


def _read_windows(
    parts: Sequence[WindowPart],
    values: Sequence[bytes | None],
    older: Sequence[bytes | None],
    t_us: int,
    block: Block,
    index: NDArray[np.int64] | None,
) -> None:
    """Fill the parts of an entity's views; `values`: as many for each; `older`: for the last."""
    if not parts:
        return
    m = len(values) // len(parts)
    recent, starts = join_values(values)
    tiles, tiles_starts = join_values(older)
    nothing, first_split = np.zeros(m + 1, np.int64), len(values) - len(older)
    times = np.full(m, t_us, np.int64)
    for i, part in enumerate(parts):
        at = i * m - first_split
        words, valid = part.plan.read_words(
            part.query,
            (recent, starts[i * m : (i + 1) * m + 1]),
            (tiles, nothing if at < 0 else tiles_starts[at : at + m + 1]),
            times,
        )
        if index is not None:
            words, valid = words[index], valid[index]
        block.words[part.rows], block.valid[part.rows] = words.T, valid.T
