"""The window engine: one set of kernels for ingest, online reads, training sets and replay.

All three entries accumulate with the same `merge_tile`, and put the tiles of a window together in
one order that depends on the window and t alone; so an online read and an offline join give the
same bits.  A window's tiles are cut at a pivot: those before it are folded from the newest to the
oldest, those from it on from the oldest to the newest, and then the two folds are merged.  The
pivot is the first multiple of the window's length (in tiles) after its oldest tile.  An online
read folds every tile once.  A join keeps the folds beside the tiles: while t advances, the window
begins at another fold before the pivot and grows by one after it, so that a row costs a few
merges instead of one for each tile (Tangwongsan, Hirzel and Schneider, "Low-latency sliding-window
aggregation in worst-case constant time", DEBS 2017, whose two stacks these are).

The entries work entity by entity on one scratch state, `work`: per resolution the live tiles,
sorted by index, in a sliding region.  `plan`, `query` and `work` are laid out by `tiles.py`; what
is seen as int64 in one array is seen as float64 in its twin.  Event times come shifted by -1 us
for views closed on the right; so a window is always `floor(t - W, hop) <= event_time < t`.
"""

# ruff: noqa: PLR0913, PLR0917  a kernel's arguments are flat arrays

from mlpd.core.kernels import device, kernel
from mlpd.features.tile_kernel import (
    ABSENT,
    F8,
    I8,
    STREAM_WIDTH,
    U1,
    copy_words,
    finish,
    merge_tile,
    write_event,
)

(
    RESOLUTIONS, STREAMS, STREAMS_AT, MERGES_AT, EMPTY_TILE_AT, TILE_WORDS, LAYOUT,
    EVENT_AT, RESULT_AT, OTHER_AT, EMPTY_AT,
) = range(11)  # fmt: skip
"""Head of a plan: where its stream table, merge list and empty tile are; a tile's length; places
for one tile each in `work`, of which that at EMPTY_AT stays empty."""
PLAN_HEAD = 11
HOP_US, RETENTION_US, CAPACITY, REGION_AT = range(4)
"""Then per resolution; REGION_AT is the place of its tiles in `work`, for 2 * CAPACITY of them."""
RESOLUTION_WIDTH = 4

WINDOWS, QUERY_MERGES_AT = range(2)
"""Head of a query; its merge list has only what its outputs need."""
QUERY_HEAD = 2
RESOLUTION, WIDTH_US, STRIDE, FOLDS_AT, OUTPUTS_AT, OUTPUTS_END = range(6)
"""Then per window: pivots are multiples of STRIDE; FOLDS_AT is the place of its folds in `work`, a
head and one for each place of a tile; its outputs are `query[OUTPUTS_AT:OUTPUTS_END]`."""
WINDOW_WIDTH = 6
FUNCTION, STREAM, COLUMN = range(3)
"""An output: the aggregate's function, its stream in the plan, its column."""
OUTPUT_WIDTH = 3

STORED_LAYOUT, STORED_NEWEST_US, STORED_COUNTS = range(3)
"""Head of a stored value: layout, newest event time, then the number of tiles per resolution."""

NEWEST_US, WORK_HEAD = range(2)
"""Head of `work`: the newest event time in the tiles."""
START, TILES, TOUCHED, HORIZON, HORIZON_UNTIL_US = range(5)
"""Then per resolution: live tiles are START to START + TILES of the region.  TOUCHED is the oldest
index changed since the last evaluation; tiles below HORIZON are gone and refused."""
META_WIDTH = 5
PIVOT, SPLIT, FOLD_START, FOLD_END, OLDEST, OLDEST_FROM_US, OLDEST_UNTIL_US, PLACE = range(8)
"""Head of a window's folds: the pivot's index, the place of the first tile from it on (counted in
tiles from the region's start, as START), the places FOLD_START to FOLD_END with good folds; the
index of the oldest tile for t in a span of times, and where it, or the next one, was last."""
FOLDS_HEAD = 8

NEVER = -(1 << 62)
ALWAYS = 1 << 62
"""Before and after every valid time and tile index (`core.time` bounds times by 2^61)."""

