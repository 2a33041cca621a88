"""Pages of events over shards: one shard's log after the other's, each event from its home alone.

There is no order between shards, so a router counts sequences of its own: epoch, place of the shard
in the map, and the sequence in its log, in one integer.  They ascend, and are good for one epoch.
"""

import asyncio
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from aiohttp import web

from mlpd.client import requests as r
from mlpd.cluster.router.members import Members
from mlpd.cluster.router.upstream import Until, Upstream
from mlpd.core.errors import ConflictError, MlpdError, UnavailableError
from mlpd.core.media import ARROW, MSGPACK
from mlpd.daemon.pages import ARROW_ROWS_MAX, MAX_SEQUENCE
from mlpd.http.events import PAGE_OPTIONS
from mlpd.http.wire import read_deadline, respond

_LOG_BITS, _PLACE_BITS, _EPOCH_BITS = 40, 10, 12
"""A trillion events on each of 1,000 shards; an epoch that is 4,096 later passes for the same."""


@dataclass(frozen=True, slots=True, order=True)
class Place:
    """Where a page begins or ends: in which shard's log, behind which sequence."""

    shard: int
    sequence: int

    def number(self, epoch: int) -> int:
        """Return it as a client sees it."""
        return base_of(self.shard, epoch) + self.sequence


def base_of(shard: int, epoch: int) -> int:
    """Return what a shard's sequences are counted from."""
    return ((epoch % (1 << _EPOCH_BITS)) << _PLACE_BITS | shard) << _LOG_BITS


def place_of(number: int, epoch: int, shards: int) -> Place:
    """Return the place of a number; raises ConflictError(code="epoch_moved") for another map's."""
    found = Place((number >> _LOG_BITS) % (1 << _PLACE_BITS), number % (1 << _LOG_BITS))
    if found.number(epoch) != number or found.shard >= shards:
        raise ConflictError(
            "the sequence is of another map: slots have moved, and events with them",
            code="epoch_moved",
            hint="Begin again without it; sequences of a router hold until the map changes.",
        )
    return found


class EventPageHandlers:
    """Gives out events; one per router."""

    def __init__(self, members: Members) -> None:
        self._members = members

    async def page(self, request: web.Request) -> web.Response:
        """Return stored events of a source, page by page, shard by shard in the order of its log.

        Sequences are this router's numbers.  A page may have fewer rows than its limit, or none,
        before the last one; as an Arrow IPC stream only the last one has fewer.
        """
        options = PAGE_OPTIONS.read_query(request.query)
        until = Until.after(r.LONG_S, read_deadline(request))
        reading = _Reading(self._members, request.match_info["source"], options, until)
        if ARROW in request.headers.get("Accept", ""):
            return web.Response(body=await reading.arrow(), content_type=ARROW)
        return await respond(request, await reading.page(), large=True)


class _Reading:
    """One request's walk over the shards, by one map."""

    def __init__(
        self, members: Members, source: str, options: Mapping[str, Any], until: Until
    ) -> None:
        self._members, self._until = members, until
        self._shards: Sequence[Upstream] = members.all()
        self._source, self._options, self._epoch = source, options, members.epoch
        after, through = options["after"], options["through"]
        asked_by = self._epoch, len(self._shards)
        self._after = place_of(after, *asked_by) if after else Place(0, 0)
        self._through = None if through is None else place_of(through, *asked_by)

    async def page(self) -> dict[str, Any]:
        """Return a page of the shard that `after` is on, and where the next one begins."""
        through = self._through
        if through is None:
            last = len(self._shards) - 1
            newest = await self._ask(last, MAX_SEQUENCE, None, 1)
            through = Place(last, newest["through"])
        at = self._after
        if at >= through:
            found = await self._ask(at.shard, MAX_SEQUENCE, None, 1)
            end = through.number(self._epoch)
            return {**found, "sequence": end, "through": end}
        bound = through.sequence if at.shard == through.shard else None
        found = await self._ask(at.shard, at.sequence, bound, self._options["limit"])
        is_over = found["sequence"] >= found["through"] and at.shard < through.shard
        reached = Place(at.shard + 1, 0) if is_over else Place(at.shard, found["sequence"])
        told = {"sequence": reached.number(self._epoch), "through": through.number(self._epoch)}
        return {**found, **told}

    async def arrow(self) -> bytes:
        """Return a page of as many shards as it takes."""
        limit = self._options["limit"]
        left = ARROW_ROWS_MAX if limit is None else limit
        last = Place(len(self._shards) - 1, MAX_SEQUENCE)
        at, through = self._after, self._through or last
        bodies: list[bytes] = []
        while True:
            bound = through.sequence if at.shard == through.shard else None
            body = await self._fetch(at.shard, at.sequence, bound, left)
            bodies.append(body)
            left -= await asyncio.to_thread(_rows_of, body)
            if left <= 0 or at.shard >= through.shard:
                return await asyncio.to_thread(_concat, bodies)
            at = Place(at.shard + 1, 0)

    async def _ask(
        self, shard: int, after: int, through: int | None, limit: int | None
    ) -> dict[str, Any]:
        asked = self._request(shard, after, through, limit)
        found: Any = await self._members.ask(self._shards[shard], asked, self._until)
        return dict(_told(self._shards[shard], found))

    async def _fetch(self, shard: int, after: int, through: int | None, limit: int) -> bytes:
        asked = self._request(shard, after, through, limit, accept=ARROW)
        found = await self._members.fetch(self._shards[shard], asked, self._until)
        body: bytes = _told(self._shards[shard], found).body
        return body

    def _request(
        self,
        shard: int,
        after: int,
        through: int | None,
        limit: int | None,
        *,
        accept: str = MSGPACK,
    ) -> r.Request:
        query = {
            **{name: self._options[name] for name in ("start", "end")},
            "after": after,
            "through": through,
            "limit": limit,
            "epoch": self._epoch,
            "numbered_from": base_of(shard, self._epoch),
        }
        return r.Request("GET", r.build_path(("v1", "events", self._source), query), accept=accept)


def _told(shard: Upstream, found: Any) -> Any:
    if isinstance(found, UnavailableError):
        raise UnavailableError(
            f"shard {shard.name} doesn't give its events: {found.message}",
            code="part_missing",
            hint="Ask for the same page again when mlpd shard status shows that shard.",
            details={"shard": shard.name, "why": found.code},
        )
    if isinstance(found, MlpdError):
        raise found
    return found


def _rows_of(body: bytes) -> int:
    import polars as pl  # noqa: PLC0415 - takes 0.1 s, and few ask for pages

    return len(pl.read_ipc_stream(body))


def _concat(bodies: Sequence[bytes]) -> bytes:
    import polars as pl  # noqa: PLC0415 - as above

    if len(bodies) == 1:
        return bodies[0]
    buffer = io.BytesIO()
    pl.concat([pl.read_ipc_stream(body) for body in bodies]).write_ipc_stream(buffer)
    return buffer.getvalue()
