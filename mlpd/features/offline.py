"""Point-in-time joins: the features of a spine as the daemon knew them, at any past moment.

The same codes, kernels, plans and transforms as online; runs in a child process.  A spine row at t
sees the events with known_time <= t (`as_known`), those with a sequence up to its own
(`as_of_sequence`), or, ignoring known_time, those with event_time <= t (`as_corrected`).
Height and order of the result are the spine's.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from mlpd.core.columns import Column, Columns
from mlpd.core.specs import Closure
from mlpd.features.assemble import FeatureFrame, FrameLayout, LatestPart, ViewPart, WindowPart
from mlpd.features.block import Block
from mlpd.features.catalog import Catalog
from mlpd.features.entities import shared_codes
from mlpd.features.latest import LatestPlan, empty_column
from mlpd.features.stamps import Stamps

Mode = Literal["as_known", "as_corrected", "as_of_sequence"]
Codes = tuple[NDArray[np.int64], NDArray[np.int64]]
"""Codes of the entities of all events, and of all spine rows; -1 is none."""


@dataclass(frozen=True, slots=True)
class Events:
    """All events of a source in sequence order: `columns` of its schema, and their stamps."""

    columns: Columns
    stamps: Stamps


@dataclass(frozen=True, slots=True)
class Spine:
    """Rows to join to.

    `given`: key columns and request fields.  `t_us`: the time of each row, int64 [n].
    `sequences`: for `as_of_sequence`, the last sequence that each row saw, int64 [n].
    """

    given: Mapping[str, Column]
    t_us: NDArray[np.int64]
    sequences: NDArray[np.int64] | None = None


LoadEvents = Callable[[str, tuple[str, ...]], Events]
"""Loads the events of a source with the columns that are needed."""


def join_history(
    catalog: Catalog,
    closure: Closure,
    spine: Spine,
    load: LoadEvents,
    *,
    mode: Mode,
    keep_stale: bool = False,
) -> FeatureFrame:
    """Return the features of every spine row.

    `keep_stale`: values older than their ttl stay, with the status STALE.
    Time O((m + n) log(m + n)) per view.
    """
    layout = catalog.layout(closure)
    block = layout.begin(spine.given)
    event_us: dict[str, NDArray[np.int64]] = {}
    for source, parts in _by_source(layout).items():
        events = load(source, _needed_columns(parts))
        coded: dict[str, Codes] = {}
        for part in parts:
            entity = part.view.entity
            if entity.name not in coded:
                coded[entity.name] = shared_codes(entity, events.columns, spine.given)
            codes = coded[entity.name]
            if isinstance(part, LatestPart):
                rows = _latest_rows(codes, events.stamps, spine, mode)
                times = event_us[part.view.view.name] = _at(events.stamps.event_us, rows)
                _take_latest(part, events, rows, spine.t_us - times, block, keep_stale)
            elif isinstance(part, WindowPart):
                _join_windows(part, events, spine, codes, mode, block)
    return layout.finish(block, event_us)


def _by_source(layout: FrameLayout) -> dict[str, list[ViewPart]]:
    found: dict[str, list[ViewPart]] = {}
    for part in (*layout.latest, *layout.windows):
        found.setdefault(part.view.view.source, []).append(part)
    return found


def _needed_columns(parts: list[ViewPart]) -> tuple[str, ...]:
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
    columns = part.plan.join(
        event_codes,
        *events.stamps,
        part.plan.inputs(events.columns),
        spine_codes,
        spine.t_us,
        part.features,
        mode=mode,
        spine_sequence=spine.sequences,
    )
    for row, feature in enumerate(part.features, part.rows.start):
        block.put(row, columns[feature])


def _take_latest(
    part: LatestPart,
    events: Events,
    rows: NDArray[np.int64],
    age_us: NDArray[np.int64],
    block: Block,
    keep_stale: bool,
) -> None:
    target = block.part(part.rows)
    for row, name in enumerate(part.features):
        column = events.columns[name]
        if len(column) == 0:
            column = empty_column(column.dtype, 1)
        target.put(row, column.take(np.maximum(rows, 0)))
    part.plan.settle(part.query, target, rows < 0, age_us, keep_stale=keep_stale)
    block.fill_texts(part.rows, target)


def _latest_rows(codes: Codes, stamps: Stamps, spine: Spine, mode: Mode) -> NDArray[np.int64]:
    """Return the index of the event behind each spine row, -1 for none.

    Within an entity, events are walked in the order in which they become visible; the running
    winner is the maximum of their ranks by (event_time, known_time, sequence).
    """
    event_codes, spine_codes = codes
    if mode == "as_of_sequence":
        if spine.sequences is None:
            raise ValueError("as_of_sequence needs the spine's sequences")
        visible, asked = stamps.sequences, spine.sequences
    elif mode == "as_known":
        visible, asked = stamps.known_us, spine.t_us
    else:
        visible, asked = stamps.event_us, spine.t_us
    by_stamp = np.lexsort((stamps.sequences, stamps.known_us, stamps.event_us))
    rank = np.empty(len(by_stamp), np.int64)
    rank[by_stamp] = np.arange(len(by_stamp))
    walk = np.lexsort((rank, visible, event_codes))
    # Ranks shifted by the entity's code never mix under one running maximum.
    shift = event_codes[walk] * np.int64(len(walk) + 1)
    winner = by_stamp[np.maximum.accumulate(rank[walk] + shift) - shift] if len(walk) else walk
    place = _last_at_most(event_codes[walk], visible[walk], spine_codes, asked)
    found = (place >= 0) & (spine_codes >= 0)
    found[found] = event_codes[walk][place[found]] == spine_codes[found]
    return np.where(found, _at(winner, np.where(found, place, -1)), -1)


def _last_at_most(
    codes: NDArray[np.int64],
    times: NDArray[np.int64],
    asked_codes: NDArray[np.int64],
    asked_times: NDArray[np.int64],
) -> NDArray[np.int64]:
    """Return the last position with (code, time) <= the asked pair, -1 for none.

    `codes` and `times` are sorted by (code, time).  One merge of both sorted lists.
    """
    n, m = len(codes), len(asked_codes)
    all_codes = np.concatenate([codes, asked_codes])
    all_times = np.concatenate([times, asked_times])
    is_asked = np.concatenate([np.zeros(n, np.int8), np.ones(m, np.int8)])
    order = np.lexsort((is_asked, all_times, all_codes))
    events_before = np.cumsum(is_asked[order] == 0)
    place = np.empty(n + m, np.int64)
    place[order] = events_before - 1
    return place[n:]


def _at(values: NDArray[np.int64], index: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return `values[index]`, 0 where the index is negative."""
    if len(values) == 0:
        return np.zeros(len(index), np.int64)
    return np.where(index < 0, 0, values[np.maximum(index, 0)])
