"""Packed lists come back bit for bit; bytes that are none are told apart."""

import struct

import msgpack
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlpd.core.columns import Column, decode_columns, encode_columns
from mlpd.core.convert import column_of
from mlpd.core.dtypes import SCALARS, DType, list_of
from mlpd.core.lists import MAX_LIST_BYTES, list_fault, pack_lists, unpack_list, unpack_lists

LISTS = [list_of(dtype) for dtype in SCALARS]
TEXTS = st.text(st.characters(exclude_categories=["Cs"]))


@given(st.lists(st.lists(st.integers(0, 2**32 - 1), max_size=4), max_size=5))
def test_every_bit_pattern_of_a_float_survives(patterns: list[list[int]]) -> None:
    lengths = np.array(list(map(len, patterns)), np.int64)
    flat = np.array([bits for part in patterns for bits in part], np.uint32).view(np.float32)
    packed = pack_lists(DType.FLOAT32, flat, lengths)
    for bits, raw in zip(patterns, packed, strict=True):
        assert list(struct.unpack(f"<{len(bits)}I", raw)) == bits
    values = np.empty(len(packed), object)
    values[:] = packed
    encoded = encode_columns({"x": Column(list_of(DType.FLOAT32), values)})
    assert decode_columns(encoded)["x"].values.tolist() == packed
    again, sizes = unpack_lists(DType.FLOAT32, packed)
    assert again.tobytes() == flat.tobytes()
    assert sizes.tolist() == lengths.tolist()


@given(st.lists(st.lists(TEXTS, max_size=4), max_size=5))
def test_texts_with_anything_in_them_survive(lists: list[list[str]]) -> None:
    column = column_of(list_of(DType.STRING), lists)
    assert column.to_list() == lists
    flat, lengths = unpack_lists(DType.STRING, column.values.tolist())
    assert pack_lists(DType.STRING, flat, lengths) == column.values.tolist()


@pytest.mark.parametrize("dtype", [*LISTS, DType("vector[float32, 2]")], ids=str)
def test_what_is_packed_has_no_fault(dtype: DType) -> None:
    samples = {DType.STRING: "a\x00", DType.BYTES: b"\xff", DType.BOOL: True}
    value = [samples.get(dtype.element, 1)] * 2
    (raw,) = column_of(dtype, [value]).values.tolist()
    assert list_fault(dtype, raw) == ""
    assert unpack_list(dtype, raw) == value


@pytest.mark.parametrize(
    ("dtype", "raw"),
    [
        ("list[int64]", bytes(7)),
        ("list[float32]", bytes(6)),
        ("list[bool]", b"\x00\x02"),
        ("vector[float32, 2]", bytes(4)),
        ("vector[float32, 2]", b""),
        ("list[float64]", bytes(MAX_LIST_BYTES + 8)),
        ("list[string]", b""),
        ("list[string]", b"\x91\xa1\xff"),
        ("list[string]", msgpack.packb(["a", b"b"])),
        ("list[string]", msgpack.packb("a")),
        ("list[string]", msgpack.packb(["a"]) + b"\x00"),
        ("list[bytes]", msgpack.packb(["a"])),
        ("list[bytes]", msgpack.packb([None])),
        ("int64", bytes(8)),
    ],
)
def test_bytes_that_are_no_list_are_told(dtype: str, raw: bytes) -> None:
    assert list_fault(DType(dtype), raw)
