"""The entry for online reads: the values of any number of views, in one call.

A view has a part in `parts`, and its tables in `tables`.  Rows name entities by code.  Stored value
i lies in `memory` from `firsts[i]` to `lasts[i]`, which are equal for one that isn't there.  Cells
are written as a block has them: that of row r of feature f is number `f * rows + r`.
"""

# ruff: noqa: PLR0913, PLR0917  a kernel's arguments are flat arrays

from mlpd.core.kernels import device, kernel
from mlpd.features.fold_kernel import (
    QUERY_HEAD,
    WINDOW_WIDTH,
    WINDOWS,
    finish_window,
    fold_stored,
)
from mlpd.features.latest_kernel import (
    EVENT_WORD,
    FEATURE_WIDTH,
    FLAGS_SHIFT,
    NULL_BIT,
    NULL_WORD,
    TOMBSTONE,
    WORD,
    settle,
)
from mlpd.features.state_kernel import (
    BAD_VALUE,
    OK,
    PAST_READ,
    RESULT_AT,
    STORED_NEWEST_US,
    clear_tile,
    is_sound,
)
from mlpd.features.words import F8, I8, U1

LATEST, WINDOW = range(2)
(
    KIND, GROUP, VALUE, OLDER, ROW, EXTRA_ROW, FEATURES, WIDTH,
    FIRST_AT, FIRST_END, SECOND_AT, SECOND_END, TTL_US, EVENT_ROW, FIXED_WORDS,
) = range(15)  # fmt: skip
"""A part: which of its group's views it is, and which of those with older tiles, or -1; the rows of
the block for its features, and for the values of lists behind them; its tables, of a latest-value
view the query's, of a window view the plan and the query."""
PART_WIDTH = 15
FIRST_VALUE, ENTITIES, FIRST_OLDER = range(3)
"""A group, the views that are read by one key: its first value, its entities, its first older."""
GROUP_WIDTH = 3
NO_ENTITY = -1
FAULT_BITS = 8


