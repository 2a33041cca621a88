"""Model: what N shards answer, how full the busiest one is, and how late the slowest of k answers.

Processor time comes from what the cluster scenario measured; slots, placement and the rules of the
cache are the real ones.  Every shard's loop has a core of its own, which this machine hasn't.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlpd.cluster.placement import first_map
from mlpd.core.hashing import SLOTS, slot_of
from mlpd.core.keys import encode_texts
from mlpd.core.shards import Shard

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

USED_SHARE = 0.6
"""Of a core, that the busiest loop and each router may use: capacity.md's."""
_ROUNDS, _SETTLED = 40, 1e-4
"""Rounds at most in which rates and shares of hits settle, and what is settled."""
_HOTTEST, _STEPS = 10_000, 300
"""Keys that count one by one, and steps in which the others do."""
_EVENTS = 200
"""Rates of events between which the hits of rare keys are interpolated."""


@dataclass(frozen=True, slots=True)
class Costs:
    """Microseconds of processor time.

    `call`, `row`: of a daemon, of each call and row.  `request`, `shard`, `routed`: of a router, of
    each request, shard that it asks and row.  `kept_request`, `kept_row`: where it keeps all rows.
    """

    call: float
    row: float
    request: float
    shard: float
    routed: float
    kept_request: float
    kept_row: float


@dataclass(frozen=True, slots=True)
class Cache:
    """A router's: `age_s` and `rows` as --cache-max-age and --cache-rows.

    `events`: sent through the same routers, by the same keys, for each row that is read.  `fill_s`:
    how long a shard takes to answer; until then a row that is asked for again misses again.
    """

    age_s: float = 1.0
    rows: int = 10_000
    events: float = 0.1
    fill_s: float = 0.002


@dataclass(frozen=True, slots=True)
class Asked:
    """What is asked for: requests of `rows`; `tagged`: those of a request share one `{tag}`."""

    rows: int
    tagged: bool = False
    cache: Cache | None = None


@dataclass(frozen=True, slots=True)
class Point:
    """A cluster with its busiest shard `USED_SHARE` full.

    `skew`: that shard's work over the mean.  `fan_out`: shards asked for a request.  `hits`: share
    of rows from caches.  `routers`: how many it takes.
    """

    requests_per_s: float
    skew: float
    fan_out: float
    hits: float
    routers: float


class Keys:
    """Keys by popularity: the i-th is asked for in proportion to i ** -exponent.

    `slots`: int64 [keys], where they are, the most popular first.
    """

    def __init__(self, slots: Ints, exponent: float) -> None:
        weights = np.arange(1, len(slots) + 1, dtype=np.float64) ** -exponent
        shares = weights / weights.sum()
        self.by_slot = sums(slots, shares, SLOTS)
        hot = slice(0, _HOTTEST)
        self.hot_shares, self.hot_slots = shares[hot], slots[hot]
        self.tail_by_slot = sums(slots[_HOTTEST:], shares[_HOTTEST:], SLOTS)
        self.tail_shares, self.tail_counts = _steps(shares[_HOTTEST:])

    def distinct(self, reads: float) -> float:
        """Return how many different keys so many reads ask for, on average."""
        hot = -np.expm1(-self.hot_shares * reads).sum()
        tail = -(self.tail_counts * np.expm1(-self.tail_shares * reads)).sum()
        return float(hot + tail)

    def missed(self, cache: Cache, rows_per_s: float) -> Floats:
        """Return the share of rows that a router with so many a second misses, float64 [SLOTS].

        The rarer keys of a slot count as a mean of all such keys.
        """
        events = cache.events * rows_per_s * self.by_slot
        idle_s = idle_life_s(self, rows_per_s, cache.rows)
        reads = rows_per_s * self.hot_shares
        hits = hit_shares(reads, events[self.hot_slots], cache, idle_s)
        found = sums(self.hot_slots, self.hot_shares * (1.0 - hits), SLOTS)
        if not len(self.tail_shares):
            return found
        few = np.linspace(events.min(), events.max(), _EVENTS)
        rare = hit_shares(rows_per_s * self.tail_shares, few[:, None], cache, idle_s)
        weights = self.tail_shares * self.tail_counts
        rare_hits = np.interp(events, few, rare @ weights / weights.sum())
        found += self.tail_by_slot * (1.0 - rare_hits)
        return found


def draw_slots(keys: int, seed: int) -> Ints:
    """Return the slots of so many keys of one text each, int64; other seeds have other texts."""
    texts = encode_texts(f"{seed}:{i}" for i in range(keys))
    return np.fromiter((slot_of(text) for text in texts), np.int64, keys)


def owners(shards: int) -> Ints:
    """Return the owner of each slot, int64 [SLOTS], as placed in a new cluster."""
    members = [Shard(f"s{i:04}", f"http://s{i}:1") for i in range(shards)]
    return np.array(first_map("0" * 32, members).owners, np.int64)


def grow(keys: Keys, asked: Asked, shards: int, costs: Costs) -> Point:
    """Return what `shards` shards answer.

    With a cache, routers come as they are needed, and each has its part of the requests.
    """
    placed = owners(shards)
    point = _point(sums(placed, keys.by_slot, shards), asked, costs)
    if asked.cache is None:
        return point
    rate = USED_SHARE * 1e6 / (costs.request + costs.shard + asked.rows * costs.routed)
    for _ in range(_ROUNDS):
        missed = keys.missed(asked.cache, asked.rows * rate)
        point = _point(sums(placed, missed, shards), asked, costs)
        known, rate = rate, (rate + point.requests_per_s / max(1.0, point.routers)) / 2.0
        if abs(rate - known) < _SETTLED * known:
            break
    return point


