"""Running a daemon behind its HTTP server until a signal: `mlpd serve`."""

import asyncio
import gc
import logging
import signal
from collections.abc import Callable
from pathlib import Path

from mlpd.core.allocator import set_up_allocator
from mlpd.core.config import Config
from mlpd.daemon.app import Daemon
from mlpd.http.api import build_routes
from mlpd.http.peers import HttpPeers
from mlpd.http.server import HttpServer

_log = logging.getLogger("mlpd")


async def serve(config: Config, directory: Path, on_ready: Callable[[str], None]) -> None:
    """Serve `directory` until SIGTERM or SIGINT, then stop gracefully: drain, flush, close.

    `on_ready` is called once with the URL.  Raises UnavailableError for a port or directory in use.
    """
    set_up_allocator()
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    daemon = Daemon(directory, config, peers=HttpPeers())
    server = HttpServer(config.server, build_routes(daemon), daemon.monitor.observe_request)
    try:
        await server.start(daemon.paths.socket)
        daemon.lock.announce(server.url)
        await daemon.start()
        gc.collect()
        gc.freeze()  # what the start has made stays; the collector need never look at it again
        on_ready(server.url)
        await stopping.wait()
        _log.info("stopping")
        daemon.refuse()
    finally:
        await server.stop()
        await daemon.stop()
