"""Entity keys: different keys have different bytes, and bytes sort as keys do."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlpd.core.columns import DType
from mlpd.core.errors import ValidationError
from mlpd.core.hashing import SLOTS, slot_of
from mlpd.core.keys import MAX_ENTITY_BYTES, encode_entity, encode_texts, online_keys

PARTS: dict[DType, st.SearchStrategy[Any]] = {
    DType.STRING: st.text(st.characters(exclude_categories=["Cs"]), max_size=12),
    DType.INT64: st.integers(-(2**63), 2**63 - 1),
    DType.BYTES: st.binary(max_size=12),
}
TYPES = st.lists(st.sampled_from(list(PARTS)), min_size=1, max_size=4)


def encode(types: list[DType], parts: tuple[Any, ...]) -> bytes:
    encoded = encode_entity(types, parts, "e")
    assert encoded is not None
    return encoded


def comparable(parts: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(p.encode() if isinstance(p, str) else p for p in parts)


@given(TYPES, st.data())
def test_bytes_sort_as_keys_do(types: list[DType], data: st.DataObject) -> None:
    keys = st.tuples(*(PARTS[dtype] for dtype in types))
    a, b = data.draw(keys), data.draw(keys)
    assert (encode(types, a) < encode(types, b)) == (comparable(a) < comparable(b))
    assert (encode(types, a) == encode(types, b)) == (a == b)


@given(TYPES, TYPES, st.data())
def test_no_key_begins_another(a_types: list[DType], b_types: list[DType], data: Any) -> None:
    a = encode(a_types, data.draw(st.tuples(*(PARTS[t] for t in a_types))))
    b = encode(b_types, data.draw(st.tuples(*(PARTS[t] for t in b_types))))
    if len(a_types) == len(b_types):
        assert a == b or not b.startswith(a)


def test_one_and_the_text_one_are_different_keys() -> None:
    assert encode([DType.INT64], (1,)) != encode([DType.STRING], ("1",))
    assert encode([DType.STRING], ("1",)) != encode([DType.BYTES], (b"1",))


def test_the_bytes_are_as_described() -> None:
    assert encode([DType.INT64], (-1,)) == b"i" + bytes.fromhex("7fffffffffffffff")
    assert encode([DType.STRING], ("a\x00é",)) == b"sa\x00\xff\xc3\xa9\x00\x00"
    assert encode([DType.BYTES, DType.INT64], (b"", 0)) == b"b\x00\x00i\x80" + bytes(7)


def test_a_null_part_is_no_entity() -> None:
    assert encode_entity([DType.STRING, DType.INT64], ("a", None), "e") is None


@pytest.mark.parametrize(
    ("dtype", "wrong"),
    [
        (DType.STRING, 1),
        (DType.INT64, "1"),
        (DType.INT64, True),
        (DType.INT64, 2**63),
        (DType.BYTES, ""),
    ],
)
def test_a_part_of_another_type_is_refused(dtype: DType, wrong: Any) -> None:
    with pytest.raises(ValidationError) as refused:
        encode_entity([dtype], (wrong,), "carrier")
    assert refused.value.code == "wrong_entity_key"
    assert "'carrier'" in refused.value.message


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=600), max_size=5))
def test_texts_together_are_encoded_as_each_alone(texts: list[str]) -> None:
    assert encode_texts(texts) == [encode([DType.STRING], (text,)) for text in texts]


def test_long_keys_are_hashed_and_stay_apart() -> None:
    longest = encode([DType.STRING], ("x" * (MAX_ENTITY_BYTES - 3),))
    assert longest.startswith(b"sx")
    over = [encode([DType.STRING], (c + "x" * MAX_ENTITY_BYTES,)) for c in "ab"]
    assert all(key.startswith(b"h") and len(key) == 33 for key in over)
    assert over[0] != over[1]


def test_online_keys_stand_by_view_then_entity_behind_their_slot() -> None:
    entities = [encode([DType.STRING], (text,)) for text in ("a", "b")]
    slots = [slot_of(entity).to_bytes(2, "big") for entity in entities]
    assert online_keys([1, 258], entities) == [
        slots[0] + bytes.fromhex("00000001") + entities[0],
        slots[1] + bytes.fromhex("00000001") + entities[1],
        slots[0] + bytes.fromhex("00000102") + entities[0],
        slots[1] + bytes.fromhex("00000102") + entities[1],
    ]
    assert all(len(key) <= 511 for key in online_keys([2**32 - 1], entities))
    assert all(slot_of(entity) < SLOTS for entity in entities)
