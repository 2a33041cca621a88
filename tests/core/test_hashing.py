"""Hashes that are on disk and on the wire: they never change."""

import math

import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from mlpd.core.hashing import SLOTS, canonical_json, definition_hash, sha256_digest, slot_of


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


def test_canonical_json_is_one_text_per_value() -> None:
    assert canonical_json({"b": 1, "a": "ü"}) == '{"a":"ü","b":1}'.encode()
    with pytest.raises(ValueError, match="JSON"):
        canonical_json(math.nan)
