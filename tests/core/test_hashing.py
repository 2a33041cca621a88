"""Hashes that are on disk and on the wire: they never change."""

import math

import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from mlpd.core.columns import DType
from mlpd.core.convert import column_of
from mlpd.core.hashing import (
    SLOTS,
    canonical_json,
    definition_hash,
    hash_values,
    sha256_digest,
    slot_of,
)


@given(st.binary(max_size=40).filter(lambda key: b"{" not in key))
def test_a_slot_is_the_low_bits_of_xxh64(key: bytes) -> None:
    assert slot_of(key) == xxhash.xxh64(key, seed=0).intdigest() % SLOTS


@pytest.mark.parametrize(
    ("key", "hashed"),
    [
        (b"{user1}.a", b"user1"),
        (b"x{user1}{other}", b"user1"),
        (b"{}{a}", b"{}{a}"),
        (b"{open", b"{open"),
        (b"}{a}", b"a"),
        (b"{{a}}", b"{a"),
    ],
)
def test_the_first_tag_alone_decides(key: bytes, hashed: bytes) -> None:
    assert slot_of(key) == xxhash.xxh64(hashed, seed=0).intdigest() % SLOTS


def test_known_values() -> None:
    assert slot_of(b"") == 0xEF46DB3751D8E999 % SLOTS
    assert sha256_digest(b"") == (
        "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    )
    text = "86c12bea16c4aa4b99657d37d135d0de"
    assert definition_hash({"b": 1, "a": [None, "ü"]}) == text


def hashed(dtype: DType, values: list[object]) -> list[int]:
    return hash_values(column_of(dtype, values).values).view("uint64").tolist()


def test_hashes_of_values_are_xxh64_of_texts_and_splitmix64_of_numbers() -> None:
    texts = ["", "a", "ü"]
    expected = [xxhash.xxh64_intdigest(text.encode()) for text in texts]
    assert hashed(DType.STRING, [*texts]) == expected
    assert hashed(DType.BYTES, [b"", b"a", "ü".encode()]) == expected
    # The first two numbers of splitmix64 seeded with 0, and the first one seeded with 1.
    step = 0x9E3779B97F4A7C15
    first, second, other = 0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x910A2DEC89025CC1
    assert hashed(DType.INT64, [0, step - 2**64, 1]) == [first, second, other]
    assert hashed(DType.TIMESTAMP, [0, 1]) == [first, other]
    assert hashed(DType.BOOL, [False, True]) == [first, other]


def test_hashes_of_reals_are_those_of_their_bits() -> None:
    assert hashed(DType.FLOAT64, [0.0, -0.0]) == hashed(DType.INT64, [0, 0])
    assert hashed(DType.FLOAT64, [1.5]) == hashed(DType.INT64, [0x3FF8000000000000])
    assert hashed(DType.FLOAT32, [1.5]) == hashed(DType.FLOAT64, [1.5])


def test_canonical_json_is_one_text_per_value() -> None:
    assert canonical_json({"b": 1, "a": "ü"}) == '{"a":"ü","b":1}'.encode()
    with pytest.raises(ValueError, match="JSON"):
        canonical_json(math.nan)
