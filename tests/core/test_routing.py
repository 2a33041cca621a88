"""Routing: slots of rows' keys as the definition says, whatever stands in the rows."""

import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from mlpd.core.columns import DType
from mlpd.core.hashing import slot_of
from mlpd.core.keys import encode_entity
from mlpd.core.routing import NO_SLOT, Routing, decode_routing, distinct, key_slots
from mlpd.core.specs import EntitySpec

USER = EntitySpec("user", (("user", DType.STRING),))
PAIR = EntitySpec("pair", (("user", DType.STRING), ("shop", DType.INT64)))

texts = st.none() | st.text(st.characters(exclude_categories=["Cs"]), max_size=4)
wrong = st.sampled_from([True, 1.0, [1], {}, b"x", 2**70, "\ud800"])


def slot(entity: EntitySpec, key: tuple[Any, ...]) -> int:
    if None in key or not all(
        type(k) is str if t is DType.STRING else type(k) is int
        for k, t in zip(key, entity.types, strict=True)
    ):
        return NO_SLOT
    encoded = encode_entity(entity.types, key, "e")
    return NO_SLOT if encoded is None else slot_of(encoded)


@given(st.lists(st.tuples(texts, st.none() | st.integers(-3, 3)), max_size=30))
def test_slots_are_those_of_the_keys(rows: list[tuple[str | None, int | None]]) -> None:
    columns = {"user": [user for user, _ in rows], "shop": [shop for _, shop in rows]}
    assert key_slots(PAIR, columns, len(rows)).tolist() == [slot(PAIR, row) for row in rows]
    assert key_slots(USER, columns, len(rows)).tolist() == [slot(USER, row[:1]) for row in rows]


@given(st.permutations([1, True, 1.0, [1], {}, "1", None, 2**70, -(2**63)]))
def test_what_is_no_key_has_no_slot_and_hides_none(values: list[Any]) -> None:
    shop = EntitySpec("shop", (("shop", DType.INT64),))
    found = dict(zip(map(repr, values), key_slots(shop, {"shop": values}, 9).tolist(), strict=True))
    assert found["1"] == slot(shop, (1,))
    assert found[str(-(2**63))] == slot(shop, (-(2**63),))
    for value in ("[1]", "{}", "'1'", "None", repr(2**70)):
        assert found[value] == NO_SLOT


def test_texts_that_are_no_unicode_and_absent_columns_have_no_slot() -> None:
    assert key_slots(USER, {"user": ["\ud800", "a"]}, 2).tolist()[0] == NO_SLOT
    assert key_slots(USER, {}, 3).tolist() == [NO_SLOT] * 3
    assert key_slots(PAIR, {"user": ["a"]}, 1).tolist() == [NO_SLOT]
    assert key_slots(USER, {"user": []}, 0).tolist() == []


def test_entities_come_by_name_and_each_set_of_columns_once() -> None:
    twin = EntitySpec("another", USER.keys)
    assert distinct([USER, PAIR, twin]) == (twin, PAIR)


def test_a_routing_survives_its_form() -> None:
    named = {"x": (PAIR, USER), "y": ()}
    routing = Routing(named, {"s": (USER,)}, {}, {"v": (PAIR,)})
    sent = json.loads(json.dumps(routing.to_dict()))
    assert decode_routing(sent) == routing
    assert sent["version"] == routing.version
    assert Routing(named, {}, {}, {}).version == routing.version
    assert Routing({"x": (USER,), "y": ()}, {}, {}, {}).version != routing.version
