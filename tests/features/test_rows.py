"""Rows of latest-value views: bytes as docs/formats/rows.md has them, and damage is told."""

import struct

import msgpack
import numpy as np
import pytest

from mlpd.core.columns import Columns, DType
from mlpd.core.convert import column_of
from mlpd.core.specs import ViewSpec
from mlpd.features.kernels import load_feature_kernels
from mlpd.features.latest import LatestPlan
from mlpd.features.stamps import Stamps

TYPES = {
    "flags": DType("list[bool]"),
    "x": DType.FLOAT64,
    "tags": DType("list[string]"),
    "name": DType.STRING,
    "point": DType("vector[float32, 2]"),
}
PLAN = LatestPlan(ViewSpec("v", "latest", "user", "clicks", TYPES), load_feature_kernels())
VALUES = {"flags": [True, False, True], "x": 0.5, "tags": ["a"], "name": "é", "point": [1.0, -0.0]}
TAIL = b"\x01\x00\x01" + msgpack.packb(["a"]) + "é".encode() + struct.pack("<2f", 1.0, -0.0)
FIXED = 40 + 8 * len(TYPES)


def columns(values: dict[str, object]) -> Columns:
    return {name: column_of(dtype, [values.get(name)]) for name, dtype in TYPES.items()}


def row(values: dict[str, object]) -> bytes:
    stamps = Stamps(*np.array([[1], [2], [3]]))
    (found,) = PLAN.update([None], np.zeros(1, np.int64), stamps, columns(values))
    assert found is not None
    return found


def place(offset: int, length: int) -> int:
    return offset << 32 | length


def test_lists_lie_behind_the_fixed_section_as_texts_do() -> None:
    value = row(VALUES)
    places = [place(0, 3), struct.unpack("<q", struct.pack("<d", 0.5))[0], place(3, 3)]
    places += [place(6, 2), place(8, 8)]
    assert value == struct.pack("<IIqqq8s5q", 1, 0, 1, 2, 3, bytes(8), *places) + TAIL
    assert PLAN.fault(value) == ""


def test_null_lists_have_a_bit_and_no_bytes() -> None:
    value = row({})
    assert value[32:40] == bytes([0b11111]) + bytes(7)
    assert len(value) == FIXED
    assert PLAN.fault(value) == ""
    block, _ = PLAN.read([value], 10, tuple(TYPES))
    assert not block.valid.any()


def test_empty_lists_are_no_nulls() -> None:
    value = row({**VALUES, "flags": [], "tags": []})
    block, _ = PLAN.read([value], 10, ("flags", "tags"))
    found = [
        block.column(i, TYPES[n], whole=True).to_list() for i, n in enumerate(("flags", "tags"))
    ]
    assert found == [[[]], [[]]]
    assert PLAN.fault(value) == ""


@pytest.mark.parametrize(
    ("at", "byte", "named"),
    [
        (FIXED, 2, "flags"),
        (FIXED + 3, 0x81, "tags"),
        (FIXED + 6, 0xFF, "name"),
        (40 + 8 * 4, 4, "point"),
        (40 + 8 * 2, 2, "tags"),
        (40 + 8 * 2 + 4, 2, "tags"),
    ],
)
def test_a_damaged_list_is_told(at: int, byte: int, named: str) -> None:
    value = bytearray(row(VALUES))
    value[at] = byte
    assert f"'{named}'" in PLAN.fault(bytes(value))
