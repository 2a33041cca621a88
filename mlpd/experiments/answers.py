"""Answers beside the sequence: of a fixed horizon (Welch), and Bayesian (normal posterior)."""

import math
from statistics import NormalDist
from typing import NamedTuple

from mlpd.core.sequences import Interval
from mlpd.experiments.estimates import Combined
from mlpd.experiments.metric import Metric
from mlpd.experiments.sequences import welch, welch_df

_NORMAL = NormalDist()


class FixedAnswer(NamedTuple):
    """Welch's t-test and interval: right for ONE look that was planned before the data."""

    low: float
    high: float
    p_value: float
    df: float

    @property
    def interval(self) -> Interval:
        """The bounds and the p-value."""
        return Interval(self.low, self.high, self.p_value)


class BayesianAnswer(NamedTuple):
    """The normal posterior of the difference, with its central interval at 1 - alpha.

    `chance`: that the arm is better than the control, in the metric's direction; `risk`: how much
    is lost on average, in units of the metric, if the arm is chosen (it counts 0 where it is
    better).  Looking often and stopping when `chance` is high has no bounded error rate.
    """

    mean: float
    sd: float
    low: float
    high: float
    chance: float
    risk: float


def fixed_answer(found: Combined, *, alpha: float) -> FixedAnswer:
    """Return Welch's answer for a difference over phases.  Costs about 0.2 ms."""
    df = welch_df(found.parts)
    return FixedAnswer(*welch(found.difference, found.std_error, df, alpha=alpha), df)


def bayesian_answer(found: Combined, metric: Metric, *, alpha: float) -> BayesianAnswer:
    """Return the posterior under the metric's prior: N(0, prior_sd^2), or a flat one."""
    variance = found.std_error**2
    prior = math.inf if metric.prior_sd is None else metric.prior_sd**2
    kept = 1.0 if math.isinf(prior) else prior / (prior + variance)
    mean, sd = kept * found.difference, math.sqrt(kept * variance)
    half = sd * -_NORMAL.inv_cdf(alpha / 2)
    gain = metric.sign * mean
    if sd == 0:
        chance = 0.5 * ((gain > 0) + (gain >= 0))
        return BayesianAnswer(mean, sd, mean, mean, chance, max(0.0, -gain))
    z = gain / sd
    risk = sd * _NORMAL.pdf(z) - gain * _tail(z)
    return BayesianAnswer(mean, sd, mean - half, mean + half, _tail(-z), max(0.0, risk))


def _tail(z: float) -> float:
    """Return P(Z > z), also far out, where 1 - cdf has no digits left."""
    return math.erfc(z / math.sqrt(2)) / 2