OK, BAD_ENTITY, BAD_VALUE, FUTURE_EVENT, PAST_READ = 0, -1, -2, -3, -4
"""What the kernels return; positive and 0 from `update_values` is a count."""


@kernel(
    "const i8[], const i8[], const i8[], const i8[], const i8[], const i8[], const i8[], "
    "const i8[], const f8[], const u1[], i8, i8[], i8[], i8[], f8[], i8[], i8[]",
    returns="i8",
)
def update_values(
    plan: I8, stored: I8, stored_starts: I8, entity_of_row: I8, event_us: I8, known_us: I8,
    sequences: I8, bits: I8, reals: F8, valid: U1, newest_known_us: int,
    order: I8, order_starts: I8, work: I8, work_f: F8, out: I8, out_starts: I8,
) -> int:  # fmt: skip
    """Write the new value of each entity with an accepted row to `out`; others get no words.

    `stored[stored_starts[e]:stored_starts[e+1]]` is the value of entity e, `out` likewise.  Rows
    are applied in their order.  Returns how many rows were older than all retentions, or an error.
    """
    entities = len(stored_starts) - 1
    if not _group(entity_of_row, 0, order, order_starts, entities):
        return BAD_ENTITY
    late, end = 0, 0
    out_starts[0] = 0
    for entity in range(entities):
        first, last = order_starts[entity], order_starts[entity + 1]
        if not _load(plan, stored, stored_starts[entity], stored_starts[entity + 1], work):
            return BAD_VALUE
        _advance(plan, work, newest_known_us)
        accepted = 0
        for i in range(first, last):
            row = order[i]
            if event_us[row] > newest_known_us:
                return FUTURE_EVENT
            accepted += _apply(
                plan, work, work_f, row, event_us, known_us, sequences, bits, reals, valid
            )
        late += last - first - accepted
        if accepted > 0:
            end = _store(plan, work, out, end)
        out_starts[entity + 1] = end
    return late


@kernel(
    "const i8[], const i8[], const i8[], const i8[], const i8[], i8[], f8[], i8[], f8[], u1[]",
    returns="i8",
)
def read_values(
    plan: I8, query: I8, stored: I8, stored_starts: I8, t_us: I8, work: I8, work_f: F8,
    out: I8, out_f: F8, present: U1,
) -> int:  # fmt: skip
    """Write the query's outputs of n values, as of `t_us[i]` each, row by row.

    Every t must be later than the value's newest event.  Returns OK or an error.
    """
    width = len(out) // max(len(t_us), 1)
    for row in range(len(t_us)):
        first, last = stored_starts[row], stored_starts[row + 1]
        if last > first:
            if not _is_sound(plan, stored, first, last):
                return BAD_VALUE
            if stored[first + STORED_NEWEST_US] >= t_us[row]:
                return PAST_READ
        for window in range(query[WINDOWS]):
            spec = QUERY_HEAD + window * WINDOW_WIDTH
            _clear_tile(plan, work, plan[RESULT_AT])
            if last > first:
                _fold_stored(plan, query, spec, stored, first, t_us[row], work, work_f)
            _finish_window(plan, query, spec, work, work_f, out, out_f, present, row * width)
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
    _forget_times(query, work)
    _forget_times(query, spare)
    width = len(out) // max(len(t_us), 1)
    for group in range(1, len(spine_starts)):  # up to the group's number: codes -1, 0, 1, ...
        spine_first, spine_end = spine_starts[group - 1], spine_starts[group]
        first, end = event_starts[group - 1], event_starts[group]
        if group == 1:
            first = end
        _plan_walk(first, end, event_us, visible, spine_first, spine_end, t_us, asked, needed_us)
        _reset(plan, work)
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
                _advance(plan, work, needed_us[i])
                applied = settled
            else:
                state, state_f = spare, spare_f
                if is_usable:
                    _copy_state(plan, work, spare)
                else:
                    start = first
                    _reset(plan, spare)
                _advance(plan, spare, t)
            for event in range(start, seen):
                if event_us[event] < t:
                    _apply(
                        plan, state, state_f, event, event_us, known_us, sequences,
                        bits, reals, valid,
                    )  # fmt: skip
            _evaluate(plan, query, state, state_f, t, out, out_f, present, to)


