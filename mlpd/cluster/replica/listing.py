"""Followers in the map: written into it, and how far each is."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from mlpd.cluster.members import Connect
from mlpd.cluster.moving import set_map, spread
from mlpd.core.errors import ConflictError, MlpdError
from mlpd.core.shards import ShardMap, decode_map


def with_replicas(shard_map: ShardMap, name: str, urls: Sequence[str]) -> ShardMap:
    """Return the next map, in which a shard has these followers.

    Raises NotFoundError(code="unknown_shard"), ValidationError(code="repeated_url").
    """
    found = shard_map.shard(name)
    after = replace(found, replicas=tuple(url.rstrip("/") for url in urls))
    shards = [after if one == found else one for one in shard_map.shards]
    return decode_map(shard_map.next(shards, shard_map.owners).to_dict())


def check_followers(new: ShardMap, name: str, connect: Connect) -> None:
    """Raise ConflictError(code="no_follower") unless all of a shard's followers follow it."""
    shard = new.shard(name)
    for url in shard.replicas:
        role = connect(url).cluster.role()
        if (role["role"], role["shard"]) != ("follower", name):
            raise ConflictError(
                f"the daemon at {url} is {role['role']} of {role['shard'] or 'no shard'}, "
                f"no follower of {name}",
                code="no_follower",
                hint=f"mlpd serve --follow {shard.url} starts one.",
            )


def set_replicas(new: ShardMap, connect: Connect) -> list[str]:
    """Let all members go by the map; return who didn't take it.

    Raises ConflictError(code="epoch_moved").
    """
    if not set_map(new, connect):
        raise ConflictError(
            "somebody else changed the map just now",
            code="epoch_moved",
            hint="Run the command again.",
        )
    return spread(new, connect)


def survey_replicas(shard_map: ShardMap, connect: Connect) -> list[Mapping[str, Any]]:
    """Return what every follower in the map says of itself: shard, url, role, lag, or why not."""
    return [
        _describe(shard.name, url, connect) for shard in shard_map.shards for url in shard.replicas
    ]


def _describe(shard: str, url: str, connect: Connect) -> Mapping[str, Any]:
    fields = ("role", "sequence", "lag_rows", "staleness_ms")
    try:
        role = connect(url).cluster.role()
    except MlpdError as error:
        return {"shard": shard, "url": url, **dict.fromkeys(fields), "why": error.message}
    found = {name: role[name] for name in fields}
    return {"shard": shard, "url": url, **found, "why": role["trouble"] or ""}
