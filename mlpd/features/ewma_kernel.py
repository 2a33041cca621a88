"""Exponentially weighted means: sums of values and of weights, and the exponent of both.

The weight of an event is `2^(event time / half-life)`: of its weight at t, `2^(-age / half-life)`,
it is the same multiple for all events, so that a mean doesn't know it and tiles need no t.  The
weight's fraction, 0.5 to 1, is one float64 for an event time, whatever the tile; the sums of a
tile are in units of 2 to the exponent of its newest event.  Other exponents are exact powers of two
away: adding tiles rounds as if all weights were in one unit, and the order shows in the last of 106
bits alone, as in other sums.
"""

import math

from mlpd.core.kernels import device
from mlpd.features.double_double import Pair, dd_add, dd_ratio, dd_times
from mlpd.features.words import F8, I8

EXPONENT, VALUES, VALUES_LOW, WEIGHTS, WEIGHTS_LOW = range(5)
EWMA_WIDTH = 5
NO_EXPONENT = -(1 << 62)
"""Of no values; below every other one."""

TAYLOR = tuple(1.0 / math.factorial(n) for n in range(13, -1, -1))
"""Of e^x, to 2^-57 of it where |x| < 0.35."""
LN_2 = math.log(2.0)
ROOT = math.sqrt(0.5)

MAX_GAP, GAP_STEP = 3000, 60
"""2^-3000 of any float64 is 0; and how many powers of two are taken off at once."""


@device
def write_ewma(
    words: I8, words_f: F8, at: int, event_us: int, half_life_us: int, value: float, low: float
) -> None:
    """Write one value, `value + low`, as the sums of it alone."""
    exponent = event_us // half_life_us
    rest_us = event_us - exponent * half_life_us
    weight = weight_of(float(rest_us) / float(half_life_us))
    words[at + EXPONENT] = exponent
    words_f[at + VALUES], words_f[at + VALUES_LOW] = dd_times(value, low, weight)
    words_f[at + WEIGHTS], words_f[at + WEIGHTS_LOW] = weight, 0.0


@device
def weight_of(fraction: float) -> float:
    """Return 2^(fraction - 1) for 0 to 1, to 2^-51 of it.

    Made of additions and products alone, so that it has the same bits on every machine, which those
    of a C library's `exp2` have not.
    """
    x = (fraction - 0.5) * LN_2
    total = 0.0
    for coefficient in TAYLOR:
        total = total * x + coefficient
    return total * ROOT


@device
def merge_ewma(into: I8, into_f: F8, to: int, words: I8, words_f: F8, at: int) -> None:
    """Add the sums at word `at` to those at word `to`."""
    gap = words[at + EXPONENT] - into[to + EXPONENT]
    for sums in range(VALUES, EWMA_WIDTH, 2):
        a, a_low = _scaled(into_f[to + sums], into_f[to + sums + 1], gap)
        b, b_low = _scaled(words_f[at + sums], words_f[at + sums + 1], -gap)
        into_f[to + sums], into_f[to + sums + 1] = dd_add(a, a_low, b, b_low)
    into[to + EXPONENT] = max(into[to + EXPONENT], words[at + EXPONENT])


@device
def _scaled(value: float, low: float, gap: int) -> Pair:
    """Return 2^-gap of value + low, where gap > 0; exact unless it is below 1e-290."""
    left = min(gap, MAX_GAP)
    while left > 0 and value != 0.0:
        step = min(left, GAP_STEP)
        factor = 1.0 / float(1 << step)
        value *= factor
        low *= factor
        left -= step
    return value, low


@device
def finish_ewma(words_f: F8, at: int) -> float:
    """Return the mean of at least one value, rounded once."""
    return dd_ratio(
        words_f[at + VALUES], words_f[at + VALUES_LOW],
        words_f[at + WEIGHTS], words_f[at + WEIGHTS_LOW],
    )[0]  # fmt: skip
