"""Leftovers: imports at a target that no source knows of, so that no move could ever end them.

A request to begin that arrives late, after its move was cancelled, leaves one, and so does a source
that is removed before its last move is finished: the shard would take no other slots for ever.
"""

from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

from mlpd.cluster.members import Connect
from mlpd.cluster.moving import Part, ask
from mlpd.core.errors import MlpdError
from mlpd.core.shards import ShardMap, parse_runs


def leftovers(shard_map: ShardMap, connect: Connect) -> Iterator[Part]:
    """Yield the imports whose source answers and has no such move; a source that is down may.

    A source that is no member any more has none.
    """
    members = {shard.name: shard for shard in shard_map.shards}
    for shard in shard_map.shards:
        with suppress(MlpdError):
            note = connect(shard.url).cluster.moves()["arriving"]
            if note is None:
                continue
            # Only now: the source notes a move before its target does, and forgets it after it.
            source = members.get(note["shard"])
            leaving: Mapping[str, Any] | None = None
            if source is not None:
                leaving = connect(source.url).cluster.moves()["leaving"]
            if leaving is None or leaving["move"] != note["move"]:
                how = note["slots"], 0, note["move"], note["state"]
                yield Part(note["shard"], shard.name, *how)


def forget(shard_map: ShardMap, part: Part, connect: Connect) -> None:
    """Let the target forget an import of `leftovers`, with its rows and tiles.

    Where the map gives the slots to the target, all is there: it is finished.
    """
    is_out = shard_map.owner(parse_runs(part.slots)[0]).name == part.target
    step = "finish" if is_out else "cancel"
    ask(shard_map, part.target, connect, lambda c: c.arrive(step, part.move))