@kernel(
    "const i8[], const i8[], const i8[], const i8[], const i8[], const i8[], const i8[], "
    "const i8[], i8, "
    "i8[], i8[], f8[], i8[], f8[], u1[], i8[], i8[], u1[], u1[], i8[]",
    returns="i8",
)
def read_views(
    parts: I8, tables: I8, groups: I8, codes: I8, memory: I8, firsts: I8, lasts: I8,
    t_us: I8, keep_stale: int,
    first_rows: I8, work: I8, work_f: F8, cells: I8, cells_f: F8, present: U1,
    words: I8, extra: I8, valid: U1, state: U1, event_us: I8,
) -> int:  # fmt: skip
    """Write all features of n rows, as of `t_us`: one for all rows, or one each.

    `codes`: per group and row the entity, numbered in the order of first use, NO_ENTITY for none.
    `keep_stale`: 1 for values that stay when they are older than their ttl.  Scratch: `first_rows`
    [entities], `work`, `cells` and `present` [widest part].  `extra`: cells for values of lists.
    `event_us`: per latest-value view and row, 0 where there is none.  Returns OK, or the part's
    number << FAULT_BITS | -fault.
    """
    rows = len(codes) // max(len(groups) // GROUP_WIDTH, 1)
    for number in range(len(parts) // PART_WIDTH):
        part = number * PART_WIDTH
        group = parts[part + GROUP] * GROUP_WIDTH
        entities = groups[group + ENTITIES]
        mine = codes[parts[part + GROUP] * rows : (parts[part + GROUP] + 1) * rows]
        at = groups[group + FIRST_VALUE] + parts[part + VALUE] * entities
        table = tables[parts[part + FIRST_AT] : parts[part + FIRST_END]]
        if parts[part + KIND] == LATEST:
            fault = _read_latest(
                parts[part : part + PART_WIDTH], table, mine, memory, firsts[at:], lasts[at:],
                t_us, keep_stale, words, valid, state, event_us,
            )  # fmt: skip
        else:
            older = groups[group + FIRST_OLDER] + max(parts[part + OLDER], 0) * entities
            fault = _read_window(
                parts[part : part + PART_WIDTH],
                table, tables[parts[part + SECOND_AT] : parts[part + SECOND_END]], mine,
                memory, firsts[at:], lasts[at:], firsts[older:], lasts[older:], t_us,
                first_rows, work, work_f,
                cells, cells_f, present, words, extra, valid,
            )  # fmt: skip
        if fault != OK:
            return number << FAULT_BITS | -fault
    return OK


@device
def _read_latest(
    part: I8, query: I8, codes: I8, memory: I8, firsts: I8, lasts: I8, t_us: I8, keep_stale: int,
    words: I8, valid: U1, state: U1, event_us: I8,
) -> int:  # fmt: skip
    """Decode the fixed sections of rows; none, and a tombstone, read as missing."""
    rows = len(codes)
    for row in range(rows):
        first, is_missing = 0, True
        if codes[row] != NO_ENTITY and lasts[codes[row]] > firsts[codes[row]]:
            first = firsts[codes[row]]
            if lasts[codes[row]] - first != part[FIXED_WORDS]:
                return BAD_VALUE
            is_missing = memory[first] >> FLAGS_SHIFT & TOMBSTONE != 0
        happened_us = 0 if is_missing else memory[first + EVENT_WORD]
        event_us[part[EVENT_ROW] * rows + row] = happened_us
        age_us = t_us[min(row, len(t_us) - 1)] - happened_us
        for feature in range(part[FEATURES]):
            at, cell, null = feature * FEATURE_WIDTH, (part[ROW] + feature) * rows + row, 1
            if not is_missing:
                words[cell] = memory[first + query[at + WORD]]
                null = memory[first + query[at + NULL_WORD]] >> query[at + NULL_BIT] & 1
            settle(
                query, at, is_missing, age_us, part[TTL_US], keep_stale, null,
                words, valid, state, cell,
            )  # fmt: skip
    return OK


@device
def _read_window(
    part: I8, plan: I8, query: I8, codes: I8, memory: I8, firsts: I8, lasts: I8,
    older_firsts: I8, older_lasts: I8, t_us: I8,
    first_rows: I8, work: I8, work_f: F8, cells: I8, cells_f: F8, present: U1,
    words: I8, extra: I8, valid: U1,
) -> int:  # fmt: skip
    """Read each entity once."""
    rows, seen = len(codes), 0
    for row in range(rows):
        code = codes[row]
        if 0 <= code < seen:
            _copy_cells(part, rows, first_rows[code], row, words, extra, valid)
            continue
        first, last, older_first, older_last = 0, 0, 0, 0
        if code != NO_ENTITY:
            first_rows[code] = row
            seen = code + 1
            first, last = firsts[code], lasts[code]
            if part[OLDER] >= 0:
                older_first, older_last = older_firsts[code], older_lasts[code]
        moment_us = t_us[min(row, len(t_us) - 1)]
        fault = _fault(plan, memory, first, last, older_first, older_last, moment_us)
        if fault != OK:
            return fault
        for window in range(query[WINDOWS]):
            spec = QUERY_HEAD + window * WINDOW_WIDTH
            clear_tile(plan, work, plan[RESULT_AT])
            if last > first:
                fold_stored(
                    plan, query, spec, memory, first, memory, older_first, older_last, moment_us,
                    work, work_f,
                )  # fmt: skip
            finish_window(plan, query, spec, work, work_f, cells, cells_f, present, 0)
        _spread_cells(part, rows, row, cells, present, words, extra, valid)
    return OK


@device
def _fault(
    plan: I8, memory: I8, first: int, last: int, older_first: int, older_last: int, t_us: int
) -> int:
    if last == first:
        return OK
    if not is_sound(plan, memory, first, last):
        return BAD_VALUE
    if older_last > older_first and not is_sound(plan, memory, older_first, older_last):
        return BAD_VALUE
    return PAST_READ if memory[first + STORED_NEWEST_US] >= t_us else OK


@device
def _spread_cells(
    part: I8, rows: int, row: int, cells: I8, present: U1, words: I8, extra: I8, valid: U1
) -> None:
    for feature in range(part[FEATURES]):
        cell = (part[ROW] + feature) * rows + row
        words[cell], valid[cell] = cells[feature], present[feature]
    for i in range(part[WIDTH] - part[FEATURES]):
        extra[(part[EXTRA_ROW] + i) * rows + row] = cells[part[FEATURES] + i]


@device
def _copy_cells(
    part: I8, rows: int, from_row: int, row: int, words: I8, extra: I8, valid: U1
) -> None:
    for feature in range(part[FEATURES]):
        start = (part[ROW] + feature) * rows
        words[start + row], valid[start + row] = words[start + from_row], valid[start + from_row]
    for i in range(part[WIDTH] - part[FEATURES]):
        start = (part[EXTRA_ROW] + i) * rows
        extra[start + row] = extra[start + from_row]
