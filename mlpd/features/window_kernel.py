"""The window engine: one set of kernels for ingest, online reads, training sets and replay.

All three entries accumulate with the same `merge_tile` and fold the tiles of a window from the
oldest to the newest, so that an online read and an offline join give the same bits.  They walk
entity by entity with one scratch state (`work`, int64 and float64 views of the same memory):
per resolution the live tiles, sorted by index, in a sliding region.

`plan`, `query` and `work` are laid out by `tiles.py`.  Event times come shifted by -1 us for views
closed on the right; so a window is always `floor(t - W, hop) <= event_time < t`.
"""

# ruff: noqa: PLR0913, PLR0917  a kernel's arguments are flat arrays

from mlpd.core.kernels import device, kernel
from mlpd.features.tile_kernel import (
    F8,
    I8,
    STREAM_WIDTH,
    U1,
    clear_words,
    copy_words,
    finish,
    merge_tile,
    write_event,
)

RESOLUTIONS, STREAMS, STREAMS_AT, TILE_WORDS, LAYOUT, EVENT_AT, RESULT_AT, FOLDS_AT = range(8)
"""Head of a plan.  The last three are places in `work`."""
PLAN_HEAD = 8
HOP_US, RETENTION_US, CAPACITY, REGION_AT = range(4)
"""Then per resolution; REGION_AT is the place of its tiles in `work`, for 2 * CAPACITY of them."""
RESOLUTION_WIDTH = 4

WINDOWS, QUERY_STREAMS, QUERY_STREAMS_AT = range(3)
"""Head of a query."""
QUERY_HEAD = 3
RESOLUTION, WIDTH_US, FOLD, OUTPUTS_AT, OUTPUTS_END = range(5)
"""Then per window: its outputs are `query[OUTPUTS_AT:OUTPUTS_END]`."""
WINDOW_WIDTH = 5
FUNCTION, STREAM, COLUMN = range(3)
"""An output: the aggregate's function, the place of its stream in the query, its column."""
OUTPUT_WIDTH = 3

STORED_LAYOUT, STORED_NEWEST_US, STORED_COUNTS = range(3)
"""Head of a stored value: layout, newest event time, then the number of tiles per resolution."""

NEWEST_US, WORK_HEAD = range(2)
"""Head of `work`: the newest event time in the tiles."""
START, TILES, TOUCHED, HORIZON = range(4)
"""Then per resolution: live tiles are START to START + TILES of the region.  TOUCHED is the oldest
index changed since the last evaluation; tiles below HORIZON are gone and refused."""
META_WIDTH = 4
FOLD_FIRST, FOLD_COUNT, FOLD_HEAD = range(3)
"""Head of a cached fold: index of its first tile and how many tiles from there on it covers."""

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
    "const i8[], const i8[], const i8[], const f8[], const i8[], const i8[], i8[], f8[], "
    "i8[], f8[], u1[]",
    returns="i8",
)
def read_values(
    plan: I8, query: I8, stored: I8, stored_f: F8, stored_starts: I8, t_us: I8,
    work: I8, work_f: F8, out: I8, out_f: F8, present: U1,
) -> int:  # fmt: skip
    """Write the query's outputs of n values, as of `t_us[i]` each, to columns of n words.

    Every t must be later than the value's newest event.  Returns OK or an error.
    """
    rows = len(t_us)
    for row in range(rows):
        first, last = stored_starts[row], stored_starts[row + 1]
        if last > first:
            if not _is_sound(plan, stored, first, last):
                return BAD_VALUE
            if stored[first + STORED_NEWEST_US] >= t_us[row]:
                return PAST_READ
        for window in range(query[WINDOWS]):
            spec = QUERY_HEAD + window * WINDOW_WIDTH
            clear_words(work, plan[RESULT_AT], plan[TILE_WORDS])
            if last > first:
                _fold_stored(plan, query, spec, stored, stored_f, first, t_us[row], work, work_f)
            _finish_window(plan, query, spec, work, work_f, out, out_f, present, row, rows)
    return OK


