"""approx_distinct: sketches against a plain reference, their error, and that no order shows."""

import math
import random
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlpd.core.columns import Column, DType
from mlpd.core.hashing import hash_values
from mlpd.features.distinct_kernel import DENSE, ROOM, SKETCH_WIDTH, merge_sketch, write_sketch
from mlpd.features.kernels import FeatureKernels, load_feature_kernels
from mlpd.features.stamps import Stamps
from mlpd.features.windows import WindowPlan
from tests.features.test_windows import (
    Event,
    Online,
    bits_of,
    build_view,
    columns_of,
    event,
    in_window,
    is_visible,
    join,
)

pytestmark = pytest.mark.timeout(300)  # the first test may wait for the kernels' compiler


@pytest.fixture(scope="module")
def kernels() -> FeatureKernels:
    return load_feature_kernels(boundscheck=True)


# --- the reference: from all hashes at once, as docs/formats/tiles.md has it ----------------------


def ranks_of(hashes: set[int]) -> dict[int, int]:
    """Return the registers that are in use."""
    ranks: dict[int, int] = {}
    for hashed in hashes:
        upper, lower = divmod(hashed % 2**64, 2**32)
        zeros = len(format(lower, "032b")) - len(format(lower, "032b").lstrip("0"))
        register = upper * 320 // 2**32
        ranks[register] = max(ranks.get(register, 0), min(zeros + 1, 31))
    return ranks


def words_of(hashes: set[int]) -> list[int]:
    """Return the words of the sketch of `hashes`."""
    if len(hashes) <= 32:
        return [len(hashes), *sorted(hashes), *[0] * (32 - len(hashes))]
    words = [0] * 32
    for register, rank in ranks_of(hashes).items():
        words[register // 10] += rank << register % 10 * 6
    return [33, *words]


def check_estimate(hashes: set[int], got: int) -> None:
    """Assert that `got` is the number of hashes, or Ertl's estimate rounded."""
    if len(hashes) <= 32:
        assert got == len(hashes)
        return
    ranks = ranks_of(hashes)
    x = Fraction(320 - len(ranks), 320)
    sigma = float(x) + sum(float(x) ** 2**k * 2 ** (k - 1) for k in range(1, 30))
    total = float(sum(Fraction(1, 2**rank) for rank in ranks.values()))
    estimate = 320**2 / (2 * math.log(2) * (320 * sigma + total))
    assert abs(got - estimate) <= 0.5 + 1e-9 * estimate


# --- sketches -------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    size=st.sampled_from([1, 5, 31, 32, 33, 40, 300]),
    parts=st.integers(1, 9),
    seed=st.integers(0, 2**32),
)
def test_a_sketch_depends_on_the_set_alone(size: int, parts: int, seed: int) -> None:
    chance = random.Random(seed)
    hashes = [chance.randrange(-(2**63), 2**63) for _ in range(size)]
    split = [[h for h in hashes if chance.random() < 0.4] for _ in range(parts)] + [hashes]
    for part in split:
        chance.shuffle(part)
    chance.shuffle(split)
    whole = sketch(())
    for part in split:
        merge_sketch(whole, 0, sketch(part), 0, SKETCH_WIDTH)
    assert whole[:SKETCH_WIDTH].tolist() == words_of(set(hashes))


def sketch(hashes: Any) -> Any:
    """Return a sketch of `hashes`, added one by one, with words of scratch behind it."""
    words, single = np.zeros(SKETCH_WIDTH + ROOM, np.int64), np.zeros(SKETCH_WIDTH, np.int64)
    for hashed in hashes:
        write_sketch(single, 0, hashed)
        merge_sketch(words, 0, single, 0, SKETCH_WIDTH)
    return words


def test_extreme_hashes_have_registers() -> None:
    hashes = {0, -1, -(2**63), 2**63 - 1, 2**32, 1, *range(-40, 0)}
    words = sketch(sorted(hashes))
    assert words[0] == DENSE
    assert words[:SKETCH_WIDTH].tolist() == words_of(hashes)


# --- windows --------------------------------------------------------------------------------------

AGGREGATES = [
    {"name": "d", "function": "approx_distinct", "input": "k"},
    {"name": "few", "function": "approx_distinct", "input": "k", "filter": "x > 0"},
    {"name": "names", "function": "approx_distinct", "input": "name"},
    {"name": "total", "function": "sum", "input": "k"},
]


