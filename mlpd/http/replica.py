"""Handlers of followers: the feed of commits, files, and the steps of a promotion.

`mlpd serve --follow` and `mlpd shard promote` call them as docs/paths/replica.md tells.
"""

import asyncio
import math
from typing import Any

from aiohttp import web

from mlpd.core.convert import INT64_MAX
from mlpd.core.errors import ConflictError, NotFoundError, ValidationError
from mlpd.core.shards import ShardMap, decode_map
from mlpd.daemon.app import Daemon
from mlpd.http.shapes import Field, Shape
from mlpd.http.wire import read_fields, respond
from mlpd.storage.tables import Head

URL_CHARS_MAX = 500

FEED = Shape(
    {
        "after": Field(
            "text", "The head of the newest commit that is there, 64 hex digits.", required=True
        ),
        "follower": Field("text", "The follower's URL, as the map has it.", required=True),
        "ticket": Field("integer", "That of the answer before, to promise by; null for none."),
        "wait": Field("flag", "Wait a quarter of a second for a commit, if there is none."),
    }
)
COMMITS = Shape(
    {
        "commits": Field("any", "Records, as docs/formats/feed.md describes; bytes."),
        "head": Field("text", "Of the newest commit of the owner, 64 hex digits."),
        "epoch": Field("integer", "Of the owner's map."),
        "ticket": Field("integer", "To be sent with the next question."),
        "lease_us": Field("integer", "For how long that question promises."),
    }
)
SNAPSHOT = Shape(
    {
        "snapshot": Field("text", "To fetch files by."),
        "sequence": Field("integer", "The newest event in it."),
        "files": Field("rows", "Of each file path, size_bytes and digest."),
    }
)
FILE = Shape(
    {
        "path": Field("text", "Below the snapshot, or the data directory.", required=True),
        "offset": Field("integer", "Where to begin, bytes.", required=True),
        "snapshot": Field("text", "Of which snapshot; null: as the daemon has it now."),
    }
)
PART = Shape(
    {
        "data": Field("any", "Up to 4 MiB, as bytes."),
        "size_bytes": Field("integer", "Of the whole file."),
    }
)
REMOVED = Shape({"removed": Field("text", "Its id.")})
ROLE = Shape(
    {
        "role": Field("text", "owner, paused, follower, standing or fenced."),
        "url": Field("text", "Of the owner, or of who takes its place; or null."),
        "token": Field("text", "Of a pause; or null."),
        "started": Field("flag", "False while it is about to start anew as the owner."),
        "shard": Field("text", "Its name in the map, or null."),
        "epoch": Field("integer", "Of its map."),
        "sequence": Field("integer", "The newest event."),
        "head": Field("text", "Of the newest commit, 64 hex digits."),
        "since": Field("integer", "The newest event when it was promoted, 0 if it never was."),
        "fence": Field("texts", "URLs of former owners that were not told yet."),
        "lease_s": Field("number", "Of an owner; 0: it needs none."),
        "wait_s": Field("number", "For how long a follower has promised not to be promoted."),
        "lag_rows": Field("integer", "Of a follower: rows that the owner had more."),
        "staleness_ms": Field("integer", "Of a follower: since it had everything; or null."),
        "trouble": Field("text", "Why a follower doesn't come on, or null."),
        "followers": Field("rows", "Of an owner: url, lag_rows and lag_s of each."),
    }
)
STEP = Shape(
    {
        "step": Field(
            "text",
            "What is to be done.",
            required=True,
            choices=("pause", "resume", "fence", "stand", "promote"),
        ),
        "url": Field("text", "To pause: of the follower that takes the place."),
        "map": Field("object", "To fence and to promote: the map that says so."),
        "head": Field(
            "text", "To promote: where the owner stopped, 64 hex digits; null: it is lost."
        ),
        "token": Field("text", "To pause: its name. To resume, to fence: only that pause."),
    }
)


