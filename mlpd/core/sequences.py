"""Always-valid confidence sequences: intervals of a difference that hold at every look."""

import math
from typing import NamedTuple


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
    log_p = math.log(x + 1) / 2 - z_squared(difference, std_error) * x / (2 * (x + 1))
    return Interval(difference - half, difference + half, math.exp(min(0.0, log_p)))


def z_squared(difference: float, std_error: float) -> float:
    """Return the square of a difference in standard errors; infinite without any error."""
    if std_error > 0:
        return (difference / std_error) ** 2
    return 0.0 if difference == 0 else math.inf
