"""The order in which a window's tiles are merged, bit for bit: docs/formats/tiles.md.

Values of very different magnitudes that cancel make sums whose visible bits depend on the order;
the last test holds that against every other order one might take for it.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from mlpd.core.columns import DType
from mlpd.core.convert import column_of
from mlpd.core.document import parse_document
from mlpd.features.kernels import load_feature_kernels
from mlpd.features.stamps import Stamps
from mlpd.features.tiles import MIN_RECENT
from mlpd.features.windows import WindowPlan

pytestmark = pytest.mark.timeout(300)  # the first test may wait for the kernels' compiler

HOP_US = 4
WINDOWS_US = (10, 23, 50, 101)
SEEDS = range(6)

# --- the reference: double-double, tiles, and the documented order, in plain Python ---------------

Pair = tuple[float, float]
EMPTY: Pair = (0.0, 0.0)
Tiles = dict[int, Pair]


def two_sum(a: float, b: float) -> Pair:
    total = a + b
    part = total - a
    return total, (a - (total - part)) + (b - part)


def quick_two_sum(a: float, b: float) -> Pair:
    total = a + b
    return total, b - (total - a)


def add(a: Pair, b: Pair) -> Pair:
    """Accurate double-word addition: Joldes, Muller and Popescu (2017), algorithm 6."""
    total, error = two_sum(a[0], b[0])
    low, low_error = two_sum(a[1], b[1])
    total, error = quick_two_sum(total, error + low)
    return quick_two_sum(total, error + low_error)


def fold(tiles: Tiles, indexes: list[int]) -> Pair:
    result = EMPTY
    for index in indexes:
        result = add(result, tiles[index])
    return result


def window_sum(tiles: Tiles, window_us: int, t_us: int) -> float:
    """Merge as documented: A from the newest to the oldest, B the other way, then A with B."""
    oldest = (t_us - window_us) // HOP_US
    per_window = window_us // HOP_US
    pivot = (oldest // per_window + 1) * per_window
    live = sorted(index for index in tiles if index >= oldest)
    before = fold(tiles, [index for index in reversed(live) if index < pivot])
    after = fold(tiles, [index for index in live if index >= pivot])
    return add(before, after)[0]


# --- events, and what mlpd makes of them ----------------------------------------------------------


@dataclass(frozen=True)
class Event:
    event_us: int
    known_us: int
    sequence: int
    x: float


def tell(seed: int) -> tuple[list[Event], list[int]]:
    """Return events in sequence order, some late, and times to read at, after every few of them."""
    chance = random.Random(seed)
    now, events, times = 10**6 + seed, [], []
    debts: list[float] = []
    for sequence in range(1, 161):
        now += chance.choice((0, 1, 2, 3))
        x = chance.uniform(-1, 1)
        if debts and chance.random() < 0.5:  # large values cancel soon and leave the small ones
            x = debts.pop(chance.randrange(len(debts)))
        elif chance.random() < 0.3:
            x *= 2.0 ** chance.randint(95, 105)
            debts.append(-x)
        late = chance.choice((0, 0, 0, 2, 7, 15))
        events.append(Event(now - late, now, sequence, x))
        if chance.random() < 0.4:
            times.append(now + 1)
            now += chance.choice((2, 5, 9))
    return events, times


def tiles_at(events: list[Event], t_us: int) -> Tiles:
    """Return the tiles of the events known before t, each accumulated in sequence order."""
    tiles: Tiles = {}
    for event in events:
        if event.known_us < t_us:
            index = event.event_us // HOP_US
            tiles[index] = add(tiles.get(index, EMPTY), (event.x, 0.0))
    return tiles


def reference(events: list[Event], times: list[int]) -> list[list[str]]:
    return [
        [window_sum(tiles_at(events, t_us), window_us, t_us).hex() for window_us in WINDOWS_US]
        for t_us in times
    ]


@pytest.fixture(scope="module")
def plan() -> WindowPlan:
    return build_plan(MIN_RECENT)


def build_plan(min_recent: int) -> WindowPlan:
    view = {
        "kind": "window",
        "entity": "name",
        "source": "s",
        "windows": [f"{window_us}us" for window_us in WINDOWS_US],
        "hop": f"{HOP_US}us",
        "aggregates": [{"name": "sum", "function": "sum", "input": "x"}],
    }
    schema = {"name": "string", "x": "float64"}
    definitions = parse_document(
        {
            "format": 1,
            "entities": {"name": {"keys": {"name": "string"}}},
            "sources": {"s": {"timestamp": "at", "schema": schema}},
            "views": {"v": view},
        }
    )
    kernels = load_feature_kernels(boundscheck=True)
    view_spec, source = definitions.views["v"], definitions.sources["s"]
    return WindowPlan.build(view_spec, source, kernels, min_recent=min_recent)


def int64(values: list[int]) -> np.ndarray[Any, np.dtype[np.int64]]:
    return np.array(values, np.int64)


def stamps(events: list[Event]) -> Stamps:
    names = ("event_us", "known_us", "sequence")
    return Stamps(*(int64([getattr(event, name) for event in events]) for name in names))


def inputs(plan: WindowPlan, events: list[Event]) -> Any:
    columns = {
        "name": column_of(DType.STRING, ["a"] * len(events)),
        "x": column_of(DType.FLOAT64, [e.x for e in events]),
    }
    return plan.inputs(columns)


def bits(columns: Any) -> list[list[str]]:
    rows = zip(*(column.to_list() for column in columns.values()), strict=True)
    return [[value.hex() for value in row] for row in rows]


@pytest.mark.parametrize("min_recent", [1, MIN_RECENT])
@pytest.mark.parametrize("seed", SEEDS)
def test_online_reads_merge_in_the_documented_order(seed: int, min_recent: int) -> None:
    plan = build_plan(min_recent)
    events, times = tell(seed)
    features = tuple(plan.layout.outputs)
    stored: bytes | None = None
    older: bytes | None = None
    served, done = [], 0
    for t_us in times:
        news = [e for e in events[done:] if e.known_us < t_us]
        done += len(news)
        update = plan.update(
            [stored],
            lambda _, value=older: [value],
            int64([0] * len(news)),
            stamps(news),
            inputs(plan, news),
            news[-1].known_us,
        )
        stored = update.recent[0] or stored
        older = update.older.get(0, older)
        served += bits(plan.read([stored], [older], t_us, features))
    assert served == reference(events, times)


@pytest.mark.parametrize("mode", ["as_known", "as_of_sequence"])
@pytest.mark.parametrize("seed", SEEDS)
def test_joins_merge_in_the_documented_order(plan: WindowPlan, seed: int, mode: Any) -> None:
    events, times = tell(seed)
    order = list(range(len(times)))
    random.Random(seed).shuffle(order)  # a spine comes in any order
    asked = [times[i] for i in order]
    columns = plan.join(
        int64([0] * len(events)),
        *stamps(events),
        inputs(plan, events),
        int64([0] * len(asked)),
        int64(asked),
        tuple(plan.layout.outputs),
        mode=mode,
        spine_sequence=int64([sum(e.known_us < t for e in events) for t in asked]),
    )
    assert bits(columns) == reference(events, asked)


# --- that the bits do depend on the order ---------------------------------------------------------

Order = Callable[[list[int], int, int], list[list[int]]]
"""Lists of tiles to fold and then merge, of (live tiles, oldest index, tiles per window)."""


def cut(live: list[int], pivot: int) -> tuple[list[int], list[int]]:
    return [i for i in live if i < pivot], [i for i in live if i >= pivot]


def documented(live: list[int], oldest: int, n: int) -> list[list[int]]:
    before, after = cut(live, (oldest // n + 1) * n)
    return [before[::-1], after]


def at_pivot(move: Callable[[int, int], int]) -> Order:
    def order(live: list[int], oldest: int, n: int) -> list[list[int]]:
        before, after = cut(live, move(oldest, n))
        return [before[::-1], after]

    return order


def one_way_before(live: list[int], oldest: int, n: int) -> list[list[int]]:
    return list(cut(live, (oldest // n + 1) * n))


def backwards_after(live: list[int], oldest: int, n: int) -> list[list[int]]:
    before, after = cut(live, (oldest // n + 1) * n)
    return [before[::-1], after[::-1]]


def chained(live: list[int], oldest: int, n: int) -> list[list[int]]:
    before, after = cut(live, (oldest // n + 1) * n)
    return [[*before[::-1], *after]]


OTHERS: dict[str, Order] = {
    "oldest to newest": lambda live, _, __: [live],
    "newest to oldest": lambda live, _, __: [live[::-1]],
    "the older part from its oldest": one_way_before,
    "the newer part from its newest": backwards_after,
    "the newer part onto the older": chained,
    "pivot a window earlier": at_pivot(lambda oldest, n: oldest // n * n),
    "pivot a window later": at_pivot(lambda oldest, n: (oldest // n + 2) * n),
    "pivot a tile earlier": at_pivot(lambda oldest, n: (oldest // n + 1) * n - 1),
    "pivot a tile later": at_pivot(lambda oldest, n: (oldest // n + 1) * n + 1),
    "pivot rounded up": at_pivot(lambda oldest, n: -(-oldest // n) * n),
    "pivot in the middle": at_pivot(lambda oldest, n: oldest + (n + 1) // 2),
}


def sums_in(order: Order) -> list[str]:
    found = []
    for seed in SEEDS:
        events, times = tell(seed)
        for t_us in times:
            tiles = tiles_at(events, t_us)
            for window_us in WINDOWS_US:
                oldest = (t_us - window_us) // HOP_US
                live = sorted(index for index in tiles if index >= oldest)
                result = EMPTY
                for part in order(live, oldest, window_us // HOP_US):
                    result = add(result, fold(tiles, part))
                found.append(result[0].hex())
    return found


@pytest.mark.parametrize("other", OTHERS)
def test_another_order_would_give_other_bits(other: str) -> None:
    expected = [bits for seed in SEEDS for row in reference(*tell(seed)) for bits in row]
    assert sums_in(documented) == expected
    found = sums_in(OTHERS[other])
    assert sum(a != b for a, b in zip(found, expected, strict=True)) > 5
