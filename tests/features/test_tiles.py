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
from mlpd.core.kernels import load_kernels
from mlpd.core.specs import SourceSpec, ViewSpec
from mlpd.core.time import DAY_US, HOUR_US, MINUTE_US
from mlpd.features.tiles import build_layout, decode_value
from mlpd.features.windows import KERNELS, WindowKernels, WindowPlan

pytestmark = pytest.mark.timeout(300)  # the first test may wait for the kernels' compiler

INT64_MIN, INT64_MAX = -(2**63), 2**63 - 1
T0 = 1_000 * HOUR_US


@pytest.fixture(scope="session")
def kernels() -> WindowKernels:
    return load_kernels(KERNELS, boundscheck=True)


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
        np.zeros(len(rows), np.int64),
        events,
        np.full(len(rows), T0 + HOUR_US),
        np.arange(1, len(rows) + 1),
        plan.inputs(columns),
        T0 + HOUR_US,
    )


def test_a_value_has_the_documented_words(kernels: WindowKernels) -> None:
    view, source = build(["1h", "1d"], EVERY_PIECE)
    plan = WindowPlan.build(view, source, kernels)
    (value,) = update(plan, None, [(T0, -3.0, 2**40 + 5), (T0 + 7, None, -1), (T0 + 9, 1.0, 6)])
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
    head = struct.pack("<IIqqq", 1, checksum, T0 + 9, 1, 1)
    assert value == head + tile(T0 // (5 * MINUTE_US)) + tile(T0 // HOUR_US)


def test_a_stream_without_values_holds_neutral_words(kernels: WindowKernels) -> None:
    view, source = build(["1h"], EVERY_PIECE)
    plan = WindowPlan.build(view, source, kernels)
    (value,) = update(plan, None, [(T0, float("nan"), 5)])
    (tiles,) = decode_value(plan.layout, value)["tiles"].values()
    assert tiles[0, 1:8].tolist() == [0, 0, 0, 0, 0, INT64_MAX, INT64_MIN]
    assert tiles[0, 9:12].tolist() == [0, 0, 0]


def test_tiles_are_sorted_and_only_there_with_events(kernels: WindowKernels) -> None:
    view, source = build(["1h", "1d"], EVERY_PIECE)
    plan = WindowPlan.build(view, source, kernels)
    minutes = [50, 10, 30, 11, 50, 0]
    (value,) = update(plan, None, [(T0 + m * MINUTE_US, 1.0, 1) for m in minutes])
    decoded = decode_value(plan.layout, value)
    assert decoded["newest_event_us"] == T0 + 50 * MINUTE_US
    fine, coarse = decoded["tiles"].values()
    first = T0 // (5 * MINUTE_US)
    assert fine[:, 0].tolist() == [first, first + 2, first + 6, first + 10]
    assert fine[:, 8].tolist() == [1, 2, 1, 2]
    assert coarse[:, [0, 8]].tolist() == [[T0 // HOUR_US, 6]]


def test_an_update_drops_what_no_later_read_needs(kernels: WindowKernels) -> None:
    view, source = build(["1h", "1d"], EVERY_PIECE)
    plan = WindowPlan.build(view, source, kernels)
    old = [T0 + HOUR_US - DAY_US, T0 - 1, T0, T0 + HOUR_US]
    updated = update(plan, None, [(t, 1.0, 1) for t in old])
    assert updated.late_rows == 0
    fine, coarse = decode_value(plan.layout, updated[0])["tiles"].values()
    assert fine[:, 0].tolist() == [T0 // (5 * MINUTE_US), (T0 + HOUR_US) // (5 * MINUTE_US)]
    assert coarse[:, 0].tolist() == [t // HOUR_US for t in old]


def test_rows_beyond_all_retentions_change_nothing_and_are_counted(
    kernels: WindowKernels,
) -> None:
    view, source = build(["1h", "1d"], EVERY_PIECE)
    plan = WindowPlan.build(view, source, kernels)
    beyond = T0 + HOUR_US - DAY_US - 1
    updated = update(plan, None, [(beyond, 1.0, 1), (0, 2.0, 2)])
    assert updated == [None]
    assert updated.late_rows == 2


def test_a_value_never_outgrows_its_windows(kernels: WindowKernels) -> None:
    view, source = build(["1h"], [{"name": "n", "function": "count"}])
    plan = WindowPlan.build(view, source, kernels)
    value = None
    columns = {"x": Column(DType.FLOAT64, np.zeros(1))}
    for minute in range(0, 6 * 60, 2):
        now = np.array([T0 + minute * MINUTE_US])
        (value,) = plan.update(
            [value], np.zeros(1, np.int64), now, now, now, plan.inputs(columns), int(now[0])
        )
        assert value is not None
        assert len(value) <= 8 * (3 + 13 * 2)


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
        lambda value: bytes([2]) + value[1:],
        lambda value: value[:16] + struct.pack("<q", -1) + value[24:],
        lambda value: value[:16] + struct.pack("<q", 2**40) + value[24:],
    ],
)
def test_a_damaged_value_is_refused(kernels: WindowKernels, spoil: Any) -> None:
    view, source = build(["1h"], EVERY_PIECE)
    plan = WindowPlan.build(view, source, kernels)
    (value,) = update(plan, None, [(T0, 1.0, 5)])
    with pytest.raises(InternalError, match="isn't of this view's layout, or is damaged"):
        plan.read([spoil(value)], T0 + 2 * HOUR_US, ("n_1h",))
    with pytest.raises(InternalError, match="isn't of this view's layout, or is damaged"):
        update(plan, spoil(value), [(T0, 1.0, 5)])


def test_a_value_of_another_layout_is_refused(kernels: WindowKernels) -> None:
    plan = WindowPlan.build(*build(["1h"], EVERY_PIECE), kernels)
    other = WindowPlan.build(*build(["2h"], EVERY_PIECE), kernels)
    (value,) = update(plan, None, [(T0, 1.0, 5)])
    with pytest.raises(InternalError):
        other.read([value], T0 + 2 * HOUR_US, ("n_2h",))
