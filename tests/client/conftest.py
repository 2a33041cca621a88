"""An HTTP server of a few routes, which do what a test tells them."""

import asyncio
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from mlpd.core.config import ServerConfig
from mlpd.core.errors import MlpdError, UnavailableError
from mlpd.http.routes import Route
from mlpd.http.server import HttpServer
from mlpd.http.wire import read_value, respond


@dataclass
class Stub:
    """Answers any call with what was called; `failures` are raised first, one per call."""

    url: str = ""
    socket_url: str = ""
    failures: list[MlpdError] = field(default_factory=list)
    calls: list[dict[str, Any]] = field(default_factory=list)
    runs: list[dict[str, Any]] = field(default_factory=list)
    delay_s: float = 0.0

    async def answer(self, request: web.Request) -> web.Response:
        body: Any = None
        if request.content_type == "application/msgpack":
            body = await read_value(request)
        else:
            await request.read()  # an answer before its end would end an upload
        called = {
            "method": request.method,
            "path": request.path,
            "body": body,
            "query": dict(request.query),
            "headers": dict(request.headers),
        }
        self.calls.append(called)
        await asyncio.sleep(self.delay_s)
        if self.failures:
            raise self.failures.pop(0)
        if request.path.startswith("/v1/runs/") and self.runs:
            return await respond(request, self.runs.pop(0))
        return await respond(request, {"method": request.method, "path": request.path})


PATHS = (
    *("/readyz", "/metrics", "/v1/{a}", "/v1/{a}/{b}", "/v1/{a}/{b}/{c}", "/v1/{a}/{b}/{c}/{d}"),
    *("/v1/{a}/{b}/{c}/{d}/{e}", "/v1/{a}/{b}/{c}/{d}/{e}/{f}"),
)


@pytest.fixture
def stub(tmp_path: Path) -> Iterator[Stub]:
    found, up, stop = Stub(), threading.Event(), asyncio.Event()
    loops: list[asyncio.AbstractEventLoop] = []
    methods = ("GET", "POST", "PUT", "DELETE")
    routes = [Route(m, path, "read", found.answer) for path in PATHS for m in methods]

    async def main() -> None:
        config = ServerConfig(port=0, drain_timeout_us=100_000)
        server = HttpServer(config, routes, lambda *_: None)
        await server.start(tmp_path / "s.sock")
        found.url, found.socket_url = server.url, f"unix:{tmp_path / 's.sock'}"
        loops.append(asyncio.get_running_loop())
        up.set()
        await stop.wait()
        await server.stop()

    thread = threading.Thread(target=lambda: asyncio.run(main()))
    thread.start()
    assert up.wait(40)
    yield found
    loops[0].call_soon_threadsafe(stop.set)
    thread.join(40)


@pytest.fixture
def overloaded() -> UnavailableError:
    return UnavailableError("busy", code="overloaded", details={"retry_after_s": 0.01})
