"""Double-double arithmetic for kernels: a value is an unevaluated sum hi + lo of two float64.

Algorithms and bounds (u = 2^-53) are those of Joldes, Muller and Popescu, "Tight and rigorous error
bounds for basic building blocks of double-word arithmetic", ACM TOMS 44(2), 2017.  `hi` is always
hi + lo rounded to float64.  Beyond HUGE, where their splitting would overflow, and for infinities
and NaN, the arithmetic is plain float64 and lo is 0.
"""

from typing import TypeAlias

from mlpd.core.kernels import device

Pair: TypeAlias = tuple[float, float]

HUGE = 1e290
"""Largest magnitude carried with two words; 2^27 times it is still finite."""
SPLITTER = 134217729.0  # 2^27 + 1 cuts a float64 into two halves of 26 bits


@device
def two_sum(a: float, b: float) -> Pair:
    """Return a + b rounded, and its rounding error exactly (Knuth)."""
    total = a + b
    b_part = total - a
    return total, (a - (total - b_part)) + (b - b_part)


@device
def quick_two_sum(a: float, b: float) -> Pair:
    """Return what two_sum does, for |a| >= |b| or a = 0 (Dekker)."""
    total = a + b
    return total, b - (total - a)


@device
def two_product(a: float, b: float) -> Pair:
    """Return a * b rounded, and its rounding error exactly (Dekker, Veltkamp)."""
    product = a * b
    a_cut, b_cut = SPLITTER * a, SPLITTER * b
    a_hi, b_hi = a_cut - (a_cut - a), b_cut - (b_cut - b)
    a_lo, b_lo = a - a_hi, b - b_hi
    return product, ((a_hi * b_hi - product) + a_hi * b_lo + a_lo * b_hi) + a_lo * b_lo


@device
def dd_add(a: float, a_lo: float, b: float, b_lo: float) -> Pair:
    """Return the sum with a relative error of at most 3 u^2 (algorithm 6, AccurateDWPlusDW)."""
    total, error = two_sum(a, b)
    if not abs(total) < HUGE:
        return total, 0.0
    low, low_error = two_sum(a_lo, b_lo)
    total, error = quick_two_sum(total, error + low)
    return quick_two_sum(total, error + low_error)


@device
def dd_times(a: float, a_lo: float, factor: float) -> Pair:
    """Return the product with a float64, relative error at most 2 u^2 (algorithm 7)."""
    product, error = two_product(a, factor)
    if not (abs(product) < HUGE and abs(a) < HUGE and abs(factor) < HUGE):
        return a * factor, 0.0
    low, low_error = two_product(a_lo, factor)
    product, carry = quick_two_sum(product, low)
    return quick_two_sum(product, carry + (error + low_error))


@device
def dd_square(a: float, a_lo: float) -> Pair:
    """Return the square with a relative error of at most 5 u^2 (algorithm 10)."""
    square, error = two_product(a, a)
    if not (square < HUGE and abs(a) < HUGE):
        return a * a, 0.0
    return quick_two_sum(square, error + 2.0 * (a * a_lo))


@device
def dd_over(a: float, a_lo: float, divisor: float) -> Pair:
    """Return the quotient by a float64, relative error at most 3 u^2 (algorithm 15)."""
    quotient = a / divisor
    if not abs(a) < HUGE:
        return quotient, 0.0
    product, error = two_product(quotient, divisor)
    rest = ((a - product) - error) + a_lo
    return quick_two_sum(quotient, rest / divisor)


@device
def dd_ratio(a: float, a_lo: float, b: float, b_lo: float) -> Pair:
    """Return the quotient with a relative error of at most 15 u^2 (algorithm 17, DWDivDW2)."""
    quotient = a / b
    if not abs(a) < HUGE:
        return quotient, 0.0
    product, product_lo = dd_times(b, b_lo, quotient)
    rest = (a - product) + (a_lo - product_lo)
    return quick_two_sum(quotient, rest / b)
