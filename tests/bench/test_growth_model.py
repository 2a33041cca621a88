"""The growth model against the real cache, enumerations and queues reckoned step by step."""

import itertools
from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from bench.growth_model import (
    USED_SHARE,
    Asked,
    Cache,
    Costs,
    Keys,
    draw_slots,
    fit_costs,
    grow,
    hit_shares,
    idle_life_s,
    owners,
    router_us,
    works_us,
)
from bench.tail_model import Loop, hedge, simulate, slowest
from mlpd.cluster.router.cache import HotKeys, Row
from mlpd.core.hashing import SLOTS, slot_of
from mlpd.core.keys import encode_texts

COSTS = Costs(400.0, 5.0, 350.0, 330.0, 4.0, 290.0, 2.0)
ROW = Row((("a",), ()), (1,), ("ok",), (), 0, 1)


def real_hits(keys: Keys, cache: Cache, rows_per_s: float, reads: int, seed: int) -> float:
    """Return the share of reads that the router's own cache answers, on a clock of ours."""
    drawn = np.random.default_rng(seed)
    now_s = [0.0]
    kept = HotKeys(cache.age_s, cache.rows, lambda: now_s[0])
    total = round(reads * (1.0 + cache.events))
    asked = drawn.choice(len(keys.hot_shares), total, p=keys.hot_shares).tolist()
    is_event = (drawn.random(total) < cache.events / (1.0 + cache.events)).tolist()
    gaps = drawn.exponential(1.0 / (rows_per_s * (1.0 + cache.events)), total).tolist()
    slots = keys.hot_slots.tolist()
    waiting: deque[tuple[float, int, Any]] = deque()
    for key, event, gap in zip(asked, is_event, gaps, strict=True):
        then_s = now_s[0] + gap
        while waiting and waiting[0][0] <= then_s:
            now_s[0], answered, stamp = waiting.popleft()
            kept.keep(str(answered).encode(), (slots[answered],), stamp, ROW)
        now_s[0] = then_s
        of_key = (slots[key],)
        if event:
            kept.forget(of_key)
        elif kept.find(str(key).encode()) is None:
            waiting.append((then_s + cache.fill_s, key, kept.stamp(of_key)))
    return kept.hits / (kept.hits + kept.misses)


@pytest.mark.parametrize(
    ("cache", "exponent"),
    [
        (Cache(age_s=1.0, rows=5_000, events=0.0), 0.99),
        (Cache(age_s=1.0, rows=5_000, events=0.5), 0.99),
        (Cache(age_s=0.2, rows=5_000, events=0.1), 1.2),
        (Cache(age_s=60.0, rows=200, events=0.0), 0.8),
        (Cache(age_s=1.0, rows=5_000, events=0.0, fill_s=0.3), 0.99),
        (Cache(age_s=2.0, rows=300, events=0.1, fill_s=0.05), 0.99),
        (Cache(age_s=1.0, rows=5_000, events=0.3, fill_s=0.2), 1.2),
    ],
    ids=["age", "events", "short", "room", "late", "all", "all, late"],
)
def test_the_model_of_the_cache_is_what_the_real_one_does(cache: Cache, exponent: float) -> None:
    keys = Keys(draw_slots(2_000, 3), exponent)
    said = 1.0 - keys.missed(cache, 800.0).sum()
    assert said == pytest.approx(real_hits(keys, cache, 800.0, 60_000, seed=1), abs=0.01)


def test_rare_keys_as_a_mean_are_what_they_are_one_by_one() -> None:
    slots, cache, rate = draw_slots(60_000, 0), Cache(age_s=5.0, rows=4_000, events=0.2), 20_000.0
    keys = Keys(slots, 0.8)
    shares = np.arange(1, 60_001) ** -0.8
    shares /= shares.sum()
    events = cache.events * rate * np.bincount(slots, shares, SLOTS)
    idle_s = idle_life_s(keys, rate, cache.rows)
    hits = hit_shares(rate * shares, events[slots], cache, idle_s)
    singly = np.bincount(slots, shares * (1.0 - hits), SLOTS)
    assert keys.missed(cache, rate).sum() == pytest.approx(singly.sum(), rel=1e-3)
    owned = np.bincount(owners(64), singly, 64)
    found = np.bincount(owners(64), keys.missed(cache, rate), 64)
    assert found == pytest.approx(owned, rel=0.02)


def test_a_row_is_idle_for_as_long_as_it_takes_others_to_fill_the_room() -> None:
    keys = Keys(draw_slots(30_000, 0), 0.9)
    idle_s = idle_life_s(keys, 1_000.0, 3_000)
    shares = np.arange(1, 30_001) ** -0.9
    shares /= shares.sum()
    assert -np.expm1(-shares * 1_000.0 * idle_s).sum() == pytest.approx(3_000, rel=1e-3)
    assert idle_life_s(keys, 1_000.0, 30_000) == float("inf")


def enumerate_calls(missed: Sequence[float], rows: int) -> list[float]:
    """Return how often each shard is asked, over all ways that rows can fall."""
    found = [0.0] * len(missed)
    kept = 1.0 - sum(missed)
    for fallen in itertools.product(range(-1, len(missed)), repeat=rows):
        chance = float(np.prod([kept if j < 0 else missed[j] for j in fallen]))
        for shard in {*fallen} - {-1}:
            found[shard] += chance
    return found


def test_a_shard_is_asked_by_the_requests_that_have_a_row_there() -> None:
    missed = [0.5, 0.2, 0.05]
    calls, work_us = works_us(np.array(missed), Asked(4), COSTS)
    assert calls == pytest.approx(enumerate_calls(missed, 4))
    assert work_us == pytest.approx(400.0 * calls + 5.0 * 4 * np.array(missed))


