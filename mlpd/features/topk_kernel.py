"""The most frequent values: exact counts of up to CAPACITY distinct ones, then the heavy ones'.

With more distinct values the smallest counts go: as many are taken from every count as leave at
most CAPACITY above 0 (Misra and Gries, "Finding repeated elements", 1982; for tiles Agarwal et al.,
"Mergeable summaries", PODS 2012).  A count is then too small by at most 1 / (CAPACITY + 1) of all
values, so a value that makes up more than that is among them.
"""

from mlpd.core.kernels import device
from mlpd.features.ends_kernel import length_of
from mlpd.features.words import I8

CAPACITY = 32
COUNTED, OCCURRENCES = range(2)
ENTRY_WIDTH = 2
TOPK_WIDTH = 1 + CAPACITY * ENTRY_WIDTH
"""The number of values, and each with its count, in ascending order of the values as integers."""
TOPK_SCRATCH = 2 * CAPACITY * ENTRY_WIDTH


@device
def write_topk(words: I8, at: int, value: int) -> None:
    """Write the counts of one value; words that they don't need stay what they are."""
    words[at] = 1
    words[at + 1 + COUNTED] = value
    words[at + 1 + OCCURRENCES] = 1


@device
def merge_topk(into: I8, to: int, words: I8, at: int, scratch: int) -> None:
    """Add the counts at word `at` to those at `to`; `into[scratch]` begins TOPK_SCRATCH words."""
    if words[at] == 0:
        return
    n = _unite(into, to, words, at, scratch)
    surplus = 0 if n <= CAPACITY else _surplus(into, scratch, n)
    kept, before = 0, length_of(into, to, CAPACITY)
    for i in range(n):
        entry = scratch + i * ENTRY_WIDTH
        if into[entry + OCCURRENCES] > surplus:
            place = to + 1 + kept * ENTRY_WIDTH
            into[place + COUNTED] = into[entry + COUNTED]
            into[place + OCCURRENCES] = into[entry + OCCURRENCES] - surplus
            kept += 1
    into[to] = kept
    for word in range(to + 1 + kept * ENTRY_WIDTH, to + 1 + before * ENTRY_WIDTH):
        into[word] = 0


@device
def _unite(into: I8, to: int, words: I8, at: int, scratch: int) -> int:
    """Write all values with their counts to `into[scratch]`, in order; return how many."""
    held, added = length_of(into, to, CAPACITY), length_of(words, at, CAPACITY)
    i = j = n = 0
    while i < held or j < added:
        a, b = to + 1 + i * ENTRY_WIDTH, at + 1 + j * ENTRY_WIDTH
        entry = scratch + n * ENTRY_WIDTH
        n += 1
        into[entry + OCCURRENCES] = 0
        if j == added or (i < held and into[a + COUNTED] <= words[b + COUNTED]):
            into[entry + COUNTED] = into[a + COUNTED]
            into[entry + OCCURRENCES] = into[a + OCCURRENCES]
            i += 1
        else:
            into[entry + COUNTED] = words[b + COUNTED]
        if j < added and words[b + COUNTED] == into[entry + COUNTED]:
            into[entry + OCCURRENCES] += words[b + OCCURRENCES]
            j += 1
    return n


@device
def _surplus(words: I8, at: int, n: int) -> int:
    """Return the largest count that more than CAPACITY of n > CAPACITY entries reach."""
    low, high = 1, 2
    while _reaching(words, at, n, high) > CAPACITY:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        if _reaching(words, at, n, middle) > CAPACITY:
            low = middle
        else:
            high = middle
    return low


@device
def _reaching(words: I8, at: int, n: int, count: int) -> int:
    found = 0
    for i in range(n):
        found += words[at + i * ENTRY_WIDTH + OCCURRENCES] >= count
    return found


@device
def finish_topk(words: I8, at: int, k: int, out: I8, to: int) -> int:
    """Write the k values with the largest counts, of equal ones the smaller first; return how many.

    They are the integers that they were counted as.
    """
    held = length_of(words, at, CAPACITY)
    chosen = min(k, held)
    last, count = -1, 1 << 62
    for place in range(chosen):
        best = -1
        for i in range(held):
            occurrences = words[at + 1 + i * ENTRY_WIDTH + OCCURRENCES]
            is_left = occurrences < count or (occurrences == count and i > last)
            if is_left and (
                best < 0 or occurrences > words[at + 1 + best * ENTRY_WIDTH + OCCURRENCES]
            ):
                best = i
        last, count = best, words[at + 1 + best * ENTRY_WIDTH + OCCURRENCES]
        out[to + place] = words[at + 1 + best * ENTRY_WIDTH + COUNTED]
    return chosen