@kernel("const i8[], i8, i8[], i8[]", returns="i8")
def group_rows(codes: I8, groups: int, order: I8, starts: I8) -> int:
    """Sort rows by code, stably: those of code c are `order[starts[c+1]:starts[c+2]]`.

    Codes are -1 to groups - 2; `starts` has groups + 1 elements.  Returns OK or BAD_ENTITY.
    """
    return OK if _group(codes, 1, order, starts, groups) else BAD_ENTITY


@kernel(
    "const i8[], const i8[], const i8[], const i8[], const i8[], const i8[], const i8[], "
    "const i8[], const i8[], const f8[], const u1[], const i8[], const i8[], const i8[], "
    "const i8[], i8[], i8[], f8[], i8[], f8[], i8[], f8[], u1[]"
)
def join_rows(
    plan: I8, query: I8, event_order: I8, event_starts: I8, event_us: I8, known_us: I8,
    sequences: I8, visible: I8, bits: I8, reals: F8, valid: U1, spine_order: I8, spine_starts: I8,
    t_us: I8, asked: I8, needed_us: I8, work: I8, work_f: F8, spare: I8, spare_f: F8,
    out: I8, out_f: F8, present: U1,
) -> None:  # fmt: skip
    """Write the query's outputs of every spine row to columns in spine order.

    Spine row i sees the events of its entity with `visible <= asked[i]` and `event_us < t_us[i]`.
    Both orders come from `group_rows`: events by (code, visible, sequence), spine rows by (code,
    asked, t); the first group (code -1) has no entity.  `needed_us`: scratch, one per spine row.

    The walk keeps one state, `work`.  An event visible to a row but not before its t must wait: if
    events behind it don't have to, the row is evaluated on a copy in `spare`.  If `work` is already
    past the row (only `as_of_sequence` with a t that no online read could have had), `spare` is
    built from the entity's first event on: right, but slow.
    """
    rows = len(t_us)
    for group in range(1, len(spine_starts)):  # up to the group's number: codes -1, 0, 1, ...
        spine_first, spine_end = spine_starts[group - 1], spine_starts[group]
        first, end = event_starts[group - 1], event_starts[group]
        if group == 1:
            first = end
        _plan_walk(
            event_order, first, end, event_us, visible, spine_order, spine_first, spine_end,
            t_us, asked, needed_us,
        )  # fmt: skip
        _reset(plan, work)
        applied, seen, reached_us = first, first, NEVER
        for i in range(spine_first, spine_end):
            row, previous = spine_order[i], spine_order[max(i - 1, spine_first)]
            t = t_us[row]
            if i > spine_first and t_us[previous] == t and asked[previous] == asked[row]:
                _repeat(query, out, present, previous, row, rows)
                continue
            while seen < end and visible[event_order[seen]] <= asked[row]:
                seen += 1
            is_usable = work[NEWEST_US] < t and reached_us <= t
            settled = _settled(event_order, applied, seen, event_us, t)
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
            for k in range(start, seen):
                event = event_order[k]
                if event_us[event] < t:
                    _apply(
                        plan, state, state_f, event, event_us, known_us, sequences,
                        bits, reals, valid,
                    )  # fmt: skip
            _evaluate(plan, query, state, state_f, t, out, out_f, present, row, rows)


@device
def _settled(event_order: I8, first: int, end: int, event_us: I8, t_us: int) -> int:
    """Return the end of the events before t at the front, -1 if others follow one that waits."""
    settled = first
    while settled < end and event_us[event_order[settled]] < t_us:
        settled += 1
    for k in range(settled, end):
        if event_us[event_order[k]] < t_us:
            return -1
    return settled


