"""Handlers of the cluster: the map that this daemon goes by, and how requests are split."""

import asyncio

from aiohttp import web

from mlpd.core.routing import EPOCH_HEADER, ROUTING_HEADER, SLOTS_HEADER
from mlpd.daemon.app import Daemon
from mlpd.daemon.ownership import Ownership, Sender
from mlpd.daemon.routing import build_routing
from mlpd.http.shapes import Field, Shape
from mlpd.http.wire import read_fields, respond

NEW_MAP = Shape(
    {
        "map": Field("object", "The map, as docs/formats/shard_map.md describes.", required=True),
        "shard": Field("text", "This daemon's name in it.", required=True),
        "expected": Field(
            "integer", "Epoch of the map that it follows, 0 for none.", required=True
        ),
        "dry_run": Field("flag", "Change nothing; say what would be refused."),
    }
)
MAP = Shape(
    {
        "shard": Field("text", "This daemon's name, or null where there is no map."),
        "epoch": Field("integer", "Of the map, 0 where there is none."),
        "digest": Field("text", "Of the map, or null."),
        "map": Field("object", "The map, or null: this daemon owns every slot."),
    }
)
ROUTING = Shape(
    {
        "version": Field("text", "Changes with how events are split: send it as x-mlpd-routing."),
        "sources": Field("object", "Per source the entities that its events concern."),
        "services": Field("object", "Per service the entities whose views it reads."),
        "routes": Field("object", "The same per route."),
        "features": Field("object", "The same per view and transform."),
    }
)


def read_sender(request: web.Request, ownership: Ownership, *, changes: bool) -> Sender:
    """Return what the sender says of its map; raises as `Ownership.check_epoch`.  0.5 us."""
    epoch = request.headers.get(EPOCH_HEADER)
    if epoch is None:
        return _NOBODY
    by_map = ownership.check_epoch(epoch, changes=changes)
    slots = request.headers.get(SLOTS_HEADER)
    return Sender(by_map, request.headers.get(ROUTING_HEADER), slots)


_NOBODY = Sender()


class ClusterHandlers:
    """Shows and takes the map."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon

    async def show(self, request: web.Request) -> web.Response:
        """Return the map that this daemon goes by, and its own name in it."""
        return await respond(request, await asyncio.to_thread(self._daemon.ownership.to_dict))

    async def put(self, request: web.Request) -> web.Response:
        """Store a map, to go by it from now on; durable when answered.  The same may come again.

        One that is older, of another cluster, or that would hide what this daemon holds is refused
        (409).
        """
        fields = await read_fields(request, NEW_MAP)
        name, expected = fields["shard"], fields["expected"]
        dry_run = bool(fields["dry_run"])
        own = self._daemon.ownership
        done = await own.install(fields["map"], name, expected, dry_run=dry_run)
        return await respond(request, done)

    async def routing(self, request: web.Request) -> web.Response:
        """Return which entities events, services and routes concern: name, key columns, types."""
        catalog, routes = self._daemon.state.catalog, self._daemon.routes
        return await respond(request, build_routing(catalog, routes).to_dict())
