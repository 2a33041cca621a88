"""Relay: a request handed on as it came, to one shard or to all; answers as they came back."""

import asyncio
import tempfile
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
from aiohttp import web

from mlpd.client import requests as r
from mlpd.cluster.router.members import Members
from mlpd.cluster.router.upstream import Until, Upstream
from mlpd.core.errors import UnavailableError
from mlpd.http.oip import HEADER_LENGTH
from mlpd.http.routes import Route
from mlpd.http.uploads import CHUNK_BYTES, receive_body
from mlpd.http.wire import BY, read_body, read_deadline

_FORWARDED = (
    *("Content-Type", "Accept", "Accept-Encoding", "Idempotency-Key"),
    *(BY, HEADER_LENGTH),
)
_NOT_RETURNED = frozenset(
    (
        *("connection", "keep-alive", "transfer-encoding", "content-length"),
        *("date", "server", "traceparent"),
    )
)
UPLOAD_BYTES_MAX = 1 << 30
"""Of a body that is written to a file; each daemon has a limit of its own below."""
SMALL_BYTES = 1 << 20
"""Answers up to here are held in memory."""
LONG_S = r.LONG_S
CALL_S = 60.0
_LONG_READS = frozenset(("/v1/features/history", "/v1/features/stats/{name}"))
"""What children of several shards work out."""

Body = bytes | Path | None


@dataclass(frozen=True, slots=True)
class _Sent:
    """What is handed on."""

    method: str
    path: str
    headers: Mapping[str, str]
    body: Body
    until: Until


class Relay:
    """Hands requests on; one per router.  `on_change` is called after a change was tried."""

    def __init__(self, members: Members, on_change: Callable[[], None]) -> None:
        self._members = members
        self._on_change = on_change

    async def any(self, request: web.Request, route: Route) -> web.StreamResponse:
        """Return the arbiter's answer, or another member's if the arbiter can't be reached."""
        return await self._first(request, route, self._members.all())

    async def arbiter(self, request: web.Request, route: Route) -> web.StreamResponse:
        """Return the arbiter's answer; of a change, when the members that follow have it."""
        try:
            return await self._first(request, route, self._members.all()[:1])
        finally:
            if route.method != "GET":
                self._on_change()

    async def _first(
        self, request: web.Request, route: Route, members: Sequence[Upstream]
    ) -> web.StreamResponse:
        """Return the answer of the first member that can be reached."""
        async with self._received(request, route) as sent:
            for member in members[:-1]:
                with suppress(UnavailableError):
                    return await _pass_on(request, member, sent)
            return await _pass_on(request, members[-1], sent)

    @asynccontextmanager
    async def _received(self, request: web.Request, route: Route) -> AsyncIterator[_Sent]:
        """Yield the request as it is handed on; a body that is a file is gone at the end."""
        deadline_s = read_deadline(request)
        headers = {n: request.headers[n] for n in _FORWARDED if n in request.headers}
        is_long = route.scope == "admin" or route.path in _LONG_READS
        until = Until.after(LONG_S if is_long else CALL_S, deadline_s)
        call = request.method, request.raw_path, headers
        if not route.consumes:
            body = await read_body(request) if request.can_read_body else None
            yield _Sent(*call, body, until)
            return
        with await asyncio.to_thread(tempfile.TemporaryDirectory, prefix="mlpd-router-") as folder:
            path = Path(folder) / "body"
            await receive_body(request, path, UPLOAD_BYTES_MAX)
            yield _Sent(*call, path, until)


@asynccontextmanager
async def _opened(body: Body) -> AsyncIterator[Any]:
    """Yield what aiohttp sends: of a file, as it is read."""
    if not isinstance(body, Path):
        yield body
        return
    with await asyncio.to_thread(body.open, "rb") as file:
        yield file


def _returned(headers: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in headers.items() if name.lower() not in _NOT_RETURNED}


async def _pass_on(request: web.Request, member: Upstream, sent: _Sent) -> web.StreamResponse:
    """Return a member's answer, a large one as it comes."""
    async with _opened(sent.body) as body:
        call = sent.method, sent.path, sent.headers, body, sent.until
        async with member.stream(*call) as found:
            headers, size = _returned(found.headers), found.content_length
            if size is not None and size <= SMALL_BYTES:
                return web.Response(body=await found.read(), status=found.status, headers=headers)
            return await _stream(request, found, headers)


async def _stream(
    request: web.Request, found: aiohttp.ClientResponse, headers: Mapping[str, str]
) -> web.StreamResponse:
    response = web.StreamResponse(status=found.status, headers=headers)
    if found.content_length is not None:
        response.content_length = found.content_length
    await response.prepare(request)
    try:
        async for part in found.content.iter_chunked(CHUNK_BYTES):
            await response.write(part)
        await response.write_eof()
    except (aiohttp.ClientError, TimeoutError) as error:
        # Whoever reads can't be told any more: the length tells that the rest is missing.
        raise ConnectionResetError(str(error)) from error
    return response
