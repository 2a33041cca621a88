"""Bandits: traffic moves to the arms that are likely to be best, by what is known of old units.

Thompson sampling by shares: an arm's part of the traffic is the probability that it is the best, as
the outcomes so far say, on top of a floor that every arm keeps.  Outcomes come late, and quick ones
may be of another kind than slow ones: units count from `delay_s` after their first exposure on.
Phases differ in their base rates and in their shares, so arms are compared within phases alone.
References: Thompson (1933); Scott, "A modern Bayesian look at the multi-armed bandit" (2010).
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from mlpd.core.numbers import is_number
from mlpd.experiments.metric import Metric, at_least
from mlpd.experiments.policy_value import Cohort, PolicyValue, policy_values
from mlpd.experiments.records import Pair, UnitRecord, pair_of

DRAWS: Final = 20_000
"""Of the effects, for the chances: right to 0.4 points."""
MOVE_MIN: Final = 0.02
"""No share changes by less than this alone: phases are few."""
EVERY_S_MIN: Final = 60.0

Floats = NDArray[np.float64]
Pairs = Mapping[tuple[int, str], Sequence[Pair]]
"""Sums of the units that count, by phase and arm."""


@dataclass(frozen=True, slots=True)
class Bandit:
    """How weights move by themselves.

    - `metric` is what is to become better; None means the first.
    - `every_s`: how long weights stay at least.
    - `delay_s`: a unit counts from so long after its first exposure on.
    - `floor` is the share that every arm keeps, `units_min` what each needs before anything moves.
    - `seed` makes the draws repeatable.
    """

    metric: str | None = None
    every_s: float = 86_400.0
    delay_s: float = 0.0
    floor: float = 0.05
    units_min: int = 100
    seed: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Return the definition as JSON and msgpack types; what is not set is left out."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    def problems(self, metrics: Sequence[str], arms: int) -> Iterator[tuple[bool, str, str]]:
        """Yield (whether it is right, what was found, what was expected) of every field."""
        right = self.metric is None or self.metric in metrics
        yield right, f"metric of the bandit is {self.metric!r}", f"one of {', '.join(metrics)}"
        for name, low in (("every_s", EVERY_S_MIN), ("delay_s", 0.0)):
            value = getattr(self, name)
            yield at_least(value, low), f"{name} of the bandit is {value!r}", f"seconds >= {low:g}"
        right = is_number(self.floor) and 0 < self.floor * arms < 1
        yield right, f"floor of the bandit is {self.floor!r}", f"0 < floor < 1/{arms}"
        for name, low in (("units_min", 2), ("seed", 0)):
            value = getattr(self, name)
            right = type(value) is int and value >= low
            yield right, f"{name} of the bandit is {value!r}", f"an integer >= {low}"


@dataclass(frozen=True, slots=True)
class Choice:
    """What a look at a bandit found.

    `units`: by arm, those that count.  `chances`: by arm, how likely it is the best, empty while
    nobody can say.  `shares`: what the weights are to become, None to leave them; `why` says it.
    `values`: by arm what it would give if everybody got it, as plain means of arms would be biased.
    """

    units: Mapping[str, int]
    chances: Mapping[str, float]
    shares: Mapping[str, float] | None
    why: str
    values: Mapping[str, PolicyValue] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON shape."""
        return {
            "units": dict(self.units),
            "chances": dict(self.chances),
            "values": {arm: value.to_dict() for arm, value in self.values.items()},
            "why": self.why,
        }


def matured_pairs(
    records: Iterable[UnitRecord], index: int, metric: Metric, before_us: int
) -> Iterator[tuple[tuple[int, str], Pair]]:
    """Yield (phase, arm) and the sums of each unit that was first exposed before `before_us`.

    Units that were seen in two arms, or have no outcome, are left out: pending is no failure.
    """
    for record in records:
        if record.first_us < before_us and not record.switched:
            pair = pair_of(record, index, metric)
            if pair is not None:
                yield (record.phase, record.arm), pair


