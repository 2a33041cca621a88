"""The stored form of window values, byte by byte as docs/formats/tiles.md has it."""

import json
import struct
import zlib
from typing import Any

import numpy as np
import pytest

from mlpd.core.columns import Column, DType
from mlpd.core.document import parse_document
from mlpd.core.errors import DefinitionError, InternalError
from mlpd.core.hashing import hash_values
from mlpd.core.specs import SourceSpec, ViewSpec
from mlpd.core.time import DAY_US, HOUR_US, MINUTE_US
from mlpd.features.ewma_kernel import weight_of
from mlpd.features.kernels import FeatureKernels, load_feature_kernels
from mlpd.features.stamps import Stamps
from mlpd.features.tiles import build_layout, decode_tiles
from mlpd.features.windows import WindowPlan

pytestmark = pytest.mark.timeout(300)  # the first test may wait for the kernels' compiler

INT64_MIN, INT64_MAX = -(2**63), 2**63 - 1
T0 = 1_000 * HOUR_US


@pytest.fixture(scope="session")
def kernels() -> FeatureKernels:
    return load_feature_kernels(boundscheck=True)


def definitions(windows: list[str], aggregates: list[dict[str, Any]], **more: Any) -> Any:
    return parse_document(
        {
            "format": 1,
            "entities": {"name": {"keys": {"name": "string"}}},
            "sources": {
                "s": {
                    "timestamp": "at",
                    "schema": {"name": "string", "x": "float64", "k": "int64"},
                }
            },
            "views": {
                "v": {
                    "kind": "window",
                    "entity": "name",
                    "source": "s",
                    "windows": windows,
                    "aggregates": aggregates,
                    **more,
                }
            },
        }
    )


def build(windows: list[str], aggregates: list[dict[str, Any]]) -> tuple[ViewSpec, SourceSpec]:
    found = definitions(windows, aggregates)
    return found.views["v"], found.sources["s"]


EVERY_PIECE = [
    {"name": "x_std", "function": "std", "input": "x"},
    {"name": "n", "function": "count"},
    {"name": "x_max", "function": "max", "input": "x"},
    {"name": "x_min", "function": "min", "input": "x"},
    {"name": "k_sum", "function": "sum", "input": "k", "filter": "x > 0"},
    {"name": "k_last", "function": "last", "input": "k"},
    {"name": "k_first", "function": "first", "input": "k"},
]


def update(plan: WindowPlan, value: bytes | None, rows: list[tuple[int, Any, Any]]) -> Any:
    """Apply (event time, x, k) rows, known an hour after T0, with sequences from 1."""
    events = np.array([row[0] for row in rows], np.int64)
    x = [row[1] for row in rows]
    columns = {
        "x": Column(
            DType.FLOAT64,
            np.array([0.0 if v is None else v for v in x]),
            np.array([v is not None for v in x]),
        ),
        "k": Column(DType.INT64, np.array([row[2] for row in rows], np.int64)),
    }
    return plan.update(
        [value],
        lambda wanted: [None for _ in wanted],
        np.zeros(len(rows), np.int64),
        Stamps(events, np.full(len(rows), T0 + HOUR_US), np.arange(1, len(rows) + 1)),
        plan.inputs(columns),
        T0 + HOUR_US,
    )


