"""The scratch state of the window kernels: one entity's live tiles, loaded, advanced, stored.

Per resolution the live tiles stand in `work`, sorted by index, in a region that they slide along:
old ones leave at the front, new ones come at the end.  `plan` says where everything is; `tiles.py`
builds it.

An entity's tiles are stored as two values: the recent ones, which nearly every event changes, and
the older ones, which change when the recent ones have become too many or an event comes late.
"""

# ruff: noqa: PLR0913, PLR0917  a kernel's arguments are flat arrays

from mlpd.core.kernels import device
from mlpd.features.tile_kernel import has_summaries, merge_summaries, merge_tile, write_event
from mlpd.features.words import F8, I8, U1, copy_words

(
    RESOLUTIONS, STREAMS, STREAMS_AT, MERGES_AT, EMPTY_TILE_AT, TILE_WORDS, LAYOUT,
    EVENT_AT, RESULT_AT, OTHER_AT, EMPTY_AT,
) = range(11)  # fmt: skip
"""Head of a plan: where its stream table, merge list and empty tile are; a tile's length; places
for one tile each in `work`, of which that at EMPTY_AT stays empty."""
PLAN_HEAD = 11
HOP_US, RETENTION_US, CAPACITY, RECENT, REGION_AT = range(5)
"""Then per resolution; at most RECENT tiles are stored as recent; REGION_AT is the place of its
tiles in `work`, for 2 * CAPACITY of them."""
RESOLUTION_WIDTH = 5

STORED_LAYOUT, STORED_NEWEST_US, STORED_HEAD = range(3)
"""Head of a stored value: layout, newest event time."""
STORED_TILES, STORED_SINCE = range(2)
"""Then per resolution: the number of tiles; of the recent ones, the index from which on they are
the recent ones: tiles before it are among the older ones."""
STORED_WIDTH = 2

NEWEST_US, WORK_HEAD = range(2)
"""Head of `work`: the newest event time in the tiles."""
START, TILES, TOUCHED, HORIZON, HORIZON_UNTIL_US, SINCE = range(6)
"""Then per resolution: live tiles are START to START + TILES of the region.  TOUCHED is the oldest
index changed since the last evaluation; tiles below HORIZON are gone and refused; those below SINCE
are stored and not loaded."""
META_WIDTH = 6

OK, BAD_ENTITY, BAD_VALUE, FUTURE_EVENT, PAST_READ, NOT_LOADED = 0, -1, -2, -3, -4, -5
"""What the window kernels return; positive and 0 from the updates is a count."""

REFUSED, APPLIED, UNLOADED = range(3)
"""What `apply_event` returns; UNLOADED asks for the older tiles, and leaves `work` half-changed."""

NEVER = -(1 << 62)
ALWAYS = 1 << 62
"""Before and after every valid time and tile index (`core.time` bounds times by 2^61)."""


@device
def reset(plan: I8, work: I8) -> None:
    """Make `work` that of an entity without events."""
    clear_tile(plan, work, plan[EMPTY_AT])
    work[NEWEST_US] = NEVER
    for resolution in range(plan[RESOLUTIONS]):
        meta = WORK_HEAD + resolution * META_WIDTH
        work[meta + START] = 0
        work[meta + TILES] = 0
        work[meta + TOUCHED] = NEVER  # no fold is good
        work[meta + HORIZON] = NEVER
        work[meta + HORIZON_UNTIL_US] = NEVER
        work[meta + SINCE] = NEVER


@device
def clear_tile(plan: I8, work: I8, tile: int) -> None:
    """Write the empty tile to word `tile`."""
    copy_words(work, tile, plan, plan[EMPTY_TILE_AT], plan[TILE_WORDS])


@device
def is_sound(plan: I8, stored: I8, first: int, last: int) -> bool:
    """Tell whether words `first` to `last` are a whole value of this plan's layout."""
    words = STORED_HEAD + plan[RESOLUTIONS] * STORED_WIDTH
    if last - first < words or stored[first + STORED_LAYOUT] != plan[LAYOUT]:
        return False
    for resolution in range(plan[RESOLUTIONS]):
        tiles = stored_tiles(stored, first, resolution)
        if not 0 <= tiles <= plan[PLAN_HEAD + resolution * RESOLUTION_WIDTH + CAPACITY]:
            return False
        words += tiles * plan[TILE_WORDS]
    return bool(words == last - first)


@device
def stored_tiles(stored: I8, first: int, resolution: int) -> int:
    """Return the number of a resolution's tiles in the value at word `first`."""
    return int(stored[first + STORED_HEAD + resolution * STORED_WIDTH + STORED_TILES])