@device
def _group(codes: I8, shift: int, order: I8, starts: I8, groups: int) -> bool:
    """Counting sort; group g gets `order[starts[g]:starts[g+1]]`."""
    clear_words(starts, 0, groups + 1)
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
    work[NEWEST_US] = NEVER
    for resolution in range(plan[RESOLUTIONS]):
        meta = WORK_HEAD + resolution * META_WIDTH
        work[meta + START] = 0
        work[meta + TILES] = 0
        work[meta + TOUCHED] = NEVER  # no cached fold is good
        work[meta + HORIZON] = NEVER


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
    """Copy the live part of `work`; the cached folds are not worth it."""
    _reset(plan, spare)
    spare[NEWEST_US] = work[NEWEST_US]
    for resolution in range(plan[RESOLUTIONS]):
        meta = WORK_HEAD + resolution * META_WIDTH
        tiles = work[meta + TILES]
        spare[meta + TILES] = tiles
        spare[meta + HORIZON] = work[meta + HORIZON]
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
    """Drop the tiles that no window reaching t or later needs, and refuse events there."""
    for resolution in range(plan[RESOLUTIONS]):
        spec = PLAN_HEAD + resolution * RESOLUTION_WIDTH
        meta = WORK_HEAD + resolution * META_WIDTH
        horizon = (t_us - plan[spec + RETENTION_US]) // plan[spec + HOP_US]
        work[meta + HORIZON] = horizon
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
                plan, plan[STREAMS_AT], streams, work, work_f, event_at,
                row * streams, bits, reals, valid, event, known_us[row], sequences[row],
            )  # fmt: skip
            is_written = True
        tile = _open_tile(plan, work, resolution, index)
        merge_tile(plan, plan[STREAMS_AT], streams, work, work_f, tile, work, work_f, event_at)
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
    clear_words(work, tile, size)
    work[tile] = index
    return tile


@device
def _slide(plan: I8, work: I8, resolution: int) -> int:
    """Move the live tiles, at most half of the region, to its front; return their place."""
    meta = WORK_HEAD + resolution * META_WIDTH
    first = _first_tile(plan, work, resolution)
    work[meta + START] = 0
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
    plan: I8, query: I8, spec: int, stored: I8, stored_f: F8, at: int, t_us: int,
    work: I8, work_f: F8,
) -> None:  # fmt: skip
    """Fold a stored value's tiles of one window into the result."""
    resolution, size = query[spec + RESOLUTION], plan[TILE_WORDS]
    first = at + STORED_COUNTS + plan[RESOLUTIONS]
    for finer in range(resolution):
        first += stored[at + STORED_COUNTS + finer] * size
    tiles = stored[at + STORED_COUNTS + resolution]
    hop_us = plan[PLAN_HEAD + resolution * RESOLUTION_WIDTH + HOP_US]
    oldest = (t_us - query[spec + WIDTH_US]) // hop_us
    streams_at, streams, result = query[QUERY_STREAMS_AT], query[QUERY_STREAMS], plan[RESULT_AT]
    for position in range(_position(stored, first, size, tiles, oldest), tiles):
        merge_tile(
            query, streams_at, streams, work, work_f, result,
            stored, stored_f, first + position * size,
        )  # fmt: skip


@device
def _evaluate(
    plan: I8, query: I8, work: I8, work_f: F8, t_us: int,
    out: I8, out_f: F8, present: U1, row: int, rows: int,
) -> None:  # fmt: skip
    for window in range(query[WINDOWS]):
        spec = QUERY_HEAD + window * WINDOW_WIDTH
        _fold_work(plan, query, spec, work, work_f, t_us)
        _finish_window(plan, query, spec, work, work_f, out, out_f, present, row, rows)
    for resolution in range(plan[RESOLUTIONS]):
        work[WORK_HEAD + resolution * META_WIDTH + TOUCHED] = ALWAYS


