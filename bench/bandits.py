"""Scenario bandits: what is lost until traffic is where it belongs, against arms that stay even."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count

import numpy as np
from numpy.typing import NDArray

from bench.options import Options
from bench.turns import Case, in_turns
from mlpd.experiments.bandit import Bandit, choose
from mlpd.experiments.metric import Metric

RUNS = 40
"""Simulated experiments of a round."""
_METRIC = Metric("outcome")


@dataclass(frozen=True, slots=True)
class World:
    """Arms with these rates; `units` new ones in each of `steps`, whose outcomes come late.

    An outcome comes after `lag` steps on average, one that is a success three times as soon; what
    is younger than `delay` steps doesn't count.  `swing`: the rates of all arms rise by so much in
    the middle of the time and fall again.
    """

    rates: tuple[float, ...]
    steps: int = 30
    units: int = 400
    lag: float = 0.0
    delay: int = 0
    swing: float = 0.0

    def rates_at(self, step: int) -> NDArray[np.float64]:
        """Return the rate of each arm at a step."""
        shift = self.swing * np.sin(np.pi * step / self.steps)
        rates: NDArray[np.float64] = np.array(self.rates) + shift
        return rates


WORLDS: Mapping[str, World] = {
    "10 and 13 %": World((0.10, 0.13)),
    "10, 10, 10 and 13 %": World((0.10, 0.10, 0.10, 0.13)),
    "10 and 20 %": World((0.10, 0.20)),
    "10 and 13 %, up by 20 points and down again": World((0.10, 0.13), swing=0.2),
    "10 and 13 %, outcomes late by 3 steps": World((0.10, 0.13), lag=3.0, delay=12),
    "10 and 10 %": World((0.10, 0.10)),
}


def bandits(options: Options) -> dict[str, Case]:
    """Successes lost by 12,000 units that didn't see the best arm, against even shares.

    A round is 40 simulated experiments from a seed of its own, so the figures are the same on every
    machine.  `best_share`: of the traffic of the last step.  Of arms that are the same, where
    nothing can be lost, `best_share` is that of the one with more traffic.
    """
    cases = {}
    for number, (name, world) in enumerate(WORLDS.items()):
        seeds = count(), count()
        sides = [partial(_round, world, seeds[side], number, moves=not side) for side in range(2)]
        measure = "lost" if len(set(world.rates)) > 1 else "best_share"
        case = in_turns(sides[0], sides[1], rounds=options.rounds, measure=measure)
        case["notes"] = {"runs": options.rounds * RUNS}
        cases[name] = case
    return cases


def _round(world: World, seeds: "count[int]", number: int, *, moves: bool) -> Mapping[str, float]:
    seed = next(seeds)
    found = [simulate(world, (number, seed, run), moves=moves) for run in range(RUNS)]
    return {
        "lost": float(np.mean([lost for lost, _ in found])),
        "best_share": float(np.mean([share for _, share in found])),
    }


def simulate(world: World, seed: Sequence[int], *, moves: bool) -> tuple[float, float]:
    """Return expected successes lost, and the best arm's share at the end; one choice a step."""
    rng = np.random.default_rng(seed)
    arms = [f"arm{i}" for i in range(len(world.rates))]
    weights = dict.fromkeys(arms, 1.0 / len(arms))
    phases = [weights]
    bandit, phase, lost = Bandit(seed=seed[-1], delay_s=float(world.delay)), 0, 0.0
    seen: list[_Units] = []
    for step in range(world.steps):
        rates = world.rates_at(step)
        arm = rng.choice(len(arms), world.units, p=np.array(list(weights.values())))
        won = rng.random(world.units) < rates[arm]
        lag = np.where(won, world.lag / 3, world.lag) * rng.exponential(1.0, world.units)
        lost += float((rates.max() - rates[arm]).sum())
        seen.append(_Units(step, phase, arm, won, step + lag))
        if not moves:
            continue
        pairs = _pairs(seen, arms, now=step + 1, delay=world.delay)
        choice = choose(bandit, _METRIC, weights, pairs, draw=phase, phases=phases)
        if choice.shares is not None:
            total = sum(choice.shares.values())
            weights, phase = {a: w / total for a, w in choice.shares.items()}, phase + 1
            phases.append(weights)
    is_tie = len(set(world.rates)) == 1
    best = max(weights, key=weights.__getitem__) if is_tie else arms[int(np.argmax(world.rates))]
    return lost, weights[best]


@dataclass(frozen=True, slots=True)
class _Units:
    """Units of one step: their arms, whether they won, and when that is known."""

    step: int
    phase: int
    arm: NDArray[np.int64]
    won: NDArray[np.bool_]
    known: NDArray[np.float64]


def _pairs(
    seen: Sequence[_Units], arms: Sequence[str], *, now: int, delay: int
) -> dict[tuple[int, str], list[tuple[float, float]]]:
    """Return what is known now of units that are old enough, as the daemon gathers it."""
    found: defaultdict[tuple[int, str], list[tuple[float, float]]] = defaultdict(list)
    for units in seen:
        if units.step + delay >= now:
            break
        here = units.known <= now
        for i, arm in enumerate(arms):
            mine = units.won[here & (units.arm == i)]
            found[units.phase, arm] += [(float(won), 1.0) for won in mine.tolist()]
    return found
