"""Placement: which slots go where when shards come or leave; by count, moving as few as can be.

Every shard gets floor or ceil of slots / shards.  Those that have most keep the larger share, so
that only the surplus moves; it is taken from the ends of the longest runs, to keep maps short.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise

from mlpd.core.errors import ValidationError
from mlpd.core.hashing import SLOTS
from mlpd.core.shards import SHARDS_MAX, Shard, ShardMap


def first_map(cluster: str, shards: Sequence[Shard]) -> ShardMap:
    """Return the map of a new cluster, of epoch 1: a run of slots for each shard, by name.

    Raises ValidationError: `too_many_shards`, `repeated_shard`.
    """
    ordered = _ordered(shards)
    bounds = [SLOTS * i // len(ordered) for i in range(len(ordered) + 1)]
    owners = [i for i in range(len(ordered)) for _ in range(bounds[i], bounds[i + 1])]
    return ShardMap(cluster, 1, ordered, tuple(owners))


def rebalance(current: ShardMap, shards: Sequence[Shard]) -> ShardMap:
    """Return the next map, in which `shards` share the slots; others leave.

    Raises as `first_map`.
    """
    ordered = _ordered(shards)
    held = _held(current)
    kept = {shard.name: held.get(shard.name, []) for shard in ordered}
    goals = _goals({name: len(slots) for name, slots in kept.items()})
    loose = [slot for name, slots in held.items() if name not in kept for slot in slots]
    for name, slots in kept.items():
        loose += _take(slots, len(slots) - goals[name])
    loose.sort()
    owners = [0] * SLOTS
    for index, (name, slots) in enumerate(kept.items()):
        missing = goals[name] - len(slots)
        for slot in (*slots, *loose[:missing]):
            owners[slot] = index
        del loose[:missing]
    return current.next(ordered, owners)


def moves(old: ShardMap, new: ShardMap) -> dict[tuple[str, str], list[int]]:
    """Return the slots that change hands, ascending, by (from, to)."""
    found: dict[tuple[str, str], list[int]] = {}
    before, after = ([shard.name for shard in m.shards] for m in (old, new))
    for slot, (one, other) in enumerate(zip(old.owners, new.owners, strict=True)):
        pair = before[one], after[other]
        if pair[0] != pair[1]:
            found.setdefault(pair, []).append(slot)
    return dict(sorted(found.items()))


def _held(shard_map: ShardMap) -> dict[str, list[int]]:
    held: list[list[int]] = [[] for _ in shard_map.shards]
    for slot, owner in enumerate(shard_map.owners):
        held[owner].append(slot)
    return {shard.name: slots for shard, slots in zip(shard_map.shards, held, strict=True)}


def _goals(counts: Mapping[str, int]) -> dict[str, int]:
    """Return how many slots each is to have; the larger share goes to those that have most."""
    share, extra = divmod(SLOTS, len(counts))
    fullest = sorted(counts, key=lambda name: (-counts[name], name))[:extra]
    return {name: share + (name in fullest) for name in counts}


def _take(slots: list[int], count: int) -> list[int]:
    """Remove `count` of ascending slots, short runs first and then an end; return them."""
    taken: list[int] = []
    for run in sorted(_runs(slots), key=len):
        if len(taken) >= count:
            break
        taken += run[len(taken) - count :]
    gone = set(taken)
    slots[:] = [slot for slot in slots if slot not in gone]
    return taken


def _runs(slots: Sequence[int]) -> list[list[int]]:
    runs: list[list[int]] = []
    for slot in slots:
        if runs and runs[-1][-1] == slot - 1:
            runs[-1].append(slot)
        else:
            runs.append([slot])
    return runs


def _ordered(shards: Sequence[Shard]) -> tuple[Shard, ...]:
    if not 1 <= len(shards) <= SHARDS_MAX:
        raise ValidationError(
            f"a cluster has 1 to {SHARDS_MAX} shards, not {len(shards)}", code="too_many_shards"
        )
    ordered = tuple(sorted(shards, key=lambda shard: shard.name))
    for one, other in pairwise(ordered):
        if one.name == other.name:
            raise ValidationError(
                f"two shards are called {one.name!r}",
                code="repeated_shard",
                hint="Give each a name of its own.",
            )
    return ordered
