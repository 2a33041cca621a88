"""Blocks as msgpack: the very bytes that msgpack-python packs of their values."""

from typing import Any

import msgpack
import numpy as np
import pytest

from mlpd.core.columns import DType
from mlpd.core.convert import column_of
from mlpd.features.block import Block
from mlpd.features.kernels import load_feature_kernels
from mlpd.features.lists import ListPlan
from mlpd.features.packed import PackPlan

EDGES = sorted({s * (2**e + d) for s in (1, -1) for e in range(64) for d in (-1, 0, 1)})
INTEGERS = [edge for edge in EDGES if -(2**63) <= edge < 2**63]
REALS = [0.0, -0.0, 1.5, float("nan"), float("inf"), -float("inf"), 5e-324, 0.1]
VALUES: dict[DType, list[Any]] = {
    DType.INT64: INTEGERS,
    DType.TIMESTAMP: [abs(value) for value in INTEGERS if abs(value) < 2**50],
    DType.FLOAT64: REALS,
    DType.FLOAT32: REALS[:-2],
    DType.BOOL: [True, False],
    DType.STRING: ["", "ä", "x" * 300],
    DType.BYTES: [b"", b"\xc1" * 40],
    DType.parse("list[int64]", "a list"): [[], [1, 2**40, -1]],
}


@pytest.mark.parametrize(
    ("n", "start", "stop"), [(0, 0, 0), (1, 0, 1), (15, 0, 15), (40, 3, 20), (260, 0, 260)]
)
def test_the_bytes_are_those_of_the_values(n: int, start: int, stop: int) -> None:
    rng = np.random.default_rng(n)
    dtypes = [dtype for dtype in VALUES for _ in range(3)]
    block = Block.empty(len(dtypes), n, with_state=0)
    for row, dtype in enumerate(dtypes):
        nulls = (0.0, 0.3, 1.0)[row % 3]
        choices, picks = VALUES[dtype], rng.integers(0, len(VALUES[dtype]), n)
        values = [None if rng.random() < nulls else choices[pick] for pick in picks.tolist()]
        block.put(row, column_of(dtype, values, "a value"))
    status = rng.integers(0, 4, (len(dtypes), n)).astype(np.uint8)
    order = rng.permutation(len(dtypes)).tolist()
    vector = {f"feature_{row}" * (1 + row): row for row in order}
    packed = PackPlan(vector, dtypes, load_feature_kernels().pack_features).pack(
        block, status, start, stop
    )
    plan = ListPlan(vector, dtypes)
    part, index = slice(start, stop), np.arange(start, stop)
    assert packed.values == msgpack.packb(plan.values(block.take(index)))
    assert packed.statuses == msgpack.packb(plan.statuses(status[:, part]))


def test_every_integer_is_as_short_as_it_goes() -> None:
    block = Block.empty(1, len(INTEGERS), with_state=0)
    block.put(0, column_of(DType.INT64, INTEGERS, "a value"))
    plan = PackPlan({"x": 0}, [DType.INT64], load_feature_kernels().pack_features)
    packed = plan.pack(block, np.zeros(block.words.shape, np.uint8), 0, len(INTEGERS))
    assert packed.values == msgpack.packb({"x": INTEGERS})


def test_no_features_are_two_empty_maps() -> None:
    plan = PackPlan({}, [], load_feature_kernels().pack_features)
    block = Block.empty(0, 3, with_state=0)
    assert plan.pack(block, np.zeros((0, 3), np.uint8), 0, 3) == (b"\x80", b"\x80")
