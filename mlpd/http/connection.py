"""Connections: aiohttp's, but for requests of a crowd that is full, which are refused at once.

A refusal on the way of every request (task, route, handler, response) costs as much as a small
answer, and where four of five are refused it takes a quarter of the processor from the fifth.  Here
it costs to parse the request and to write.  Whole requests are refused so, on a connection that has
nothing else to do; others go the way of every request, and are refused there, in the same words.
"""

import asyncio
import re
import socket
import time
from collections.abc import Callable, Iterable
from typing import Any

from aiohttp import web
from aiohttp.http_parser import RawRequestMessage

from mlpd.core.errors import OverloadedError
from mlpd.core.trace import TRACEPARENT
from mlpd.http.routes import Route
from mlpd.http.wire import encode_error

_BACKLOG = 1024
_KEEPALIVE_S = 75.0
_LINE_BYTES_MAX = 8190


class Door:
    """Knows which requests are refused before anything looks at them, and in which words.

    `observe`: called with route, status and seconds, as for any other answer.
    """

    def __init__(self, routes: Iterable[Route], observe: Callable[[str, int, float], None]) -> None:
        crowds = [(route, route.limit) for route in routes if route.limit is not None]
        self._crowds = [
            (route.method, re.compile(re.sub(r"{\w+}", "[^/]+", route.path)), route.path, limit)
            for route, limit in crowds
        ]
        self._limits = tuple({id(limit): limit for _, limit in crowds}.values())
        self._observe = observe

    def refuse(self, message: RawRequestMessage) -> bytes | None:
        """Return the whole answer to a request whose crowd is full, else None; 0.3 us mostly.

        Nothing is told that would depend on the Host or Origin.  Traced requests, and the last on
        a connection, are left to the route.
        """
        if not any(limit.is_full for limit in self._limits):
            return None
        if message.should_close or TRACEPARENT in message.headers:
            return None
        started_s, path = time.perf_counter(), message.path.partition("?")[0]
        for method, pattern, name, limit in self._crowds:
            if method == message.method and pattern.fullmatch(path):
                try:
                    limit.check()
                except OverloadedError as error:
                    self._observe(name, error.status, time.perf_counter() - started_s)
                    return _answer(error, plain=path.startswith("/v2"))
        return None


class Site(web.BaseSite):
    """A bound socket, served with connections that have a door."""

    def __init__(self, runner: web.BaseRunner, bound: socket.socket, door: Door) -> None:
        super().__init__(runner, backlog=_BACKLOG)
        self._bound, self._door = bound, door

    @property
    def name(self) -> str:
        """Return the address."""
        return str(self._bound.getsockname())

    async def start(self) -> None:
        """Accept connections."""
        await super().start()
        self._server = await asyncio.get_running_loop().create_server(
            self._connect, sock=self._bound, backlog=_BACKLOG
        )

    def _connect(self) -> "Connection":
        server = self._runner.server
        assert server is not None
        return Connection(server, self._door)


class Connection(web.RequestHandler):
    """A connection of aiohttp's whose parser passes on only what isn't refused."""

    __slots__ = ("_door",)

    def __init__(self, server: web.Server, door: Door) -> None:
        super().__init__(
            server,
            loop=asyncio.get_running_loop(),
            access_log=None,  # type: ignore[arg-type]  # as aiohttp's runners say it
            keepalive_timeout=_KEEPALIVE_S,
            max_line_size=_LINE_BYTES_MAX,
        )
        self._door = door
        self._parser: Any = _Sieve(self._parser, self._refused)

    def _refused(self, message: RawRequestMessage, body: Any) -> bool:
        """Answer a request that is refused; whether it was."""
        transport, waiter = self.transport, self._waiter
        is_idle = waiter is not None and not waiter.done() and not self._messages
        if not is_idle or not body.is_eof() or transport is None:
            return False
        if transport.get_write_buffer_size():  # who doesn't read has to wait, as everybody
            return False
        answer = self._door.refuse(message)
        if answer is None:
            return False
        transport.write(answer)
        self._next_keepalive_close_time = self._loop.time() + _KEEPALIVE_S
        return True


class _Sieve:
    """A parser without the requests that are refused."""

    def __init__(self, parser: Any, refused: Callable[[RawRequestMessage, Any], bool]) -> None:
        self._parser, self._refused = parser, refused
        self.message_consumed = parser.message_consumed

    def feed_data(self, data: bytes) -> tuple[list[Any], bool, bytes]:
        """Do as aiohttp's parsers."""
        messages, upgraded, tail = self._parser.feed_data(data)
        if len(messages) == 1 and self._refused(*messages[0]):
            messages = []
            self.message_consumed()
        return messages, upgraded, tail

    def __getattr__(self, name: str) -> Any:
        return getattr(self._parser, name)


def _answer(error: OverloadedError, *, plain: bool) -> bytes:
    body, headers = encode_error(error, plain=plain)
    fields = {**headers, "Content-Length": str(len(body))}
    lines = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
    return f"HTTP/1.1 {error.status} Service Unavailable\r\n{lines}\r\n".encode() + body
