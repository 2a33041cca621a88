"""last_n and topk: lists of values, against plain references, online and in joins."""

import math
import random
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlpd.features.kernels import FeatureKernels, load_feature_kernels
from mlpd.features.topk_kernel import CAPACITY, TOPK_SCRATCH, TOPK_WIDTH, merge_topk, write_topk
from mlpd.features.windows import WindowPlan
from tests.features.reference import check_list
from tests.features.test_windows import (
    Event,
    Online,
    Story,
    bits_of,
    build_view,
    event,
    in_window,
    is_visible,
    join,
    stories,
)

pytestmark = pytest.mark.timeout(300)  # the first test may wait for the kernels' compiler

LENGTHS = (1, 3, 16)
AGGREGATES = [
    {"name": f"{function}_{column}_{length}", "function": function, "input": column, field: length}
    for function, field in (("last_n", "n"), ("topk", "k"))
    for column in ("x", "k", "late")
    for length in LENGTHS
] + [
    {"name": "kept", "function": "last_n", "input": "k", "n": 2, "filter": "x > 0"},
    {"name": "often", "function": "topk", "input": "k", "k": 2, "filter": "x > 0"},
    {"name": "last", "function": "last", "input": "k"},
    {"name": "e", "function": "ewma", "input": "k", "half_life": "3us"},  # the stream of last_n 3
]


@pytest.fixture(scope="module")
def kernels() -> FeatureKernels:
    return load_feature_kernels(boundscheck=True)


def build_plan(kernels: FeatureKernels, **more: Any) -> WindowPlan:
    return WindowPlan.build(*build_view(aggregates=AGGREGATES), kernels, **more)


def check(plan: WindowPlan, events: list[Event], spine: Any, mode: str, got: Any) -> None:
    view = plan.layout.view
    lists = [a for a in view.aggregates if a.function in ("last_n", "topk")]
    for (entity, t_us, sequence), row in zip(spine, got, strict=True):
        seen = [e for e in events if e.entity == entity and is_visible(e, mode, t_us, sequence)]
        seen.sort(key=lambda e: e.stamp)
        results = iter(row)
        for aggregate in lists:
            for window in range(len(view.windows_us)):
                inside = [e.row for e in seen if in_window(view, window, e.event_us, t_us)]
                if aggregate.filter is not None:
                    inside = [r for r in inside if r["x"] is not None and r["x"] > 0]
                values = [r.get(aggregate.input or "") for r in inside]
                valid = [v for v in values if v is not None and not math.isnan(v)]
                numbers = [int(v) if isinstance(v, bool) else v for v in valid]
                length = aggregate.parameter or 0
                check_list(aggregate.function, length, numbers, next(results))


@pytest.mark.parametrize("min_recent", [1, 8])
@settings(max_examples=40, deadline=None)
@given(story=stories())
def test_lists_equal_the_reference_online_and_in_joins(
    kernels: FeatureKernels, min_recent: int, story: Story
) -> None:
    plan = build_plan(kernels, min_recent=min_recent)
    online, served, spine = Online(plan), [], []
    features = tuple(plan.layout.outputs)
    for batch, t_us in story.batches:
        online.update(batch)
        served += online.read([0, 1, 2, 3], t_us, features)
        spine += [(entity, t_us, batch[-1].sequence) for entity in range(4)]
    for mode in ("as_known", "as_of_sequence"):
        assert bits_of(join(plan, story.events, spine, mode)) == bits_of(served)
    check(plan, story.events, spine, "as_known", served)
    corrected = join(plan, story.events, spine, "as_corrected")
    check(plan, story.events, spine, "as_corrected", corrected)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32), kinds=st.sampled_from([8, 40, 400]), cut=st.integers(1, 7))