def test_a_value_has_the_documented_words(kernels: FeatureKernels) -> None:
    view, source = build(["1h", "1d"], EVERY_PIECE)
    plan = WindowPlan.build(view, source, kernels)
    (value,) = update(
        plan, None, [(T0, -3.0, 2**40 + 5), (T0 + 7, None, -1), (T0 + 9, 1.0, 6)]
    ).recent
    known = T0 + HOUR_US

    def tile(index: int) -> bytes:
        negative = struct.unpack("<q", struct.pack("<d", -3.0))[0] ^ INT64_MAX
        one = struct.unpack("<q", struct.pack("<d", 1.0))[0]
        return b"".join(
            [
                struct.pack("<q", index),
                # x: count, sum -2, squares 8, min -3, max 1
                struct.pack("<qddddqq", 2, -2.0, 0.0, 8.0, 0.0, negative, one),
                struct.pack("<q", 3),  # events
                struct.pack("<qqq", 1, 0, 6),  # k where x > 0: count, sum
                # k: count, first, last
                struct.pack("<qqqqq", 3, 2**40 + 5, T0, known, 1),
                struct.pack("<qqqq", 6, T0 + 9, known, 3),
            ]
        )

    # Numbers of tile_kernel: kinds REAL 2, EVENTS 0, INTEGER 1; pieces count 2, sum 3, squares 4,
    # min 5, max 6, first 7, last 8.
    streams = [
        ["x", None, 2, [[2, 1], [3, 2], [4, 4], [5, 6], [6, 7]]],
        [None, None, 0, [[2, 8]]],
        ["k", "x > 0", 1, [[2, 9], [3, 10]]],
        ["k", None, 1, [[2, 12], [7, 13], [8, 17]]],
    ]
    shape = [streams, [5 * MINUTE_US, HOUR_US], [HOUR_US, DAY_US]]
    checksum = zlib.crc32(json.dumps(shape, separators=(",", ":")).encode()) >> 1
    before = -(2**62)  # no tile is among the older ones
    head = struct.pack("<IIqqqqq", 2, checksum, T0 + 9, 1, before, 1, before)
    assert value == head + tile(T0 // (5 * MINUTE_US)) + tile(T0 // HOUR_US)


def test_weighted_sums_have_the_documented_words(kernels: FeatureKernels) -> None:
    ewma = {"name": "e", "function": "ewma", "input": "x", "half_life": "2h"}
    other = {"name": "k", "function": "ewma", "input": "k", "half_life": "1h"}
    view, source = build(["1h"], [ewma, other, {"name": "n", "function": "count", "input": "x"}])
    plan = WindowPlan.build(view, source, kernels)
    (value,) = update(plan, None, [(T0, 3.0, 2), (T0 + 60_000_000, None, 7)]).recent
    assert value is not None
    at, half = struct.unpack_from("<I", value, 4)[0], weight_of(0.0)
    streams = [
        ["x", None, 2, [[2, 1], [9, 2]], 2 * HOUR_US],
        ["k", None, 1, [[2, 7], [9, 8]], HOUR_US],
        ["x", None, 2, [[2, 13]]],
    ]
    shape = [streams, [5 * MINUTE_US], [HOUR_US]]
    assert at == zlib.crc32(json.dumps(shape, separators=(",", ":")).encode()) >> 1
    assert half == 0.5
    # x at an even hour: its count, exponent, 3 halves and a half.
    assert value[32:88] == struct.pack("<qqqdddd", T0 // (5 * MINUTE_US), 1, 500, 1.5, 0, 0.5, 0)
    count, exponent, total, _, weight, _ = struct.unpack_from("<qqdddd", value, 88)
    later = weight_of(1 / 60)
    assert (count, exponent, weight, total) == (2, 1000, half + later, 2 * half + 7 * later)


def test_a_sketch_has_the_documented_words(kernels: FeatureKernels) -> None:
    distinct = {"name": "d", "function": "approx_distinct", "input": "k"}
    plan = WindowPlan.build(*build(["1h"], [distinct]), kernels)
    (value,) = update(plan, None, [(T0, None, k) for k in (5, 7, 5)]).recent
    assert value is not None
    hashes = sorted(hash_values(np.array([5, 7])).tolist())
    assert struct.unpack("<35q", value[32:])[1:] == (3, 2, *hashes, *[0] * 30)
    (value,) = update(plan, value, [(T0, None, k) for k in range(33)]).recent
    assert value is not None
    shape = [[["k", None, 3, [[2, 1], [10, 2]]]], [5 * MINUTE_US], [HOUR_US]]
    checksum = zlib.crc32(json.dumps(shape, separators=(",", ":")).encode()) >> 1
    assert struct.unpack_from("<II", value) == (2, checksum)
    registers = [0] * 320
    for hashed in hash_values(np.arange(33)).view(np.uint64).tolist():
        upper, lower = divmod(hashed, 2**32)
        index = upper * 320 >> 32
        registers[index] = max(registers[index], 33 - lower.bit_length())
    words = [sum(registers[i * 10 + j] << 6 * j for j in range(10)) for i in range(32)]
    assert struct.unpack("<35q", value[32:])[1:] == (36, 33, *words)


def test_lists_have_the_documented_words(kernels: FeatureKernels) -> None:
    latest = {"name": "l", "function": "last_n", "input": "k", "n": 2}
    counts = {"name": "t", "function": "topk", "input": "x", "k": 2}
    plan = WindowPlan.build(*build(["1h"], [latest, counts]), kernels)
    rows = [(T0 + 9, -0.0, 5), (T0, -3.0, 7), (T0 + 7, 0.0, 6)]
    (value,) = update(plan, None, rows).recent
    assert value is not None
    shape = [
        [["k", None, 1, [[2, 1], [11, 2]], 2], ["x", None, 2, [[2, 11], [12, 12]], 2]],
        [5 * MINUTE_US],
        [HOUR_US],
    ]
    checksum = zlib.crc32(json.dumps(shape, separators=(",", ":")).encode()) >> 1
    assert struct.unpack_from("<II", value) == (2, checksum)
    known = T0 + HOUR_US
    lowest = struct.unpack("<q", struct.pack("<d", -3.0))[0] ^ INT64_MAX
    assert struct.unpack("<77q", value[32:])[1:] == (
        *(3, 2, 6, T0 + 7, known, 3, 5, T0 + 9, known, 1),
        *(3, 2, lowest, 1, 0, 2, *[0] * 60),
    )


def test_a_stream_without_values_holds_neutral_words(kernels: FeatureKernels) -> None:
    view, source = build(["1h"], EVERY_PIECE)
    plan = WindowPlan.build(view, source, kernels)
    (value,) = update(plan, None, [(T0, float("nan"), 5)]).recent
    (tiles,) = decode_tiles(plan.layout, value).by_hop.values()
    assert tiles[0, 1:8].tolist() == [0, 0, 0, 0, 0, INT64_MAX, INT64_MIN]
    assert tiles[0, 9:12].tolist() == [0, 0, 0]
    ewma = {"name": "e", "function": "ewma", "input": "x", "half_life": "2h"}
    distinct = {"name": "d", "function": "approx_distinct", "input": "x"}
    plan = WindowPlan.build(*build(["1h"], [ewma, distinct]), kernels)
    (value,) = update(plan, None, [(T0, float("nan"), 5)]).recent
    (tiles,) = decode_tiles(plan.layout, value).by_hop.values()
    assert tiles[0, 1:].tolist() == [0, -(2**62), 0, 0, 0, 0, 0, *[0] * 33]


def test_tiles_are_sorted_and_only_there_with_events(kernels: FeatureKernels) -> None:
    view, source = build(["1h", "1d"], EVERY_PIECE)
    plan = WindowPlan.build(view, source, kernels)
    minutes = [50, 10, 30, 11, 50, 0]
    (value,) = update(plan, None, [(T0 + m * MINUTE_US, 1.0, 1) for m in minutes]).recent
    decoded = decode_tiles(plan.layout, value)
    assert decoded.newest_event_us == T0 + 50 * MINUTE_US
    fine, coarse = decoded.by_hop.values()
    first = T0 // (5 * MINUTE_US)
    assert fine[:, 0].tolist() == [first, first + 2, first + 6, first + 10]
    assert fine[:, 8].tolist() == [1, 2, 1, 2]
    assert coarse[:, [0, 8]].tolist() == [[T0 // HOUR_US, 6]]


def test_an_update_drops_what_no_later_read_needs(kernels: FeatureKernels) -> None:
    view, source = build(["1h", "1d"], EVERY_PIECE)
    plan = WindowPlan.build(view, source, kernels)
    old = [T0 + HOUR_US - DAY_US, T0 - 1, T0, T0 + HOUR_US]
    updated = update(plan, None, [(t, 1.0, 1) for t in old])
    assert updated.late_rows == 0
    fine, coarse = decode_tiles(plan.layout, updated.recent[0]).by_hop.values()
    assert fine[:, 0].tolist() == [T0 // (5 * MINUTE_US), (T0 + HOUR_US) // (5 * MINUTE_US)]
    assert coarse[:, 0].tolist() == [t // HOUR_US for t in old]


def test_rows_beyond_all_retentions_change_nothing_and_are_counted(
    kernels: FeatureKernels,
) -> None:
    view, source = build(["1h", "1d"], EVERY_PIECE)
    plan = WindowPlan.build(view, source, kernels)
    beyond = T0 + HOUR_US - DAY_US - 1
    updated = update(plan, None, [(beyond, 1.0, 1), (0, 2.0, 2)])
    assert (updated.recent, updated.older) == ([None], {})
    assert updated.late_rows == 2


def test_a_value_never_outgrows_its_windows(kernels: FeatureKernels) -> None:
    view, source = build(["1h"], [{"name": "n", "function": "count"}])
    plan = WindowPlan.build(view, source, kernels)
    value = None
    columns = {"x": Column(DType.FLOAT64, np.zeros(1))}
    for minute in range(0, 6 * 60, 2):
        now = np.array([T0 + minute * MINUTE_US])
        update = plan.update(
            [value],
            lambda _: pytest.fail("thirteen tiles are all recent"),
            np.zeros(1, np.int64),
            Stamps(now, now, now),
            plan.inputs(columns),
            int(now[0]),
        )
        (value,) = update.recent
        assert value is not None
        assert len(value) <= 8 * (4 + 13 * 2)


class Values:
    """Both values of one entity of a view of a day by the hour, as LMDB would keep them."""

    def __init__(self, kernels: FeatureKernels) -> None:
        view, source = build(["1d"], [{"name": "n", "function": "count"}])
        self.plan = WindowPlan.build(view, source, kernels)
        self.recent: bytes | None = None
        self.older: bytes | None = None
        self.asked = 0

    def add(self, hours: int, known_hours: int | None = None) -> None:
        """Apply an event of the hour T0 + `hours`, known in that hour or later."""

        def get_older(entities: Any) -> list[bytes | None]:
            self.asked += 1
            assert entities == [0]
            return [self.older]

        known_us = T0 + (hours if known_hours is None else known_hours) * HOUR_US + 1
        update = self.plan.update(
            [self.recent],
            get_older,
            np.zeros(1, np.int64),
            Stamps(np.array([T0 + hours * HOUR_US]), np.array([known_us]), np.array([1])),
            self.plan.inputs({"x": Column(DType.FLOAT64, np.zeros(1))}),
            known_us,
        )
        self.recent = update.recent[0] or self.recent
        self.older = update.older.get(0, self.older)

    def hours(self, value: bytes | None) -> list[int]:
        if value is None:
            return []
        (tiles,) = decode_tiles(self.plan.layout, value).by_hop.values()
        return [int(index) - T0 // HOUR_US for index in tiles[:, 0]]

    def since(self) -> int:
        assert self.recent is not None
        return int(struct.unpack_from("<q", self.recent, 24)[0]) - T0 // HOUR_US

    def count(self, hours: int) -> Any:
        columns = self.plan.read([self.recent], [self.older], T0 + hours * HOUR_US, ["n_1d"])
        return columns["n_1d"].to_list()[0]


def test_tiles_beyond_eight_become_older_ones_but_for_four(kernels: FeatureKernels) -> None:
    values = Values(kernels)
    for hours in range(8):
        values.add(hours)
    assert (values.asked, values.older) == (0, None)
    values.add(8)
    assert (values.asked, values.hours(values.older)) == (1, list(range(5)))
    assert (values.since(), values.hours(values.recent)) == (5, list(range(5, 9)))
    assert values.count(9) == 9
    for hours in range(9, 25):
        values.add(hours)
    assert (values.asked, values.hours(values.older)) == (4, list(range(20)))
    values.add(25)  # only now is the hour 0 out of reach
    assert (values.asked, values.hours(values.older)) == (4, list(range(20)))
    for hours in range(26, 29):
        values.add(hours)
    # What no window needs any more is left out as the older ones are written again.
    assert (values.asked, values.hours(values.older)) == (5, list(range(4, 25)))
    assert values.count(29) == 24
    assert values.recent is not None
    everything = decode_tiles(values.plan.layout, values.recent, values.older)
    (tiles,) = everything.by_hop.values()
    assert [int(index) - T0 // HOUR_US for index in tiles[:, 0]] == list(range(4, 29))


def test_a_late_event_finds_its_tile_among_the_older_ones(kernels: FeatureKernels) -> None:
    values = Values(kernels)
    for hours in range(18):
        values.add(hours)
    asked = values.asked
    values.add(3, 17)
    assert values.asked == asked + 1
    assert values.count(18) == 19
    values.add(17, 17)
    assert values.asked == asked + 1


def test_older_tiles_that_nobody_needs_are_deleted(kernels: FeatureKernels) -> None:
    values = Values(kernels)
    for hours in range(9):
        values.add(hours)
    values.add(4, 200)  # too old: changes nothing
    assert values.hours(values.older) == list(range(5))
    for hours in [*range(200, 205), *range(216, 220)]:
        values.add(hours)
    assert values.hours(values.older) == [*range(200, 205)]
    values.add(215, 239)  # belongs among the older ones, which are all out of reach by now
    assert values.hours(values.recent) == [*range(215, 220)]
    assert values.older is None
    assert values.count(239) == 5


def test_a_view_with_too_many_tiles_is_refused() -> None:
    found = definitions(["60d"], [{"name": "n", "function": "count"}], hop="1m")
    with pytest.raises(DefinitionError, match="86401 hops") as caught:
        build_layout(found.views["v"], found.sources["s"])
    assert caught.value.code == "too_many_tiles"


@pytest.mark.parametrize(
    "spoil",
    [
        lambda value: value[:-8],
        lambda value: value + bytes(8),
        lambda value: value[:8],
        lambda value: bytes([1]) + value[1:],
        lambda value: value[:16] + struct.pack("<q", -1) + value[24:],
        lambda value: value[:16] + struct.pack("<q", 2**40) + value[24:],
    ],
)
def test_a_damaged_value_is_refused(kernels: FeatureKernels, spoil: Any) -> None:
    view, source = build(["1h"], EVERY_PIECE)
    plan = WindowPlan.build(view, source, kernels)
    (value,) = update(plan, None, [(T0, 1.0, 5)]).recent
    with pytest.raises(InternalError, match="isn't of this view's layout, or is damaged"):
        plan.read([spoil(value)], [None], T0 + 2 * HOUR_US, ("n_1h",))
    with pytest.raises(InternalError, match="isn't of this view's layout, or is damaged"):
        update(plan, spoil(value), [(T0, 1.0, 5)])


def test_a_value_of_another_layout_is_refused(kernels: FeatureKernels) -> None:
    plan = WindowPlan.build(*build(["1h"], EVERY_PIECE), kernels)
    other = WindowPlan.build(*build(["2h"], EVERY_PIECE), kernels)
    (value,) = update(plan, None, [(T0, 1.0, 5)]).recent
    with pytest.raises(InternalError):
        other.read([value], [None], T0 + 2 * HOUR_US, ("n_2h",))
