"""Scenario guardrails: how soon an arm that turns bad is stopped, and how often a healthy one."""

import statistics
from collections.abc import Iterator, Mapping
from functools import partial
from itertools import count

import numpy as np
from numpy.typing import NDArray

from bench.options import Options
from bench.turns import Case, alone
from mlpd.experiments.guardrails import (
    CONTROL_UNITS,
    GUARDRAIL_ALPHA,
    TRIP_POINTS,
    WINDOW_UNITS,
    FaultGuard,
    FaultSequence,
    Guardrail,
    Tripwire,
)

ERRORS = Guardrail("errors")
HEALTHY_REQUESTS = 1_000_000
Counts = NDArray[np.int64]
BAD_RUNS, HEALTHY_RUNS = 10, 60
"""Simulated arms of a round."""
_CHUNK = 4_096


def guardrails(options: Options) -> dict[str, Case]:
    """Requests of its own until an arm that turns bad is stopped, and healthy arms stopped.

    A round is 10 arms that turn bad, or 60 healthy ones with 1,000,000 requests of both arms, from
    a seed of its own.  Every request is a unit's of its own unless said otherwise.
    """
    cases: dict[str, Case] = {}
    bad: dict[str, Mapping[str, float]] = {
        "50 points on 1 %": {"base": 0.01, "jump": 0.5},
        "5 points on 1 %": {"base": 0.01, "jump": 0.05},
        "5 points on 5 %": {"base": 0.05, "jump": 0.05},
        "5 points on 0 %": {"base": 0.0, "jump": 0.05},
    }
    for name, world in bad.items():
        for before in (0, 10_000):
            cases[f"{name}, after {before:,}"] = _bad_arms(options, before=before, **world)
    more: dict[str, Mapping[str, float]] = {
        "5 points on 1 %, 99/1, after 0": {"share": 0.01},
        "5 points on 1 %, 90/10, after 2,000": {"share": 0.1, "before": 2_000},
        "5 points on 1 %, units that come 10 times, after 2,000": {"visits": 10, "before": 2_000},
    }
    for name, world in more.items():
        cases[name] = _bad_arms(options, **{"before": 0, "base": 0.01, "jump": 0.05, **world})
    for base, share in ((0.01, 0.5), (0.01, 0.1)):
        split = f"{100 - 100 * share:.0f}/{100 * share:.0f}"
        cases[f"healthy, {base:.0%} fail, {split}"] = _healthy_arms(options, base, share)
    return cases


def _bad_arms(options: Options, **world: float) -> Case:
    seeds, found = count(), []

    def run() -> Mapping[str, float]:
        rng = np.random.default_rng((300, next(seeds)))
        one = partial(requests_until_stopped, rng, **world)  # type: ignore[arg-type]  # numbers all
        requests = [one() for _ in range(BAD_RUNS)]
        found.extend(requests)
        return {"own_requests": float(statistics.median(requests))}

    case = alone(run, rounds=options.rounds, measure="own_requests")
    case["notes"] = {
        "runs": len(found),
        "median": statistics.median(found),
        "p95": sorted(found)[int(0.95 * len(found))],
        "most": max(found),
    }
    return case


def _healthy_arms(options: Options, base: float, share: float) -> Case:
    seeds, found = count(), []

    def run() -> Mapping[str, float]:
        rng = np.random.default_rng((400, next(seeds)))
        arms = range(HEALTHY_RUNS)
        stopped = sum(is_stopped_for_nothing(rng, base=base, share=share) for _ in arms)
        found.append(stopped)
        return {"stopped_share": stopped / HEALTHY_RUNS}

    case = alone(run, rounds=options.rounds, measure="stopped_share")
    case["notes"] = {"runs": HEALTHY_RUNS * len(found), "stopped": sum(found)}
    return case


def requests_until_stopped(
    rng: np.random.Generator,
    *,
    before: float,
    base: float,
    jump: float,
    share: float = 0.5,
    visits: float = 1,
    most: int = 20_000,
) -> int:
    """Return how many requests of its own an arm answers from its jump on until it is stopped.

    It is healthy for `before` requests of its own; `visits` is how often a unit comes on average.
    `most` if it isn't stopped by then; 0 if it is stopped before the jump, for nothing.
    """
    guard = FaultGuard(ERRORS, "a", {"a": 1 - share, "b": share}, GUARDRAIL_ALPHA)
    own = 0
    for in_b, unit, level in _requests(rng, share, round(visits)):
        own += in_b
        fault = level < base + (jump if in_b and own > before else 0.0)
        if guard.observe(unit, "b" if in_b else "a", fault=fault):
            return max(0, round(own - before))
        if own >= before + most:
            return most
    raise AssertionError("requests never end")


def _requests(
    rng: np.random.Generator, share: float, visits: int
) -> Iterator[tuple[bool, str, float]]:
    """Yield (whether in b, unit, a number in [0, 1)) of requests; a unit stays in its arm."""
    first = 0
    while True:
        units = first + rng.integers(0, max(1, _CHUNK // visits), _CHUNK) if visits > 1 else None
        if units is None:
            units = np.arange(first, first + _CHUNK)
        first += _CHUNK
        arms = rng.random(_CHUNK) < share
        levels = rng.random(_CHUNK)
        for unit, level in zip(units.tolist(), levels.tolist(), strict=True):
            yield bool(arms[unit % _CHUNK]), str(unit), level


def is_stopped_for_nothing(
    rng: np.random.Generator, *, base: float, share: float, requests: int = HEALTHY_REQUESTS
) -> bool:
    """Tell whether an arm as healthy as the control is ever stopped within `requests` of both.

    Each comes from a unit of its own.  Only faults move the sequence, so only these are drawn, with
    the requests between them; the tripwire is asked wherever it could go off at all.
    """
    gaps = rng.geometric(base, round(1.2 * base * requests) + 100)
    gaps = gaps[np.cumsum(gaps) <= requests]
    in_b = rng.random(len(gaps)) < share
    sequence = FaultSequence()
    for in_arm in in_b.tolist():
        sequence = sequence.after(in_arm=in_arm, share=share)
        if sequence.e >= 1 / GUARDRAIL_ALPHA:
            return True
    own = np.cumsum(rng.binomial(gaps - 1, share) + in_b)
    return _trips(own, np.cumsum(gaps) - own, in_b)


def _trips(own: Counts, controls: Counts, in_b: NDArray[np.bool_]) -> bool:
    """Tell whether the tripwire goes off; `own`, `controls`: requests of each arm at each fault."""
    faults, others = own[in_b], controls[~in_b]
    first = np.searchsorted(faults, faults - WINDOW_UNITS, side="right")
    counts = np.arange(len(faults)) - first + 1
    for i in np.flatnonzero(counts >= TRIP_POINTS * WINDOW_UNITS).tolist():
        at = controls[in_b][i]
        begun = np.searchsorted(others, at - CONTROL_UNITS, side="right")
        usual = int(np.searchsorted(others, at, side="right") - begun)
        arm = _window(min(WINDOW_UNITS, int(faults[i])), int(counts[i]))
        if arm.trips(_window(min(CONTROL_UNITS, int(at)), usual)):
            return True
    return False


def _window(units: int, faults: int) -> Tripwire:
    window = Tripwire(units)
    for unit in range(units):
        window.observe(str(unit), fault=unit < faults)
    return window
