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
from mlpd.core.keys import encode_entity
from mlpd.core.specs import Closure, EntitySpec
from mlpd.features.assemble import FeatureFrame, Statuses, assemble, check_given, validity_status
from mlpd.features.catalog import Catalog, ViewPlan
from mlpd.features.latest import LatestPlan, empty_column, with_default
from mlpd.features.stamps import Stamps
from mlpd.features.status import Status

Mode = Literal["as_known", "as_corrected", "as_of_sequence"]


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
    catalog: Catalog, closure: Closure, spine: Spine, load: LoadEvents, *, mode: Mode
) -> FeatureFrame:
    """Return the features of every spine row.  Time O((m + n) log(m + n)) per view."""
    check_given(closure, spine.given)
    parts = []
    for source, plans in _by_source(catalog, closure).items():
        events = load(source, _needed_columns(plans))
        for plan in plans:
            features = closure.view_features[plan.view.name]
            parts.append(_join_view(plan, features, events, spine, mode))
    return assemble(closure, catalog.transforms, spine.given, parts)


def _by_source(catalog: Catalog, closure: Closure) -> dict[str, list[ViewPlan]]:
    found: dict[str, list[ViewPlan]] = {}
    for name in closure.view_features:
        plan = catalog.views[name]
        found.setdefault(plan.view.source, []).append(plan)
    return found


def _needed_columns(plans: list[ViewPlan]) -> tuple[str, ...]:
    needed: set[str] = set()
    for plan in plans:
        needed.update(plan.entity.columns)
        if isinstance(plan.plan, LatestPlan):
            needed.update(plan.view.features)
        else:
            needed.update(plan.plan.columns)
    return tuple(sorted(needed))


def _join_view(
    plan: ViewPlan, features: tuple[str, ...], events: Events, spine: Spine, mode: Mode
) -> FeatureFrame:
    event_codes, spine_codes = _shared_codes(plan.entity, events.columns, spine.given)
    event_us: dict[str, NDArray[np.int64]] = {}
    if isinstance(plan.plan, LatestPlan):
        rows = _latest_rows(event_codes, events.stamps, spine_codes, spine, mode)
        columns, statuses = _take_latest(plan, features, events, spine, rows)
        event_us[plan.view.name] = _at(events.stamps.event_us, rows)
    else:
        columns = plan.plan.join(
            event_codes,
            *events.stamps,
            plan.plan.inputs(events.columns),
            spine_codes,
            spine.t_us,
            features,
            mode=mode,
            spine_sequence=spine.sequences,
        )
        statuses = {feature: validity_status(column) for feature, column in columns.items()}
    name = plan.view.name
    return FeatureFrame(
        {f"{name}.{feature}": columns[feature] for feature in features},
        {f"{name}.{feature}": statuses[feature] for feature in features},
        event_us,
    )


def _latest_rows(
    event_codes: NDArray[np.int64],
    stamps: Stamps,
    spine_codes: NDArray[np.int64],
    spine: Spine,
    mode: Mode,
) -> NDArray[np.int64]:
    """Return the index of the event behind each spine row, -1 for none.

    Within an entity, events are walked in the order in which they become visible; the running
    winner is the maximum of their ranks by (event_time, known_time, sequence).
    """
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


def _take_latest(
    plan: ViewPlan,
    features: tuple[str, ...],
    events: Events,
    spine: Spine,
    rows: NDArray[np.int64],
) -> tuple[Columns, Statuses]:
    age_us = spine.t_us - _at(events.stamps.event_us, rows)
    state = np.where(rows < 0, np.uint8(Status.MISSING), np.uint8(Status.PRESENT))
    if plan.view.ttl_us is not None:
        state[(rows >= 0) & (age_us > plan.view.ttl_us)] = Status.STALE
    columns: Columns = {}
    statuses: Statuses = {}
    for name in features:
        column = events.columns[name]
        if len(column) == 0:
            column = empty_column(column.dtype, 1)
        taken = column.take(np.maximum(rows, 0))
        null = ~taken.mask()
        statuses[name] = np.where((state == 0) & null, np.uint8(Status.NULL), state)
        bare = Column(taken.dtype, taken.values)
        present = statuses[name] == Status.PRESENT
        columns[name] = with_default(bare, present, plan.view.defaults.get(name))
    return columns, statuses


def _shared_codes(
    entity: EntitySpec, events: Mapping[str, Column], spine: Mapping[str, Column]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return dense codes of the entity keys on both sides, -1 for a null key."""
    seen: dict[tuple[object, ...], int] = {}
    sides = []
    for columns in (events, spine):
        keys = list(zip(*(columns[name].to_list() for name in entity.columns), strict=True))
        for key in dict.fromkeys(keys):
            if key not in seen:
                encoded = encode_entity(entity.types, key, entity.name)
                seen[key] = -1 if encoded is None else len(seen)
        sides.append(np.fromiter((seen[key] for key in keys), np.int64, len(keys)))
    return sides[0], sides[1]


def _at(values: NDArray[np.int64], index: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return `values[index]`, 0 where the index is negative."""
    if len(values) == 0:
        return np.zeros(len(index), np.int64)
    return np.where(index < 0, 0, values[np.maximum(index, 0)])
