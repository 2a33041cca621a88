"""How far two histograms are apart: PSI, chi-square, Jensen-Shannon, KS, Wasserstein, and BH.

Everything here takes integer counts over the same bins and imports numpy alone: scipy costs the
daemon 1.8 s of import, and these few formulas agree with it to 1e-9 (tests/monitoring).
"""

import math
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Counts: TypeAlias = NDArray[np.int64]
Floats: TypeAlias = NDArray[np.float64]


def psi(reference: Counts, current: Counts) -> Floats:
    """Return the population stability index over the last axis; both [..., k], broadcast.

    With R and C the totals, pi = (r+c)/(R+C) and a = k/2 over the k bins with pi > 0, the shares
    p = (r + a pi)/(R + a) and q = (c + a pi)/(C + a) are smoothed towards what both have in common,
    so that identical counts give exactly 0 and a category new to one side stays finite.  An empty
    side gives 0: nothing is known about it.

        >>> float(psi(np.array([50, 50]), np.array([50, 50])))
        0.0
    """
    r, c = reference.astype(np.float64), current.astype(np.float64)
    totals_r, totals_c = r.sum(-1, keepdims=True), c.sum(-1, keepdims=True)
    pi = (r + c) / np.maximum(totals_r + totals_c, 1.0)
    a = np.count_nonzero(pi > 0, axis=-1, keepdims=True) / 2
    with np.errstate(divide="ignore", invalid="ignore"):
        p = (r + a * pi) / (totals_r + a)
        q = (c + a * pi) / (totals_c + a)
        terms = np.where(pi > 0, (q - p) * np.log(q / p), 0.0)
    known = (totals_r > 0) & (totals_c > 0)
    return np.asarray(np.where(known, terms, 0.0).sum(-1))


def psi_adjusted(reference: Counts, current: Counts) -> Floats:
    """Return max(0, PSI - noise): the part of PSI that sampling alone doesn't explain."""
    noise = psi_noise(reference, current)
    return np.asarray(np.maximum(0.0, psi(reference, current) - noise))


def psi_noise(reference: Counts, current: Counts) -> Floats:
    """Return (k-1)(1/R + 1/C), the PSI expected of two samples of one distribution.

    B. Yurdakul (2018), "Statistical Properties of Population Stability Index".
    """
    k = np.count_nonzero(reference + current, axis=-1)
    totals_r = np.maximum(reference.sum(-1), 1)
    totals_c = np.maximum(current.sum(-1), 1)
    return np.asarray(np.maximum(k - 1, 0) * (1.0 / totals_r + 1.0 / totals_c))


def chi_square_p(reference: Counts, current: Counts) -> float:
    """Return the p-value of the two-sample 2 x k chi-square test, without Yates' correction.

    Bins empty on both sides don't count.  1.0 when fewer than two bins or one side is empty.
    """
    used = (reference + current) > 0
    r, c = reference[used].astype(np.float64), current[used].astype(np.float64)
    total_r, total_c = r.sum(), c.sum()
    if len(r) < 2 or total_r == 0 or total_c == 0:  # noqa: PLR2004  two bins make a table
        return 1.0
    expected = (r + c) / (total_r + total_c)
    statistic = np.sum((r - total_r * expected) ** 2 / (total_r * expected))
    statistic += np.sum((c - total_c * expected) ** 2 / (total_c * expected))
    return chi_square_survival(float(statistic), len(r) - 1)