def test_rows_under_one_tag_are_one_call() -> None:
    calls, work_us = works_us(np.array([0.5, 0.5]), Asked(100, tagged=True), COSTS)
    assert calls == pytest.approx([0.5, 0.5])
    assert work_us == pytest.approx([450.0, 450.0])


def test_a_router_asks_only_for_what_it_does_not_keep() -> None:
    cached = Asked(4, cache=Cache())
    assert router_us(np.zeros(3), cached, COSTS) == pytest.approx(290.0 + 4 * 2.0)
    all_missed = router_us(np.array([1.0, 0.0, 0.0]), cached, COSTS)
    assert all_missed == pytest.approx(350.0 + 330.0 + 4 * 4.0)
    assert all_missed == router_us(np.array([1.0, 0.0, 0.0]), Asked(4), COSTS)


def test_one_shard_answers_what_its_core_has_time_for() -> None:
    point = grow(Keys(draw_slots(100, 0), 1.0), Asked(16), 1, COSTS)
    assert point.requests_per_s == pytest.approx(USED_SHARE * 1e6 / (400.0 + 16 * 5.0))
    assert (point.skew, point.fan_out, point.hits) == (1.0, 1.0, 0.0)


def test_a_hot_key_bounds_the_cluster_and_a_cache_raises_the_bound() -> None:
    keys = Keys(draw_slots(50_000, 0), 1.2)
    one = grow(keys, Asked(1), 1, COSTS).requests_per_s
    most = grow(keys, Asked(1), 1_000, COSTS).requests_per_s
    assert 0.8 / keys.hot_shares[0] < most / one <= 1.0 / keys.hot_shares[0]
    cached = grow(keys, Asked(1, cache=Cache()), 1_000, COSTS)
    assert cached.requests_per_s > 2.0 * most
    assert 0.0 < cached.hits < 1.0


def test_the_same_seed_has_the_same_slots_as_the_daemons() -> None:
    (key,) = encode_texts(["7:2"])
    assert draw_slots(3, 7)[2] == slot_of(key)
    assert (draw_slots(50, 1) == draw_slots(50, 1)).all()
    assert (draw_slots(50, 1) != draw_slots(50, 2)).any()


def made_up_cases(router_row: float) -> dict[str, Any]:
    def case(**figures: float) -> dict[str, Any]:
        return {"ours": {figure: {"median": value} for figure, value in figures.items()}}

    cases = {}
    for shards, sizes in {1: (1, 16, 100), 4: (4, 16, 100), 16: (16,)}.items():
        for rows in sizes:
            what = f"{rows} rows, {shards} shards"
            work = 400.0 * shards + 5.0 * rows
            hop = 350.0 + 330.0 * shards + router_row * rows
            cases[f"{what}: client"] = case(daemons_us=work)
            cases[f"{what}: router"] = case(daemons_us=work, hop_us=hop)
            cases[f"{what}: router, cached"] = case(hop_us=290.0 + 2.0 * rows)
    cases["moves"] = case(slots_per_s=1.0)
    return cases


def test_costs_are_found_in_the_measured_reads() -> None:
    found = fit_costs(made_up_cases(4.0))
    assert found.call == pytest.approx(400.0)
    assert found == Costs(*map(pytest.approx, (400.0, 5.0, 350.0, 330.0, 4.0, 290.0, 2.0)))


def test_no_cost_is_negative() -> None:
    found = fit_costs(made_up_cases(-0.5))
    assert found.routed == 0.0
    assert found.shard == pytest.approx(330.0, rel=0.1)


def step_by_step(loop: Loop, calls: int, seed: int) -> list[float]:
    """Return times as `simulate`, one call after the other."""
    drawn = np.random.default_rng(seed)
    every_us = loop.call_us / loop.used_share
    stalled = (drawn.random(calls) < every_us / 1e6).tolist()
    gaps = drawn.exponential(every_us, calls).tolist()
    found, wait, last = [], 0.0, 0.0
    for i in range(calls):
        wait = max(0.0, wait + last - gaps[i]) if i else 0.0
        last = loop.call_us + loop.stall_us * stalled[i]
        found.append(wait + last)
    return found


def test_waits_are_those_of_a_queue() -> None:
    loop = Loop(400.0, 9_000.0, 0.7)
    assert simulate(loop, 3_000, 5) == pytest.approx(step_by_step(loop, 3_000, 5))


def test_the_mean_wait_is_pollaczek_and_khinchines() -> None:
    times = simulate(Loop(400.0, 0.0, 0.6), 400_000, 1)
    assert times.mean() - 400.0 == pytest.approx(400.0 * 0.6 / (2 * (1 - 0.6)), rel=0.03)


def test_the_slowest_of_k_is_that_of_drawn_ones() -> None:
    times = simulate(Loop(400.0, 9_000.0, 0.5), 200_000, 2)
    drawn = np.random.default_rng(0).choice(times, (50_000, 8)).max(axis=1)
    assert slowest(times, 8, 0.9) == pytest.approx(np.quantile(drawn, 0.9), rel=0.03)


def test_a_hedge_helps_only_where_there_is_another_queue() -> None:
    loop = Loop(400.0, 9_000.0, 0.5)
    plain, same, other = (
        slowest(times, 16, 0.99)
        for times in (
            simulate(loop, 200_000),
            hedge(loop, other_copy=False, calls=200_000),
            hedge(loop, other_copy=True, calls=200_000),
        )
    )
    assert same >= 0.95 * plain
    assert other < plain / 2
