"""The window engine's entries for joins: training sets, history and replay.

All accumulate with the same `merge_tile` (tile_kernel), keep an entity's tiles in the same scratch
state (state_kernel) and put windows together in the same order (fold_kernel); so an online read
and an offline join give the same bits.

What is seen as int64 in one array is seen as float64 in its twin.  Event times come shifted by -1
us for views closed on the right; so a window is always `floor(t - W, hop) <= event_time < t`.
"""

# ruff: noqa: PLR0913, PLR0917  a kernel's arguments are flat arrays

from mlpd.core.kernels import device, kernel
from mlpd.features.fold_kernel import (
    evaluate,
    forget_times,
)
from mlpd.features.grouping_kernel import group_by_code
from mlpd.features.state_kernel import (
    ALWAYS,
    BAD_ENTITY,
    NEVER,
    NEWEST_US,
    OK,
    advance,
    apply_event,
    copy_state,
    reset,
)
from mlpd.features.words import F8, I8, U1


@kernel("const i8[], i8, i8[], i8[]", returns="i8")
def group_rows(codes: I8, groups: int, order: I8, starts: I8) -> int:
    """Sort rows by code, stably: those of code c are `order[starts[c+1]:starts[c+2]]`.

    Codes are -1 to groups - 2; `starts` has groups + 1 elements.  Returns OK or BAD_ENTITY.
    """
    return OK if group_by_code(codes, 1, order, starts, groups) else BAD_ENTITY


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