def chi_square_survival(statistic: float, degrees: int) -> float:
    """Return P(X >= statistic) for a chi-square variable with `degrees` >= 1 degrees of freedom.

    For integer degrees the regularised incomplete gamma function Q(degrees/2, statistic/2) is a
    finite sum (Abramowitz and Stegun 26.4.4 and 26.4.5) of positive terms: nothing cancels.
    """
    half = statistic / 2
    if half <= 0:
        return 1.0
    log_half = math.log(half)
    if degrees % 2 == 0:
        powers = [float(i) for i in range(degrees // 2)]
        tail = 0.0
    else:
        powers = [i + 0.5 for i in range(degrees // 2)]
        tail = math.erfc(math.sqrt(half))
    terms = [math.exp(i * log_half - half - math.lgamma(i + 1)) for i in powers]
    return min(1.0, tail + math.fsum(terms))


def adjust_benjamini_hochberg(p_values: list[float]) -> list[float]:
    """Return the p-values adjusted to the false discovery rate, in the given order.

    Benjamini and Hochberg (1995): the i-th smallest of m becomes min over j >= i of p_j m / j.
    """
    adjusted = [1.0] * len(p_values)
    running = 1.0
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    for rank in range(len(order), 0, -1):
        index = order[rank - 1]
        running = min(running, p_values[index] * len(order) / rank)
        adjusted[index] = running
    return adjusted


def jensen_shannon(reference: Counts, current: Counts) -> float:
    """Return the Jensen-Shannon distance in base 2, from 0 to 1, of the unsmoothed shares.

    The square root of the divergence, as scipy, Evidently and NannyML show it.
    """
    if not reference.any() or not current.any():
        return 0.0
    p, q = reference / reference.sum(), current / current.sum()
    middle = (p + q) / 2
    divergence = (_relative_entropy(p, middle) + _relative_entropy(q, middle)) / 2
    return math.sqrt(max(0.0, divergence))


def _relative_entropy(p: Floats, q: Floats) -> float:
    some = p > 0
    return float(np.sum(p[some] * np.log2(p[some] / q[some])))


def kolmogorov_smirnov(reference: Counts, current: Counts) -> float:
    """Return the largest distance of the two distribution functions at the bins' edges.

    A lower bound of the exact statistic, which may lie inside a bin.
    """
    if not reference.any() or not current.any():
        return 0.0
    return float(np.abs(_cumulative(reference) - _cumulative(current)).max())


def wasserstein(
    reference: Counts, current: Counts, knots_reference: Floats, knots_current: Floats
) -> float:
    """Return the 1-Wasserstein distance of two binned numeric samples, in the feature's unit.

    The k bins of each side lie between its k + 1 ascending knots (see `knots_of`).  Both
    distribution functions are exact at the knots and taken as linear between them, which is all
    that bins can know: exact for atoms (at most 10 distinct values), a quarter too large for ten
    bins of a normal distribution shifted by its deviation, whose tails aren't linear.
    """
    if not reference.any() or not current.any():
        return 0.0
    knots = np.union1d(knots_reference, knots_current)
    knots = knots[np.isfinite(knots)]
    gap = _interpolate(knots, knots_reference, reference)
    gap -= _interpolate(knots, knots_current, current)
    with np.errstate(over="ignore"):  # a range beyond the largest float: the answer is inf
        left, right, width = gap[:-1], gap[1:], np.diff(knots)
    crossing = left * right < 0
    span = np.where(crossing, np.abs(left) + np.abs(right), 1.0)
    triangles = (left**2 + right**2) / (2 * span)
    areas = np.where(crossing, triangles, (np.abs(left) + np.abs(right)) / 2)
    return float(np.sum(areas[areas > 0] * width[areas > 0]))


def knots_of(edges: Floats, low: float, high: float) -> Floats:
    """Return where each bin of a sample begins, and the end: edges within [low, next above high].

    At each knot P(X < knot) is known: 0 up to the minimum `low`, 1 just above the maximum `high`.
    """
    end = math.nextafter(high, math.inf)
    return np.concatenate([[low], np.clip(edges, low, end), [end]])


def _interpolate(at: Floats, knots: Floats, counts: Counts) -> Floats:
    shares = np.concatenate([[0.0], _cumulative(counts)])
    keep = np.append(np.diff(knots) > 0, [True])  # clipped knots repeat, with equal shares
    return np.asarray(np.interp(at, knots[keep], shares[keep], left=0.0, right=1.0))


def _cumulative(counts: NDArray[Any]) -> Floats:
    return np.asarray(np.cumsum(counts) / counts.sum(), dtype=np.float64)
