"""Scenario scaling: the growth model for 1 to 1,000 shards, and what it says of shards that run."""

import asyncio
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from bench import results
from bench.fleet import AT_ONCE, Fleet, Rows, count, cpu_s, idle_share, open_fleet, read_all
from bench.growth_model import (
    Asked,
    Cache,
    Costs,
    Keys,
    draw_slots,
    fit_costs,
    grow,
    owners,
    router_us,
    sums,
    works_us,
)
from bench.options import Options
from bench.tail_model import Loop, hedge, simulate, slowest
from bench.turns import Case, compared

SHARDS = (1, 2, 3, 4, 8, 16, 32, 64, 128, 256, 512, 1_000)
EXPONENTS = (0.0, 0.8, 0.99, 1.2)
"""Of how often keys are asked for; 0.99 is YCSB's."""
KEYS, SEEDS = 1_000_000, 3
ASKED = {
    "1 row": Asked(1),
    "1 row, cached": Asked(1, cache=Cache()),
    "16 rows": Asked(16),
    "16 rows, cached": Asked(16, cache=Cache()),
    "100 rows": Asked(100),
    "100 rows, tagged": Asked(100, tagged=True),
}
USED = (0.3, 0.6, 0.8, 0.9)
FAN_OUTS = (1, 4, 16, 100)

RUNNING = (1, 2, 4, 8)
"""Shards that the model is held against."""
RUNNING_KEYS, RUNNING_EXPONENT, RUNNING_ROWS = 5_000, 0.99, (1, 16)
RUNNING_AGE_S = 1.0
REQUESTS = 20_000
"""Drawn; each round goes on where the last one ended."""
WARM_S = 3.0

Figures = Mapping[str, float]


def scaling(options: Options) -> dict[str, Case]:
    """The growth model by the saved costs of `cluster`; and up to 8 shards against it, in turns.

    `running`: reads by zipfian keys through a router, measured, against what the model says of the
    same keys and map.  `growth`, `tail`: the model; deterministic.
    """
    found = results.load()
    costs = fit_costs(found["cluster"]["cases"])
    cases: dict[str, Case] = {}
    for shards in RUNNING:
        cases |= _check(shards, costs, options)
    return {**cases, **model(costs, stall_us_of(found))}


def stall_us_of(found: results.Results) -> float:
    """Return what holds a loop under writers up once a second: one of a thousand 1 ms ticks."""
    case = found["loop"]["cases"]["1 rows, 64 writers"]
    return float(1e3 * case["ours"]["stall_p999_ms"]["median"])


def model(costs: Costs, stall_us: float, keys: int = KEYS, seeds: int = SEEDS) -> dict[str, Case]:
    """Return the growth of all series over SHARDS, and the tails; 30 s."""
    slots = [draw_slots(keys, seed) for seed in range(seeds)]
    found = {}
    for exponent in EXPONENTS:
        drawn = [Keys(each, exponent) for each in slots]
        for name, asked in ASKED.items():
            found[f"growth, {exponent:g}, {name}"] = _growth(drawn, asked, costs)
    for used in USED:
        loop = Loop(costs.call + costs.row, stall_us, used)
        found[f"tail, {used:.0%} used"] = _tail(loop)
    return found


def _growth(drawn: Sequence[Keys], asked: Asked, costs: Costs) -> Case:
    """Return medians over the texts of keys, by number of shards; of `skew` the extremes too."""
    points = [[grow(keys, asked, shards, costs) for keys in drawn] for shards in SHARDS]
    medians = {
        name: [_short(np.median([getattr(p, name) for p in same])) for same in points]
        for name in ("requests_per_s", "skew", "fan_out", "hits", "routers")
    }
    extremes = {
        name: [_short(pick(p.skew for p in same)) for same in points]
        for name, pick in (("skew_min", min), ("skew_max", max))
    }
    hottest = _short(float(drawn[0].hot_shares[0]))
    notes = {"shards": [*SHARDS], "hottest_share": hottest, **medians, **extremes}
    return {"measure": "requests_per_s", "ours": {}, "rounds": len(drawn), "notes": notes}


def _tail(loop: Loop) -> Case:
    ways: Mapping[str, Callable[[], Any]] = {
        "plain": partial(simulate, loop),
        "same shard": partial(hedge, loop, other_copy=False),
        "other copy": partial(hedge, loop, other_copy=True),
    }
    notes: dict[str, Any] = {"fan_outs": [*FAN_OUTS]}
    for name, way in ways.items():
        times = way()
        for figure, share in (("p50_ms", 0.5), ("p99_ms", 0.99)):
            found = [_short(slowest(times, k, share) / 1e3) for k in FAN_OUTS]
            notes[f"{name}, {figure}"] = found
    return {"measure": "p99_ms", "ours": {}, "rounds": 1, "notes": notes}