@device
def stored_place(plan: I8, stored: I8, first: int, resolution: int) -> int:
    """Return the place of a resolution's first tile in the value at word `first`."""
    place = first + STORED_HEAD + int(plan[RESOLUTIONS]) * STORED_WIDTH
    for finer in range(resolution):
        place += stored_tiles(stored, first, finer) * plan[TILE_WORDS]
    return int(place)


@device
def load_recent(plan: I8, stored: I8, first: int, last: int, work: I8) -> bool:
    """Take the recent tiles into `work`; no words are an entity never seen."""
    reset(plan, work)
    if first == last:
        return True
    if not is_sound(plan, stored, first, last):
        return False
    work[NEWEST_US] = stored[first + STORED_NEWEST_US]
    _append_tiles(plan, stored, first, work)
    for resolution in range(plan[RESOLUTIONS]):
        since = stored[first + STORED_HEAD + resolution * STORED_WIDTH + STORED_SINCE]
        work[WORK_HEAD + resolution * META_WIDTH + SINCE] = since
    return True


@device
def load_all(
    plan: I8, older: I8, older_first: int, older_last: int,
    recent: I8, first: int, last: int, work: I8,
) -> bool:  # fmt: skip
    """Take all tiles into `work`, which has room for twice as many as either value may have."""
    reset(plan, work)
    if older_last > older_first:
        if not is_sound(plan, older, older_first, older_last):
            return False
        _append_tiles(plan, older, older_first, work)
    if last > first:
        if not is_sound(plan, recent, first, last):
            return False
        work[NEWEST_US] = recent[first + STORED_NEWEST_US]
        _append_tiles(plan, recent, first, work)
    return True


@device
def _append_tiles(plan: I8, stored: I8, first: int, work: I8) -> None:
    """Copy a value's tiles behind those in `work`; they must be newer, and `work` fresh."""
    size = plan[TILE_WORDS]
    for resolution in range(plan[RESOLUTIONS]):
        meta = WORK_HEAD + resolution * META_WIDTH
        region = plan[PLAN_HEAD + resolution * RESOLUTION_WIDTH + REGION_AT]
        tiles = stored_tiles(stored, first, resolution)
        place = stored_place(plan, stored, first, resolution)
        copy_words(work, region + work[meta + TILES] * size, stored, place, tiles * size)
        work[meta + TILES] += tiles


@device
def is_overfull(plan: I8, work: I8) -> bool:
    """Tell whether there are more tiles than may be stored as recent."""
    for resolution in range(plan[RESOLUTIONS]):
        recent = plan[PLAN_HEAD + resolution * RESOLUTION_WIDTH + RECENT]
        if work[WORK_HEAD + resolution * META_WIDTH + TILES] > recent:
            return True
    return False


@device
def split(plan: I8, work: I8) -> bool:
    """Set SINCE of all tiles in `work`: half of RECENT stay recent where there are too many.

    Returns whether any is older.
    """
    found = False
    for resolution in range(plan[RESOLUTIONS]):
        meta = WORK_HEAD + resolution * META_WIDTH
        recent = plan[PLAN_HEAD + resolution * RESOLUTION_WIDTH + RECENT]
        work[meta + SINCE] = NEVER
        if work[meta + TILES] > recent:
            older = work[meta + TILES] - (recent + 1) // 2
            place = first_tile(plan, work, resolution) + older * plan[TILE_WORDS]
            work[meta + SINCE] = work[place]
            found = True
    return found


@device
def store_recent(plan: I8, work: I8, out: I8, at: int) -> int:
    """Write the tiles from SINCE on as a value from word `at` on; return the word after it."""
    return _store(plan, work, 0, out, at)


@device
def store_older(plan: I8, work: I8, out: I8, at: int) -> int:
    """Write the tiles before SINCE as a value from word `at` on; return the word after it."""
    return _store(plan, work, 1, out, at)


@device
def _store(plan: I8, work: I8, is_older: int, out: I8, at: int) -> int:
    out[at + STORED_LAYOUT] = plan[LAYOUT]
    out[at + STORED_NEWEST_US] = work[NEWEST_US]
    size = int(plan[TILE_WORDS])
    end = at + STORED_HEAD + int(plan[RESOLUTIONS]) * STORED_WIDTH
    for resolution in range(plan[RESOLUTIONS]):
        meta = WORK_HEAD + resolution * META_WIDTH
        first, tiles = first_tile(plan, work, resolution), int(work[meta + TILES])
        older = position_of(work, first, size, tiles, work[meta + SINCE])
        if is_older:
            tiles = older
        else:
            first += older * size
            tiles -= older
        head = at + STORED_HEAD + resolution * STORED_WIDTH
        out[head + STORED_TILES] = tiles
        out[head + STORED_SINCE] = work[meta + SINCE]
        copy_words(out, end, work, first, tiles * size)
        end += tiles * size
    return end


