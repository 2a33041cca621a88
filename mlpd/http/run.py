"""Running a daemon behind its HTTP server until a signal: `mlpd serve`."""

import asyncio
import gc
import logging
import signal
from collections.abc import Callable, Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from mlpd.core.allocator import set_up_allocator
from mlpd.core.config import Config
from mlpd.daemon.app import Daemon
from mlpd.http.api import build_routes
from mlpd.http.peers import HttpPeers
from mlpd.http.server import HttpServer

_log = logging.getLogger("mlpd")


class Beside(Protocol):
    """What talks to other daemons, beside the one that is served."""

    async def prepare(self, directory: Path) -> None:
        """Make the data directory ready for a daemon; nobody runs there."""

    async def run(self, daemon: Daemon, url: str) -> None:
        """Work until it is cancelled, while a daemon is served at a URL."""


async def serve(
    config: Config,
    directory: Path,
    on_ready: Callable[[str], None],
    beside: Beside | None = None,
) -> None:
    """Do what `serve_until` does until SIGTERM or SIGINT, then stop: drain, flush, close."""
    set_up_allocator()
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    await serve_until(stopping, config, directory, on_ready, beside)


async def serve_until(
    stopping: asyncio.Event,
    config: Config,
    directory: Path,
    on_ready: Callable[[str], None],
    beside: Beside | None = None,
) -> None:
    """Serve `directory` until `stopping` is set.

    A daemon whose role changes starts anew, on the same port.  `on_ready` is called once with the
    URL.  Raises UnavailableError for a port or directory in use, and what `beside` raises when it
    prepares.
    """
    while True:
        if beside is not None and not await _first(beside.prepare(directory), stopping):
            return
        port = await _serve(config, directory, on_ready, beside, stopping)
        if stopping.is_set():
            return
        on_ready = _log_ready
        config = replace(config, server=replace(config.server, port=port))


async def _serve(
    config: Config,
    directory: Path,
    on_ready: Callable[[str], None],
    beside: Beside | None,
    stopping: asyncio.Event,
) -> int:
    """Serve until a signal, or until the daemon has to start anew; return its port."""
    daemon = Daemon(directory, config, peers=HttpPeers())
    server = HttpServer(config.server, build_routes(daemon), daemon.monitor.observe_request)
    working: asyncio.Task[None] | None = None
    try:
        await server.start(daemon.paths.socket)
        daemon.lock.announce(server.url)
        await daemon.start()
        if beside is not None:
            working = asyncio.create_task(beside.run(daemon, server.url))
        gc.collect()
        gc.freeze()  # what the start has made stays; the collector need never look at it again
        on_ready(server.url)
        await _first(daemon.roles.changed.wait(), stopping)
        _log.info("stopping")
        daemon.refuse()
    finally:
        if working is not None:
            working.cancel()
            await asyncio.gather(working, return_exceptions=True)
        await server.stop()
        await daemon.stop()
    return urlsplit(server.url).port or 0


async def _first(work: Coroutine[Any, Any, object], stopping: asyncio.Event) -> bool:
    """Do some work; tell whether it ended before the signal, which cancels it."""
    task, signalled = asyncio.ensure_future(work), asyncio.ensure_future(stopping.wait())
    try:
        await asyncio.wait((task, signalled), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            task.result()
        return task.done()
    finally:
        task.cancel()
        signalled.cancel()
        await asyncio.gather(task, signalled, return_exceptions=True)


def _log_ready(url: str) -> None:
    _log.info("ready again at %s", url)
