"""The state of one tile: events as tiles of one, tiles merged, accumulated results read out.

A tile is `[index, stream, stream, ...]` in 8-byte words, seen through an int64 and a float64 view
of the same memory.  A stream is one (input, filter) of a view; its words are the number of values
and then only the pieces that its aggregates need.  Words of no values are neutral, so that merging
asks no questions.  An event is written as a tile of one value, so that `merge_tile` is the one
place where anything accumulates.  docs/formats/tiles.md has the words; `tiles.py` builds the
tables that describe a view's streams.
"""

# ruff: noqa: PLR0913, PLR0917  a kernel's arguments are flat arrays

import math

from mlpd.core.kernels import device, routine
from mlpd.features.distinct_kernel import finish_sketch, merge_sketch, write_sketch
from mlpd.features.double_double import (
    Pair,
    dd_add,
    dd_over,
    dd_square,
    dd_times,
    quick_two_sum,
    two_sum,
)
from mlpd.features.ends_kernel import (
    END_WIDTH,
    VALUE,
    finish_last_n,
    is_earlier,
    merge_last_n,
    write_end,
)
from mlpd.features.ewma_kernel import finish_ewma, merge_ewma, write_ewma
from mlpd.features.topk_kernel import finish_topk, merge_topk, write_topk
from mlpd.features.words import F8, I8, U1, copy_words, nat

(
    KIND, WORDS, COUNT_AT, SUM_AT, M2_AT, MIN_AT, MAX_AT, FIRST_AT, LAST_AT, EWMA_AT, SKETCH_AT,
    LAST_N_AT, TOPK_AT, PARAMETER,
) = range(14)  # fmt: skip
"""Columns of the stream table: the kind, how many words, each piece's first word or ABSENT, and
what its aggregate was declared with: the half-life in us of ewma, n of last_n, k of topk."""
STREAM_WIDTH = 14
ABSENT = -1

(
    SQUARES, COUNTS, INTEGER_SUMS, REAL_SUMS, MINIMA, MAXIMA, FIRSTS, LASTS, EWMAS, SKETCHES,
    LISTS, TOPS, MERGES,
) = range(13)  # fmt: skip
"""Columns of a merge list: where in the table the words of each kind to merge begin; each ends
where the next begins, the last at MERGES.  A word stands for itself; of SQUARES there are four:
the words of the squared deviations, count and sum, and the stream's kind; of SKETCHES, LISTS and
TOPS three: the first word, a place to use in the array that is merged into, and the parameter."""
SQUARES_WIDTH = 4
SUMMARY_WIDTH = 3

EVENTS, INTEGER, REAL, HASHED = range(4)
"""Kinds of streams: valid values are only counted, are int64, are float64 (NaN is skipped), or are
hashes of values."""

(
    COUNT, SUM, MEAN, MIN, MAX, VAR, STD, FIRST, LAST, EWMA, APPROX_DISTINCT, LAST_N, TOPK,
) = range(13)  # fmt: skip
"""Aggregate functions, in the order of `core.specs.AGGREGATE_FUNCTIONS`; those from LAST_N on give
lists."""

LOW_BITS, LOW_MASK = 32, 0xFFFFFFFF
"""An integer sum is two words: high * 2^32 + low with 0 <= low < 2^32."""
LOW_SCALE = 4294967296.0
SUM_HIGH_LIMIT = 1 << 31
"""A sum fits int64 while -limit <= high < limit."""
EXACT_HIGH_LIMIT = 1 << 20
"""Below it in magnitude, a sum fits 53 bits."""
MAGNITUDE_BITS = 0x7FFFFFFFFFFFFFFF


@device
def ordered_bits(bits: int) -> int:
    """Return a float64's bits as an integer of the same order, -0.0 below 0.0; its own inverse."""
    return bits if bits >= 0 else bits ^ MAGNITUDE_BITS


