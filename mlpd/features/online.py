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
from mlpd.features.ingest import entity_codes
from mlpd.features.windows import join_values

GetMany = Callable[[Sequence[bytes]], Sequence[bytes | None]]
"""Returns the online rows at keys, from one snapshot."""


def read_online(
    catalog: Catalog,
    closure: Closure,
    given: Mapping[str, Column],
    get_many: GetMany,
    t_us: int,
) -> FeatureFrame:
    """Return the features of every row of `given` as of `t_us`.

    `given`: key columns and request fields, equal lengths.  `t_us` must be later than every event
    and arrival in the snapshot behind `get_many`.  Runs on the loop: about 10 us per view and call
    and 1 us per view and entity.
    """
    layout = catalog.layout(closure)
    block = layout.begin(given)
    event_us: dict[str, NDArray[np.int64]] = {}
    for parts in layout.entities:
        distinct, codes = entity_codes(parts.entity, given)
        values = get_many(online_keys(parts.view_ids, distinct))
        m, index = len(distinct), None
        if m < len(codes):
            # Rows without a key read one more entity, which no view has seen.
            values = _spread(values, m, len(parts.view_ids))
            index = np.where(codes < 0, m, codes)
            m += 1
        for i, part in enumerate(parts.latest):
            events = _read_latest(part, values[i * m : (i + 1) * m], t_us, block, index)
            event_us[part.view.view.name] = events
        _read_windows(parts.windows, values[len(parts.latest) * m :], t_us, block, index)
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
) -> NDArray[np.int64]:
    """Fill a view's part of the block; `index`: the value of each row, None for one each."""
    target = block.part(part.rows)
    if index is None:
        events = part.plan.read(values, t_us, part.query, target)
        block.fill_texts(part.rows, target)
        return events
    each = Block.empty(len(part.features), len(values), with_state=len(part.features))
    events = part.plan.read(values, t_us, part.query, each)
    block.fill(part.rows, each.take(index))
    return events[index]


def _read_windows(
    parts: Sequence[WindowPart],
    values: Sequence[bytes | None],
    t_us: int,
    block: Block,
    index: NDArray[np.int64] | None,
) -> None:
    """Fill the parts of an entity's views; `values`: as many for each."""
    if not parts:
        return
    stored, starts = join_values(values)
    m = len(values) // len(parts)
    times = np.full(m, t_us, np.int64)
    for i, part in enumerate(parts):
        words, valid = part.plan.read_words(
            part.query, stored, starts[i * m : (i + 1) * m + 1], times
        )
        if index is not None:
            words, valid = words[index], valid[index]
        block.words[part.rows], block.valid[part.rows] = words.T, valid.T