def works_us(missed: Floats, asked: Asked, costs: Costs) -> tuple[Floats, Floats]:
    """Return by shard the calls and the microseconds of work of a request, float64 [shards].

    `missed`: shares of rows by shard that no cache has.  Rows are drawn one by one, so shard j is
    asked by 1 - (1 - missed[j]) ** rows of the requests; with a tag all rows are one shard's.
    """
    calls = missed if asked.tagged else 1.0 - (1.0 - missed) ** asked.rows
    return calls, costs.call * calls + costs.row * asked.rows * missed


def router_us(missed: Floats, asked: Asked, costs: Costs) -> float:
    """Return a router's microseconds of work of a request."""
    calls, _ = works_us(missed, asked, costs)
    left = float(missed.sum())
    some = left if asked.tagged else 1.0 - (1.0 - left) ** asked.rows
    asks = (
        costs.request * some + costs.shard * float(calls.sum()) + costs.routed * asked.rows * left
    )
    if asked.cache is None:
        return asks
    return asks + costs.kept_request * (1.0 - some) + costs.kept_row * asked.rows * (1.0 - left)


def hit_shares(reads: Floats, events: Floats, cache: Cache, idle_s: float) -> Floats:
    """Return the share of reads of a key that a router's cache answers.

    `reads` of it and `events` of its slot come so often a second, at moments without memory.  One
    read misses, and so do those that come until it is answered; each answer keeps the row anew,
    unless an event came meanwhile.  From the first answer on reads hit, until the last one's row is
    too old or an event comes.  Rows that are idle for `idle_s` go, as others came, which bounds it
    by 1 - exp(-reads idle) (Che, Tung and Wang, Hierarchical Web Caching Systems, 2002).
    """
    also = np.maximum(reads * cache.fill_s, 1e-12)
    last_s = cache.fill_s * (1.0 + np.expm1(-also) / also)
    misses = 1.0 + reads * _before_event(events, cache.fill_s)
    kept = np.exp(-events * cache.fill_s)
    hits = reads * kept * _before_event(events, last_s + cache.age_s)
    return np.minimum(hits / (misses + hits), -np.expm1(-reads * idle_s))


def _before_event(events: Floats, seconds: Any) -> Floats:
    """Return how much of so many seconds passes before the first event, on average."""
    often = np.maximum(events, 1e-9)
    found: Floats = -np.expm1(-often * seconds) / often
    return found


def idle_life_s(keys: Keys, rows_per_s: float, rows: int) -> float:
    """Return after how long without a read a row goes, as `rows` others came; inf if all fit."""
    if len(keys.hot_shares) + keys.tail_counts.sum() <= rows:
        return float("inf")
    low, high = 0.0, 1.0
    while keys.distinct(rows_per_s * high) < rows:
        low, high = high, 2.0 * high
    for _ in range(40):
        middle = (low + high) / 2.0
        few = keys.distinct(rows_per_s * middle) < rows
        low, high = (middle, high) if few else (low, middle)
    return high


def _steps(shares: Floats) -> tuple[Floats, Floats]:
    """Return means of descending shares in steps, and how many each step has."""
    if not len(shares):
        return shares, shares
    ends = np.geomspace(_HOTTEST, _HOTTEST + len(shares), _STEPS).astype(np.int64) - _HOTTEST
    bounds: Ints = np.unique(ends)
    counts = np.diff(bounds).astype(np.float64)
    found: Floats = np.add.reduceat(shares, bounds[:-1]) / counts
    return found, counts


def sums(where: Ints, values: Floats, length: int) -> Floats:
    """Return the sums of values by where they are, float64 [length]."""
    found: Floats = np.bincount(where, values, length).astype(np.float64, copy=False)
    return found


def _point(missed: Floats, asked: Asked, costs: Costs) -> Point:
    calls, work_us = works_us(missed, asked, costs)
    busiest = float(work_us.max())
    return Point(
        requests_per_s=USED_SHARE * 1e6 / busiest,
        skew=busiest / float(work_us.mean()),
        fan_out=float(calls.sum()),
        hits=0.0 if asked.cache is None else 1.0 - float(missed.sum()),
        routers=router_us(missed, asked, costs) / busiest,
    )


def fit_costs(cases: Mapping[str, Any]) -> Costs:
    """Return the costs that fit the reads of the cluster scenario, by least squares of ratios."""
    asked = [read for way in ("client", "router") for read in _reads(cases, way, "daemons_us")]
    daemon = _fit((shards, rows, us) for rows, shards, us in asked)
    router = _fit((1.0, k, rows, us) for rows, k, us in _reads(cases, "router", "hop_us"))
    kept = _fit((1.0, rows, us) for rows, _, us in _reads(cases, "router, cached", "hop_us"))
    return Costs(*daemon, *router, *kept)


def _reads(cases: Mapping[str, Any], way: str, figure: str) -> Iterable[tuple[float, float, float]]:
    """Yield rows, shards and a figure of all reads by one way."""
    for name, case in cases.items():
        what, _, by = name.partition(": ")
        if by == way:
            rows, shards = (int(part.split()[0]) for part in what.split(", "))
            yield rows, shards, case["ours"][figure]["median"]


def _fit(points: Iterable[tuple[float, ...]]) -> list[float]:
    """Return factors, none below 0, of all columns but the last, which they come close to."""
    values = np.array(list(points))
    inputs, outputs = values[:, :-1] / values[:, -1:], np.ones(len(values))
    used = list(range(inputs.shape[1]))
    while True:
        found, *_ = np.linalg.lstsq(inputs[:, used], outputs, rcond=None)
        if (found >= 0.0).all():
            break
        del used[int(found.argmin())]
    return [float(found[used.index(i)]) if i in used else 0.0 for i in range(inputs.shape[1])]