@device
def write_event(
    table: I8, streams_at: int, streams: int, empty_at: int, tile: I8, tile_f: F8, to: int,
    row_at: int, bits: I8, reals: F8, valid: U1, event_us: int, known_us: int, sequence: int,
) -> None:  # fmt: skip
    """Write one event as a tile of one value per stream; its index word is left alone.

    `bits`, `reals` (two views of the same words) and `valid`: the event's value of stream s is at
    `row_at + s`.  Where it isn't valid or is NaN, the words are those of the empty tile, which is
    at `table[empty_at]`.
    """
    for stream in range(streams):
        spec, at = streams_at + stream * STREAM_WIDTH, row_at + stream
        kind, count_at = table[spec + KIND], table[spec + COUNT_AT]
        if valid[at] == 0 or (kind == REAL and math.isnan(reals[at])):
            copy_words(tile, to + count_at, table, empty_at + count_at, table[spec + WORDS])
            continue
        tile[to + count_at] = 1
        if table[spec + WORDS] == 1:
            continue
        if kind == HASHED or table[spec + PARAMETER] != 0:
            _write_summaries(
                table, spec, tile, tile_f, to, event_us, known_us, sequence, bits[at], reals[at]
            )
            continue
        _write_sum(table, spec, tile, tile_f, to, bits[at], reals[at])
        ordered = bits[at] if kind == INTEGER else ordered_bits(bits[at])
        for piece in range(MIN_AT, MAX_AT + 1):
            if table[spec + piece] != ABSENT:
                tile[to + table[spec + piece]] = ordered
        for piece in range(FIRST_AT, LAST_AT + 1):
            if table[spec + piece] != ABSENT:
                end = to + table[spec + piece]
                write_end(tile, end, bits[at], event_us, known_us, sequence)


@device
def _write_sum(
    table: I8, spec: int, tile: I8, tile_f: F8, to: int, bits: int, real: float
) -> None:  # fmt: skip
    if table[spec + SUM_AT] != ABSENT:
        at = to + table[spec + SUM_AT]
        if table[spec + KIND] == INTEGER:
            tile[at] = bits >> LOW_BITS
            tile[at + 1] = bits & LOW_MASK
        else:
            tile_f[at] = real
            tile_f[at + 1] = 0.0
    if table[spec + M2_AT] != ABSENT:
        at = to + table[spec + M2_AT]
        tile_f[at] = 0.0
        tile_f[at + 1] = 0.0


@routine
def _write_summaries(
    table: I8, spec: int, tile: I8, tile_f: F8, to: int,
    event_us: int, known_us: int, sequence: int, bits: int, real: float,
) -> None:  # fmt: skip
    """Write the pieces of aggregates of hashes or with a parameter, which no others share."""
    if table[spec + SKETCH_AT] != ABSENT:
        write_sketch(tile, to + table[spec + SKETCH_AT], bits)
    is_integer = table[spec + KIND] == INTEGER
    if table[spec + EWMA_AT] != ABSENT:
        value, low = real, 0.0
        if is_integer:
            value, low = _integer_pair(bits >> LOW_BITS, bits & LOW_MASK)
        at = to + table[spec + EWMA_AT]
        write_ewma(tile, tile_f, at, event_us, table[spec + PARAMETER], value, low)
    if table[spec + LAST_N_AT] != ABSENT:
        at = to + table[spec + LAST_N_AT]
        tile[at] = 1
        write_end(tile, at + 1, bits, event_us, known_us, sequence)
    if table[spec + TOPK_AT] != ABSENT:
        counted = bits if is_integer else ordered_bits(bits if real != 0.0 else 0)  # -0.0 is 0.0
        write_topk(tile, to + table[spec + TOPK_AT], counted)


@device
def merge_tile(
    table: I8, merges: int, into: I8, into_f: F8, to: int, tile: I8, tile_f: F8, at: int
) -> None:  # fmt: skip
    """Add the tile at word `at` to the one at word `to`: the words in the list at `table[merges]`.

    All but those for `merge_summaries`: a call in the loops that merge tiles would slow down who
    doesn't need it.  Counts, integer sums, extremes, first and last are exact in any order.  Real
    sums and squared deviations depend on the order of merges in their last bits of 106.
    """
    _merge_additive(table, merges, into, into_f, to, tile, tile_f, at)
    for i in range(table[nat(merges + MINIMA)], table[nat(merges + MAXIMA)]):
        word = table[nat(i)]
        into[nat(to + word)] = min(into[nat(to + word)], tile[nat(at + word)])
    for i in range(table[nat(merges + MAXIMA)], table[nat(merges + FIRSTS)]):
        word = table[nat(i)]
        into[nat(to + word)] = max(into[nat(to + word)], tile[nat(at + word)])
    for i in range(table[nat(merges + FIRSTS)], table[nat(merges + LASTS)]):
        word = table[nat(i)]
        if is_earlier(tile, at + word, into, to + word):
            copy_words(into, to + word, tile, at + word, END_WIDTH)
    for i in range(table[nat(merges + LASTS)], table[nat(merges + EWMAS)]):
        word = table[nat(i)]
        if is_earlier(into, to + word, tile, at + word):
            copy_words(into, to + word, tile, at + word, END_WIDTH)