class ReplicaHandlers:
    """Feeds followers, and changes roles."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon

    async def feed(self, request: web.Request) -> web.Response:
        """Return the commits that follow one, for a follower; 409 feed_gone if they are gone."""
        fields = await read_fields(request, FEED)
        found = await self._daemon.feeding.commits(
            Head.parse(fields["after"]),
            fields["follower"][:URL_CHARS_MAX],
            fields["ticket"],
            wait=bool(fields["wait"]),
        )
        return await respond(request, found, large=True)

    async def snapshot(self, request: web.Request) -> web.Response:
        """Make a backup for a follower to start from, and keep commits from then on."""
        return await respond(request, await self._daemon.feeding.snapshot())

    async def file(self, request: web.Request) -> web.Response:
        """Return a part of a file, of a snapshot or as the daemon has it."""
        fields = await read_fields(request, FILE)
        offset = fields["offset"]
        if not 0 <= offset <= INT64_MAX:
            raise ValidationError(f"{offset} is no offset", code="invalid_offset")
        found = await self._daemon.feeding.file(fields["snapshot"], fields["path"], offset)
        return await respond(request, found, large=True)

    async def forget(self, request: web.Request) -> web.Response:
        """Remove a snapshot that was fetched."""
        snapshot = request.match_info["id"]
        await self._daemon.feeding.forget(snapshot)
        return await respond(request, {"removed": snapshot})

    async def show(self, request: web.Request) -> web.Response:
        """Return what this daemon is to its shard, and how far behind followers are."""
        return await respond(request, await asyncio.to_thread(self._describe))

    async def step(self, request: web.Request) -> web.Response:
        """Make the daemon take a step of a promotion; one that was taken may be asked for again."""
        fields = await read_fields(request, STEP)
        step, roles = fields["step"], self._daemon.roles
        if step == "pause":
            await self._pause(_needed(fields, "url"), _needed(fields, "token"))
        elif step == "resume":
            await roles.resume(fields["token"])
        elif step == "stand":
            await roles.stand()
        else:
            new = await asyncio.to_thread(decode_map, _needed(fields, "map"))
            if step == "fence":
                await roles.fence(new, self._daemon.ownership.adopt, token=fields["token"])
            else:
                await self._promote(new, fields["head"])
        return await respond(request, await asyncio.to_thread(self._describe))

    async def _pause(self, url: str, token: str) -> None:
        daemon = self._daemon
        if url not in daemon.roles.replicas():
            raise NotFoundError(
                f"{url} is no follower in the map of this daemon",
                code="unknown_replica",
                hint="mlpd shard replicas SHARD URL... writes followers into the map.",
            )
        moves = daemon.ownership.moves
        if moves.leaving is not None or moves.arriving is not None:
            raise ConflictError(
                "slots of this daemon move just now",
                code="move_under_way",
                hint="Finish that by the same mlpd shard move, or mlpd shard cancel it.",
            )
        await daemon.roles.pause(url, token)

    async def _promote(self, new: ShardMap, head: str | None) -> None:
        daemon, found = self._daemon, self._daemon.tailing.head
        if daemon.roles.role.follows and head not in (None, found.text):
            raise ConflictError(
                "this follower isn't where the owner has stopped",
                code="replica_behind",
                hint="mlpd shard promote waits for that.",
                details={"sequence": found.sequence},
            )
        adopt, since = daemon.ownership.adopt, int(found.sequence)
        await daemon.roles.promote(new, adopt, since=since, lost=head is None)

    def _describe(self) -> dict[str, Any]:
        daemon, tailing = self._daemon, self._daemon.tailing
        head, stale_s = tailing.head, tailing.staleness_s
        member = daemon.ownership.member
        follows = daemon.roles.role.follows
        lags = sorted(daemon.feeding.lags().items())
        return {
            **daemon.roles.describe(),
            "shard": None if member is None else member.shard,
            "epoch": daemon.ownership.epoch,
            "sequence": int(head.sequence),
            "head": head.text,
            "lag_rows": tailing.lag_rows,
            "staleness_ms": round(stale_s * 1e3) if follows and math.isfinite(stale_s) else None,
            "trouble": tailing.trouble,
            "followers": [{"url": u, "lag_rows": rows, "lag_s": s} for u, (rows, s) in lags],
        }


def _needed(fields: dict[str, Any], name: str) -> Any:
    if fields[name] is None:
        raise ValidationError(f"{name!r} is missing for this step", code="missing_field")
    return fields[name]