@device
def _forget_times(query: I8, work: I8) -> None:
    for window in range(query[WINDOWS]):
        head = query[QUERY_HEAD + window * WINDOW_WIDTH + FOLDS_AT]
        work[head + OLDEST_UNTIL_US] = NEVER


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


@device
def _reset(plan: I8, work: I8) -> None:
    _clear_tile(plan, work, plan[EMPTY_AT])
    work[NEWEST_US] = NEVER
    for resolution in range(plan[RESOLUTIONS]):
        meta = WORK_HEAD + resolution * META_WIDTH
        work[meta + START] = 0
        work[meta + TILES] = 0
        work[meta + TOUCHED] = NEVER  # no fold is good
        work[meta + HORIZON] = NEVER
        work[meta + HORIZON_UNTIL_US] = NEVER


@device
def _clear_tile(plan: I8, work: I8, tile: int) -> None:
    copy_words(work, tile, plan, plan[EMPTY_TILE_AT], plan[TILE_WORDS])


@device
def _is_sound(plan: I8, stored: I8, first: int, last: int) -> bool:
    """Tell whether words `first` to `last` are a whole value of this plan's layout."""
    head = STORED_COUNTS + plan[RESOLUTIONS]
    if last - first < head or stored[first + STORED_LAYOUT] != plan[LAYOUT]:
        return False
    words = head
    for resolution in range(plan[RESOLUTIONS]):
        tiles = stored[first + STORED_COUNTS + resolution]
        if not 0 <= tiles <= plan[PLAN_HEAD + resolution * RESOLUTION_WIDTH + CAPACITY]:
            return False
        words += tiles * plan[TILE_WORDS]
    return bool(words == last - first)


@device
def _load(plan: I8, stored: I8, first: int, last: int, work: I8) -> bool:
    """Take a stored value into `work`; no words are an entity never seen."""
    _reset(plan, work)
    if first == last:
        return True
    if not _is_sound(plan, stored, first, last):
        return False
    work[NEWEST_US] = stored[first + STORED_NEWEST_US]
    at = first + STORED_COUNTS + plan[RESOLUTIONS]
    for resolution in range(plan[RESOLUTIONS]):
        tiles = stored[first + STORED_COUNTS + resolution]
        region = plan[PLAN_HEAD + resolution * RESOLUTION_WIDTH + REGION_AT]
        work[WORK_HEAD + resolution * META_WIDTH + TILES] = tiles
        copy_words(work, region, stored, at, tiles * plan[TILE_WORDS])
        at += tiles * plan[TILE_WORDS]
    return True


@device
def _store(plan: I8, work: I8, out: I8, at: int) -> int:
    """Write `work` as a stored value from word `at` on; return the word after it."""
    out[at + STORED_LAYOUT] = plan[LAYOUT]
    out[at + STORED_NEWEST_US] = work[NEWEST_US]
    end = at + STORED_COUNTS + int(plan[RESOLUTIONS])
    for resolution in range(plan[RESOLUTIONS]):
        tiles = work[WORK_HEAD + resolution * META_WIDTH + TILES]
        first = _first_tile(plan, work, resolution)
        out[at + STORED_COUNTS + resolution] = tiles
        copy_words(out, end, work, first, tiles * plan[TILE_WORDS])
        end += tiles * plan[TILE_WORDS]
    return end


@device
def _copy_state(plan: I8, work: I8, spare: I8) -> None:
    """Copy the live tiles of `work`, not their folds."""
    _reset(plan, spare)
    spare[NEWEST_US] = work[NEWEST_US]
    for resolution in range(plan[RESOLUTIONS]):
        meta = WORK_HEAD + resolution * META_WIDTH
        tiles = work[meta + TILES]
        spare[meta + TILES] = tiles
        spare[meta + HORIZON] = work[meta + HORIZON]
        spare[meta + HORIZON_UNTIL_US] = work[meta + HORIZON_UNTIL_US]
        region = plan[PLAN_HEAD + resolution * RESOLUTION_WIDTH + REGION_AT]
        first = _first_tile(plan, work, resolution)
        copy_words(spare, region, work, first, tiles * plan[TILE_WORDS])