@device
def has_summaries(table: I8, merges: int) -> bool:
    """Tell whether a merge list has pieces for `merge_summaries`."""
    return bool(table[nat(merges + EWMAS)] != table[nat(merges + MERGES)])


@routine
def merge_summaries(
    table: I8, merges: int, into: I8, into_f: F8, to: int, tile: I8, tile_f: F8, at: int
) -> None:  # fmt: skip
    """Add the pieces of a tile that `merge_tile` leaves out.

    Sketches and lists of last_n are exact in any order; of weighted sums the last bits of 106
    depend on it, and counts of topk once they are more than fit.
    """
    for i in range(table[nat(merges + EWMAS)], table[nat(merges + SKETCHES)]):
        word = table[nat(i)]
        merge_ewma(into, into_f, to + word, tile, tile_f, at + word)
    for i in range(table[nat(merges + SKETCHES)], table[nat(merges + LISTS)], SUMMARY_WIDTH):
        word = table[nat(i)]
        merge_sketch(into, to + word, tile, at + word, table[nat(i + 1)])
    for i in range(table[nat(merges + LISTS)], table[nat(merges + TOPS)], SUMMARY_WIDTH):
        word = table[nat(i)]
        merge_last_n(into, to + word, tile, at + word, table[nat(i + 2)], table[nat(i + 1)])
    for i in range(table[nat(merges + TOPS)], table[nat(merges + MERGES)], SUMMARY_WIDTH):
        word = table[nat(i)]
        merge_topk(into, to + word, tile, at + word, table[nat(i + 1)])


@device
def _merge_additive(
    table: I8, merges: int, into: I8, into_f: F8, to: int, tile: I8, tile_f: F8, at: int
) -> None:  # fmt: skip
    for i in range(table[nat(merges + SQUARES)], table[nat(merges + COUNTS)], SQUARES_WIDTH):
        _merge_squares(table, i, into, into_f, to, tile, tile_f, at)  # before counts and sums
    for i in range(table[nat(merges + COUNTS)], table[nat(merges + INTEGER_SUMS)]):
        word = table[nat(i)]
        into[nat(to + word)] += tile[nat(at + word)]
    for i in range(table[nat(merges + INTEGER_SUMS)], table[nat(merges + REAL_SUMS)]):
        a, b = nat(to + table[nat(i)]), nat(at + table[nat(i)])
        a_low, b_low = nat(to + table[nat(i)] + 1), nat(at + table[nat(i)] + 1)
        low = into[a_low] + tile[b_low]
        into[a] += tile[b] + (low >> LOW_BITS)
        into[a_low] = low & LOW_MASK
    for i in range(table[nat(merges + REAL_SUMS)], table[nat(merges + MINIMA)]):
        a, b = nat(to + table[nat(i)]), nat(at + table[nat(i)])
        a_low, b_low = nat(to + table[nat(i)] + 1), nat(at + table[nat(i)] + 1)
        into_f[a], into_f[a_low] = dd_add(into_f[a], into_f[a_low], tile_f[b], tile_f[b_low])


@device
def _merge_squares(
    table: I8, entry: int, into: I8, into_f: F8, to: int, tile: I8, tile_f: F8, at: int
) -> None:  # fmt: skip
    """Add squared deviations before the counts and sums are merged.

    Chan, Golub and LeVeque (1979): M2 = M2_a + M2_b + d^2 n_a n_b / (n_a + n_b), d = the
    difference of the means.
    """
    squares, count_at, sum_at = table[entry], table[entry + 1], table[entry + 2]
    kind = table[entry + 3]
    n_a, n_b = into[to + count_at], tile[at + count_at]
    if n_b == 0:
        return
    if n_a == 0:
        copy_words(into, to + squares, tile, at + squares, 2)
        return
    mean_a, mean_a_lo = _mean(kind, into, into_f, to + sum_at, n_a)
    mean_b, mean_b_lo = _mean(kind, tile, tile_f, at + sum_at, n_b)
    d, d_lo = dd_add(mean_b, mean_b_lo, -mean_a, -mean_a_lo)
    gain, gain_lo = dd_square(d, d_lo)
    gain, gain_lo = dd_times(gain, gain_lo, float(n_a))
    gain, gain_lo = dd_times(gain, gain_lo, float(n_b))
    gain, gain_lo = dd_over(gain, gain_lo, float(n_a + n_b))
    a, b = to + squares, at + squares
    gain, gain_lo = dd_add(gain, gain_lo, tile_f[b], tile_f[b + 1])
    into_f[a], into_f[a + 1] = dd_add(into_f[a], into_f[a + 1], gain, gain_lo)


