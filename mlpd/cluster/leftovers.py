"""Leftovers: imports at a target that no source knows of, so that no move could ever end them.

A request to begin that arrives late, after its move was cancelled, leaves one: the shard would take
no other slots for ever.  The seeds of tests/cluster/histories found it.
"""

from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

from mlpd.cluster.members import Connect
from mlpd.cluster.moving import Part, ask
from mlpd.core.errors import MlpdError
from mlpd.core.shards import ShardMap


def leftovers(shard_map: ShardMap, connect: Connect) -> Iterator[Part]:
    """Yield the imports whose source answers and has no such move; a source that is down may."""
    for shard in shard_map.shards:
        with suppress(MlpdError):
            note = connect(shard.url).cluster.moves()["arriving"]
            if note is None:
                continue
            # Only now: the source notes a move before its target does, and forgets it after it.
            source = shard_map.shard(note["shard"])
            leaving: Mapping[str, Any] | None = connect(source.url).cluster.moves()["leaving"]
            if leaving is None or leaving["move"] != note["move"]:
                yield Part(source.name, shard.name, note["slots"], 0, note["move"], note["state"])


def forget(shard_map: ShardMap, part: Part, connect: Connect) -> None:
    """Let the target forget an import of `leftovers`, with its rows and tiles.

    Raises ConflictError(code="move_done") for one whose slots the map gives to the target.
    """
    ask(shard_map, part.target, connect, lambda c: c.arrive("cancel", part.move))
