"""The scratch state of the window kernels: one entity's live tiles, loaded, advanced, stored.

Per resolution the live tiles stand in `work`, sorted by index, in a region that they slide along:
old ones leave at the front, new ones come at the end.  `plan` says where everything is; `tiles.py`
builds it.
"""

# ruff: noqa: PLR0913, PLR0917  a kernel's arguments are flat arrays

from mlpd.core.kernels import device
from mlpd.features.tile_kernel import F8, I8, U1, copy_words, merge_tile, write_event

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

STORED_LAYOUT, STORED_NEWEST_US, STORED_COUNTS = range(3)
"""Head of a stored value: layout, newest event time, then the number of tiles per resolution."""

NEWEST_US, WORK_HEAD = range(2)
"""Head of `work`: the newest event time in the tiles."""
START, TILES, TOUCHED, HORIZON, HORIZON_UNTIL_US = range(5)
"""Then per resolution: live tiles are START to START + TILES of the region.  TOUCHED is the oldest
index changed since the last evaluation; tiles below HORIZON are gone and refused."""
META_WIDTH = 5

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


@device
def clear_tile(plan: I8, work: I8, tile: int) -> None:
    """Write the empty tile to word `tile`."""
    copy_words(work, tile, plan, plan[EMPTY_TILE_AT], plan[TILE_WORDS])


@device
def is_sound(plan: I8, stored: I8, first: int, last: int) -> bool:
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
def load(plan: I8, stored: I8, first: int, last: int, work: I8) -> bool:
    """Take a stored value into `work`; no words are an entity never seen."""
    reset(plan, work)
    if first == last:
        return True
    if not is_sound(plan, stored, first, last):
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
def store(plan: I8, work: I8, out: I8, at: int) -> int:
    """Write `work` as a stored value from word `at` on; return the word after it."""
    out[at + STORED_LAYOUT] = plan[LAYOUT]
    out[at + STORED_NEWEST_US] = work[NEWEST_US]
    end = at + STORED_COUNTS + int(plan[RESOLUTIONS])
    for resolution in range(plan[RESOLUTIONS]):
        tiles = work[WORK_HEAD + resolution * META_WIDTH + TILES]
        first = first_tile(plan, work, resolution)
        out[at + STORED_COUNTS + resolution] = tiles
        copy_words(out, end, work, first, tiles * plan[TILE_WORDS])
        end += tiles * plan[TILE_WORDS]
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
