"""Window views: online reads, joins and a brute-force reference give the same features."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlpd.core.columns import Columns, DType
from mlpd.core.convert import column_of
from mlpd.core.document import parse_document
from mlpd.core.errors import InternalError, NotFoundError, ValidationError
from mlpd.core.specs import AggregateSpec, SourceSpec, ViewSpec
from mlpd.features import read_kernel, update_kernel, window_kernel
from mlpd.features.kernels import FeatureKernels, load_feature_kernels
from mlpd.features.stamps import Stamps
from mlpd.features.tiles import MIN_RECENT
from mlpd.features.windows import WindowPlan
from tests.features.reference import check_distinct, check_ewma

pytestmark = pytest.mark.timeout(300)  # the first test may wait for the kernels' compiler

# --- brute force: every event looked at for every feature, in exact fractions -------------------

ERROR = Fraction(1, 2**98)
"""Double-double error per value, relative to the largest partial result: generous."""
TINY = Fraction(1, 2**1072)
"""Error per pair of values where a product falls below the smallest float64, 2^-1074."""


@dataclass(frozen=True)
class Event:
    entity: int
    event_us: int
    known_us: int
    sequence: int
    row: dict[str, Any]

    @property
    def stamp(self) -> tuple[int, int, int]:
        return self.event_us, self.known_us, self.sequence


Select = Callable[[dict[str, Any]], Any]
"""What an input or filter expression gives for one row; None is null."""


def in_window(view: ViewSpec, window: int, event_us: int, t_us: int) -> bool:
    start = (t_us - view.windows_us[window]) // view.hops_us[window] * view.hops_us[window]
    if view.closed == "left":
        return start <= event_us < t_us
    return start < event_us <= t_us


def is_visible(event: Event, mode: str, t_us: int, sequence: int | None) -> bool:
    if mode == "as_known":
        return event.known_us <= t_us
    if mode == "as_of_sequence":
        assert sequence is not None
        return event.sequence <= sequence
    return True


def values_of(
    events: Sequence[Event], aggregate: AggregateSpec, selects: dict[str, Select]
) -> list[tuple[tuple[int, int, int], Any]]:
    """Return (stamp, value) of what the aggregate sees, by stamp; True for counted events."""
    found = []
    for event in sorted(events, key=lambda e: e.stamp):
        if aggregate.filter is not None and selects[aggregate.filter](event.row) is not True:
            continue
        value = True if aggregate.input is None else selects[aggregate.input](event.row)
        if value is None or (isinstance(value, float) and math.isnan(value)):
            continue
        found.append((event.stamp, value))
    return found


def check(function: str, values: list[Any], got: Any) -> None:
    """Assert that `got` is the aggregate of `values`, in the order of their stamps."""
    if function == "count":
        assert got == len(values)
        return
    if function == "approx_distinct":
        check_distinct(values, got)
        return
    if not values:
        assert got == (0 if function == "sum" else None)
        return
    if function in ("min", "max", "first", "last"):
        picks = {"min": min, "max": max, "first": lambda v: v[0], "last": lambda v: v[-1]}
        expected = picks[function](values)
        assert got == expected
        assert type(got) is (float if isinstance(expected, float) else int)
        return
    if any(isinstance(v, float) and math.isinf(v) for v in values):
        _check_infinite(function, values, got)
        return
    _check_moment(function, [Fraction(v) for v in values], got, isinstance(values[0], float))


def _check_infinite(function: str, values: list[float], got: Any) -> None:
    total = sum(v for v in values if math.isinf(v))
    if function in ("var", "std"):
        assert got is None if len(values) == 1 else math.isnan(got)
    else:
        assert repr(got) == repr(total)


def _check_moment(function: str, values: list[Fraction], got: Any, is_float: bool) -> None:
    n, total = len(values), sum(values, Fraction(0))
    size = max(abs(v) for v in values)
    if function == "sum":
        if is_float:
            assert_rounds(total, n * n * (size * ERROR + TINY), got)
        else:
            assert got == (int(total) if -(2**63) <= total < 2**63 else None)
        return
    if function == "mean":
        # An integer sum is exact; the quotient's error is relative to the mean itself.
        error = n * (size * ERROR + TINY if is_float else abs(total / n) * ERROR)
        assert_rounds(total / n, error, got)
        return
    if n == 1:
        assert got is None
        return
    variance = sum((v - total / n) ** 2 for v in values) / (n - 1)
    scale = size * size if is_float else variance + abs(total / n)
    error = n * n * (scale * ERROR + TINY)
    if function == "var":
        assert_rounds(variance, error, got)
    else:
        low, high = (math.sqrt(float(max(variance + e, 0))) for e in (-error, error))
        assert low <= got <= high


def assert_rounds(exact: Fraction, error: Fraction, got: float) -> None:
    """Assert that `got` is the float64 nearest to a number within `error` of the exact one."""
    assert float(exact - error) <= got <= float(exact + error), (float(exact), got)


# --- the view under test -------------------------------------------------------------------------

SCHEMA = {"name": "string", "x": "float64", "f": "float32", "k": "int64", "late": "bool"}

SELECTS: dict[str, Select] = {
    "name": lambda row: row["name"],
    "x": lambda row: row["x"],
    "k": lambda row: row["k"],
    "late": lambda row: None if row["late"] is None else int(row["late"]),
    "x > 0": lambda row: None if row["x"] is None else int(row["x"] > 0),
    "k > 0": lambda row: None if row["k"] is None else row["k"] > 0,
}

AGGREGATES: list[dict[str, Any]] = [
    {"name": "count", "function": "count"},
    {"name": "names", "function": "count", "input": "name"},
    {"name": "few", "function": "count", "filter": "k > 0"},
    {"name": "share", "function": "mean", "input": "x > 0"},
    {"name": "late_sum", "function": "sum", "input": "late"},
    {"name": "x_filtered", "function": "mean", "input": "x", "filter": "k > 0"},
    *(
        {"name": f"{column}_{function}", "function": function, "input": column}
        for column in ("x", "k")
        for function in ("count", "sum", "mean", "min", "max", "var", "std", "first", "last")
    ),
    {"name": "x_ewma", "function": "ewma", "input": "x", "half_life": "7us"},
    {"name": "x_slow", "function": "ewma", "input": "x", "half_life": "1d", "filter": "k > 0"},
    {"name": "k_ewma", "function": "ewma", "input": "k", "half_life": "1us"},
    {"name": "late_ewma", "function": "ewma", "input": "late", "half_life": "7us"},
    *(
        {"name": f"{column}_distinct", "function": "approx_distinct", "input": column}
        for column in ("x", "k", "name", "late")
    ),
    {"name": "few_names", "function": "approx_distinct", "input": "name", "filter": "k > 0"},
]


def build_view(**overrides: Any) -> tuple[ViewSpec, SourceSpec]:
    """Return a view with short windows: 10 and 23 us by hops of 4, 50 us by hops of 7."""
    document = {
        "format": 1,
        "entities": {"name": {"keys": {"name": "string"}}},
        "sources": {"s": {"timestamp": "at", "schema": SCHEMA}},
        "views": {
            "v": {
                "kind": "window",
                "entity": "name",
                "source": "s",
                "windows": ["10us", "50us", "23us"],
                "hop": "4us",
                "aggregates": AGGREGATES,
                **overrides,
            }
        },
    }
    definitions = parse_document(document)
    view = definitions.views["v"]
    if "windows" not in overrides:
        view = replace(view, hops_us=(4, 7, 4))
    return view, definitions.sources["s"]


@pytest.fixture(scope="session")
def kernels() -> FeatureKernels:
    return load_feature_kernels(boundscheck=True)


def columns_of(rows: list[dict[str, Any]]) -> Columns:
    return {
        name: column_of(DType(dtype), [row.get(name) for row in rows])
        for name, dtype in SCHEMA.items()
    }


def int64(values: list[int]) -> np.ndarray[Any, np.dtype[np.int64]]:
    return np.array(values, np.int64)


class Online:
    """The online store of one view: a value per entity, in a dict."""

    def __init__(self, plan: WindowPlan) -> None:
        self.plan = plan
        self.values: dict[int, bytes] = {}
        self.older: dict[int, bytes] = {}
        self.late_rows = 0

    def update(self, events: list[Event]) -> None:
        entities = list(dict.fromkeys(e.entity for e in events))
        updated = self.plan.update(
            [self.values.get(entity) for entity in entities],
            lambda wanted: [self.older.get(entities[i]) for i in wanted],
            int64([entities.index(e.entity) for e in events]),
            Stamps(
                int64([e.event_us for e in events]),
                int64([e.known_us for e in events]),
                int64([e.sequence for e in events]),
            ),
            self.plan.inputs(columns_of([e.row for e in events])),
            max(e.known_us for e in events),
        )
        self.late_rows += updated.late_rows
        self.values |= {e: v for e, v in zip(entities, updated.recent, strict=True) if v}
        for index, older in updated.older.items():
            self.older.pop(entities[index], None)
            if older is not None:
                self.older[entities[index]] = older

    def read(self, entities: list[int], t_us: int, features: tuple[str, ...]) -> list[list[Any]]:
        recent, older = ([v.get(e) for e in entities] for v in (self.values, self.older))
        return rows_of(self.plan.read(recent, older, t_us, features))


def rows_of(columns: Columns) -> list[list[Any]]:
    return [list(row) for row in zip(*(c.to_list() for c in columns.values()), strict=True)]


def bits_of(rows: list[list[Any]]) -> list[list[str]]:
    """Return rows that compare equal only if all bits are (but all NaN are one)."""
    return [[v.hex() if isinstance(v, float) else repr(v) for v in row] for row in rows]


def join(
    plan: WindowPlan,
    events: list[Event],
    spine: list[tuple[int, int, int]],
    mode: Any,
    features: tuple[str, ...] | None = None,
) -> list[list[Any]]:
    """Join a spine of (entity, t, sequence)."""
    columns = plan.join(
        int64([e.entity for e in events]),
        int64([e.event_us for e in events]),
        int64([e.known_us for e in events]),
        int64([e.sequence for e in events]),
        plan.inputs(columns_of([e.row for e in events])),
        int64([row[0] for row in spine]),
        int64([row[1] for row in spine]),
        features or tuple(plan.layout.outputs),
        mode=mode,
        spine_sequence=int64([row[2] for row in spine]),
    )
    return rows_of(columns)


def check_rows(
    view: ViewSpec,
    events: list[Event],
    spine: list[tuple[int, int, int]],
    mode: str,
    got: list[list[Any]],
) -> None:
    """Compare joined rows of all features with the reference."""
    assert len(got) == len(spine)
    for (entity, t_us, sequence), row in zip(spine, got, strict=True):
        seen = [
            e for e in events if e.entity == entity >= 0 and is_visible(e, mode, t_us, sequence)
        ]
        results = iter(row)
        for aggregate in view.aggregates:
            for window in range(len(view.windows_us)):
                inside = [e for e in seen if in_window(view, window, e.event_us, t_us)]
                values = values_of(inside, aggregate, SELECTS)
                if aggregate.function == "ewma":
                    aged = [(t_us - stamp[0], value) for stamp, value in values]
                    check_ewma(aged, aggregate.parameter, next(results))
                else:
                    check(aggregate.function, [value for _, value in values], next(results))


# --- strategies ----------------------------------------------------------------------------------

REALS = st.one_of(
    st.none(),
    st.sampled_from([math.nan, 0.0, -0.0, 0.1, 1e16, -1e16, 1.0, 3.0, 1e-300, 1e100]),
    st.floats(-1e6, 1e6),
)
INTEGERS = st.one_of(
    st.none(),
    st.sampled_from([0, 1, -1, 2**53 + 1, -(2**53) - 1, 2**63 - 1, -(2**63), 2**62]),
    st.integers(-1000, 1000),
)
ROWS = st.fixed_dictionaries(
    {
        "name": st.sampled_from([None, "a", "b"]),
        "x": REALS,
        "k": INTEGERS,
        "late": st.sampled_from([None, True, False]),
    }
)


@dataclass(frozen=True)
class Story:
    """Batches of events, each followed by a read of all entities at a time."""

    batches: list[tuple[list[Event], int]]

    @property
    def events(self) -> list[Event]:
        return [event for events, _ in self.batches for event in events]


@st.composite
def stories(draw: st.DrawFn, rows: st.SearchStrategy[dict[str, Any]] = ROWS) -> Story:
    now, sequence = draw(st.sampled_from([0, -1000, 10**15])), 0
    batches = []
    for size in draw(st.lists(st.integers(1, 8), min_size=1, max_size=10)):
        events = []
        for _ in range(size):
            now += draw(st.sampled_from([0, 0, 1, 2, 5, 30]))
            sequence += 1
            lateness = draw(st.sampled_from([0, 0, 1, 3, 8, 20, 60, 200]))
            entity = draw(st.integers(0, 2))
            events.append(Event(entity, now - lateness, now, sequence, draw(rows)))
        read_at = now + draw(st.sampled_from([1, 1, 3, 9, 40]))
        batches.append((events, read_at))
        now = read_at + 1
    return Story(batches)


# --- online and offline --------------------------------------------------------------------------


@pytest.mark.parametrize("min_recent", [1, MIN_RECENT])  # nearly all tiles are older ones, or none
@pytest.mark.parametrize("closed", ["left", "right"])
@settings(max_examples=30, deadline=None)
@given(story=stories())
def test_online_reads_equal_both_joins_and_the_reference(
    kernels: FeatureKernels, closed: str, min_recent: int, story: Story
) -> None:
    view, source = build_view(closed=closed)
    plan = WindowPlan.build(view, source, kernels, min_recent=min_recent)
    online = Online(plan)
    features = tuple(plan.layout.outputs)
    entities = [0, 1, 2, 3]
    served, spine = [], []
    for events, t_us in story.batches:
        online.update(events)
        served += online.read(entities, t_us, features)
        spine += [(entity, t_us, events[-1].sequence) for entity in entities]
    check_rows(view, story.events, spine, "as_of_sequence", served)
    for mode in ("as_of_sequence", "as_known"):
        assert bits_of(join(plan, story.events, spine, mode)) == bits_of(served)


@pytest.mark.parametrize("closed", ["left", "right"])
@pytest.mark.parametrize("mode", ["as_known", "as_corrected", "as_of_sequence"])
@settings(max_examples=30, deadline=None)
@given(story=stories(), data=st.data())
def test_a_join_at_any_time_equals_the_reference(
    kernels: FeatureKernels, closed: str, mode: str, story: Story, data: st.DataObject
) -> None:
    view, source = build_view(closed=closed)
    plan = WindowPlan.build(view, source, kernels)
    events = data.draw(st.permutations(story.events))
    times = sorted({t for e in events for t in (e.event_us, e.known_us, e.event_us + 1)})
    rows = st.tuples(st.integers(-1, 3), st.sampled_from(times), st.integers(0, len(events)))
    spine = data.draw(st.lists(rows, max_size=25))
    check_rows(view, events, spine, mode, join(plan, events, spine, mode))


@settings(max_examples=30, deadline=None)
@given(story=stories(), data=st.data())
def test_batches_and_tiles_may_be_split_anywhere(
    kernels: FeatureKernels, story: Story, data: st.DataObject
) -> None:
    plan = WindowPlan.build(*build_view(), kernels)
    whole = Online(plan)
    min_recent = data.draw(st.integers(1, 5))
    split = Online(WindowPlan.build(*build_view(), kernels, min_recent=min_recent))
    features = tuple(plan.layout.outputs)
    for events, t_us in story.batches:
        whole.update(events)
        cut = data.draw(st.integers(0, len(events)))
        for part in (events[:cut], events[cut:]):
            if part:
                split.update(part)
        reads = [bits_of(o.read([0, 1, 2], t_us, features)) for o in (whole, split)]
        assert reads[0] == reads[1]


@settings(max_examples=30, deadline=None)
@given(story=stories(), data=st.data())
def test_a_subset_of_features_has_the_bits_of_all(
    kernels: FeatureKernels, story: Story, data: st.DataObject
) -> None:
    plan = WindowPlan.build(*build_view(), kernels)
    names = list(plan.layout.outputs)
    chosen = data.draw(st.lists(st.sampled_from(names), min_size=1, max_size=5, unique=True))
    online = Online(plan)
    for events, _ in story.batches:
        online.update(events)
    t_us = story.batches[-1][1]
    everything = online.read([0, 1, 2], t_us, tuple(names))
    expected = [[row[names.index(name)] for name in chosen] for row in everything]
    assert bits_of(online.read([0, 1, 2], t_us, tuple(chosen))) == bits_of(expected)
    spine = [(entity, t_us, 0) for entity in (0, 1, 2)]
    joined = join(plan, story.events, spine, "as_known", tuple(chosen))
    assert bits_of(joined) == bits_of(expected)


# --- single behaviours ---------------------------------------------------------------------------


def event(sequence: int, event_us: int, **row: Any) -> Event:
    """Return an event of entity 0, known at once."""
    return Event(0, event_us, event_us, sequence, row)


def feature(plan: WindowPlan, events: list[Event], t_us: int, name: str) -> Any:
    online = Online(plan)
    online.update(events)
    ((value,),) = online.read([0], t_us, (name,))
    assert bits_of(join(plan, events, [(0, t_us, 0)], "as_known", (name,))) == bits_of([[value]])
    return value


@pytest.fixture(scope="module")
def plan(kernels: FeatureKernels) -> WindowPlan:
    return WindowPlan.build(*build_view(), kernels)


def test_an_event_at_t_is_in_when_closed_on_the_right_only(kernels: FeatureKernels) -> None:
    for closed, expected in (("left", 0), ("right", 1)):
        plan = WindowPlan.build(*build_view(closed=closed), kernels)
        assert join(plan, [event(1, 100)], [(0, 100, 1)], "as_known", ("count_10us",)) == [
            [expected]
        ]


def test_an_event_at_the_start_of_a_window_is_in_when_closed_on_the_left_only(
    kernels: FeatureKernels,
) -> None:
    for closed, expected in (("left", 1), ("right", 0)):
        plan = WindowPlan.build(*build_view(closed=closed), kernels)
        # t - W = 102; its hop begins at 100.
        assert feature(plan, [event(1, 100)], 112, "count_10us") == expected


def test_an_entity_never_seen_reads_as_an_empty_window(plan: WindowPlan) -> None:
    names = tuple(plan.layout.outputs)
    columns = plan.read([None], [None], 100, names)
    for name, column in columns.items():
        zero = any(part in name for part in ("count", "_sum_", "names", "few", "distinct"))
        assert column.to_list() == ([0] if zero else [None]), name


def test_a_null_key_joins_as_an_empty_window(plan: WindowPlan) -> None:
    events = [replace(event(1, 100), entity=-1), event(2, 100)]
    rows = join(plan, events, [(-1, 101, 2), (0, 101, 2)], "as_known", ("count_10us",))
    assert rows == [[0], [1]]


def test_an_integer_sum_is_exact_and_null_when_it_does_not_fit(plan: WindowPlan) -> None:
    big = 2**63 - 1
    assert feature(plan, [event(1, 100, k=big)], 101, "k_sum_10us") == big
    events = [event(1, 100, k=big), event(2, 100, k=1)]
    assert feature(plan, events, 101, "k_sum_10us") is None
    assert feature(plan, [*events, event(3, 100, k=-1)], 101, "k_sum_10us") == big
    assert feature(plan, events, 101, "k_mean_10us") == 2.0**62
    low = [event(1, 100, k=-(2**63)), event(2, 100, k=-1)]
    assert feature(plan, low, 101, "k_sum_10us") is None
    assert feature(plan, low[:1], 101, "k_sum_10us") == -(2**63)


def test_integers_beyond_two_to_the_53_stay_exact(plan: WindowPlan) -> None:
    odd = 2**53 + 1
    for function in ("sum", "min", "max", "first", "last"):
        assert feature(plan, [event(1, 100, k=odd)], 101, f"k_{function}_10us") == odd


def test_small_addends_survive_a_cancelled_large_one(plan: WindowPlan) -> None:
    values = [1e16, 1.0, -1e16, 1.0]
    events = [event(i + 1, 100 + i, x=x) for i, x in enumerate(values)]
    assert feature(plan, events, 110, "x_sum_10us") == 2.0
    assert feature(plan, events, 110, "x_mean_10us") == 0.5


def test_variance_of_close_values_far_from_zero(plan: WindowPlan) -> None:
    events = [event(i + 1, 100 + i, x=1e9 + x) for i, x in enumerate([4.0, 7.0, 13.0, 16.0])]
    assert feature(plan, events, 110, "x_var_10us") == 30.0
    assert feature(plan, events, 110, "x_std_10us") == math.sqrt(30.0)


def test_infinities_follow_ieee(plan: WindowPlan) -> None:
    up, down = event(1, 100, x=math.inf), event(2, 101, x=-math.inf)
    assert feature(plan, [up, event(2, 101, x=1.0)], 110, "x_sum_10us") == math.inf
    assert math.isnan(feature(plan, [up, down], 110, "x_mean_10us"))
    assert feature(plan, [up, down], 110, "x_min_10us") == -math.inf
    assert feature(plan, [event(1, 100, x=1e308), event(2, 101, x=1e308)], 110, "x_sum_10us") == (
        math.inf
    )


def test_zeros_of_both_signs_have_an_order(plan: WindowPlan) -> None:
    for values in ([0.0, -0.0], [-0.0, 0.0]):
        events = [event(i + 1, 100 + i, x=x) for i, x in enumerate(values)]
        assert repr(feature(plan, events, 110, "x_min_10us")) == "-0.0"
        assert repr(feature(plan, events, 110, "x_max_10us")) == "0.0"
        assert repr(feature(plan, events, 110, "x_last_10us")) == repr(values[1])


def test_float32_inputs_read_as_float64(kernels: FeatureKernels) -> None:
    aggregates = [{"name": "f_max", "function": "max", "input": "f"}]
    plan = WindowPlan.build(*build_view(aggregates=aggregates), kernels)
    value = feature(plan, [event(1, 100, f=0.1)], 101, "f_max_10us")
    assert value == float(np.float32(0.1))


def test_first_and_last_order_by_event_time_then_known_time_then_sequence(
    plan: WindowPlan,
) -> None:
    events = [
        Event(0, 101, 105, 1, {"k": 1}),
        Event(0, 100, 105, 2, {"k": 2}),
        Event(0, 100, 106, 3, {"k": 3}),
        Event(0, 101, 106, 4, {"k": 4}),
        Event(0, 101, 106, 5, {"k": 5}),
    ]
    assert feature(plan, events, 110, "k_first_10us") == 2
    assert feature(plan, events, 110, "k_last_10us") == 5


def test_a_late_event_changes_a_window_that_was_already_joined(plan: WindowPlan) -> None:
    events = [event(1, 100, k=1), event(2, 117, k=2), Event(0, 103, 118, 3, {"k": 4})]
    spine = [(0, t, 0) for t in (101, 118, 119, 120)]
    assert join(plan, events, spine, "as_known", ("k_sum_23us",)) == [[1], [7], [7], [7]]
    assert join(plan, events, spine, "as_corrected", ("k_sum_23us",)) == [[1], [7], [7], [7]]
    early = [(0, 117, 0), (0, 105, 0)]
    assert join(plan, events, early, "as_known", ("k_sum_23us",)) == [[1], [1]]
    assert join(plan, events, early, "as_corrected", ("k_sum_23us",)) == [[5], [5]]


def test_an_event_at_its_known_time_waits_while_later_ones_do_not(plan: WindowPlan) -> None:
    waits, passes = Event(0, 100, 100, 1, {"k": 1}), Event(0, 98, 100, 2, {"k": 2})
    spine = [(0, 100, 0), (0, 101, 0), (0, 100, 0)]
    for events in ([waits, passes], [waits, passes, replace(waits, sequence=3)]):
        rows = join(plan, events, spine, "as_known", ("k_sum_10us",))
        assert rows == [[2], [2 + len(events) - 1], [2]]


def test_a_replay_before_events_of_its_sequence_leaves_them_out(plan: WindowPlan) -> None:
    events = [event(1, 100, k=1), event(2, 110, k=2), event(3, 120, k=4)]
    spine = [(0, 105, 3), (0, 130, 3), (0, 115, 2), (0, 101, 3), (0, 130, 0)]
    rows = join(plan, events, spine, "as_of_sequence", ("k_sum_50us",))
    assert rows == [[1], [7], [3], [1], [0]]


def test_a_sum_does_not_depend_on_the_order_of_arrival(plan: WindowPlan) -> None:
    rng = np.random.default_rng(5)
    times = np.sort(rng.integers(0, 40, 200)).tolist()
    values = (rng.normal(size=200) * 10.0 ** rng.integers(-8, 8, 200)).tolist()
    stamped = list(zip(times, values, strict=True))
    results = set()
    for _ in range(5):
        order = rng.permutation(200).tolist()
        events = [
            Event(0, stamped[i][0], 50, sequence + 1, {"x": stamped[i][1]})
            for sequence, i in enumerate(order)
        ]
        online = Online(plan)
        online.update(events)
        names = ("x_sum_50us", "x_mean_50us", "x_var_50us")
        results.add(str(bits_of(online.read([0], 51, names))))
    assert len(results) == 1
    ((total, mean, _),) = online.read([0], 51, names)
    assert total == math.fsum(values)
    assert mean == float(sum(map(Fraction, values)) / 200)


def test_plain_python_kernels_give_the_same_bits(kernels: FeatureKernels) -> None:
    rng = np.random.default_rng(6)
    events = [
        Event(0, 100 + i - int(rng.integers(0, 9)), 100 + i, i + 1, {"x": x, "k": int(x * 100)})
        for i, x in enumerate(rng.normal(size=30).tolist())
    ]
    spine = [(0, t, 0) for t in range(95, 160, 7)]
    python = SimpleNamespace(**{**vars(update_kernel), **vars(window_kernel), **vars(read_kernel)})
    plans = [
        WindowPlan.build(*build_view(), module, min_recent=1)
        for module in (kernels, cast("FeatureKernels", python))
    ]
    native, plain = (Online(plan) for plan in plans)
    native.update(events)
    plain.update(events)
    assert (native.values, native.older) == (plain.values, plain.older)
    rows = [bits_of(join(plan, events, spine, "as_known")) for plan in plans]
    assert rows[0] == rows[1]


def test_wide_joins_transpose_every_row(plan: WindowPlan) -> None:
    n = 3000
    events = [event(i + 1, 20 * i, k=i) for i in range(n)]
    spine = [(0, 20 * i + 1, 0) for i in range(n)]
    rows = join(plan, events, spine, "as_known", ("k_last_10us", "k_sum_10us"))
    assert rows[0] == [0, 0]
    assert rows[1:] == [[i, i] for i in range(1, n)]


def test_mistakes_are_named(plan: WindowPlan) -> None:
    online = Online(plan)
    online.update([event(1, 100)])
    with pytest.raises(NotFoundError, match="no feature 'nope'"):
        online.read([0], 101, ("nope",))
    with pytest.raises(ValidationError, match="later than the time of the read"):
        online.read([0], 100, ("count_10us",))
    with pytest.raises(InternalError, match="entity code is out of range"):
        plan.update(
            [None],
            lambda _: [],
            int64([1]),
            Stamps(int64([1]), int64([1]), int64([1])),
            plan.inputs(columns_of([{}])),
            10,
        )
    with pytest.raises(InternalError, match="later than the newest known time"):
        plan.update(
            [None],
            lambda _: [],
            int64([0]),
            Stamps(int64([11]), int64([1]), int64([1])),
            plan.inputs(columns_of([{}])),
            10,
        )
    empty = int64([])
    with pytest.raises(ValidationError, match="needs the sequence"):
        plan.join(
            empty,
            empty,
            empty,
            empty,
            plan.inputs(columns_of([])),
            empty,
            empty,
            ("count_10us",),
            mode="as_of_sequence",
        )


def test_nothing_joins_to_nothing(plan: WindowPlan) -> None:
    assert join(plan, [], [], "as_known", ("count_10us",)) == []
    assert join(plan, [], [(0, 5, 0)], "as_known", ("count_10us",)) == [[0]]
    assert join(plan, [event(1, 100)], [], "as_known", ("count_10us",)) == []