def tell(seed: int, kinds: int) -> list[tuple[list[Event], int]]:
    """Return batches of many events, some late, each with a time to read at after it."""
    chance, now, sequence, batches = random.Random(seed), 10_000, 0, []
    for _ in range(chance.randint(1, 5)):
        events = []
        for _ in range(chance.randint(1, 150)):
            now += chance.choice((0, 0, 0, 1))
            sequence += 1
            k = chance.choice((None, *[chance.randrange(-kinds, kinds)] * 9))
            row = {"k": k, "name": f"n{k}", "x": chance.choice((None, -1.0, 1.0, 1.0))}
            late = chance.choice((0, 0, 0, 5, 30))
            events.append(Event(chance.randrange(2), now - late, now, sequence, row))
        batches.append((events, now + 1))
        now += 2
    return batches


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    kinds=st.sampled_from([10, 40, 10**6]),
    min_recent=st.sampled_from([1, 8]),
)
def test_windows_count_as_the_reference_online_and_in_joins(
    kernels: FeatureKernels, seed: int, kinds: int, min_recent: int
) -> None:
    view, source = build_view(aggregates=AGGREGATES)
    plan = WindowPlan.build(view, source, kernels, min_recent=min_recent)
    batches = tell(seed, kinds)
    events = [e for batch, _ in batches for e in batch]
    online, served, spine = Online(plan), [], []
    for batch, t_us in batches:
        online.update(batch)
        served += online.read([0, 1], t_us, tuple(plan.layout.outputs))
        spine += [(entity, t_us, batch[-1].sequence) for entity in (0, 1)]
    for mode in ("as_known", "as_of_sequence"):
        assert bits_of(join(plan, events, spine, mode)) == bits_of(served)
    check_windows(plan, events, spine, "as_known", served)
    corrected = join(plan, events, spine, "as_corrected")
    check_windows(plan, events, spine, "as_corrected", corrected)


def check_windows(plan: WindowPlan, events: list[Event], spine: Any, mode: str, got: Any) -> None:
    columns = columns_of([e.row for e in events])
    numbers, names = (hash_values(columns[name].values).tolist() for name in ("k", "name"))
    view = plan.layout.view
    for (entity, t_us, sequence), row in zip(spine, got, strict=True):
        for window in range(3):
            seen = [
                (e, number, name)
                for e, number, name in zip(events, numbers, names, strict=True)
                if e.entity == entity and is_visible(e, mode, t_us, sequence)
                if in_window(view, window, e.event_us, t_us)
            ]
            counted = [(e, number) for e, number, _ in seen if e.row["k"] is not None]
            check_estimate({number for _, number in counted}, row[window])
            few = {number for e, number in counted if e.row["x"] == 1.0}
            check_estimate(few, row[3 + window])
            check_estimate({name for _, _, name in seen}, row[6 + window])


def test_nulls_are_skipped_and_equal_values_are_one(kernels: FeatureKernels) -> None:
    view, source = build_view(
        aggregates=[
            {"name": column, "function": "approx_distinct", "input": column}
            for column in ("name", "x", "f", "k", "late")
        ]
    )
    plan = WindowPlan.build(view, source, kernels)
    online = Online(plan)
    rows = [
        {"name": "a", "x": 0.0, "f": 0.5, "k": 0, "late": True},
        {"name": "b", "x": -0.0, "f": 0.5, "k": 2**53, "late": True},
        {"name": "", "x": math.nan, "f": math.nan, "k": 2**53 + 1, "late": None},
        {"name": "b", "x": math.inf, "f": -0.5, "k": None, "late": False},
        {},
    ]
    online.update([event(i + 1, 100, **row) for i, row in enumerate(rows)])
    features = tuple(f"{name}_10us" for name in ("name", "x", "f", "k", "late"))
    assert online.read([0, 7], 101, features) == [[3, 2, 2, 3, 2], [0, 0, 0, 0, 0]]


ERROR = 1.04 / math.sqrt(320)
"""Standard error of HyperLogLog with 320 registers: 5.8 %."""
SKETCHES = 100


@pytest.mark.parametrize("column", ["k", "name"])
@pytest.mark.parametrize("distinct", [50, 200, 1000, 5000])
def test_the_error_is_as_documented(kernels: FeatureKernels, distinct: int, column: str) -> None:
    aggregates = [{"name": "d", "function": "approx_distinct", "input": column}]
    plan = WindowPlan.build(*build_view(windows=["1d"], hop="1h", aggregates=aggregates), kernels)
    n = distinct * SKETCHES
    numbers, zeros = np.arange(n), np.zeros(n, np.int64)
    values = {
        "k": Column(DType.INT64, numbers),
        "name": Column(DType.STRING, np.array([f"user-{i}" for i in numbers], object)),
    }
    updated = plan.update(
        [None] * SKETCHES,
        lambda _: pytest.fail("one tile each"),
        numbers % SKETCHES,
        Stamps(zeros, zeros, numbers + 1),
        plan.inputs(values),
        0,
    )
    found = plan.read(updated.recent, [None] * SKETCHES, 1, ["d_1d"])["d_1d"]
    off = found.values / distinct - 1
    assert math.sqrt(float((off**2).mean())) < 1.2 * ERROR
    assert abs(float(off.mean())) < 3 * ERROR / math.sqrt(SKETCHES)
    assert float(abs(off).max()) < 4 * ERROR
