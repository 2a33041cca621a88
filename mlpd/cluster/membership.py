"""Shards that come and go: the map without moving anything, and what then is to be moved."""

import time

from mlpd.cluster.members import Connect, ask_all, check_answered
from mlpd.cluster.moving import ask, pending, set_map, spread
from mlpd.cluster.placement import moves, rebalance
from mlpd.core.errors import ConflictError
from mlpd.core.hashing import SLOTS
from mlpd.core.shards import Shard, ShardMap, decode_map

FOLLOW_S = 60.0
"""How long a new member may take to come to what all share; models are pulled meanwhile."""
_FOLLOW_POLL_S = 0.05


def drain_moves(shard_map: ShardMap, name: str) -> dict[tuple[str, str], list[int]]:
    """Return what moves if a shard gives all its slots to the others, which share them evenly.

    Raises NotFoundError(code="unknown_shard"), ConflictError(code="last_shard").
    """
    gone = shard_map.shard(name)
    others = [shard for shard in shard_map.shards if shard != gone]
    if not others:
        raise ConflictError("there is no other shard", code="last_shard")
    spread_out = rebalance(shard_map, others)
    return {pair: slots for pair, slots in moves(shard_map, spread_out).items() if pair[0] == name}


def add_member(shard_map: ShardMap, new: Shard, connect: Connect, *, dry_run: bool) -> ShardMap:
    """Return the map with one more shard, which has no slots yet; it may be there already.

    It returns once the new one has what all share: definitions, models, experiments.
    Raises ConflictError: `repeated_shard`, `member_unavailable`, `not_following`, and what the
    daemon refuses.
    """
    known = {shard.name: shard for shard in shard_map.shards}
    if new.name in known:
        if known[new.name].url != new.url:
            raise ConflictError(
                f"there is a shard {new.name!r} at {known[new.name].url}",
                code="repeated_shard",
                hint="Give the new one another name.",
            )
        if not dry_run:
            _await_shared(shard_map.arbiter, new, connect)
        return shard_map
    shards = tuple(sorted([*shard_map.shards, new], key=lambda shard: shard.name))
    names = [shard_map.owner(slot).name for slot in range(SLOTS)]
    index = {shard.name: i for i, shard in enumerate(shards)}
    grown = decode_map(shard_map.next(shards, [index[name] for name in names]).to_dict())
    if grown.arbiter != shard_map.arbiter:
        raise ConflictError(
            f"{new.name!r} would come before {shard_map.arbiter.name!r}, which decides on maps",
            code="arbiter_stays",
            hint="Give the new shard a name that sorts behind.",
        )
    check_answered(ask_all([new], connect))
    ask(
        grown, new.name, connect,
        lambda c: c.put_map(grown.to_dict(), shard=new.name, expected=0, dry_run=True),
    )  # fmt: skip
    if dry_run:
        return grown
    agreed = _agreed(grown, connect)
    _await_shared(agreed.arbiter, new, connect)
    return agreed


def _await_shared(arbiter: Shard, new: Shard, connect: Connect) -> None:
    """Wait until a new member has come to what all share now: moves ask it for the same things."""
    revision = connect(arbiter.url).status()["shared"]["revision"]
    until_s = time.monotonic() + FOLLOW_S
    while True:
        found = connect(new.url).status()["shared"]
        if found["arbiter"] == arbiter.name and found["revision"] >= revision:
            return
        if time.monotonic() > until_s:
            why = found.get("why") or f"it has come to {found['revision']} of {revision} changes"
            raise ConflictError(
                f"shard {new.name} is a member, but doesn't follow yet: {why}",
                code="not_following",
                hint="mlpd shard status shows it; once it follows, run the same command again.",
            )
        time.sleep(_FOLLOW_POLL_S)


def check_removable(shard_map: ShardMap, name: str) -> None:
    """Raise ConflictError(code="arbiter_stays") for the shard whose copy of the map decides."""
    if shard_map.shard(name) == shard_map.arbiter:
        raise ConflictError(
            f"shard {name} decides on maps and can't be removed",
            code="arbiter_stays",
            hint="mlpd shard drain takes its slots; it may then stay as a small daemon.",
        )


def remove_member(shard_map: ShardMap, name: str, connect: Connect) -> ShardMap:
    """Take a shard without slots off the map; the others go by it then.

    Raises ConflictError: `holds_slots`, or `move_under_way` for one that slots are moving to.
    """
    gone = shard_map.index(name)
    if gone in shard_map.owners:
        raise ConflictError(
            f"shard {name} holds slots", code="holds_slots", hint="mlpd shard remove moves them."
        )
    for part in pending(shard_map, connect):
        if part.target == name:
            raise ConflictError(
                f"slots {part.slots[:60]} move from {part.source} to {name}",
                code="move_under_way",
                hint="Finish that by the same mlpd shard move, or mlpd shard cancel it.",
                details={"slots": part.slots},
            )
    shards = [shard for i, shard in enumerate(shard_map.shards) if i != gone]
    return _agreed(
        shard_map.next(shards, [owner - (owner > gone) for owner in shard_map.owners]), connect
    )


def _agreed(shard_map: ShardMap, connect: Connect) -> ShardMap:
    """Set a map at the arbiter and tell the others; raises ConflictError(code="epoch_moved")."""
    if not set_map(shard_map, connect):
        raise ConflictError(
            "somebody else changed the map just now",
            code="epoch_moved",
            hint="Run the command again.",
        )
    spread(shard_map, connect)
    return shard_map
