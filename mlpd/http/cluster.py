"""Handlers of the cluster: the map that this daemon goes by, and how requests are split."""

import asyncio

from aiohttp import web

from mlpd.core.errors import ValidationError
from mlpd.core.media import OCTETS, PARQUET
from mlpd.core.routing import EPOCH_HEADER, ROUTING_HEADER, SLOTS_HEADER
from mlpd.daemon.app import Daemon
from mlpd.daemon.ownership import Ownership, Sender
from mlpd.daemon.routing import build_routing
from mlpd.experiments.guardrails import Breach
from mlpd.http.shapes import Field, Shape
from mlpd.http.wire import read_fields, respond, send_file

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


CHANGES_AFTER = Shape(
    {
        "cluster": Field("text", "The cluster of the member that asks.", required=True),
        "shard": Field("text", "Its name.", required=True),
        "after": Field("integer", "The revision that it has come to, 0 at first.", required=True),
        "wait_s": Field("number", "How long to wait for a change if there is none; 0 by default."),
        "why": Field("text", "What hinders it from going on."),
    }
)
CHANGES = Shape(
    {
        "revision": Field("integer", "Of the newest change."),
        "changes": Field(
            "any",
            "The first ones behind `after`, in order: revision, table, key, and the row as it is "
            "now, null if it is gone; of definitions their version and document.",
        ),
    }
)
STOP = Shape(
    {
        "experiment": Field("text", "The experiment.", required=True),
        "arm": Field("text", "The arm.", required=True),
        "guardrail": Field("text", "What was broken.", required=True),
        "reason": Field("text", "How.", required=True),
    }
)
HOME = Shape(
    {
        "definitions": Field("text", "Digest of those of whoever asks.", required=True),
        "epoch": Field("integer", "Of its map, 0 for none.", required=True),
        "copies": Field("flag", "Also those that have their home on another shard."),
    }
)
PART = Shape(
    {
        "what": Field(
            "text",
            "Of what.",
            required=True,
            choices=(
                *("performance", "drift", "experiment", "audit", "audit_run", "horizons"),
                *("units", "stats", "standing", "shadows"),
            ),
        ),
        "fields": Field(
            "object", "Which: model, version, route, name, outcomes, views ...", required=True
        ),
    }
)
GIVEN = Shape({"part": Field("any", "What adds up with those of other members.")})
STOPPED = Shape({"stopped": Field("text", "The arm.")})


class ClusterHandlers:
    """Shows and takes the map, and tells what members share."""

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

    async def changes(self, request: web.Request) -> web.Response:
        """Return what changed of all that members share, behind a revision; the arbiter's alone."""
        asked = await read_fields(request, CHANGES_AFTER)
        found = await self._daemon.shared.changes(
            *(asked["cluster"], asked["shard"], asked["after"]),
            wait_s=asked["wait_s"] or 0.0,
            why=asked["why"] or "",
        )
        return await respond(request, found, large=bool(found["changes"]))

    async def events(self, request: web.Request) -> web.StreamResponse:
        """Return the events of a source that have their home on this shard, as a Parquet file.

        Over all shards each event comes once; with `copies` all that lie here come.
        """
        asked = HOME.read_query(request.query)
        source = request.match_info["source"]
        gathering = self._daemon.gathering
        written = gathering.written(
            source, asked["definitions"], asked["epoch"], copies=bool(asked["copies"])
        )
        async with written as file:
            return await send_file(request, file, PARQUET, {})

    async def part(self, request: web.Request) -> web.Response:
        """Return this member's part of what all of them know: sums that add up, and audits."""
        fields = await read_fields(request, PART)
        part = await self._daemon.parts.give(fields["what"], fields["fields"])
        return await respond(request, {"part": part}, large=True)

    async def stop_arm(self, request: web.Request) -> web.Response:
        """Stop an arm of an experiment, for a member whose guardrail was broken."""
        fields = await read_fields(request, STOP)
        breach = Breach(fields["arm"], fields["guardrail"], fields["reason"])
        experiments, name = self._daemon.experiments, fields["experiment"]
        if breach.arm not in (weights := experiments.find(name).spec.weights):
            raise ValidationError(
                f"experiment {name!r} has no arm {breach.arm!r}",
                code="unknown_arm",
                hint=f"Its arms: {', '.join(weights)}.",
            )
        await experiments.stop_arm(name, breach)
        return await respond(request, {"stopped": fields["arm"]})

    async def blob(self, request: web.Request) -> web.StreamResponse:
        """Return a file of the registry by its digest, `sha256:` and 64 hex digits, verified."""
        blobs = self._daemon.registry.blobs
        file = await asyncio.to_thread(blobs.open, request.match_info["digest"])
        try:
            return await send_file(request, file, OCTETS, {})
        finally:
            file.close()
