"""The tiles of a window put together: for an online read, and for a join that moves along.

A window's tiles are cut at a pivot: those before it are folded from the newest to the oldest, those
from it on from the oldest to the newest, and then the two folds are merged.  The pivot is the first
multiple of the window's length (in tiles) after its oldest tile; so the order of merging depends
on the window and t alone, and an online read and a join give the same bits.

An online read folds every tile once.  A join keeps the folds beside the tiles: while t advances,
the window begins at another fold before the pivot and grows by one after it, so that a row costs a
few merges instead of one for each tile (Tangwongsan, Hirzel and Schneider, "Low-latency
sliding-window aggregation in worst-case constant time", DEBS 2017, whose two stacks these are).
"""

# ruff: noqa: PLR0913, PLR0917  a kernel's arguments are flat arrays

from mlpd.core.kernels import device, routine
from mlpd.features.state_kernel import (
    ALWAYS,
    EMPTY_AT,
    EVENT_AT,
    HOP_US,
    META_WIDTH,
    NEVER,
    OTHER_AT,
    PLAN_HEAD,
    REGION_AT,
    RESOLUTION_WIDTH,
    RESOLUTIONS,
    RESULT_AT,
    START,
    STREAMS_AT,
    TILE_WORDS,
    TILES,
    TOUCHED,
    WORK_HEAD,
    clear_tile,
    position_of,
    stored_place,
    stored_tiles,
)
from mlpd.features.tile_kernel import (
    ABSENT,
    LAST_N,
    STREAM_WIDTH,
    finish,
    finish_list,
    has_summaries,
    merge_summaries,
    merge_tile,
)
from mlpd.features.words import F8, I8, U1, copy_words

WINDOWS, QUERY_MERGES_AT = range(2)
"""Head of a query; its merge list has only what its outputs need."""
QUERY_HEAD = 2
RESOLUTION, WIDTH_US, STRIDE, FOLDS_AT, OUTPUTS_AT, OUTPUTS_END = range(6)
"""Then per window: pivots are multiples of STRIDE; FOLDS_AT is the place of its folds in `work`, a
head and one for each place of a tile; its outputs are `query[OUTPUTS_AT:OUTPUTS_END]`."""
WINDOW_WIDTH = 6
FUNCTION, STREAM, COLUMN, ELEMENTS = range(4)
"""An output: the aggregate's function, its stream in the plan, its column; of a list, whose column
is its length, the first column of its values."""
OUTPUT_WIDTH = 4

PIVOT, SPLIT, FOLD_START, FOLD_END, OLDEST, OLDEST_FROM_US, OLDEST_UNTIL_US, PLACE = range(8)
"""Head of a window's folds: the pivot's index, the place of the first tile from it on (counted in
tiles from the region's start, as START), the places FOLD_START to FOLD_END with good folds; the
index of the oldest tile for t in a span of times, and where it, or the next one, was last."""
FOLDS_HEAD = 8


@device
def fold_stored(
    plan: I8, query: I8, spec: int, recent: I8, at: int, older: I8, older_at: int, older_end: int,
    t_us: int, work: I8, work_f: F8,
) -> None:  # fmt: skip
    """Put an entity's stored tiles of one window together as the result.

    Its recent tiles are the value at `recent[at]`, the older ones `older[older_at:older_end]`.
    """
    resolution, size = query[spec + RESOLUTION], plan[TILE_WORDS]
    first, newer = stored_place(plan, recent, at, resolution), stored_tiles(recent, at, resolution)
    older_first, before = 0, 0
    if older_end > older_at:
        older_first = stored_place(plan, older, older_at, resolution)
        before = stored_tiles(older, older_at, resolution)
    hop_us = plan[PLAN_HEAD + resolution * RESOLUTION_WIDTH + HOP_US]
    oldest = (t_us - query[spec + WIDTH_US]) // hop_us
    pivot = _pivot(oldest, query[spec + STRIDE])
    start = position_of(older, older_first, size, before, oldest)
    middle = position_of(older, older_first, size, before, pivot)
    if start == before:
        start += position_of(recent, first, size, newer, oldest)
    if middle == before:
        middle += position_of(recent, first, size, newer, pivot)
    result, other, tile = plan[RESULT_AT], plan[OTHER_AT], plan[EVENT_AT]
    clear_tile(plan, work, other)
    for i in range(start, before + newer):
        to, position = (result, middle - 1 - (i - start)) if i < middle else (other, i)
        if position < before:
            copy_words(work, tile, older, older_first + position * size, size)
        else:
            copy_words(work, tile, recent, first + (position - before) * size, size)
        merge_tile(query, query[QUERY_MERGES_AT], work, work_f, to, work, work_f, tile)
    merge_tile(query, query[QUERY_MERGES_AT], work, work_f, result, work, work_f, other)
    if has_summaries(query, query[QUERY_MERGES_AT]):
        _fold_summaries(
            plan, query, recent, first, older, older_first, before, start, middle, before + newer,
            work, work_f,
        )  # fmt: skip


