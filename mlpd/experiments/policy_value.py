"""What an arm would give if everybody got it, from traffic whose shares moved with the outcomes.

Plain means of arms are biased then: an arm that was given its traffic in good times looks good.
Two estimates take the shares that each unit was assigned by: IPS weighs each unit by one over its
propensity (normalized, Hajek 1971), DR adds a model's answer for all units and weighs what that got
wrong (Robins, Rotnitzky & Zhao 1994): right if either the shares or the model are.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import NamedTuple


class Cohort(NamedTuple):
    """Units of one arm in one phase: how many, and their mean."""

    n: int
    mean: float


@dataclass(frozen=True, slots=True)
class PolicyValue:
    """Mean outcome of an arm if everybody got it; the standard error is of `dr`."""

    ips: float
    dr: float
    std_error: float

    def to_dict(self) -> dict[str, float]:
        """Return the JSON shape."""
        return asdict(self)


def policy_values(
    arms: Sequence[str],
    cohorts: Mapping[tuple[int, str], Cohort],
    shares: Sequence[Mapping[str, float]],
    effects: Sequence[float],
    variances: Mapping[str, float],
) -> dict[str, PolicyValue]:
    """Return each arm's value; arms that nobody saw are left out.

    `cohorts` by phase and arm, `shares` by phase (each sums to 1), `effects` of the arms against
    the first one, `variances` of a unit by arm.  The model: each phase's base plus the effect.
    """
    phases = sorted({phase for phase, _ in cohorts})
    bases = {phase: _base(phase, arms, cohorts, effects, variances) for phase in phases}
    found = {}
    for arm, effect in zip(arms, effects, strict=True):
        weighted = total = units = dr = spread = 0.0
        for phase in phases:
            in_phase = sum(c.n for (p, _), c in cohorts.items() if p == phase)
            cohort, share = cohorts.get((phase, arm), Cohort(0, 0.0)), shares[phase].get(arm, 0.0)
            modelled = bases[phase] + effect
            units += in_phase
            dr += in_phase * modelled
            if cohort.n and share > 0.0:
                weighted += cohort.n * cohort.mean / share
                total += cohort.n / share
                dr += cohort.n * (cohort.mean - modelled) / share
                spread += cohort.n * variances[arm] / share**2
        if total:
            found[arm] = PolicyValue(weighted / total, dr / units, math.sqrt(spread) / units)
    return found


def _base(
    phase: int,
    arms: Sequence[str],
    cohorts: Mapping[tuple[int, str], Cohort],
    effects: Sequence[float],
    variances: Mapping[str, float],
) -> float:
    """Return the first arm's mean in a phase, as all arms there and the effects say."""
    total = weights = 0.0
    for arm, effect in zip(arms, effects, strict=True):
        cohort = cohorts.get((phase, arm), Cohort(0, 0.0))
        weight = cohort.n / variances[arm]
        total += weight * (cohort.mean - effect)
        weights += weight
    return total / weights if weights else 0.0