def _check(shards: int, costs: Costs, options: Options) -> dict[str, Case]:
    """Return what running shards do by a router, without and with a cache, against the model."""
    slots = draw_slots(RUNNING_KEYS, 0)
    names = [f"0:{i}" for i in range(RUNNING_KEYS)]
    keys = Keys(slots, RUNNING_EXPONENT)
    found = {}
    with (
        tempfile.TemporaryDirectory(prefix="bench") as folder,
        open_fleet(Path(folder), shards, names, cache_s=RUNNING_AGE_S) as fleet,
    ):
        idle = idle_share(fleet.pids, 2.0)
        for rows in RUNNING_ROWS:
            requests = _draw(names, keys, rows)
            for cache in (None, Cache(RUNNING_AGE_S, RUNNING_KEYS, events=0.0)):
                asked = Asked(rows, cache=cache)
                run = partial(_round, fleet, asked, _busiest(keys, shards), idle)
                run(requests, min(WARM_S, options.seconds))
                pairs, before = [], _hedges(fleet)
                for _ in range(options.rounds):
                    figures = run(requests, options.seconds)
                    said = _predict(keys, asked, shards, costs, figures["rows_per_s"])
                    pairs.append((figures, said))
                    made = int(figures["requests"])
                    requests = [*requests[made:], *requests[:made]]
                sent, won = (now - b for now, b in zip(_hedges(fleet), before, strict=True))
                kept = ", cached" if cache else ""
                found[f"running, {shards} shards, {rows} rows{kept}"] = compared(
                    pairs, measure="calls_share", hedged=sent, hedges_won=won
                )
    return found


def _busiest(keys: Keys, shards: int) -> int:
    """Return the shard that most rows are asked of; it isn't chosen by what is measured."""
    return int(sums(owners(shards), keys.by_slot, shards).argmax())


def _draw(names: Sequence[str], keys: Keys, rows: int) -> list[Rows]:
    drawn = np.random.default_rng(rows)
    found = drawn.choice(len(names), (REQUESTS, rows), p=keys.hot_shares)
    return [[{"user": names[i]} for i in row] for row in found.tolist()]


def _hedges(fleet: Fleet) -> tuple[float, float]:
    """Return how many reads were sent twice, and how often the second was answered first."""
    counts = [count(router.url) for router in (fleet.router, fleet.cached)]
    sent, won = (sum(each[name] for each in counts) for name in ("hedged", "hedges_won"))
    return sent, won


def _round(
    fleet: Fleet, asked: Asked, busiest: int, idle: float, requests: Sequence[Rows], seconds: float
) -> dict[str, float]:
    """Return shares and microseconds of processor time of a request, measured for so long."""
    router = fleet.router if asked.cache is None else fleet.cached
    pids, made = (*fleet.pids, router.pid), [0]
    before, counted, began_s = [cpu_s(pid) for pid in pids], count(router.url), time.perf_counter()
    asyncio.run(read_all(router.url, requests, _turns(seconds, made)))
    took_s = time.perf_counter() - began_s
    *daemons, hop_s = (cpu_s(pid) - b for pid, b in zip(pids, before, strict=True))
    busy = [max(0.0, each - idle / len(daemons) * took_s) for each in daemons]
    for name, value in count(router.url).items():
        counted[name] = value - counted.get(name, 0.0)
    calls = [counted.get(f"calls {shard.name}", 0.0) for shard in fleet.shard_map.shards]
    rows = counted["cache_hits"] + counted["cache_misses"]
    return {
        "calls_share": calls[busiest] / sum(calls),
        "cpu_share": busy[busiest] / sum(busy),
        "hit_share": counted["cache_hits"] / rows if rows else 0.0,
        "daemons_us": 1e6 * sum(busy) / made[0],
        "hop_us": 1e6 * hop_s / made[0],
        "requests": made[0],
        "rows_per_s": made[0] * asked.rows / took_s,
    }


def _turns(seconds: float, made: list[int]) -> Iterator[int]:
    """Yield numbers for so long, and count them."""
    stop = time.perf_counter() + seconds
    while time.perf_counter() < stop:
        yield made[0]
        made[0] += 1


def _predict(
    keys: Keys, asked: Asked, shards: int, costs: Costs, rows_per_s: float
) -> dict[str, float]:
    """Return what the model says of the figures of a round, at the round's own rate."""
    by_slot = keys.by_slot
    if asked.cache is not None:  # so many are under way that, by Little, each takes
        fill_s = AT_ONCE * asked.rows / rows_per_s
        by_slot = keys.missed(replace(asked.cache, fill_s=fill_s), rows_per_s)
    missed = sums(owners(shards), by_slot, shards)
    calls, work_us = works_us(missed, asked, costs)
    busiest = _busiest(keys, shards)
    return {
        "calls_share": float(calls[busiest] / calls.sum()),
        "cpu_share": float(work_us[busiest] / work_us.sum()),
        "hit_share": max(0.0, 1.0 - float(missed.sum())),
        "daemons_us": float(work_us.sum()),
        "hop_us": router_us(missed, asked, costs),
        "rows_per_s": rows_per_s,
    }


def _short(value: Any) -> float:
    """Return four digits."""
    return float(f"{value:.4g}")