@routine
def _fold_summaries(
    plan: I8, query: I8, recent: I8, first: int, older: I8, older_first: int, before: int,
    start: int, middle: int, end: int, work: I8, work_f: F8,
) -> None:  # fmt: skip
    """Put the summaries of stored tiles together, in the order of `fold_stored`."""
    merges, size = query[QUERY_MERGES_AT], plan[TILE_WORDS]
    result, other, tile = plan[RESULT_AT], plan[OTHER_AT], plan[EVENT_AT]
    for i in range(start, end):
        to, position = (result, middle - 1 - (i - start)) if i < middle else (other, i)
        if position < before:
            copy_words(work, tile, older, older_first + position * size, size)
        else:
            copy_words(work, tile, recent, first + (position - before) * size, size)
        merge_summaries(query, merges, work, work_f, to, work, work_f, tile)
    merge_summaries(query, merges, work, work_f, result, work, work_f, other)


@device
def _pivot(oldest: int, stride: int) -> int:
    return (oldest // stride + 1) * stride


@device
def evaluate(
    plan: I8, query: I8, work: I8, work_f: F8, t_us: int,
    out: I8, out_f: F8, present: U1, to: int,
) -> None:  # fmt: skip
    """Write the query's outputs at t of the entity in `work`, from word `to` on."""
    for window in range(query[WINDOWS]):
        spec = QUERY_HEAD + window * WINDOW_WIDTH
        _fold_work(plan, query, spec, work, work_f, t_us)
        finish_window(plan, query, spec, work, work_f, out, out_f, present, to)
    for resolution in range(plan[RESOLUTIONS]):
        work[WORK_HEAD + resolution * META_WIDTH + TOUCHED] = ALWAYS


@device
def _fold_work(plan: I8, query: I8, spec: int, work: I8, work_f: F8, t_us: int) -> None:
    """Put the live tiles of one window together as the result, making only the folds not yet there.

    The fold beside a tile before the pivot is that of the tiles from there to the pivot, beside a
    tile after it that of the tiles from the pivot to there.
    """
    resolution, size = query[spec + RESOLUTION], plan[TILE_WORDS]
    meta, head = WORK_HEAD + resolution * META_WIDTH, query[spec + FOLDS_AT]
    region = plan[PLAN_HEAD + resolution * RESOLUTION_WIDTH + REGION_AT]
    start, end = _find_start(plan, query, spec, work, t_us), work[meta + START] + work[meta + TILES]
    _forget_touched(plan, work, meta, region, head)
    split, folds = work[head + SPLIT], head + FOLDS_HEAD
    older = max(work[head + FOLD_START] - start, 0)
    newer = end - work[head + FOLD_END]
    for step in range(older + newer + 1):
        base = plan[EMPTY_AT]
        if step < older:
            work[head + FOLD_START] -= 1
            place = work[head + FOLD_START]
            to, tile = folds + place * size, region + place * size
            if place + 1 < split:
                base = to + size
        elif step < older + newer:
            place = work[head + FOLD_END]
            work[head + FOLD_END] += 1
            to, tile = folds + place * size, region + place * size
            if place > split:
                base = to - size
        else:
            to = plan[RESULT_AT]
            tile = folds + (end - 1) * size if end > split else plan[EMPTY_AT]
            if start < split:
                base = folds + start * size
        copy_words(work, to, work, base, size)
        merge_tile(query, query[QUERY_MERGES_AT], work, work_f, to, work, work_f, tile)
        if has_summaries(query, query[QUERY_MERGES_AT]):
            merge_summaries(query, query[QUERY_MERGES_AT], work, work_f, to, work, work_f, tile)


@device
def _find_start(plan: I8, query: I8, spec: int, work: I8, t_us: int) -> int:
    """Return the place of a window's first tile, looking from where it was last."""
    resolution, size = query[spec + RESOLUTION], plan[TILE_WORDS]
    meta, head = WORK_HEAD + resolution * META_WIDTH, query[spec + FOLDS_AT]
    if not work[head + OLDEST_FROM_US] <= t_us < work[head + OLDEST_UNTIL_US]:
        hop_us = plan[PLAN_HEAD + resolution * RESOLUTION_WIDTH + HOP_US]
        oldest = (t_us - query[spec + WIDTH_US]) // hop_us
        work[head + OLDEST] = oldest
        work[head + OLDEST_FROM_US] = oldest * hop_us + query[spec + WIDTH_US]
        work[head + OLDEST_UNTIL_US] = work[head + OLDEST_FROM_US] + hop_us
        pivot = _pivot(oldest, query[spec + STRIDE])
        if pivot != work[head + PIVOT]:
            work[head + PIVOT] = pivot
            work[head + SPLIT] = ABSENT
    oldest, first = work[head + OLDEST], work[meta + START]
    end = first + work[meta + TILES]
    region = plan[PLAN_HEAD + resolution * RESOLUTION_WIDTH + REGION_AT]
    place = min(max(work[head + PLACE], first), end)
    while place < end and work[region + place * size] < oldest:
        place += 1
    while place > first and work[region + (place - 1) * size] >= oldest:
        place -= 1
    work[head + PLACE] = place
    return int(place)


@device
def _forget_touched(plan: I8, work: I8, meta: int, region: int, head: int) -> None:
    """Shorten a window's folds to those whose tiles are as they were."""
    size, touched = plan[TILE_WORDS], work[meta + TOUCHED]
    if work[head + SPLIT] == ABSENT or touched < work[head + PIVOT]:
        first, tiles = work[meta + START], work[meta + TILES]
        place = position_of(work, region + first * size, size, tiles, work[head + PIVOT])
        work[head + SPLIT] = first + place
        work[head + FOLD_START] = work[head + FOLD_END] = first + place
    while (
        work[head + FOLD_END] > work[head + SPLIT]
        and work[region + (work[head + FOLD_END] - 1) * size] >= touched
    ):
        work[head + FOLD_END] -= 1


@device
def finish_window(
    plan: I8, query: I8, spec: int, work: I8, work_f: F8,
    out: I8, out_f: F8, present: U1, to: int,
) -> None:  # fmt: skip
    """Write a window's outputs from the result; `present` is 0 where one is NULL."""
    for output in range(query[spec + OUTPUTS_AT], query[spec + OUTPUTS_END], OUTPUT_WIDTH):
        at = to + query[output + COLUMN]
        stream = plan[STREAMS_AT] + query[output + STREAM] * STREAM_WIDTH
        function, result = query[output + FUNCTION], plan[RESULT_AT]
        if function < LAST_N:
            present[at] = finish(plan, stream, function, work, work_f, result, out, out_f, at)
        else:
            elements = to + query[output + ELEMENTS]
            present[at] = finish_list(plan, stream, function, work, result, out, at, elements)


@device
def forget_times(query: I8, work: I8) -> None:
    """Make a fresh `work` fit for `evaluate`."""
    for window in range(query[WINDOWS]):
        head = query[QUERY_HEAD + window * WINDOW_WIDTH + FOLDS_AT]
        work[head + OLDEST_UNTIL_US] = NEVER
