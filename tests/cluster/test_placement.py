"""Placement: even by count, and no slot moves that needn't."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlpd.cluster.placement import first_map, moves, rebalance
from mlpd.core.errors import ValidationError
from mlpd.core.hashing import SLOTS
from mlpd.core.shards import Shard, ShardMap, decode_map

CLUSTER = "0" * 32


def shards(names: range | set[int]) -> list[Shard]:
    return [Shard(f"s{i:03d}", f"http://127.0.0.1:{9000 + i}") for i in names]


def counts(shard_map: ShardMap) -> list[int]:
    return [shard_map.owners.count(i) for i in range(len(shard_map.shards))]


def fewest_moves(old: ShardMap, new: ShardMap) -> int:
    """How many must move at least, if each shard of `new` is to have floor or ceil of its share."""
    held = dict(zip((s.name for s in old.shards), counts(old), strict=True))
    share, extra = divmod(SLOTS, len(new.shards))
    kept = sorted((held.get(s.name, 0) for s in new.shards), reverse=True)
    stay = sum(min(count, share + (i < extra)) for i, count in enumerate(kept))
    return SLOTS - stay


@pytest.mark.parametrize("n", [1, 2, 3, 7, 100, 200, 1000])
def test_a_new_cluster_is_even_and_in_runs(n: int) -> None:
    made = first_map(CLUSTER, shards(range(n)))
    assert made.epoch == 1
    assert max(counts(made)) - min(counts(made)) <= 1
    assert all("-" in run and " " not in run for run in made.to_dict()["slots"].values())
    assert decode_map(made.to_dict()) == made


@settings(max_examples=25)
@given(st.integers(1, 199))
def test_adding_a_shard_moves_the_ideal_share(n: int) -> None:
    old = first_map(CLUSTER, shards(range(n)))
    new = rebalance(old, shards(range(n + 1)))
    moved = moves(old, new)
    assert {to for _, to in moved} == {f"s{n:03d}"}
    assert sum(map(len, moved.values())) <= 1.02 * SLOTS / (n + 1)
    assert max(counts(new)) <= 1.03 * SLOTS / (n + 1)
    assert new.epoch == old.epoch + 1


def test_a_cluster_that_grew_one_by_one_stays_even_and_its_map_short() -> None:
    grown = first_map(CLUSTER, shards(range(1)))
    for n in range(2, 41):
        before, grown = grown, rebalance(grown, shards(range(n)))
        assert sum(map(len, moves(before, grown).values())) <= 1.02 * SLOTS / n
        assert max(counts(grown)) <= 1.03 * SLOTS / n
    assert len(grown.encode()) < 32 * 1024


@settings(max_examples=25)
@given(
    st.lists(st.sets(st.integers(0, 30), min_size=1, max_size=12), min_size=2, max_size=4),
)
def test_no_change_of_members_moves_more_than_it_must(members: list[set[int]]) -> None:
    current = first_map(CLUSTER, shards(members[0]))
    for wanted in members[1:]:
        new = rebalance(current, shards(wanted))
        assert decode_map(new.to_dict()) == new
        assert max(counts(new)) - min(counts(new)) <= 1
        assert sum(map(len, moves(current, new).values())) == fewest_moves(current, new)
        current = new


def test_no_shards_and_two_of_one_name_are_refused() -> None:
    with pytest.raises(ValidationError, match="1 to 1000 shards"):
        first_map(CLUSTER, [])
    with pytest.raises(ValidationError, match="two shards are called 's001'"):
        first_map(CLUSTER, [*shards({1, 2}), Shard("s001", "http://127.0.0.1:1")])
