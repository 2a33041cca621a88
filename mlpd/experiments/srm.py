"""Sample ratio mismatch: whether the arms got the units that their weights promise."""

import math
from collections.abc import Iterable, Mapping
from typing import Any, Final, NamedTuple

CONCENTRATION: Final = 1000.0
"""Dirichlet concentration around the expected shares: tuned to small deviations."""

ALARM_E_VALUE: Final = 100.0

_MAX_LOG_E: Final = 690.0  # keeps the e-value a finite float64, which JSON can carry


class SampleRatio(NamedTuple):
    """The verdict over all phases: an alarm blocks every decision of the experiment.

    `e_value` is capped at e^690; `p_value` = min(1, 1 / e), 0 if an arm of weight 0 has units.
    """

    e_value: float
    p_value: float

    @property
    def alarm(self) -> bool:
        """True if the split is not what was asked for: assignment or logging is broken."""
        return self.e_value > ALARM_E_VALUE

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON shape."""
        return {"e_value": self.e_value, "p_value": self.p_value, "alarm": self.alarm}


def sample_ratio(phases: Iterable[tuple[Mapping[str, int], Mapping[str, float]]]) -> SampleRatio:
    """Return the sequential test of units per arm against weights, (counts, weights) per phase.

    The e-values of phases multiply, as a unit counts in one phase only.  Anytime-valid: under the
    right split e ever exceeds 100 with probability at most 1 %.  Arms without a weight count as 0.
    """
    log_e = sum(log_e_value(counts, weights) for counts, weights in phases)
    e_value = math.exp(min(log_e, _MAX_LOG_E))
    return SampleRatio(e_value, math.exp(min(0.0, -log_e)))


def log_e_value(counts: Mapping[str, int], weights: Mapping[str, float]) -> float:
    """Return ln of the Dirichlet-multinomial e-value; +inf if an arm of weight 0 has units.

    e = integral of prod(theta^n) over Dirichlet(1000 p), divided by prod(p^n).
    Reference: Lindon & Malek, "Anytime-valid inference for multinomial count data" (2022).

    >>> round(log_e_value({"a": 600, "b": 400}, {"a": 1, "b": 1}), 3)
    9.675
    """
    total = math.fsum(weights.values())
    log_e = math.lgamma(CONCENTRATION) - math.lgamma(CONCENTRATION + sum(counts.values()))
    for arm, n in counts.items():
        share = weights.get(arm, 0.0) / total
        if share > 0:
            prior = CONCENTRATION * share
            log_e += math.lgamma(prior + n) - math.lgamma(prior) - n * math.log(share)
        elif n:
            return math.inf
    return log_e
