"""Forwarding: what one member decides for all is handed on to it, and has come everywhere then.

docs/paths/follow.md tells the way.
"""

from collections.abc import Mapping
from typing import Any

from aiohttp import web

from mlpd.core.errors import UnavailableError
from mlpd.core.shards import Shard
from mlpd.daemon.app import Daemon
from mlpd.http.peers import HttpPeers
from mlpd.http.routes import Handler, Route
from mlpd.http.wire import BY, read_by

FORWARDED_BY, REVISION = "x-mlpd-forwarded-by", "x-mlpd-revision"
"""Headers: the member that hands a request on; the arbiter's revision behind what it answers."""
LONG_S = 900.0
"""What a change may take that builds views or loads models."""
REACH_S = 10.0
_HANDED_ON = ("Content-Type", "Accept", "Idempotency-Key")
_HANDED_BACK = ("Content-Type", "Retry-After", "Content-Security-Policy", REVISION)


def decided_by_arbiter(route: Route, handler: Handler, daemon: Daemon) -> Handler:
    """Return the handler of a shared route: the daemon's own at the arbiter, elsewhere the hop.

    A change is answered when the members that follow have it.
    """

    async def serve(request: web.Request) -> web.StreamResponse:
        arbiter = daemon.shared.arbiter
        if arbiter is not None:
            return await _hand_on(request, arbiter, daemon)
        answer = await handler(request)
        if route.method != "GET" and not answer.prepared:
            revision = daemon.shared.revision()
            await daemon.shared.spread(revision)
            answer.headers[REVISION] = str(revision)
        return answer

    return serve


async def _hand_on(request: web.Request, arbiter: Shard, daemon: Daemon) -> web.Response:
    member = daemon.ownership.member
    assert member is not None  # else there were no arbiter
    if FORWARDED_BY in request.headers:
        raise UnavailableError(
            f"shard {request.headers[FORWARDED_BY][:100]} takes this one for the arbiter, and "
            f"{arbiter.name} is it by the map of epoch {member.shard_map.epoch}",
            code="map_behind",
            hint="Try again shortly; mlpd shard status shows who is behind.",
        )
    headers = {name: request.headers[name] for name in _HANDED_ON if name in request.headers}
    headers |= {FORWARDED_BY: member.shard, BY: read_by(request)}
    body: Any = request.content if request.can_read_body else None
    peers = daemon.peers
    assert isinstance(peers, HttpPeers)  # whoever serves HTTP has them
    try:
        async with peers.open(
            *(arbiter.url, request.method, request.raw_path, headers, body), timeout_s=LONG_S
        ) as found:
            answer = web.Response(
                body=await found.read(), status=found.status, headers=_returned(found.headers)
            )
    except UnavailableError as error:
        raise _unreachable(arbiter, error) from None
    if REVISION in answer.headers and not daemon.following.why:
        await daemon.following.reach(int(answer.headers[REVISION]), REACH_S)
    return answer


def _returned(headers: Mapping[str, str]) -> dict[str, str]:
    return {name: headers[name] for name in _HANDED_BACK if name in headers}


def _unreachable(arbiter: Shard, error: UnavailableError) -> UnavailableError:
    unsure = "" if error.code == "unreachable" else "; it is not known whether it was done"
    return UnavailableError(
        f"shard {arbiter.name} at {arbiter.url} decides this for all members and gave no answer: "
        f"{error.message}{unsure}",
        code="arbiter_unreachable",
        hint="What is there goes on being served; change it when mlpd shard status shows that "
        "shard again.",
        details={"shard": arbiter.name, "why": error.code},
    )
