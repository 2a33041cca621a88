"""The window engine's entries for ingest: stored values and a batch of events to new values.

A module of its own, so that two processors compile it and the readers at the same time.  Arrays are
as in `window_kernel`.
"""

# ruff: noqa: PLR0913, PLR0917  a kernel's arguments are flat arrays

from mlpd.core.kernels import device, kernel
from mlpd.features.grouping_kernel import group_by_code
from mlpd.features.state_kernel import (
    BAD_ENTITY,
    BAD_VALUE,
    FUTURE_EVENT,
    NOT_LOADED,
    UNLOADED,
    advance,
    apply_event,
    is_overfull,
    load_all,
    load_recent,
    split,
    store_older,
    store_recent,
)
from mlpd.features.words import F8, I8, U1


@kernel(
    "const i8[], const i8[], const i8[], const i8[], const i8[], const i8[], const i8[], "
    "const i8[], const f8[], const u1[], i8, i8[], i8[], i8[], f8[], i8[], i8[], u1[]",
    returns="i8",
)
def update_recent(
    plan: I8, recent: I8, recent_starts: I8, entity_of_row: I8, event_us: I8, known_us: I8,
    sequences: I8, bits: I8, reals: F8, valid: U1, newest_known_us: int,
    order: I8, order_starts: I8, work: I8, work_f: F8, out: I8, out_starts: I8, unloaded: U1,
) -> int:  # fmt: skip
    """Write the new recent value of each entity with an accepted row to `out`; others get no words.

    `recent[recent_starts[e]:recent_starts[e+1]]` is the value of entity e, `out` likewise.  Rows
    are applied in their order; `order` and `order_starts` group them by entity.  `unloaded[e]` is 1
    where the older tiles are needed: nothing is written or counted, `update_all` does it.
    Returns how many rows were older than all retentions, or an error.
    """
    entities = len(recent_starts) - 1
    if not group_by_code(entity_of_row, 0, order, order_starts, entities):
        return BAD_ENTITY
    late, end = 0, 0
    out_starts[0] = 0
    for entity in range(entities):
        if not load_recent(plan, recent, recent_starts[entity], recent_starts[entity + 1], work):
            return BAD_VALUE
        first, last = order_starts[entity], order_starts[entity + 1]
        accepted = _apply_rows(
            plan, work, work_f, order, first, last, 1, event_us, known_us, sequences,
            bits, reals, valid, newest_known_us,
        )  # fmt: skip
        if accepted == FUTURE_EVENT:
            return FUTURE_EVENT
        unloaded[entity] = accepted == NOT_LOADED
        if accepted >= 0:
            late += last - first - accepted
        if accepted > 0:
            end = store_recent(plan, work, out, end)
        out_starts[entity + 1] = end
    return late


@kernel(
    "const i8[], const i8[], const i8[], const i8[], const i8[], const i8[], const i8[], "
    "const i8[], const i8[], const i8[], const f8[], const u1[], i8, const i8[], const i8[], "
    "i8[], f8[], i8[], i8[], i8[], i8[]",
    returns="i8",
)
def update_all(
    plan: I8, recent: I8, recent_starts: I8, older: I8, older_starts: I8, entities: I8,
    event_us: I8, known_us: I8, sequences: I8, bits: I8, reals: F8, valid: U1,
    newest_known_us: int, order: I8, order_starts: I8, work: I8, work_f: F8,
    out: I8, out_starts: I8, older_out: I8, older_out_starts: I8,
) -> int:  # fmt: skip
    """Write both new values of each of some `entities`, as `update_recent` left them.

    The i-th of `entities` has its older value at `older[older_starts[i]:older_starts[i+1]]` and
    gets its new ones likewise; no words are no older tiles, or, of both, no accepted row.
    """
    late, end, older_end = 0, 0, 0
    out_starts[0] = older_out_starts[0] = 0
    for i in range(len(entities)):
        entity = entities[i]
        if not load_all(
            plan, older, older_starts[i], older_starts[i + 1],
            recent, recent_starts[entity], recent_starts[entity + 1], work,
        ):  # fmt: skip
            return BAD_VALUE
        first, last = order_starts[entity], order_starts[entity + 1]
        accepted = _apply_rows(
            plan, work, work_f, order, first, last, 0, event_us, known_us, sequences,
            bits, reals, valid, newest_known_us,
        )  # fmt: skip
        if accepted == FUTURE_EVENT:
            return FUTURE_EVENT
        late += last - first - accepted
        if accepted > 0:
            if split(plan, work):
                older_end = store_older(plan, work, older_out, older_end)
            end = store_recent(plan, work, out, end)
        out_starts[i + 1] = end
        older_out_starts[i + 1] = older_end
    return late


@device
def _apply_rows(
    plan: I8, work: I8, work_f: F8, order: I8, first: int, last: int, is_recent: int,
    event_us: I8, known_us: I8, sequences: I8, bits: I8, reals: F8, valid: U1,
    newest_known_us: int,
) -> int:  # fmt: skip
    """Apply an entity's rows; return how many it took, FUTURE_EVENT or NOT_LOADED.

    `is_recent`: whether only the recent tiles are loaded, and must not become too many.
    """
    advance(plan, work, newest_known_us)
    accepted = 0
    for i in range(first, last):
        row = order[i]
        if event_us[row] > newest_known_us:
            return FUTURE_EVENT
        result = apply_event(
            plan, work, work_f, row, event_us, known_us, sequences, bits, reals, valid
        )
        if result == UNLOADED or (is_recent and is_overfull(plan, work)):
            return NOT_LOADED
        accepted += result
    return accepted
