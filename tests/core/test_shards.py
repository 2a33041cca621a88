"""The shard map: one form, and every map that can't be is refused by name."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import mlpd
from mlpd.core.columns import DType
from mlpd.core.errors import ConflictError, NotFoundError, ValidationError
from mlpd.core.hashing import SLOTS, slot_of
from mlpd.core.keys import encode_entity
from mlpd.core.shards import (
    Shard,
    ShardMap,
    check_successor,
    decode_map,
    format_runs,
    parse_runs,
)

PAGE = (Path(mlpd.__file__).parent / "docs/formats/shard_map.md").read_text()
A, B = Shard("a", "http://127.0.0.1:8701"), Shard("b", "unix:/run/b.sock", ("http://[::1]:1",))
HALVES = ShardMap("0f" * 16, 3, (A, B), tuple(int(slot >= 8192) for slot in range(SLOTS)))

KEYS: dict[str, tuple[tuple[DType, ...], tuple[object, ...]]] = {
    "the empty text": ((DType.STRING,), ("",)),
    "1": ((DType.INT64,), (1,)),
    "-1": ((DType.INT64,), (-1,)),
    "`00 ff`": ((DType.BYTES,), (b"\x00\xff",)),
    "`B6`, 42": ((DType.STRING, DType.INT64), ("B6", 42)),
    "500 times `x`": ((DType.STRING,), ("x" * 500,)),
}


def test_the_published_vectors_of_slots_hold() -> None:
    rows = re.findall(
        r"^\| ([a-z0-9, ]+) \| (.+) \| `([0-9a-f ]+)` \| (\d+) \|$", PAGE, re.MULTILINE
    )
    assert len(rows) == 11
    for kind, key, raw, slot in rows:
        types, parts = KEYS.get(key, ((DType.STRING,), (key.strip("`"),)))
        assert ", ".join(map(str, types)) == kind
        entity = encode_entity(types, parts, "e")
        assert entity == bytes.fromhex(raw), key
        assert slot_of(entity) == int(slot), key
    assert (slot_of(b"42"), slot_of(b""), slot_of(b"departures")) == (697, 10649, 7132)


def test_the_map_on_the_page_is_read() -> None:
    found = decode_map(json.loads(re.findall(r"```json\n(.*?)```", PAGE, re.DOTALL)[0]))
    assert (found.epoch, found.owner(8191).name, found.owner(16383).name) == (3, "a", "b")
    assert found.to_dict()["slots"]["b"] == "8192-16383"


maps = st.builds(
    lambda epoch, owners: ShardMap("ab" * 16, epoch, (A, B), tuple(owners)),
    st.integers(1, 2**53 - 1),
    st.lists(st.integers(0, 1), min_size=8, max_size=8).map(
        lambda bits: [bits[slot // 64 * 7919 % 8] for slot in range(SLOTS)]
    ),
)


@settings(max_examples=20)
@given(maps)
def test_a_map_survives_its_form(given_map: ShardMap) -> None:
    again = decode_map(json.loads(given_map.encode()))
    assert again == given_map
    assert again.encode() == given_map.encode()
    assert again.digest == given_map.digest


@given(st.sets(st.integers(0, SLOTS - 1)))
def test_runs_are_their_slots(slots: set[int]) -> None:
    text = format_runs(sorted(slots))
    assert parse_runs(text) == sorted(slots)
    assert text == format_runs(parse_runs(text))


def test_who_owns_what() -> None:
    assert (HALVES.owner(0), HALVES.owner(8192)) == (A, B)
    assert HALVES.arbiter == A
    assert HALVES.slots_of("b") == list(range(8192, SLOTS))
    flags = HALVES.flags("b")
    assert [slot for slot in range(SLOTS) if flags[slot]] == HALVES.slots_of("b")
    with pytest.raises(NotFoundError, match="Known: a, b|no shard 'c'"):
        HALVES.owner(0), HALVES.shard("c")


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"format": 2}, "invalid_map"),
        ({"epoch": 0}, "invalid_map"),
        ({"epoch": True}, "invalid_map"),
        ({"epoch": "3"}, "invalid_map"),
        ({"cluster": "xyz"}, "invalid_map"),
        ({"cluster": None}, "invalid_map"),
        ({"more": 1}, "invalid_map"),
        ({"shards": {}}, "invalid_map"),
        ({"shards": []}, "invalid_map"),
        ({"shards": {"a": {"url": "http://x:1"}}}, "invalid_map"),
        ({"shards": {"a": {"url": "http://x:1", "replicas": None}}}, "invalid_map"),
        ({"shards": {"a": {"url": "ftp://x", "replicas": []}}}, "invalid_map"),
        ({"shards": {"a": {"url": "http://x:99999", "replicas": []}}}, "invalid_map"),
        ({"shards": {"A b": {"url": "http://x:1", "replicas": []}}}, "invalid_name"),
        ({"shards": {7: {"url": "http://x:1", "replicas": []}}}, "invalid_name"),
        ({"slots": {"a": "0-16383", "c": "0"}}, "invalid_map"),
        ({"slots": []}, "invalid_map"),
        ({"slots": {"a": "0-8192", "b": "8192-16383"}}, "overlapping_slots"),
        ({"slots": {"a": "0-8190", "b": "8192-16383"}}, "uncovered_slots"),
        ({"slots": {"a": "0-16384"}}, "invalid_slots"),
        ({"slots": {"a": "5-3"}}, "invalid_slots"),
        ({"slots": {"a": "3 2"}}, "invalid_slots"),
        ({"slots": {"a": "-1"}}, "invalid_slots"),
        ({"slots": {"a": "1-"}}, "invalid_slots"),
        ({"slots": {"a": "\u0663"}}, "invalid_slots"),
        ({"slots": {"a": "9" * 5000}}, "invalid_slots"),
        ({"slots": {"a": 5}}, "invalid_slots"),
    ],
    ids=str,
)
def test_a_map_that_cannot_be_is_refused_by_name(change: dict[str, Any], code: str) -> None:
    with pytest.raises(ValidationError) as refused:
        decode_map({**HALVES.to_dict(), **change})
    assert refused.value.code == code
    assert len(refused.value.message) < 400


@pytest.mark.parametrize("value", [None, [], "map", {}, {"epoch": 1}])
def test_what_is_no_map_at_all_is_refused(value: object) -> None:
    with pytest.raises(ValidationError, match="can't be used"):
        decode_map(value)


def test_no_url_twice() -> None:
    shards = {"a": {"url": A.url, "replicas": []}, "b": {"url": B.url, "replicas": [A.url]}}
    with pytest.raises(ValidationError, match="two members"):
        decode_map({**HALVES.to_dict(), "shards": shards})


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda m: replace(m, cluster="aa" * 16, epoch=9), "other_cluster"),
        (lambda m: replace(m, epoch=2), "older_map"),
        (lambda m: replace(m, owners=(0,) * SLOTS), "map_differs"),
        (lambda m: replace(m, shards=(A, replace(B, replicas=()))), "map_differs"),
    ],
)
def test_what_may_not_follow_a_map(change: Callable[[ShardMap], ShardMap], code: str) -> None:
    with pytest.raises(ConflictError) as refused:
        check_successor(HALVES, change(HALVES))
    assert refused.value.code == code
    check_successor(HALVES, HALVES)
    check_successor(HALVES, HALVES.next((A,), (0,) * SLOTS))