def test_counts_beyond_the_capacity_are_the_same_online_and_in_joins(
    kernels: FeatureKernels, seed: int, kinds: int, cut: int
) -> None:
    chance, now, events = random.Random(seed), 10_000, []
    for sequence in range(1, 400):
        now += chance.choice((0, 0, 0, 1))
        late = chance.choice((0, 0, 0, 5, 30))
        k = chance.choice((0, 1, 1, chance.randrange(kinds), chance.randrange(kinds)))
        events.append(Event(0, now - late, now, sequence, {"k": k, "x": k / 2}))
    whole, split = build_plan(kernels), build_plan(kernels, min_recent=1)
    online, served, spine = Online(split), [], []
    features = tuple(whole.layout.outputs)
    for start in range(0, len(events), 57 * cut):
        batch = events[start : start + 57 * cut]
        for part in (batch[:cut], batch[cut:]):
            if part:
                online.update(part)
        later = [e for e in events[start + 57 * cut :] if e.known_us == batch[-1].known_us]
        if not later:
            t_us = batch[-1].known_us + 1
            if events[-1] is batch[-1] or events[batch[-1].sequence].known_us >= t_us:
                served += online.read([0], t_us, features)
                spine.append((0, t_us, batch[-1].sequence))
    assert bits_of(join(whole, events, spine, "as_of_sequence")) == bits_of(served)
    check(whole, events, spine, "as_of_sequence", served)


def test_the_latest_come_last_by_stamp_not_by_arrival(kernels: FeatureKernels) -> None:
    plan = build_plan(kernels)
    online = Online(plan)
    online.update([Event(0, 100, 108, 1, {"k": 1}), Event(0, 103, 108, 2, {"k": 2})])
    online.update([Event(0, 101, 109, 3, {"k": 3}), Event(0, 103, 109, 4, {"k": 4})])
    features = ("last_n_k_16_10us", "last_n_k_3_10us", "last_n_k_1_10us", "kept_10us")
    assert online.read([0, 1], 110, features) == [
        [[1, 3, 2, 4], [3, 2, 4], [4], None],
        [None, None, None, None],
    ]


def test_equally_frequent_values_come_in_their_order(kernels: FeatureKernels) -> None:
    plan = build_plan(kernels)
    online = Online(plan)
    values = [2.0, -0.0, 7.5, -3.0, 0.0, math.inf, -3.0, math.nan, -math.inf]
    rows = [{"x": x, "k": 2**53 + (i & 1)} for i, x in enumerate(values)]
    online.update([event(i + 1, 100, **row) for i, row in enumerate(rows)])
    (row,) = online.read([0], 101, ("topk_x_16_10us", "topk_x_1_10us", "topk_k_3_10us"))
    assert repr(row[0]) == "[-3.0, 0.0, -inf, 2.0, 7.5, inf]"
    assert row[1:] == [[-3.0], [2**53, 2**53 + 1]]


# --- counts beyond the capacity -------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(
    seed=st.integers(0, 2**32), kinds=st.sampled_from([20, 33, 60, 1000]), parts=st.integers(1, 6)
)
def test_no_count_is_off_by_more_than_its_share(seed: int, kinds: int, parts: int) -> None:
    chance = random.Random(seed)
    values = [
        int(min(abs(chance.gauss(0, kinds / 3)), kinds)) - kinds // 2
        for _ in range(chance.randint(1, 400))
    ]
    owner = [chance.randrange(parts) for _ in values]
    whole = counted([])
    for part in range(parts):
        tile = counted([v for v, o in zip(values, owner, strict=True) if o == part])
        merge_topk(whole, 0, tile, 0, TOPK_WIDTH)
    entries = entries_of(whole)
    exact = Counter(values)
    assert list(entries) == sorted(entries)
    assert whole[1 + 2 * len(entries) : TOPK_WIDTH].tolist() == [0] * 2 * (CAPACITY - len(entries))
    if len(exact) <= CAPACITY:
        assert entries == exact
    assert len(entries) <= CAPACITY
    for value, count in exact.items():
        assert count - len(values) / (CAPACITY + 1) <= entries.get(value, 0) <= count


def counted(values: list[int]) -> Any:
    """Return the counts of `values`, added one by one, with scratch behind them."""
    words = np.zeros(TOPK_WIDTH + TOPK_SCRATCH, np.int64)
    single = np.zeros(TOPK_WIDTH, np.int64)
    for value in values:
        write_topk(single, 0, value)
        merge_topk(words, 0, single, 0, TOPK_WIDTH)
    return words


def entries_of(words: Any) -> dict[int, int]:
    pairs = words[1 : 1 + 2 * words[0]].reshape(-1, 2).tolist()
    return dict(pairs)