@device
def _first_tile(plan: I8, work: I8, resolution: int) -> int:
    """Return the place of a resolution's oldest live tile."""
    start = work[WORK_HEAD + resolution * META_WIDTH + START]
    region = plan[PLAN_HEAD + resolution * RESOLUTION_WIDTH + REGION_AT]
    return int(region + start * plan[TILE_WORDS])


@device
def _advance(plan: I8, work: I8, t_us: int) -> None:
    """Drop the tiles that no window reaching t or later needs, and refuse events there.

    t must not be before that of an earlier call since `_reset`.
    """
    for resolution in range(plan[RESOLUTIONS]):
        spec = PLAN_HEAD + resolution * RESOLUTION_WIDTH
        meta = WORK_HEAD + resolution * META_WIDTH
        if t_us < work[meta + HORIZON_UNTIL_US]:
            continue
        hop_us, retention_us = plan[spec + HOP_US], plan[spec + RETENTION_US]
        horizon = (t_us - retention_us) // hop_us
        work[meta + HORIZON] = horizon
        work[meta + HORIZON_UNTIL_US] = (horizon + 1) * hop_us + retention_us
        tile = _first_tile(plan, work, resolution)
        while work[meta + TILES] > 0 and work[tile] < horizon:
            work[meta + START] += 1
            work[meta + TILES] -= 1
            tile += plan[TILE_WORDS]


@device
def _apply(
    plan: I8, work: I8, work_f: F8, row: int, event_us: I8, known_us: I8, sequences: I8,
    bits: I8, reals: F8, valid: U1,
) -> int:  # fmt: skip
    """Merge an event into its tile of every resolution; return 0 if all refuse it, else 1."""
    streams, event_at = plan[STREAMS], plan[EVENT_AT]
    event = event_us[row]
    is_written = False
    for resolution in range(plan[RESOLUTIONS]):
        meta = WORK_HEAD + resolution * META_WIDTH
        index = event // plan[PLAN_HEAD + resolution * RESOLUTION_WIDTH + HOP_US]
        if index < work[meta + HORIZON]:
            continue
        if not is_written:
            write_event(
                plan, plan[STREAMS_AT], streams, plan[EMPTY_TILE_AT], work, work_f, event_at,
                row * streams, bits, reals, valid, event, known_us[row], sequences[row],
            )  # fmt: skip
            is_written = True
        tile = _open_tile(plan, work, resolution, index)
        merge_tile(plan, plan[MERGES_AT], work, work_f, tile, work, work_f, event_at)
        work[meta + TOUCHED] = min(work[meta + TOUCHED], index)
    if not is_written:
        return 0
    work[NEWEST_US] = max(work[NEWEST_US], event)
    return 1


@device
def _open_tile(plan: I8, work: I8, resolution: int, index: int) -> int:
    """Return the place of the tile `index`, made empty if it wasn't there."""
    meta, size = WORK_HEAD + resolution * META_WIDTH, int(plan[TILE_WORDS])
    tiles, first = int(work[meta + TILES]), _first_tile(plan, work, resolution)
    position = tiles
    if tiles > 0 and work[first + (tiles - 1) * size] >= index:
        position = _position(work, first, size, tiles, index)
        if work[first + position * size] == index:
            return first + position * size
    if work[meta + START] + tiles == 2 * plan[PLAN_HEAD + resolution * RESOLUTION_WIDTH + CAPACITY]:
        first = _slide(plan, work, resolution)
    tile = first + position * size
    for i in range(first + tiles * size - 1, tile - 1, -1):
        work[i + size] = work[i]
    work[meta + TILES] = tiles + 1
    _clear_tile(plan, work, tile)
    work[tile] = index
    return tile