def choose(
    bandit: Bandit,
    metric: Metric,
    weights: Mapping[str, float],
    pairs: Pairs,
    *,
    draw: int,
    phases: Sequence[Mapping[str, float]],
) -> Choice:
    """Return what the weights are to become; arms of weight 0 stay out.

    `draw` tells one choice's random numbers from another's, `phases` are the weights of each phase.
    0.1 s for a million units.
    """
    arms = [arm for arm, weight in weights.items() if weight > 0]
    groups = {key: _Group.of(found) for key, found in pairs.items() if key[1] in arms}
    units = {arm: sum(g.n for (_, a), g in groups.items() if a == arm) for arm in arms}
    few = [arm for arm in arms if units[arm] < bandit.units_min]
    if len(arms) < 2:  # noqa: PLR2004 - nothing to choose from
        return Choice(units, {}, None, f"arm {arms[0]} is alone")
    if few:
        wanted = f"{units[few[0]]} of {bandit.units_min} units that count"
        return Choice(units, {}, None, f"arm {few[0]} has {wanted}")
    variances = _variances(arms, groups, metric)
    if variances is None:
        return Choice(units, {}, None, "all outcomes are the same")
    found = _effects(arms, groups, variances, metric.prior_sd)
    if found is None:
        return Choice(units, {}, None, "no phase has units of all arms")
    rng = np.random.default_rng([bandit.seed, draw])
    cohorts = {key: Cohort(g.n, g.ratio) for key, g in groups.items() if g.n}
    effects = [0.0, *found[0].tolist()]
    values = policy_values(arms, cohorts, [*map(_shares, phases)], effects, variances)
    chances = dict(zip(arms, _chances(*found, metric.sign, rng), strict=True))
    total, k = math.fsum(weights.values()), len(arms)
    shares = dict.fromkeys(weights, 0.0)
    for arm, chance in chances.items():
        shares[arm] = round(bandit.floor + (1.0 - k * bandit.floor) * chance, 6)
    change = max(abs(shares[arm] - weights[arm] / total) for arm in arms)
    best = max(arms, key=lambda arm: chances[arm])
    why = f"{best} is the best with probability {chances[best]:.1%}"
    if change < MOVE_MIN:
        why = f"{why}; weights are within {MOVE_MIN:.0%} of that"
        return Choice(units, chances, None, why, values)
    return Choice(units, chances, shares, why, values)


def _shares(weights: Mapping[str, float]) -> dict[str, float]:
    total = math.fsum(weights.values())
    return {arm: weight / total for arm, weight in weights.items()}


@dataclass(frozen=True, slots=True)
class _Group:
    """Units of one arm and phase: their ratio, and the variance that one unit brings to it."""

    n: int
    x: float
    y: float
    ratio: float
    variance: float

    @classmethod
    def of(cls, pairs: Sequence[Pair]) -> "_Group":
        x, y = np.array(pairs, np.float64).reshape(-1, 2).T
        n, mean = len(x), float(y.mean()) if len(y) else 0.0
        if not mean:
            return cls(0, 0.0, 0.0, 0.0, 0.0)
        ratio = float(x.sum() / y.sum())
        residuals = x - ratio * y
        spread = float(residuals @ residuals) / max(n - 1, 1) / mean**2
        return cls(n, float(x.sum()), float(y.sum()), ratio, spread)


def _variances(
    arms: Sequence[str], groups: Mapping[tuple[int, str], _Group], metric: Metric
) -> dict[str, float] | None:
    """Return by arm the variance of a unit, pooled over phases; None if nothing varies.

    An arm in which nothing varied is given Laplace's share of a proportion, else the greatest
    variance of the others: it can't be known without error.
    """
    found = {}
    for arm in arms:
        mine = [g for (_, a), g in groups.items() if a == arm and g.n]
        units = sum(g.n for g in mine)
        found[arm] = sum(g.n * g.variance for g in mine) / units
        if found[arm] == 0.0 and metric.kind == "proportion":
            x, y = sum(g.x for g in mine), sum(g.y for g in mine)
            share = (x + 1.0) / (y + 2.0)
            found[arm] = share * (1.0 - share) * units / y
    most = max(found.values())
    return {arm: v or most for arm, v in found.items()} if most > 0.0 else None


def _effects(
    arms: Sequence[str],
    groups: Mapping[tuple[int, str], _Group],
    variances: Mapping[str, float],
    prior_sd: float | None,
) -> tuple[Floats, Floats] | None:
    """Return mean [k-1] and covariance of the arms' effects against the first one's.

    Each phase has a base of its own, which is eliminated: generalized least squares.
    """
    k = len(arms)
    precision, pull = np.zeros((k, k)), np.zeros(k)
    for phase in {phase for phase, _ in groups}:
        here = [groups.get((phase, arm)) for arm in arms]
        w = np.array([0.0 if g is None else g.n / variances[a]
                      for a, g in zip(arms, here, strict=True)])  # fmt: skip
        if not w.any():
            continue
        means = np.array([0.0 if g is None else g.ratio for g in here])
        precision += np.diag(w) - np.outer(w, w) / w.sum()
        pull += w * (means - w @ means / w.sum())
    precision, pull = precision[1:, 1:], pull[1:]
    if prior_sd is not None:
        precision += np.eye(k - 1) / prior_sd**2
    try:
        covariance = np.linalg.inv(precision).astype(np.float64)
    except np.linalg.LinAlgError:
        return None
    if not np.isfinite(covariance).all() or (np.diag(covariance) <= 0).any():
        return None
    return covariance @ pull, covariance


def _chances(mean: Floats, covariance: Floats, sign: int, rng: np.random.Generator) -> list[float]:
    """Return by arm how often it is the best in draws of the effects."""
    drawn = rng.multivariate_normal(mean, covariance, DRAWS, method="eigh")
    effects = sign * np.hstack([np.zeros((DRAWS, 1)), drawn])
    wins = np.bincount(effects.argmax(axis=1), minlength=len(mean) + 1)
    return [float(win) / DRAWS for win in wins]