@device
def _mean(kind: int, words: I8, words_f: F8, sum_at: int, count: int) -> Pair:
    if kind == INTEGER:
        total, total_lo = _integer_pair(words[sum_at], words[sum_at + 1])
    else:
        total, total_lo = words_f[sum_at], words_f[sum_at + 1]
    return dd_over(total, total_lo, float(count))


@device
def _integer_pair(high: int, low: int) -> Pair:
    """Return high * 2^32 + low exactly: 95 bits at most."""
    if -EXACT_HIGH_LIMIT <= high < EXACT_HIGH_LIMIT:
        return float((high << LOW_BITS) + low), 0.0
    top = float(high >> LOW_BITS) * (LOW_SCALE * LOW_SCALE)
    middle, rest = two_sum(float(high & LOW_MASK) * LOW_SCALE, float(low))
    total, error = two_sum(top, middle)
    return quick_two_sum(total, error + rest)


@device
def finish(
    table: I8, spec: int, function: int, tile: I8, tile_f: F8, at: int, out: I8, out_f: F8, to: int
) -> int:  # fmt: skip
    """Write an aggregate's result to word `to`; return 1, or 0 for NULL (then the word is 0).

    Over no values count, sum and approx_distinct are 0, the others NULL; var and std are NULL below
    two values; the sum of integers is NULL when it doesn't fit int64.
    """
    count = tile[nat(at + table[nat(spec + COUNT_AT)])]
    out[nat(to)] = 0
    if function == COUNT:
        out[nat(to)] = count
        return 1
    if function == SUM:
        return 1 if count == 0 else _finish_sum(table, spec, tile, tile_f, at, out, out_f, to)
    if function == APPROX_DISTINCT:
        out[nat(to)] = finish_sketch(tile, at + table[nat(spec + SKETCH_AT)])
        return 1
    if count == 0 or (count == 1 and function in (VAR, STD)):
        return 0
    if function == MEAN:
        out_f[nat(to)] = _mean(
            table[nat(spec + KIND)], tile, tile_f, at + table[nat(spec + SUM_AT)], count
        )[0]
    elif function in (VAR, STD):
        word = at + table[nat(spec + M2_AT)]
        variance = dd_over(tile_f[word], tile_f[word + 1], float(count - 1))[0]
        out_f[to] = variance if function == VAR else math.sqrt(variance)
    elif function in (MIN, MAX):
        value = tile[at + table[spec + (MIN_AT if function == MIN else MAX_AT)]]
        out[to] = value if table[nat(spec + KIND)] == INTEGER else ordered_bits(value)
    elif function == EWMA:
        out_f[to] = finish_ewma(tile_f, at + table[spec + EWMA_AT])
    else:
        out[to] = tile[at + table[spec + (FIRST_AT if function == FIRST else LAST_AT)] + VALUE]
    return 1


@routine
def finish_list(
    table: I8, spec: int, function: int, tile: I8, at: int, out: I8, to: int, elements: int
) -> int:  # fmt: skip
    """Write a list's length to word `to` and its values from `elements` on; 0 for NULL if empty."""
    most = table[spec + PARAMETER]
    if function == LAST_N:
        length = finish_last_n(tile, at + table[spec + LAST_N_AT], most, out, elements)
    else:
        length = finish_topk(tile, at + table[spec + TOPK_AT], most, out, elements)
        if table[spec + KIND] == REAL:
            for i in range(length):
                out[elements + i] = ordered_bits(out[elements + i])
    out[to] = length
    return 1 if length > 0 else 0


@device
def _finish_sum(
    table: I8, spec: int, tile: I8, tile_f: F8, at: int, out: I8, out_f: F8, to: int
) -> int:  # fmt: skip
    word = at + table[nat(spec + SUM_AT)]
    if table[nat(spec + KIND)] == REAL:
        out_f[to] = tile_f[word]
        return 1
    if not -SUM_HIGH_LIMIT <= tile[word] < SUM_HIGH_LIMIT:
        return 0
    out[to] = (tile[word] << LOW_BITS) + tile[word + 1]
    return 1
