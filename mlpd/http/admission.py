"""Admission: whether a crowd has room is asked before a body is read, and taken when it is there.

A client that sends its body slowly takes nobody's place.  Of the requests that come in one turn of
the loop all but the first wait for the next turn before they work, so that those beyond the limit
hear so at once, and the time of the others is what the whole crowd took.
"""

import asyncio
import time

from aiohttp import web

from mlpd.core.errors import DeadlineExceededError
from mlpd.core.limits import AdaptiveLimit
from mlpd.http.routes import Handler


class Turn:
    """Knows whether a request has come in this turn of the loop; one for all crowds."""

    def __init__(self) -> None:
        self._taken = False

    async def wait(self) -> None:
        """Return at once for the first request of a turn, in the next turn for the others."""
        if self._taken:
            await asyncio.sleep(0)
        else:
            self._taken = True
            asyncio.get_running_loop().call_soon(self._end)

    def _end(self) -> None:
        self._taken = False


class _Permit:
    __slots__ = ("_began_s", "_limit", "_turn", "may_take_s")

    def __init__(self, limit: AdaptiveLimit, turn: Turn) -> None:
        self._limit, self._turn = limit, turn
        self._began_s: float | None = None
        self.may_take_s: float | None = None

    async def enter(self) -> None:
        self._limit.enter()
        self._began_s = time.monotonic()
        await self._turn.wait()

    def leave(self, *, late: bool = False) -> None:
        if self._began_s is not None:
            may_take_s = 0.0 if late else self.may_take_s
            self._limit.leave_after(self._began_s, time.monotonic(), may_take_s=may_take_s)
            self._began_s = None

    def give_up(self) -> None:
        if self._began_s is not None:
            self._limit.leave()
            self._began_s = None


_PERMIT = web.RequestKey("permit", _Permit)


async def admit(
    request: web.Request, handler: Handler, limit: AdaptiveLimit, turn: Turn
) -> web.StreamResponse:
    """Return the handler's answer if the limit has room; about 3 us.

    Raises OverloadedError(code="too_many_requests"), here or when the body has been read.
    """
    limit.check()
    permit = request[_PERMIT] = _Permit(limit, turn)
    try:
        response = await handler(request)
    except DeadlineExceededError:
        permit.leave(late=True)
        raise
    except BaseException:
        permit.give_up()
        raise
    permit.leave()
    return response


def note_patience(request: web.Request, wait_s: float) -> None:
    """Let the limit know how long the caller waits; a request may take a quarter of that.

    Under load it lay in a socket for as long again, or twice, before anybody saw it.
    """
    permit = request.get(_PERMIT)
    if permit is not None:
        permit.may_take_s = wait_s / 4.0


async def enter(request: web.Request) -> None:
    """Take the request's place in its crowd; whoever reads a body calls it with the body there."""
    permit = request.get(_PERMIT)
    if permit is not None:
        await permit.enter()


def step_aside(request: web.Request) -> None:
    """Leave the crowd: what follows takes long, and nothing from the others."""
    permit = request.get(_PERMIT)
    if permit is not None:
        permit.leave()
