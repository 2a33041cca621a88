"""The window engine's entries: one set of kernels for ingest, online reads, training sets, replay.

All accumulate with the same `merge_tile` (tile_kernel), keep an entity's tiles in the same scratch
state (state_kernel) and put windows together in the same order (fold_kernel); so an online read
and an offline join give the same bits.

What is seen as int64 in one array is seen as float64 in its twin.  Event times come shifted by -1
us for views closed on the right; so a window is always `floor(t - W, hop) <= event_time < t`.
"""

# ruff: noqa: PLR0913, PLR0917  a kernel's arguments are flat arrays

from mlpd.core.kernels import device, kernel
from mlpd.features.fold_kernel import (
    QUERY_HEAD,
    WINDOW_WIDTH,
    WINDOWS,
    evaluate,
    finish_window,
    fold_stored,
    forget_times,
)
from mlpd.features.state_kernel import (
    ALWAYS,
    NEVER,
    NEWEST_US,
    RESULT_AT,
    STORED_NEWEST_US,
    UNLOADED,
    advance,
    apply_event,
    clear_tile,
    copy_state,
    is_overfull,
    is_sound,
    load_all,
    load_recent,
    reset,
    split,
    store_older,
    store_recent,
)
from mlpd.features.tile_kernel import F8, I8, U1

OK, BAD_ENTITY, BAD_VALUE, FUTURE_EVENT, PAST_READ, NOT_LOADED = 0, -1, -2, -3, -4, -5
"""What the kernels return; positive and 0 from the updates is a count."""


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
    if not _group(entity_of_row, 0, order, order_starts, entities):
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


@kernel(
    "const i8[], const i8[], const i8[], const i8[], const i8[], const i8[], const i8[], "
    "i8[], f8[], i8[], f8[], u1[]",
    returns="i8",
)
def read_values(
    plan: I8, query: I8, recent: I8, recent_starts: I8, older: I8, older_starts: I8, t_us: I8,
    work: I8, work_f: F8, out: I8, out_f: F8, present: U1,
) -> int:  # fmt: skip
    """Write the query's outputs of n entities, as of `t_us[i]` each, row by row.

    Every t must be later than the entity's newest event.  Returns OK or an error.
    """
    width = len(out) // max(len(t_us), 1)
    for row in range(len(t_us)):
        first, last = recent_starts[row], recent_starts[row + 1]
        older_first, older_last = older_starts[row], older_starts[row + 1]
        if last > first:
            if not is_sound(plan, recent, first, last):
                return BAD_VALUE
            if older_last > older_first and not is_sound(plan, older, older_first, older_last):
                return BAD_VALUE
            if recent[first + STORED_NEWEST_US] >= t_us[row]:
                return PAST_READ
        for window in range(query[WINDOWS]):
            spec = QUERY_HEAD + window * WINDOW_WIDTH
            clear_tile(plan, work, plan[RESULT_AT])
            if last > first:
                fold_stored(
                    plan, query, spec, recent, first, older, older_first, older_last, t_us[row],
                    work, work_f,
                )  # fmt: skip
            finish_window(plan, query, spec, work, work_f, out, out_f, present, row * width)
    return OK


@kernel("const i8[], i8, i8[], i8[]", returns="i8")
def group_rows(codes: I8, groups: int, order: I8, starts: I8) -> int:
    """Sort rows by code, stably: those of code c are `order[starts[c+1]:starts[c+2]]`.

    Codes are -1 to groups - 2; `starts` has groups + 1 elements.  Returns OK or BAD_ENTITY.
    """
    return OK if _group(codes, 1, order, starts, groups) else BAD_ENTITY


