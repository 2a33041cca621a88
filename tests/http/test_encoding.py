"""Encoding in turns gives the same bytes, and gives way in between."""

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlpd.http import encoding
from mlpd.http.encoding import encode_in_turns, encode_json, encode_msgpack

LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**63), 2**63 - 1),
    st.floats(),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=5),
    st.binary(max_size=5),
    st.lists(st.integers(0, 9), max_size=3).map(np.array),
)
KEYS = st.text(st.characters(exclude_categories=["Cs"]), max_size=5)
VALUES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=6) | st.dictionaries(KEYS, inner, max_size=4)
)


@given(value=VALUES, piece=st.integers(1, 20))
def test_pieces_make_the_whole(value: Any, piece: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoding, "JSON_PIECE", piece)
        patch.setattr(encoding, "MSGPACK_PIECE", piece)
        assert encode_in_turns(value, as_msgpack=False) == encode_json(value)
        assert encode_in_turns(value, as_msgpack=True) == encode_msgpack(value)


@pytest.mark.parametrize("as_msgpack", [False, True])
@pytest.mark.parametrize(
    "value",
    [
        {"columns": {"x": [0.1] * 20_000}},
        {"columns": {"x": [[0.1] * 8_192, None, []]}},
        {"columns": {"x": [[0.1, math.nan]] * 10_000}},
        {"columns": {"x": np.arange(20_000) / 3}},
        [{"prediction_id": "0" * 32, "score": 0.1}] * 5_000,
        {f"feature {i}": [i / 3] * 100 for i in range(200)},
    ],
    ids=["column", "long lists", "short lists", "array", "rows", "columns"],
)
def test_large_values_give_way_often(value: Any, as_msgpack: bool) -> None:
    turns: list[float] = []
    found = encode_in_turns(value, as_msgpack=as_msgpack, give_way=turns.append)
    assert found == (encode_msgpack if as_msgpack else encode_json)(value)
    assert len(turns) >= max(1, len(found) // (300_000 if as_msgpack else 32_768))
    assert turns == [0] * len(turns)


def test_small_values_give_no_way() -> None:
    turns: list[float] = []
    assert encode_in_turns({"x": [1.5]}, as_msgpack=False, give_way=turns.append) == b'{"x":[1.5]}'
    assert turns == []


def test_keys_are_those_of_json() -> None:
    value = {1: [1], None: [2], False: [3], 'a"': [4]}
    assert encode_in_turns(value, as_msgpack=False) == encode_json(value)
