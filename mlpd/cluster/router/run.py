"""Running a router behind its HTTP server until a signal: `mlpd router`."""

import asyncio
import logging
import signal
from collections.abc import Callable

from mlpd.cluster.router.app import Router, RouterConfig
from mlpd.http.server import HttpServer

_log = logging.getLogger("mlpd.router")


async def serve(config: RouterConfig, on_start: Callable[[str, Router], None]) -> None:
    """Serve until SIGTERM or SIGINT, then let requests under way end.

    `on_start` is called once with the URL, also while no shard answers yet.  Raises
    UnavailableError for a port in use, ConfigurationError for shards that can't be one cluster's.
    """
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    router = Router(config)
    server = HttpServer(config.server, router.routes, router.metrics.observe)
    try:
        await server.start(None)
        await router.start()
        on_start(server.url, router)
        await stopping.wait()
        _log.info("stopping")
        router.refuse()
    finally:
        await server.stop()
        await router.stop()
