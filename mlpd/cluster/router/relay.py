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
from mlpd.core.errors import ConflictError, MlpdError, UnavailableError
from mlpd.http.experiments import RESULT
from mlpd.http.oip import HEADER_LENGTH
from mlpd.http.routes import Route
from mlpd.http.uploads import CHUNK_BYTES, receive_body
from mlpd.http.versions import ONE_VERSION
from mlpd.http.wire import BY, read_body, read_deadline, respond

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
PING_S = 2.0
LONG_S = r.LONG_S
CALL_S = 60.0

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
        """Return the arbiter's answer."""
        return await self._first(request, route, self._members.all()[:1])

    async def all(self, request: web.Request, route: Route) -> web.StreamResponse:
        """Return the arbiter's answer once all members have done what is asked.

        Raises UnavailableError: `member_unavailable` with nothing done, `not_everywhere` if some
        members have done it and others not; ConflictError(code="members_differ") if a version got
        different numbers.
        """
        arbiter, *others = members = self._members.all()
        async with self._received(request, route) as sent:
            await _ping(members)
            try:
                first = await _send(arbiter, sent)
                if not others or first.status >= 400:  # noqa: PLR2004 - the statuses of errors
                    return _response(first)
                rest = await asyncio.gather(*(_try(member, sent) for member in others))
            finally:
                self._on_change()
        _check_done(members, [first, *rest])
        if route.answer is ONE_VERSION:
            _check_same(members, [first, *rest])
        if route.answer is RESULT:
            # What the arbiter's units say alone would pass for what all of them do.
            answer = {**r.read_answer(first), "result": None, "preference": None}
            return await respond(request, answer)
        return _response(first)

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
        until = Until.after(LONG_S if route.scope == "admin" else CALL_S, deadline_s)
        call = request.method, request.raw_path, headers
        if not route.consumes:
            body = await read_body(request) if request.can_read_body else None
            yield _Sent(*call, body, until)
            return
        with await asyncio.to_thread(tempfile.TemporaryDirectory, prefix="mlpd-router-") as folder:
            path = Path(folder) / "body"
            await receive_body(request, path, UPLOAD_BYTES_MAX)
            yield _Sent(*call, path, until)


async def _ping(members: Sequence[Upstream]) -> None:
    """Raise UnavailableError(code="member_unavailable") unless all members are ready."""
    ready = r.Request("GET", "/readyz")
    asked = (_try_ask(member, ready, Until.after(PING_S)) for member in members)
    found = await asyncio.gather(*asked)
    wrong = {m.name: error.to_dict() for m, error in zip(members, found, strict=True) if error}
    if wrong:
        raise UnavailableError(
            f"{', '.join(sorted(wrong))} can't take part, and all members have to; nothing was "
            "changed",
            code="member_unavailable",
            hint="Try again when all of them answer; mlpd shard status shows who does.",
            details={"failed": wrong},
        )


async def _try_ask(member: Upstream, request: r.Request, until: Until) -> MlpdError | None:
    try:
        r.read_answer(await member.ask(request, until))
    except MlpdError as error:
        return error
    return None


async def _send(member: Upstream, sent: _Sent) -> r.Answer:
    """Return a member's answer as a whole: those to changes are small."""
    async with _opened(sent.body) as body:
        call = sent.method, sent.path, sent.headers, body, sent.until
        async with member.stream(*call) as response:
            headers = {name.lower(): value for name, value in response.headers.items()}
            return r.Answer(response.status, headers, await response.read())


async def _try(member: Upstream, sent: _Sent) -> r.Answer | MlpdError:
    try:
        return await _send(member, sent)
    except MlpdError as error:
        return error


@asynccontextmanager
async def _opened(body: Body) -> AsyncIterator[Any]:
    """Yield what aiohttp sends: of a file, as it is read."""
    if not isinstance(body, Path):
        yield body
        return
    with await asyncio.to_thread(body.open, "rb") as file:
        yield file


def _check_done(members: Sequence[Upstream], answers: Sequence[r.Answer | MlpdError]) -> None:
    failed: dict[str, MlpdError] = {}
    for member, answer in zip(members, answers, strict=True):
        if isinstance(answer, MlpdError):
            failed[member.name] = answer
        elif answer.status >= 400:  # noqa: PLR2004 - the statuses of errors
            failed[member.name] = r.read_error(answer)
    if not failed:
        return
    done = [member.name for member in members if member.name not in failed]
    first = next(iter(failed.values()))
    raise UnavailableError(
        f"it is done on {', '.join(done)}, but not on {', '.join(failed)}: {first.message}",
        code="not_everywhere",
        hint=first.hint or "Send the same call again: what is done stays done.",
        details={"done": done, "failed": {name: e.to_dict() for name, e in failed.items()}},
    )


def _check_same(members: Sequence[Upstream], answers: Sequence[Any]) -> None:
    """Raise ConflictError(code="members_differ") if members gave a version different numbers."""
    values = [r.read_answer(answer)["version"] for answer in answers]
    numbers = {m.name: v["number"] for m, v in zip(members, values, strict=True)}
    if len(set(numbers.values())) > 1:
        raise ConflictError(
            "the members had different versions before, so that this one has different numbers",
            code="members_differ",
            hint="Bring the missing versions to each member: mlpd models export and import --url.",
            details={"versions": numbers},
        )


def _response(answer: r.Answer) -> web.Response:
    return web.Response(body=answer.body, status=answer.status, headers=_returned(answer.headers))


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