@device
def _fold_work(plan: I8, query: I8, spec: int, work: I8, work_f: F8, t_us: int) -> None:
    """Fold a window's tiles into the result, keeping the fold of all but the newest.

    The kept fold is taken up again while the window begins at the same tile and no tile in it was
    touched: a left fold may stop anywhere and go on, with the same bits.
    """
    resolution, size, result = query[spec + RESOLUTION], plan[TILE_WORDS], plan[RESULT_AT]
    streams_at, streams = query[QUERY_STREAMS_AT], query[QUERY_STREAMS]
    meta = WORK_HEAD + resolution * META_WIDTH
    hop_us = plan[PLAN_HEAD + resolution * RESOLUTION_WIDTH + HOP_US]
    fold = plan[FOLDS_AT] + query[spec + FOLD] * (FOLD_HEAD + size)
    first, tiles = _first_tile(plan, work, resolution), work[meta + TILES]
    oldest = (t_us - query[spec + WIDTH_US]) // hop_us
    position = _position(work, first, size, tiles, oldest)
    clear_words(work, result, size)
    if position == tiles:
        work[fold + FOLD_COUNT] = 0
        return
    first += position * size
    done = _kept(work, fold, first, size, tiles - position, work[meta + TOUCHED])
    kept, count = fold + FOLD_HEAD, tiles - position
    if done == 0:
        clear_words(work, kept, size)
    for i in range(done, count):
        to = kept
        if i == count - 1:
            to = result
            copy_words(work, result, work, kept, size)
        merge_tile(
            query, streams_at, streams, work, work_f, to, work, work_f, first + i * size
        )  # fmt: skip
    work[fold + FOLD_FIRST] = work[first]
    work[fold + FOLD_COUNT] = count - 1


@device
def _kept(work: I8, fold: int, first: int, size: int, tiles: int, touched: int) -> int:
    """Return how many of the window's tiles the kept fold covers, 0 if it is of no use."""
    count = work[fold + FOLD_COUNT]
    if touched == NEVER or not 0 < count < tiles or work[fold + FOLD_FIRST] != work[first]:
        return 0
    return count if touched > work[first + (count - 1) * size] else 0


@device
def _finish_window(
    plan: I8, query: I8, spec: int, work: I8, work_f: F8,
    out: I8, out_f: F8, present: U1, row: int, rows: int,
) -> None:  # fmt: skip
    for output in range(query[spec + OUTPUTS_AT], query[spec + OUTPUTS_END], OUTPUT_WIDTH):
        to = query[output + COLUMN] * rows + row
        stream = query[QUERY_STREAMS_AT] + query[output + STREAM] * STREAM_WIDTH
        present[to] = finish(
            query, stream, query[output + FUNCTION], work, work_f, plan[RESULT_AT], out, out_f, to
        )


@device
def _repeat(query: I8, out: I8, present: U1, previous: int, row: int, rows: int) -> None:
    """Give a spine row the results of an equal one."""
    outputs = query[QUERY_HEAD + OUTPUTS_AT]
    last = QUERY_HEAD + (query[WINDOWS] - 1) * WINDOW_WIDTH
    for output in range(outputs, query[last + OUTPUTS_END], OUTPUT_WIDTH):
        column = query[output + COLUMN] * rows
        out[column + row] = out[column + previous]
        present[column + row] = present[column + previous]


@device
def _plan_walk(
    event_order: I8, first: int, end: int, event_us: I8, visible: I8,
    spine_order: I8, spine_first: int, spine_end: int, t_us: I8, asked: I8, needed_us: I8,
) -> None:  # fmt: skip
    """Set `needed_us[i]`: the earliest t that the walk's state must still serve from row i on.

    That is the row's own t, or an earlier one of a later row, as `as_of_sequence` may have.  Of
    the later ones only those count which find all their events before their t; the others get a
    state of their own if they must.  So the live tiles never span more than a window and a hop.
    """
    newest, seen = NEVER, first
    for i in range(spine_first, spine_end):
        row = spine_order[i]
        while seen < end and visible[event_order[seen]] <= asked[row]:
            newest = max(newest, event_us[event_order[seen]])
            seen += 1
        needed_us[i] = t_us[row] if newest < t_us[row] else ALWAYS
    earliest = ALWAYS
    for i in range(spine_end - 1, spine_first - 1, -1):
        earliest = min(earliest, needed_us[i])
        needed_us[i] = min(earliest, t_us[spine_order[i]])