@device
def copy_state(plan: I8, work: I8, spare: I8) -> None:
    """Copy the live tiles of `work`, not their folds."""
    reset(plan, spare)
    spare[NEWEST_US] = work[NEWEST_US]
    for resolution in range(plan[RESOLUTIONS]):
        meta = WORK_HEAD + resolution * META_WIDTH
        tiles = work[meta + TILES]
        spare[meta + TILES] = tiles
        spare[meta + HORIZON] = work[meta + HORIZON]
        spare[meta + HORIZON_UNTIL_US] = work[meta + HORIZON_UNTIL_US]
        region = plan[PLAN_HEAD + resolution * RESOLUTION_WIDTH + REGION_AT]
        first = first_tile(plan, work, resolution)
        copy_words(spare, region, work, first, tiles * plan[TILE_WORDS])


@device
def first_tile(plan: I8, work: I8, resolution: int) -> int:
    """Return the place of a resolution's oldest live tile."""
    start = work[WORK_HEAD + resolution * META_WIDTH + START]
    region = plan[PLAN_HEAD + resolution * RESOLUTION_WIDTH + REGION_AT]
    return int(region + start * plan[TILE_WORDS])


@device
def advance(plan: I8, work: I8, t_us: int) -> None:
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
        tile = first_tile(plan, work, resolution)
        while work[meta + TILES] > 0 and work[tile] < horizon:
            work[meta + START] += 1
            work[meta + TILES] -= 1
            tile += plan[TILE_WORDS]


@device
def apply_event(
    plan: I8, work: I8, work_f: F8, row: int, event_us: I8, known_us: I8, sequences: I8,
    bits: I8, reals: F8, valid: U1,
) -> int:  # fmt: skip
    """Merge an event into its tile of every resolution; REFUSED if it is too old for all."""
    streams, event_at = plan[STREAMS], plan[EVENT_AT]
    event = event_us[row]
    is_written = False
    for resolution in range(plan[RESOLUTIONS]):
        meta = WORK_HEAD + resolution * META_WIDTH
        index = event // plan[PLAN_HEAD + resolution * RESOLUTION_WIDTH + HOP_US]
        if index < work[meta + HORIZON]:
            continue
        if index < work[meta + SINCE]:
            return UNLOADED
        if not is_written:
            write_event(
                plan, plan[STREAMS_AT], streams, plan[EMPTY_TILE_AT], work, work_f, event_at,
                row * streams, bits, reals, valid, event, known_us[row], sequences[row],
            )  # fmt: skip
            is_written = True
        tile = _open_tile(plan, work, resolution, index)
        merge_tile(plan, plan[MERGES_AT], work, work_f, tile, work, work_f, event_at)
        if has_summaries(plan, plan[MERGES_AT]):
            merge_summaries(plan, plan[MERGES_AT], work, work_f, tile, work, work_f, event_at)
        work[meta + TOUCHED] = min(work[meta + TOUCHED], index)
    if not is_written:
        return REFUSED
    work[NEWEST_US] = max(work[NEWEST_US], event)
    return APPLIED


@device
def _open_tile(plan: I8, work: I8, resolution: int, index: int) -> int:
    """Return the place of the tile `index`, made empty if it wasn't there."""
    meta, size = WORK_HEAD + resolution * META_WIDTH, int(plan[TILE_WORDS])
    tiles, first = int(work[meta + TILES]), first_tile(plan, work, resolution)
    position = tiles
    if tiles > 0 and work[first + (tiles - 1) * size] >= index:
        position = position_of(work, first, size, tiles, index)
        if work[first + position * size] == index:
            return first + position * size
    if work[meta + START] + tiles == 2 * plan[PLAN_HEAD + resolution * RESOLUTION_WIDTH + CAPACITY]:
        first = _slide(plan, work, resolution)
    tile = first + position * size
    for i in range(first + tiles * size - 1, tile - 1, -1):
        work[i + size] = work[i]
    work[meta + TILES] = tiles + 1
    clear_tile(plan, work, tile)
    work[tile] = index
    return tile


@device
def _slide(plan: I8, work: I8, resolution: int) -> int:
    """Move the live tiles, at most half of the region, to its front; return their place."""
    meta = WORK_HEAD + resolution * META_WIDTH
    first = first_tile(plan, work, resolution)
    work[meta + START] = 0
    work[meta + TOUCHED] = NEVER  # the folds lie beside other tiles now
    region = first_tile(plan, work, resolution)
    copy_words(work, region, work, first, work[meta + TILES] * plan[TILE_WORDS])
    return region


@device
def position_of(words: I8, first: int, size: int, tiles: int, index: int) -> int:
    """Return the position of the first tile not older than `index`, by binary search."""
    low, high = 0, tiles
    while low < high:
        middle = (low + high) // 2
        if words[first + middle * size] < index:
            low = middle + 1
        else:
            high = middle
    return low
