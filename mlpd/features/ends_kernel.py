"""Values with the stamps that order them: those of first and last, and the lists of last_n."""

from mlpd.core.kernels import device
from mlpd.features.words import I8, copy_words

VALUE, EVENT_US, KNOWN_US, SEQUENCE = range(4)
END_WIDTH = 4
"""A value and its stamp.  A list is the number of its values, and these from the earliest on."""


@device
def write_end(
    words: I8, at: int, value: int, event_us: int, known_us: int, sequence: int
) -> None:  # fmt: skip
    """Write one value with its stamp."""
    words[at + VALUE] = value
    words[at + EVENT_US] = event_us
    words[at + KNOWN_US] = known_us
    words[at + SEQUENCE] = sequence


@device
def is_earlier(a: I8, a_at: int, b: I8, b_at: int) -> bool:
    """Tell whether the stamp at `a_at` is smaller than the one at `b_at`."""
    for word in range(EVENT_US, END_WIDTH):
        if a[a_at + word] != b[b_at + word]:
            return bool(a[a_at + word] < b[b_at + word])
    return False


@device
def merge_last_n(into: I8, to: int, words: I8, at: int, n: int, scratch: int) -> None:
    """Keep the latest n of two lists as the one at `to`; `into[scratch]` begins room for a list."""
    held, added = length_of(into, to, n), length_of(words, at, n)
    if added == 0:
        return
    copy_words(into, scratch, into, to + 1, held * END_WIDTH)
    into[to] = min(held + added, n)
    for place in range(into[to] - 1, -1, -1):
        a, b = scratch + (held - 1) * END_WIDTH, at + 1 + (added - 1) * END_WIDTH
        end = to + 1 + place * END_WIDTH
        if added == 0 or (held > 0 and is_earlier(words, b, into, a)):
            copy_words(into, end, into, a, END_WIDTH)
            held -= 1
        else:
            copy_words(into, end, words, b, END_WIDTH)
            added -= 1


@device
def length_of(words: I8, at: int, most: int) -> int:
    """Return a list's length; of a damaged one what stays within its tile."""
    return int(max(min(words[at], most), 0))


@device
def finish_last_n(words: I8, at: int, n: int, out: I8, to: int) -> int:
    """Write the values, from the earliest on; return how many."""
    length = length_of(words, at, n)
    for i in range(length):
        out[to + i] = words[at + 1 + i * END_WIDTH + VALUE]
    return length
