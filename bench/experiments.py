"""Scenario experiments: how often the statistics are wrong, and what being right costs."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import count

import numpy as np

from bench.options import Options
from bench.simulations import (
    MEAN,
    PROPORTION,
    Z_99,
    Look,
    World,
    decides,
    first_decision,
    lognormal,
    naive_decides,
    naive_returning,
    one_phase,
    proportion,
    purchases,
    ramp,
    returning,
    spec_of,
)
from bench.turns import Case, in_turns
from mlpd.experiments.spec import ExperimentSpec
from mlpd.experiments.srm import sample_ratio

RUNS = 400
"""Simulated experiments of a round."""


def experiments(options: Options) -> dict[str, Case]:
    """False positives at every look, false alarms and power, beside tests that are peeked at.

    A round is 400 simulated experiments from a seed of its own, so the figures are the same on
    every machine.  `A/A`: arms that are the same, looked at 18 to 30 times; against a z-test at
    5 % at every look, of all units whatever their phase.  `sample ratio`: units that do follow the
    weights, 60 looks; against a z-test at 1 %.  `power`: against the z-test at the planned end.
    """
    return {**_false_positives(options), **_sample_ratios(options), **_power(options)}


def aa_worlds() -> dict[str, tuple[ExperimentSpec, World, World]]:
    """Return experiments without an effect: spec, world, and the world as the naive test sees it.

    Each kind of trouble once: few units in an arm, rare events, skew, moving base rates, and
    units that come back.
    """
    canary = one_phase(proportion(0.3), share=0.01, units=24_000)
    even = one_phase(proportion(0.3), share=0.5, units=8_000)
    rare = one_phase(proportion(0.005), share=0.1, units=60_000)
    skewed = one_phase(lognormal(1.5), share=0.5, units=8_000)
    skewed_canary = one_phase(lognormal(1.5), share=0.01, units=40_000)
    revenue = one_phase(purchases(0.05, 1.0), share=0.5, units=20_000)
    return {
        "50/50, proportion": (spec_of(PROPORTION, 4_000), even, even),
        "99/1, proportion": (spec_of(PROPORTION, 24_000), canary, canary),
        "90/10, events of 0.5 %": (spec_of(PROPORTION, 60_000), rare, rare),
        "50/50, skewed amounts": (spec_of(MEAN, 4_000), skewed, skewed),
        "99/1, skewed amounts": (spec_of(MEAN, 40_000), skewed_canary, skewed_canary),
        "50/50, 5 % buy skewed amounts": (spec_of(MEAN, 10_000), revenue, revenue),
        "ramp 1, 10, 50 %, base rate 10 to 60 %": (spec_of(PROPORTION, 18_000), ramp, ramp),
        "units that come back 12 times": (spec_of(PROPORTION, 1_000), returning, naive_returning),
    }


def rate(
    world: World, decide: Callable[[Look], bool], *, seed: Sequence[int], runs: int = RUNS
) -> float:
    """Return the share of experiments in which any look decides."""
    rng = np.random.default_rng(seed)
    return sum(any(map(decide, world(rng))) for _ in range(runs)) / runs


def _rate(
    world: World, decide: Callable[[Look], bool], number: int, seed: int
) -> Mapping[str, float]:
    return {"false_positives": rate(world, decide, seed=(number, seed))}


def _false_positives(options: Options) -> dict[str, Case]:
    cases = {}
    for number, (name, (spec, world, naive)) in enumerate(aa_worlds().items()):
        cases[f"A/A, {name}"] = _turns(
            options,
            "false_positives",
            partial(_rate, world, partial(decides, spec), number),
            partial(_rate, naive, naive_decides, number),
        )
    return cases


def _sample_ratios(options: Options) -> dict[str, Case]:
    shares = {"50/50": 0.5, "99/1": 0.01}
    return {
        f"sample ratio, {name}": _turns(
            options,
            "false_alarms",
            partial(_alarms, share, e_alarm),
            partial(_alarms, share, z_alarm),
        )
        for name, share in shares.items()
    }


def alarm_rate(
    share: float, alarm: Callable[[int, int, float], bool], *, seed: int, runs: int = RUNS
) -> float:
    """Return the share of healthy experiments that any of 60 looks, 100 units apart, alarms."""
    rng = np.random.default_rng((100, seed))
    alarms = 0
    for _ in range(runs):
        in_b = np.cumsum(rng.binomial(100, share, 60)).tolist()
        alarms += any(alarm(100 * i - n, n, share) for i, n in enumerate(in_b, start=1))
    return alarms / runs


def _alarms(share: float, alarm: Callable[[int, int, float], bool], seed: int) -> dict[str, float]:
    return {"false_alarms": alarm_rate(share, alarm, seed=seed)}


def e_alarm(in_a: int, in_b: int, share: float) -> bool:
    """Tell whether the sample-ratio check alarms: the code under test."""
    return sample_ratio([({"a": in_a, "b": in_b}, {"a": 1 - share, "b": share})]).alarm


def z_alarm(in_a: int, in_b: int, share: float) -> bool:
    """Tell whether a z-test at 1 % rejects the split."""
    n = in_a + in_b
    return (in_b - n * share) ** 2 > Z_99**2 * n * share * (1 - share)


def _power(options: Options) -> dict[str, Case]:
    spec = spec_of(PROPORTION, 8_000)
    cases = {}
    for points in (2, 3, 4):
        effect = points / 100 / 0.7  # of those who would not have had the event, so much more do
        world = one_phase(proportion(0.3), share=0.5, units=8_000, effect=effect, looks=40)

        def ours(seed: int, world: World = world) -> dict[str, float]:
            rng = np.random.default_rng((200, seed))
            found = [first_decision(spec, world(rng)) for _ in range(RUNS)]
            stops = [200 + (8_000 - 200) * (39 if i is None else i) / 39 for i in found]
            won = sum(i is not None for i in found)
            return {"power": won / RUNS, "units_to_end": statistics.mean(stops)}

        def fixed(seed: int, world: World = world) -> dict[str, float]:
            rng = np.random.default_rng((200, seed))
            won = sum(naive_decides(world(rng)[-1]) for _ in range(RUNS))
            return {"power": won / RUNS, "units_to_end": 8_000.0}

        name = f"power, {points} points on 30 %, 8,000 units"
        cases[name] = _turns(options, "power", ours, fixed)
    return cases


def _turns(
    options: Options,
    measure: str,
    ours: Callable[[int], Mapping[str, float]],
    other: Callable[[int], Mapping[str, float]],
) -> Case:
    """Return both sides over rounds; each round's number is its seed, the same for both."""
    seeds = count(), count()
    seen: tuple[list[float], list[float]] = [], []

    def run(side: int, rate_of: Callable[[int], Mapping[str, float]]) -> Mapping[str, float]:
        found = rate_of(next(seeds[side]))
        seen[side].append(found[measure])
        return found

    case = in_turns(
        lambda: run(0, ours), lambda: run(1, other), rounds=options.rounds, measure=measure
    )
    pooled = [statistics.mean(rates) for rates in seen]
    case["notes"] = {
        "runs": options.rounds * RUNS,
        "pooled": pooled[0],
        "pooled_against": pooled[1],
    }
    return case
