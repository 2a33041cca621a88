"""The HTTP server: the route table on a TCP port and a unix socket, with one boundary for errors.

Every request passes `_boundary`: guard, handler, then any error becomes its one shape.  A request
that fails for a reason of our own is logged with its traceback and answered 500.

When a client goes away, what it waited for is cancelled if the route is abandonable: work that
waits for a thread or a model is dropped unexecuted.  Every other request runs to its end.
"""

import asyncio
import contextlib
import errno
import logging
import os
import socket
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from aiohttp import web

from mlpd.core.config import ServerConfig
from mlpd.core.errors import InternalError, MlpdError, NotFoundError, UnavailableError
from mlpd.core.trace import TRACEPARENT, Span, set_span
from mlpd.http.connection import Door, Site
from mlpd.http.routes import Handler, Route
from mlpd.http.security import HostGuard
from mlpd.http.slow import SlowLog
from mlpd.http.wire import BODY_BYTES_MAX, check_length, encode_error

Observe = Callable[[str, int, float], None]
"""Called after every request with (route path, status, seconds)."""

_log = logging.getLogger("mlpd.http")
_SOCKET_MODE = 0o600
_SOCKET_PATH_BYTES_MAX = 107
"""What the kernel takes; a daemon in a deeper directory serves TCP alone."""
_CLIENT_GONE = 499
"""Status counted for a request whose client went away."""


class HttpServer:
    """Serves a route table; `start` and `stop` once each."""

    def __init__(self, config: ServerConfig, routes: Iterable[Route], observe: Observe) -> None:
        self._config = config
        self._guard = HostGuard(config)
        self._observe = observe
        self._slow = SlowLog(config.slow_request_us / 1e6)
        self._app = web.Application(client_max_size=config.body_bytes_max)
        self._app[BODY_BYTES_MAX] = config.body_bytes_max
        self._unattended: set[asyncio.Task[web.StreamResponse]] = set()
        routes = list(routes)
        self._door = Door(routes, observe)
        self._add_routes(routes)
        self._runner: web.AppRunner | None = None
        self._socket_path: Path | None = None
        self.url = ""

    async def start(self, socket_path: Path | None) -> None:
        """Listen; raises UnavailableError(code="port_in_use") naming the port.

        The unix socket, if there is to be one, gets mode 0600 before it accepts anybody.
        """
        tcp = _bind_tcp(self._config.host, self._config.port)
        self._runner = web.AppRunner(
            self._app,
            handle_signals=False,
            handler_cancellation=True,
            shutdown_timeout=self._config.drain_timeout_us / 1e6,
        )
        await self._runner.setup()
        await Site(self._runner, tcp, self._door).start()
        host, port = tcp.getsockname()[:2]
        self.url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        if socket_path is None:
            return
        if len(os.fsencode(socket_path)) + len(".tmp") > _SOCKET_PATH_BYTES_MAX:
            _log.warning("no unix socket: the path %s is too long for one", socket_path)
            return
        self._socket_path = socket_path
        await Site(self._runner, _bind_unix(socket_path), self._door).start()

    async def stop(self) -> None:
        """Stop accepting, wait for requests under way up to the drain timeout, close."""
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None
        for task in self._unattended:  # the drain timeout has passed
            task.cancel()
        await asyncio.gather(*self._unattended, return_exceptions=True)
        if self._socket_path is not None:
            self._socket_path.unlink(missing_ok=True)

    def _add_routes(self, routes: list[Route]) -> None:
        """Add routes path by path: aiohttp then compiles and looks up each path once."""
        by_path: dict[str, list[Route]] = {}
        for route in routes:
            by_path.setdefault(route.path, []).append(route)
        for path, group in by_path.items():
            for route in group:
                self._app.router.add_route(route.method, path, self._handler(route))
            refuse = _wrong_method([route.method for route in group])
            self._app.router.add_route("*", path, self._boundary(path, refuse))
        self._app.router.add_route("*", "/{path:.*}", self._boundary("unknown", _unknown_path))

    def _handler(self, route: Route) -> Handler:
        # What an admin asks for may take its time, and so may what only waits or computes.
        watched = route.scope != "admin" and not route.keeps_nothing
        streamed = bool(route.consumes)
        handler = self._boundary(route.path, route.handler, watched=watched, streamed=streamed)
        return handler if route.abandonable else self._to_the_end(handler)

    def _to_the_end(self, handler: Handler) -> Handler:
        """Return the handler so that it goes on when its client has gone; 4 us per request."""

        async def serve(request: web.Request) -> web.StreamResponse:
            task = asyncio.ensure_future(handler(request))
            self._unattended.add(task)
            task.add_done_callback(self._unattended.discard)
            return await asyncio.shield(task)

        return serve

    def _boundary(
        self, path: str, handler: Handler, *, watched: bool = False, streamed: bool = False
    ) -> Handler:
        check, observe, slow = self._guard.check, self._observe, self._slow

        async def serve(request: web.Request) -> web.StreamResponse:
            span = Span.begin(request.headers.get(TRACEPARENT))
            span.method = request.method
            set_span(span)
            status = _CLIENT_GONE
            try:
                response = await answer(request)
                status = response.status
            finally:
                seconds = time.perf_counter() - span.started_s
                observe(path, status, seconds)
                if watched and seconds >= slow.slow_s:
                    slow.note(request.method, path, status, seconds, span)
            if span.trace_id and not response.prepared:
                response.headers[TRACEPARENT] = span.traceparent
            return response

        async def answer(request: web.Request) -> web.StreamResponse:
            try:
                check(request)
                if not streamed:
                    check_length(request)
                return await handler(request)
            except MlpdError as error:
                return error_response(error, plain=_is_plain(request))
            except web.HTTPException as error:
                return error_response(_from_aiohttp(error), plain=_is_plain(request))
            except ConnectionError:
                raise
            except Exception:  # noqa: BLE001 - the one boundary: logged, counted, answered
                _log.exception("request failed: %s %s", request.method, path)
                return error_response(_bug(), plain=_is_plain(request))

        return serve


