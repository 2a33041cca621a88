"""The counting kernels: a block of served rows into edge counts, apart counts and moments.

Branch-free on numbers: each edge is compared with the whole column (`x >= edge` is False for NaN),
which the compiler turns into vector instructions; binary search costs ten times that.  Bins are
differences of these counts, taken when somebody reads them.
"""

import math
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from mlpd.core.kernels import device, kernel

F8: TypeAlias = NDArray[np.float64]
I8: TypeAlias = NDArray[np.int64]
U1: TypeAlias = NDArray[np.uint8]

BLOCK_ROWS = 512
"""Rows per call at most: a column of them (4 KiB) stays in the first-level cache."""

MISSING, NEGATIVE_INFINITE, POSITIVE_INFINITE, BELOW, ABOVE, FINITE, STALE, DEFAULTED = range(8)
"""Columns of the apart counts.  BELOW and ABOVE are finite values outside the reference's range."""
APART_WIDTH = 8
MEAN, M2, LOW, HIGH = range(4)
"""Columns of the moments, over finite values."""
MOMENTS_WIDTH = 4
STALE_FLAG, DEFAULTED_FLAG = 1, 2
"""Bits of a served value's flags."""


@kernel(
    "const f8[], i8, const u1[], const f8[], const i8[], const i8[], const i8[], const f8[], "
    "f8[], i8[], i8[], f8[]"
)
def count_rows(  # noqa: PLR0913, PLR0917  a kernel's arguments are flat arrays
    rows: F8, width: int, categorical: U1, keys: F8, slots: I8, key_starts: I8, tally_starts: I8,
    limits: F8, scratch: F8, tallies: I8, apart: I8, moments: F8,
) -> None:  # fmt: skip
    """Add a block of at most BLOCK_ROWS rows (row-major, `width` columns) to the running counts.

    Column f owns `keys[key_starts[f]:key_starts[f+1]]` (edges, or category codes, ascending; then
    `slots` says each code's tally) and `tallies[tally_starts[f]:tally_starts[f+1]]`: of a numeric
    column, how many values were >= each edge; of a categorical one, each bin's count, the last one
    being that of unknown codes.  `limits` has the reference's low and high of each column.
    """
    count = len(rows) // width
    for column in range(width):
        for i in range(count):
            scratch[i] = rows[i * width + column]
        first, last = key_starts[column], key_starts[column + 1]
        tally = tally_starts[column]
        low, high = limits[2 * column], limits[2 * column + 1]
        finite = _count_apart(scratch, count, low, high, apart, column * APART_WIDTH)
        if categorical[column]:
            unknown = tally_starts[column + 1] - tally - 1
            _count_codes(scratch, count, keys, slots, first, last, tally, unknown, tallies)
        else:
            for key in range(first, last):
                tallies[tally + key - first] += _count_at_least(scratch, count, keys[key])
            before = apart[column * APART_WIDTH + FINITE] - finite
            _fold_moments(scratch, count, finite, before, moments, column * MOMENTS_WIDTH)


@kernel("const u1[], i8, i8[]")
def count_flags(flags: U1, width: int, apart: I8) -> None:
    """Add a block's flags (row-major, `width` columns; STALE_FLAG, DEFAULTED_FLAG) to `apart`."""
    for i in range(len(flags) // width):
        for column in range(width):
            flag = flags[i * width + column]
            if flag & STALE_FLAG:
                apart[column * APART_WIDTH + STALE] += 1
            if flag & DEFAULTED_FLAG:
                apart[column * APART_WIDTH + DEFAULTED] += 1


@device
def _count_at_least(values: F8, count: int, edge: float) -> int:
    found = 0
    for i in range(count):
        found += values[i] >= edge
    return found


@device
def _count_apart(values: F8, count: int, low: float, high: float, apart: I8, at: int) -> int:
    missing, negative, positive, below, above = 0, 0, 0, 0, 0
    for i in range(count):
        value = values[i]
        missing += value != value  # noqa: PLR0124  the branch-free test for NaN
        negative += value == -math.inf
        positive += value == math.inf
        below += value < low
        above += value > high
    apart[at + MISSING] += missing
    apart[at + NEGATIVE_INFINITE] += negative
    apart[at + POSITIVE_INFINITE] += positive
    apart[at + BELOW] += below - negative
    apart[at + ABOVE] += above - positive
    finite = count - missing - negative - positive
    apart[at + FINITE] += finite
    return finite


@device
def _count_codes(  # noqa: PLR0913, PLR0917  as count_rows
    values: F8, count: int, keys: F8, slots: I8, first: int, last: int,
    tally: int, unknown: int, tallies: I8,
) -> None:  # fmt: skip
    """Count each code's bin by binary search; `unknown` is the bin of a code not among the keys."""
    for i in range(count):
        value = values[i]
        if value != value:  # noqa: PLR0124  NaN: counted apart
            continue
        low, high = first, last
        while low < high:
            middle = (low + high) // 2
            if keys[middle] < value:
                low = middle + 1
            else:
                high = middle
        if low < last and keys[low] == value:
            tallies[tally + slots[low]] += 1
        else:
            tallies[tally + unknown] += 1


@device
def _fold_moments(values: F8, count: int, finite: int, before: int, moments: F8, to: int) -> None:
    """Merge the block's moments into the running ones, of `before` finite values.

    Chan, Golub and LeVeque (1979): counts a and b, means that differ by d: M2 gains d^2 ab/(a+b).
    """
    if finite == 0:
        return
    if finite < count:  # rare, so the loops below need not ask
        count = _keep_finite(values, count)
    mean = _sum_lanes(values, count) / count
    delta = mean - moments[to + MEAN]
    share = count / (before + count)
    moments[to + MEAN] += delta * share
    moments[to + M2] += _sum_squares(values, count, mean) + delta * delta * before * share
    low, high = moments[to + LOW], moments[to + HIGH]
    for i in range(count):
        value = values[i]
        low = min(low, value)
        high = max(high, value)
    moments[to + LOW] = low
    moments[to + HIGH] = high


@device
def _keep_finite(values: F8, count: int) -> int:
    kept = 0
    for i in range(count):
        value = values[i]
        if -math.inf < value < math.inf:
            values[kept] = value
            kept += 1
    return kept


@device
def _sum_lanes(values: F8, count: int) -> float:
    """Return the sum in four lanes: one would wait for each addition's latency."""
    a, b, c, d = 0.0, 0.0, 0.0, 0.0
    whole = count - count % 4
    for i in range(0, whole, 4):
        a += values[i]
        b += values[i + 1]
        c += values[i + 2]
        d += values[i + 3]
    for i in range(whole, count):
        a += values[i]
    return (a + b) + (c + d)


@device
def _sum_squares(values: F8, count: int, mean: float) -> float:
    a, b, c, d = 0.0, 0.0, 0.0, 0.0
    whole = count - count % 4
    for i in range(0, whole, 4):
        a += (values[i] - mean) * (values[i] - mean)
        b += (values[i + 1] - mean) * (values[i + 1] - mean)
        c += (values[i + 2] - mean) * (values[i + 2] - mean)
        d += (values[i + 3] - mean) * (values[i + 3] - mean)
    for i in range(whole, count):
        a += (values[i] - mean) * (values[i] - mean)
    return (a + b) + (c + d)
