"""The event behind each spine row of a latest-value view: winners so far, then one search per row.

An entity's events lie side by side, in the order in which they become visible.  Of each the
winner so far is kept; a spine row needs the last event that it sees, and takes its winner.
"""

# ruff: noqa: PLR0913, PLR0917  a kernel's arguments are flat arrays

from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from mlpd.core.kernels import device, kernel
from mlpd.features.grouping_kernel import group_by_code

I8: TypeAlias = NDArray[np.int64]

NONE = -1


@kernel("const i8[], const i8[], const i8[], const i8[]", returns="b1")
def is_walk_order(visible: I8, event_us: I8, known_us: I8, sequences: I8) -> bool:
    """Tell whether events come in the order in which they become visible, then by their stamps."""
    for i in range(1, len(visible)):
        if visible[i - 1] != visible[i]:
            if visible[i - 1] > visible[i]:
                return False
        elif is_later(event_us, known_us, sequences, i - 1, i):
            return False
    return True


@kernel("const i8[], i8, i8[], i8[]", returns="b1")
def group_events(codes: I8, groups: int, order: I8, starts: I8) -> bool:
    """Sort events by code, stably: those of code c are `order[starts[c+1]:starts[c+2]]`.

    Codes are -1 to groups - 2; `starts` has groups + 1 elements.  False for a code out of range.
    """
    return group_by_code(codes, 1, order, starts, groups)


@kernel(
    "const i8[], const i8[], const i8[], const i8[], const i8[], const i8[], "
    "const i8[], const i8[], const i8[], i8[], i8[], i8[], i8[]"
)
def find_winners(
    order: I8, starts: I8, visible: I8, event_us: I8, known_us: I8, sequences: I8,
    spine_codes: I8, asked: I8, limits: I8,
    times: I8, winners: I8, places: I8, rows: I8,
) -> None:  # fmt: skip
    """Set `rows[i]` to the event that spine row i sees as the newest, -1 for none.

    A row sees the events of its entity with `visible <= asked[i]` and `event_us <= limits[i]`.
    `order` and `starts` are those of `group_events`, events of a code in walk
    order.  Scratch: `times` and `winners`, one per event, `places`, one per code.

    Rows that come in the order of `asked` cost a step each: the search starts where the entity's
    last row ended.  A row looks at all its entity's events where the winner is beyond its limit:
    only by `as_of_sequence`, with an open end and a t that no online read could have had.
    """
    for group in range(1, len(starts) - 1):
        places[group - 1] = starts[group]
        _walk(order, starts[group], starts[group + 1], visible, event_us, known_us, sequences,
              times, winners)  # fmt: skip
    for row in range(len(rows)):
        code = spine_codes[row]
        rows[row] = NONE
        if code >= 0:
            first, end, limit = starts[code + 1], starts[code + 2], limits[row]
            place = _search(
                first, end, places[code], order, times, event_us, asked[row], limit
            )  # fmt: skip
            if place >= first:
                places[code] = place
                rows[row] = winners[place]
                if event_us[winners[place]] > limit:
                    rows[row] = _scan(
                        order, first, place, event_us, known_us, sequences, limit
                    )  # fmt: skip


@device
def is_later(event_us: I8, known_us: I8, sequences: I8, a: int, b: int) -> bool:
    """Tell whether event a beats event b."""
    if event_us[a] != event_us[b]:
        return bool(event_us[a] > event_us[b])
    if known_us[a] != known_us[b]:
        return bool(known_us[a] > known_us[b])
    return bool(sequences[a] > sequences[b])


@device
def _walk(
    order: I8, first: int, end: int, visible: I8, event_us: I8, known_us: I8, sequences: I8,
    times: I8, winners: I8,
) -> None:  # fmt: skip
    """Set, for each of an entity's events, when it becomes visible and who wins then."""
    best = NONE
    for place in range(first, end):
        event = order[place]
        times[place] = visible[event]
        if best == NONE or is_later(event_us, known_us, sequences, event, best):
            best = event
        winners[place] = best


@device
def _search(
    first: int, end: int, start: int, order: I8, times: I8, event_us: I8, asked: int, limit: int
) -> int:
    """Return the last place from `first` on that a row sees, `first - 1` for none.

    Steps that double, forwards or backwards from `start`; then halves.
    """
    low, high, step = first - 1, end, 1
    if start < end and _is_seen(start, order, times, event_us, asked, limit):
        low = start
        while low + step < end:
            if not _is_seen(low + step, order, times, event_us, asked, limit):
                high = low + step
                break
            low += step
            step *= 2
    else:
        high = start
        while high - step >= first:
            if _is_seen(high - step, order, times, event_us, asked, limit):
                low = high - step
                break
            high -= step
            step *= 2
    while high - low > 1:
        middle = (low + high) // 2
        if _is_seen(middle, order, times, event_us, asked, limit):
            low = middle
        else:
            high = middle
    return low


@device
def _is_seen(place: int, order: I8, times: I8, event_us: I8, asked: int, limit: int) -> bool:
    """Tell whether a row sees the event at `place` and, so, all before it.

    Of events that become visible together the older ones come first: so an open interval cuts off
    the last of them.
    """
    if times[place] != asked:
        return bool(times[place] < asked)
    return bool(event_us[order[place]] <= limit)


@device
def _scan(
    order: I8, first: int, last: int, event_us: I8, known_us: I8, sequences: I8, limit: int
) -> int:
    """Return the winner among the events at `first` to `last` that aren't later than `limit`."""
    best = NONE
    for place in range(first, last + 1):
        event = order[place]
        if event_us[event] <= limit and (
            best == NONE or is_later(event_us, known_us, sequences, event, best)
        ):
            best = event
    return best