def error_response(error: MlpdError, *, plain: bool = False) -> web.Response:
    """Return the answer for an error, see `encode_error`."""
    body, headers = encode_error(error, plain=plain)
    return web.Response(body=body, status=error.status, headers=headers)


def _is_plain(request: web.Request) -> bool:
    return request.path.startswith("/v2")


def _wrong_method(allowed: list[str]) -> Handler:
    async def refuse(request: web.Request) -> web.StreamResponse:
        error = MlpdError(
            f"{request.method} is not allowed on {request.path}; use {', '.join(allowed)}",
            code="method_not_allowed",
            hint="/openapi.json lists every route.",
        )
        response = error_response(error, plain=_is_plain(request))
        response.set_status(405)
        response.headers["Allow"] = ", ".join(allowed)
        return response

    return refuse


async def _unknown_path(request: web.Request) -> web.StreamResponse:
    raise NotFoundError(
        f"there is nothing at {request.path}",
        code="unknown_path",
        hint="/openapi.json lists every route.",
    )


def _from_aiohttp(error: web.HTTPException) -> MlpdError:
    wrapped = MlpdError(error.text or error.reason, code="http_error")
    wrapped.status = error.status  # type: ignore[misc]  # this one answer's
    return wrapped


def _bug() -> InternalError:
    return InternalError(
        "the request failed for a reason of the daemon's own",
        hint="The daemon's log has the details; please report it.",
    )


def _bind_tcp(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        if error.errno not in (errno.EADDRINUSE, errno.EACCES):
            raise
        raise UnavailableError(
            f"port {port} on {host} is {'in use' if error.errno == errno.EADDRINUSE else 'denied'}",
            code="port_in_use",
            hint="Stop what uses it, or take another: --port 0 picks a free one.",
        ) from None
    return listener


def _bind_unix(path: Path) -> socket.socket:
    """Bind beside the final name, restrict, then rename: nobody connects before the mode is set."""
    temporary = path.with_suffix(".tmp")
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    with contextlib.suppress(FileNotFoundError):
        temporary.unlink()
    listener.bind(str(temporary))
    temporary.chmod(_SOCKET_MODE)
    os.replace(temporary, path)  # noqa: PTH105 - atomic, over a stale socket
    return listener