@kernel(
    "const i8[], const i8[], const i8[], const i8[], const i8[], const i8[], const i8[], "
    "const i8[], const f8[], const u1[], const i8[], const i8[], const i8[], const i8[], "
    "i8[], i8[], f8[], i8[], f8[], i8[], f8[], u1[]"
)
def join_rows(
    plan: I8, query: I8, event_starts: I8, event_us: I8, known_us: I8, sequences: I8, visible: I8,
    bits: I8, reals: F8, valid: U1, spine_starts: I8, spine_rows: I8, t_us: I8, asked: I8,
    needed_us: I8, work: I8, work_f: F8, spare: I8, spare_f: F8, out: I8, out_f: F8, present: U1,
) -> None:  # fmt: skip
    """Write the query's outputs of every spine row, row by row, to the places `spine_rows`.

    Spine row i sees the events of its entity with `visible <= asked[i]` and `event_us < t_us[i]`.
    Events come sorted by (code, visible, sequence), spine rows by (code, asked, t); both `starts`
    are those of `group_rows`, whose first group (code -1) has no entity.  `needed_us`: scratch, one
    per spine row.

    The walk keeps one state, `work`.  An event visible to a row but not before its t must wait: if
    events behind it don't have to, the row is evaluated on a copy in `spare`.  If `work` is already
    past the row (only `as_of_sequence` with a t that no online read could have had), `spare` is
    built from the entity's first event on: right, but slow.
    """
    forget_times(query, work)
    forget_times(query, spare)
    width = len(out) // max(len(t_us), 1)
    for group in range(1, len(spine_starts)):  # up to the group's number: codes -1, 0, 1, ...
        spine_first, spine_end = spine_starts[group - 1], spine_starts[group]
        first, end = event_starts[group - 1], event_starts[group]
        if group == 1:
            first = end
        _plan_walk(first, end, event_us, visible, spine_first, spine_end, t_us, asked, needed_us)
        reset(plan, work)
        applied, seen, reached_us = first, first, NEVER
        for i in range(spine_first, spine_end):
            t, to = t_us[i], spine_rows[i] * width
            if i > spine_first and t_us[i - 1] == t and asked[i - 1] == asked[i]:
                _repeat(out, present, spine_rows[i - 1] * width, to, width)
                continue
            while seen < end and visible[seen] <= asked[i]:
                seen += 1
            is_usable = work[NEWEST_US] < t and reached_us <= t
            settled = _settled(event_us, applied, seen, t)
            start, state, state_f = applied, work, work_f
            if is_usable and settled >= 0:
                reached_us = max(reached_us, needed_us[i])
                advance(plan, work, needed_us[i])
                applied = settled
            else:
                state, state_f = spare, spare_f
                if is_usable:
                    copy_state(plan, work, spare)
                else:
                    start = first
                    reset(plan, spare)
                advance(plan, spare, t)
            for event in range(start, seen):
                if event_us[event] < t:
                    apply_event(
                        plan, state, state_f, event, event_us, known_us, sequences,
                        bits, reals, valid,
                    )  # fmt: skip
            evaluate(plan, query, state, state_f, t, out, out_f, present, to)


@device
def _settled(event_us: I8, first: int, end: int, t_us: int) -> int:
    """Return the end of the events before t at the front, -1 if others follow one that waits."""
    settled = first
    while settled < end and event_us[settled] < t_us:
        settled += 1
    for event in range(settled, end):
        if event_us[event] < t_us:
            return -1
    return settled


@device
def _plan_walk(
    first: int, end: int, event_us: I8, visible: I8,
    spine_first: int, spine_end: int, t_us: I8, asked: I8, needed_us: I8,
) -> None:  # fmt: skip
    """Set `needed_us[i]`: the earliest t that the walk's state must still serve from row i on.

    That is the row's own t, or an earlier one of a later row, as `as_of_sequence` may have.  Of
    the later ones only those count which find all their events before their t; the others get a
    state of their own if they must.  So the live tiles never span more than a window and a hop.
    """
    newest, seen = NEVER, first
    for i in range(spine_first, spine_end):
        while seen < end and visible[seen] <= asked[i]:
            newest = max(newest, event_us[seen])
            seen += 1
        needed_us[i] = t_us[i] if newest < t_us[i] else ALWAYS
    earliest = ALWAYS
    for i in range(spine_end - 1, spine_first - 1, -1):
        earliest = min(earliest, needed_us[i])
        needed_us[i] = min(earliest, t_us[i])


@device
def _repeat(out: I8, present: U1, row: int, to: int, width: int) -> None:
    """Give a spine row the results of an equal one."""
    for column in range(width):
        out[to + column] = out[row + column]
        present[to + column] = present[row + column]


@device
def _group(codes: I8, shift: int, order: I8, starts: I8, groups: int) -> bool:
    """Counting sort; group g gets `order[starts[g]:starts[g+1]]`."""
    for group in range(groups + 1):
        starts[group] = 0
    for i in range(len(codes)):
        group = codes[i] + shift
        if not 0 <= group < groups:
            return False
        starts[group + 1] += 1
    for group in range(groups):
        starts[group + 1] += starts[group]
    for i in range(len(codes) - 1, -1, -1):  # backwards, so that ends become starts and ties stay
        group = codes[i] + shift
        starts[group + 1] -= 1
        order[starts[group + 1]] = i
    for group in range(groups):
        starts[group] = starts[group + 1]
    starts[groups] = len(codes)
    return True
