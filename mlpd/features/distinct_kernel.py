"""Sketches that count distinct values: exact while these are few, then with a known error.

Up to ROOM distinct hashes are kept as they are, in ascending order.  Beyond that a sketch has
registers: each hash belongs to one of them, which holds the most leading zeros that one of its
hashes had (Flajolet, Fusy, Gandouet and Meunier, "HyperLogLog", AofA 2007).  Both forms depend on
the set of hashes alone, so no order of events and merges shows in a sketch.
"""

import math

from mlpd.core.kernels import device, routine
from mlpd.features.words import I8, copy_words, nat

ROOM = 32
SKETCH_WIDTH = 1 + ROOM
"""A sketch: the number of hashes, DENSE for registers, and then the hashes or the registers."""
DENSE = ROOM + 1

LANES, LANE_BITS = 10, 6
"""Registers to a word, and bits to a register; of these the highest is 0 and helps comparing."""
REGISTERS = ROOM * LANES
RANK_MASK = 31
GUARDS = sum(32 << LANE_BITS * lane for lane in range(LANES))
HALF, HALF_MASK = 32, 0xFFFFFFFF

SCALE = REGISTERS * REGISTERS / (2.0 * math.log(2.0))


@device
def write_sketch(words: I8, at: int, hashed: int) -> None:
    """Write the sketch of one hash; words that it doesn't need stay what they are."""
    words[at] = 1
    words[at + 1] = hashed


@device
def merge_sketch(into: I8, to: int, words: I8, at: int, scratch: int) -> None:
    """Add the sketch at word `at` to the one at `to`; `into[scratch]` begins ROOM words to use."""
    held, added = into[to], words[at]
    if added == 0:
        return
    if held < DENSE:
        copy_words(into, scratch, into, to + 1, held)
        if added < DENSE and _unite(into, to, scratch, held, words, at + 1, added):
            return
        into[to] = DENSE
        for word in range(to + 1, to + SKETCH_WIDTH):
            into[word] = 0
        _raise_registers(into, to + 1, into, scratch, held)
    if added < DENSE:
        _raise_registers(into, to + 1, words, at + 1, added)
    else:
        _merge_registers(into, to + 1, words, at + 1)


@device
def _unite(into: I8, to: int, scratch: int, held: int, words: I8, at: int, added: int) -> bool:
    """Write the union of two ascending lists as a sketch; False, and in disorder, beyond ROOM."""
    i = j = n = 0
    while i < held or j < added:
        if n == ROOM:
            return False
        if j == added or (i < held and into[scratch + i] <= words[at + j]):
            hashed = into[scratch + i]
            if j < added and words[at + j] == hashed:
                j += 1
            i += 1
        else:
            hashed = words[at + j]
            j += 1
        n += 1
        into[to + n] = hashed
    into[to] = n
    return True


@device
def _raise_registers(into: I8, to: int, hashes: I8, at: int, count: int) -> None:
    """Note hashes: the upper half says in which register, the lower one is what is noted."""
    for i in range(count):
        hashed = hashes[at + i]
        register = (((hashed >> HALF) & HALF_MASK) * REGISTERS) >> HALF
        low, rank = hashed & HALF_MASK, 1
        while rank < RANK_MASK and low >> (HALF - rank) == 0:
            rank += 1
        word, shift = to + register // LANES, register % LANES * LANE_BITS
        before = (into[word] >> shift) & RANK_MASK
        if before < rank:
            into[word] += (rank - before) << shift


@device
def _merge_registers(into: I8, to: int, words: I8, at: int) -> None:
    """Keep the larger one of each two registers, a word at a time."""
    for i in range(ROOM):
        a, b = into[nat(to + i)], words[nat(at + i)]
        kept = ((a | GUARDS) - b) & GUARDS  # the guard of a lane is left where a >= b
        mask = kept - (kept >> (LANE_BITS - 1))
        into[nat(to + i)] = (a & mask) | (b & ~mask)


@routine
def finish_sketch(words: I8, at: int) -> int:
    """Return the number of distinct values.

    Of registers it is the estimate of Ertl, "New cardinality estimation algorithms for HyperLogLog
    sketches" (2017), algorithm 6, nearly without bias from few to many; without its correction for
    full registers, which more than 2^32 values would need.
    """
    if words[at] < DENSE:
        return int(words[at])
    unused, total = 0, 0.0
    for word in range(at + 1, at + SKETCH_WIDTH):
        for lane in range(LANES):
            rank = (words[word] >> (lane * LANE_BITS)) & RANK_MASK
            if rank == 0:
                unused += 1
            else:
                total += 1.0 / float(1 << rank)  # exact: multiples of 2^-31
    return int(SCALE / (total + REGISTERS * _sigma(float(unused) / REGISTERS)) + 0.5)


@device
def _sigma(x: float) -> float:
    """Return x + sum of x^(2^k) 2^(k-1) for k = 1, 2, ...; 0 <= x < 1."""
    total, before, weight = x, -1.0, 1.0
    while total != before:
        before = total
        x *= x
        total += x * weight
        weight += weight
    return total