@device
def _slide(plan: I8, work: I8, resolution: int) -> int:
    """Move the live tiles, at most half of the region, to its front; return their place."""
    meta = WORK_HEAD + resolution * META_WIDTH
    first = _first_tile(plan, work, resolution)
    work[meta + START] = 0
    work[meta + TOUCHED] = NEVER  # the folds lie beside other tiles now
    region = _first_tile(plan, work, resolution)
    copy_words(work, region, work, first, work[meta + TILES] * plan[TILE_WORDS])
    return region


@device
def _position(words: I8, first: int, size: int, tiles: int, index: int) -> int:
    """Return the position of the first tile not older than `index`, by binary search."""
    low, high = 0, tiles
    while low < high:
        middle = (low + high) // 2
        if words[first + middle * size] < index:
            low = middle + 1
        else:
            high = middle
    return low


@device
def _fold_stored(
    plan: I8, query: I8, spec: int, stored: I8, at: int, t_us: int, work: I8, work_f: F8
) -> None:  # fmt: skip
    """Put a stored value's tiles of one window together as the result."""
    resolution, size = query[spec + RESOLUTION], plan[TILE_WORDS]
    first = at + STORED_COUNTS + plan[RESOLUTIONS]
    for finer in range(resolution):
        first += stored[at + STORED_COUNTS + finer] * size
    tiles = stored[at + STORED_COUNTS + resolution]
    hop_us = plan[PLAN_HEAD + resolution * RESOLUTION_WIDTH + HOP_US]
    oldest = (t_us - query[spec + WIDTH_US]) // hop_us
    start = _position(stored, first, size, tiles, oldest)
    split = _position(stored, first, size, tiles, _pivot(oldest, query[spec + STRIDE]))
    result, other = plan[RESULT_AT], plan[OTHER_AT]
    _clear_tile(plan, work, other)
    for i in range(start, tiles + 1):
        to, tile = result if i < split else other, plan[EVENT_AT]
        if i < tiles:
            position = split - 1 - (i - start) if i < split else i
            copy_words(work, tile, stored, first + position * size, size)
        else:
            to, tile = result, other
        merge_tile(query, query[QUERY_MERGES_AT], work, work_f, to, work, work_f, tile)


@device
def _pivot(oldest: int, stride: int) -> int:
    return (oldest // stride + 1) * stride


@device
def _evaluate(
    plan: I8, query: I8, work: I8, work_f: F8, t_us: int,
    out: I8, out_f: F8, present: U1, to: int,
) -> None:  # fmt: skip
    for window in range(query[WINDOWS]):
        spec = QUERY_HEAD + window * WINDOW_WIDTH
        _fold_work(plan, query, spec, work, work_f, t_us)
        _finish_window(plan, query, spec, work, work_f, out, out_f, present, to)
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
        place = _position(work, region + first * size, size, tiles, work[head + PIVOT])
        work[head + SPLIT] = first + place
        work[head + FOLD_START] = work[head + FOLD_END] = first + place
    while (
        work[head + FOLD_END] > work[head + SPLIT]
        and work[region + (work[head + FOLD_END] - 1) * size] >= touched
    ):
        work[head + FOLD_END] -= 1


@device
def _finish_window(
    plan: I8, query: I8, spec: int, work: I8, work_f: F8,
    out: I8, out_f: F8, present: U1, to: int,
) -> None:  # fmt: skip
    for output in range(query[spec + OUTPUTS_AT], query[spec + OUTPUTS_END], OUTPUT_WIDTH):
        at = to + query[output + COLUMN]
        stream = plan[STREAMS_AT] + query[output + STREAM] * STREAM_WIDTH
        present[at] = finish(
            plan, stream, query[output + FUNCTION], work, work_f, plan[RESULT_AT], out, out_f, at
        )


@device
def _repeat(out: I8, present: U1, row: int, to: int, width: int) -> None:
    """Give a spine row the results of an equal one."""
    for column in range(width):
        out[to + column] = out[row + column]
        present[to + column] = present[row + column]


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
