"""Tail: how late the slowest of k shards answers, by how full their loops are, hedged or not."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

CALLS = 1_000_000
"""Simulated: of 100 shards' slowest, one in a hundred is one in 10,000 of each."""
HEDGED_SHARE = 0.05
"""Of calls, that are sent again after the p95 of all."""


@dataclass(frozen=True, slots=True)
class Loop:
    """What a shard's loop does: calls of `call_us` each, and once a second something of `stall_us`.

    `used_share`: of its time, for calls.
    """

    call_us: float
    stall_us: float
    used_share: float


def simulate(loop: Loop, calls: int = CALLS, seed: int = 0) -> Floats:
    """Return microseconds from asking to the answer of each call, float64 [calls].

    Calls come at moments without memory and are answered one after the other (Lindley, The Theory
    of Queues with a Single Server, 1952: a wait is the sum of work less time since it was least).
    """
    drawn = np.random.default_rng(seed)
    every_us = loop.call_us / loop.used_share
    stalled = drawn.random(calls) < every_us / 1e6  # once a second, just before a call
    work = loop.call_us + loop.stall_us * stalled
    gaps = drawn.exponential(every_us, calls)
    walk = np.concatenate([[0.0], np.cumsum(work[:-1] - gaps[1:])])
    waits: Floats = walk - np.minimum.accumulate(walk)
    return waits + work


def hedge(loop: Loop, *, other_copy: bool, calls: int = CALLS, seed: int = 0) -> Floats:
    """Return what `simulate` does where calls that take longer than the p95 are sent once more.

    To the same shard the second waits behind the first in the same queue, and is work alone; to
    one with `other_copy` of the data it waits in another one.
    """
    busier = Loop(loop.call_us, loop.stall_us, loop.used_share * (1.0 + HEDGED_SHARE))
    first = simulate(busier, calls, seed)
    if not other_copy:
        return first
    delay_us = np.quantile(first, 1.0 - HEDGED_SHARE)
    second = simulate(busier, calls, seed + 1)
    return np.minimum(first, np.where(first > delay_us, delay_us + second, np.inf))


def slowest(times: Floats, fan_out: int, share: float) -> float:
    """Return what `share` of requests take that wait for `fan_out` calls, each as in `times`."""
    return float(np.quantile(times, share ** (1.0 / fan_out)))
