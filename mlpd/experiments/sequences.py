"""From a difference and its standard error to an interval and p-value, and many p-values to one."""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from mlpd.experiments.spec import Correction
from mlpd.experiments.student_t import t_survival, t_upper_quantile


class Interval(NamedTuple):
    """Bounds of a difference at level 1 - alpha, and the two-sided p-value of "no difference".

    0 lies outside of [low, high] exactly where p_value < alpha.
    """

    low: float
    high: float
    p_value: float


def rho_squared(planned_units: int, alpha: float) -> float:
    """Return the mixture's rho^2, which makes the sequence tightest at `planned_units`."""
    return (-2 * math.log(alpha) + math.log(1 - 2 * math.log(alpha))) / planned_units


def sequence_multiplier(units: int, *, planned_units: int, alpha: float) -> float:
    """Return the half width of the confidence sequence in standard errors, for `units` >= 1.

    half = se sqrt(n) sqrt(2k / (n rho)^2 ln(sqrt(k) / alpha)) with k = n rho^2 + 1, which is
    se sqrt(2k / (n rho^2) ln(sqrt(k) / alpha)).  About 3.03 at n = planned_units and alpha = 0.05,
    where a single look would take 1.96.  Reference: Waudby-Smith, Arbour, Sinha, Kennedy &
    Ramdas, "Time-uniform central limit theory and asymptotic confidence sequences" (2021).
    """
    x = units * rho_squared(planned_units, alpha)
    k = x + 1
    return math.sqrt(2 * k / x * math.log(math.sqrt(k) / alpha))


def confidence_sequence(
    difference: float, std_error: float, units: int, *, planned_units: int, alpha: float
) -> Interval:
    """Return the always-valid asymptotic confidence sequence at `units` in both arms together.

    All intervals over time hold together with probability 1 - alpha, asymptotically: one may look
    after every unit and stop at will.  `p_value` is the smallest level at which the sequence (with
    this rho) excludes 0, so it is always valid too.
    """
    half = std_error * sequence_multiplier(units, planned_units=planned_units, alpha=alpha)
    x = units * rho_squared(planned_units, alpha)
    log_p = math.log(x + 1) / 2 - _z_squared(difference, std_error) * x / (2 * (x + 1))
    return Interval(difference - half, difference + half, math.exp(min(0.0, log_p)))


def welch(difference: float, std_error: float, df: float, *, alpha: float) -> Interval:
    """Return the fixed-horizon Welch interval: valid for ONE look, planned before the data.

    Peeking at it rejects 36-73 % of A/A tests.  `df` is that of `welch_df`.
    """
    half = std_error * t_upper_quantile(alpha / 2, df)
    t = math.sqrt(_z_squared(difference, std_error))
    p_value = 2 * t_survival(t, df) if math.isfinite(t) else 0.0
    return Interval(difference - half, difference + half, p_value)


def welch_df(parts: Iterable[tuple[float, int]]) -> float:
    """Return Satterthwaite's degrees of freedom of a sum of variances (variance of mean, n >= 2).

    Without any variance the smallest n - 1.
    """
    listed = list(parts)
    spread = sum(v * v / (n - 1) for v, n in listed)
    if spread == 0:
        return min(n for _, n in listed) - 1.0
    return float(sum(v for v, _ in listed) ** 2 / spread)


def adjust(p_values: Sequence[float], correction: Correction) -> list[float]:
    """Return p-values, in the same order, each to be compared with the one alpha.

    `bonferroni` and `holm` bound the chance of any false positive (Holm rejects at least as much),
    `bh` the expected share of false ones among positives (Benjamini & Hochberg, for independent or
    positively dependent p-values); `none` leaves them.
    """
    m = len(p_values)
    if correction == "none":
        return list(p_values)
    if correction == "bonferroni":
        return [min(1.0, m * p) for p in p_values]
    adjusted, running = list(p_values), 0.0 if correction == "holm" else 1.0
    ascending = sorted(range(m), key=p_values.__getitem__)
    if correction == "holm":
        for rank, i in enumerate(ascending):
            adjusted[i] = running = max(running, min(1.0, (m - rank) * p_values[i]))
    else:
        for rank, i in reversed(list(enumerate(ascending, start=1))):
            adjusted[i] = running = min(running, p_values[i] * m / rank)
    return adjusted


def _z_squared(difference: float, std_error: float) -> float:
    if std_error > 0:
        return (difference / std_error) ** 2
    return 0.0 if difference == 0 else math.inf
