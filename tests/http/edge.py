"""A real daemon behind its HTTP server on port 0, on a loop in a thread of its own."""

import asyncio
import http.client
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from mlpd import Aggregate, Entity, FeatureService, FeatureView, Job, Source, Spine, WindowView
from mlpd.client import Client
from mlpd.core.config import (
    Config,
    LimitsConfig,
    MonitoringConfig,
    RegistryConfig,
    ServerConfig,
    TrainingConfig,
)
from mlpd.core.definitions import build_document
from mlpd.core.time import DAY_US, SECOND_US
from mlpd.daemon.app import Daemon
from mlpd.http.api import build_routes
from mlpd.http.peers import HttpPeers
from mlpd.http.server import HttpServer
from mlpd.http.slow import SlowLog
from tests.conftest import SHARED_DAEMON

BODY_BYTES_MAX = 256 * 1024
START_US = 1_356_998_400_000_000  # 2013-01-01T00:00:00Z

user = Entity("user")
clicks = Source(
    "clicks",
    timestamp="event_time",
    schema={
        "user": "string",
        "amount": "float64",
        "age": "float64",
        "bought": "int64",
        "shown_at": "timestamp",
    },
)
spend = WindowView(
    "spend", user, clicks, ["1h", "1d"], [Aggregate.count(), Aggregate.mean("amount")]
)
profile = FeatureView("profile", user, clicks, ["amount"], ttl="3h")
risk = FeatureService("risk", [user, spend, profile], request={"age": "float64"})
train_risk = Job(
    "risk",
    risk,
    Spine(clicks, time="shown_at"),
    label="bought",
    categorical=["user"],
    params={"min_data_in_leaf": 5},
    num_boost_round=10,
    gate={"auc": 0.5},
    deploy="champion",
)
DOCUMENT = build_document([user, clicks, spend, profile, risk, train_risk])
ROW = {"user": "a", "age": 0.5}


@dataclass
class Edge:
    """A running daemon: `url`, `socket_url`, and the daemon itself for looking inside."""

    url: str
    socket_url: str
    daemon: Daemon
    loop: asyncio.AbstractEventLoop
    slow: SlowLog
    run_id: str = ""
    prediction_id: str = ""
    host: str = field(init=False)

    def __post_init__(self) -> None:
        self.host = self.url.removeprefix("http://")

    def call(
        self,
        method: str,
        path: str,
        body: Any = None,
        headers: dict[str, str] | None = None,
    ) -> tuple[int, Any, dict[str, str]]:
        """Send JSON (or bytes as they are) with the standard library; status, value, headers."""
        if body is not None and not isinstance(body, bytes):
            body = json.dumps(body).encode()
        connection = http.client.HTTPConnection(self.host, timeout=30)
        try:
            connection.putrequest(method, path, skip_host=True)
            sent = {"Host": self.host, "Content-Type": "application/json", **(headers or {})}
            if body is not None:
                sent.setdefault("Content-Length", str(len(body)))
            for name, value in sent.items():
                connection.putheader(name, value)
            connection.endheaders(body)
            response = connection.getresponse()
            data = response.read()
            kind = response.headers.get("Content-Type", "")
            value = json.loads(data) if kind.startswith("application/json") else data
            return response.status, value, {k.lower(): v for k, v in response.headers.items()}
        finally:
            connection.close()


@contextmanager
def serve(
    directory: Path, *, registry: dict[str, Any] | None = None, **server: Any
) -> Iterator[Edge]:
    """Run a daemon on `directory` until the block ends."""
    config = Config(
        server=replace(ServerConfig(port=0), **server),
        limits=LimitsConfig(*(60 * SECOND_US,) * 3),  # a slow machine is no crowd
        monitoring=MonitoringConfig(audit_us=DAY_US),  # no child of its own between tests
        registry=RegistryConfig(**registry or {}),
        training=TrainingConfig(idle=False, nice=0),  # nor does training wait for an idle one
    )
    started: list[Edge | BaseException] = []
    up, stop = threading.Event(), asyncio.Event()

    async def main() -> None:
        daemon = Daemon(directory, config, peers=HttpPeers())
        server = HttpServer(config.server, build_routes(daemon), daemon.monitor.observe_request)
        await server.start(daemon.paths.socket)
        await daemon.start()
        socket_url = f"unix:{daemon.paths.socket}"
        loop = asyncio.get_running_loop()
        started.append(Edge(server.url, socket_url, daemon, loop, server._slow))
        up.set()
        await stop.wait()
        daemon.refuse()
        await server.stop()
        await daemon.stop()

    def run() -> None:
        try:
            asyncio.run(main())
        except BaseException as error:
            started.append(error)
            up.set()
            raise

    thread = threading.Thread(target=run, name=SHARED_DAEMON)
    thread.start()
    assert up.wait(50), "the daemon did not start"  # compiling kernels takes long, once
    edge = started[0]
    if isinstance(edge, BaseException):
        raise edge
    try:
        yield edge
    finally:
        edge.loop.call_soon_threadsafe(stop.set)
        thread.join(30)


def sample_events(n: int = 3000) -> dict[str, Any]:
    """Columns of clicks, one a minute, known as they happened."""
    rng = np.random.default_rng(7)
    times = START_US + np.arange(n) * 60_000_000
    columns: dict[str, Any] = {
        "event_time": times,
        "known_at": times,
        "shown_at": times,
        "user": rng.choice(["a", "b", "c"], n),
        "amount": rng.normal(size=n),
        "age": rng.normal(size=n),
    }
    columns["bought"] = (columns["amount"] + columns["age"] > 0).astype(np.int64)
    return columns


def fill(edge: Edge) -> None:
    """Define, ingest, train, route, predict once: what every part needs to answer."""
    with Client(edge.url) as client:
        client.apply(DOCUMENT)
        client.events.send("clicks", sample_events())
        run = client.runs.wait(client.runs.start("risk")["run_id"], timeout_s=50)
        assert run["state"] == "succeeded", run["error"]
        edge.run_id = run["run_id"]
        client.routes.put("risk", {"service": "risk", "arms": [{"model": "risk@champion"}]})
        answer = client.predict("risk", [ROW])
        edge.prediction_id = answer["predictions"][0]["prediction_id"]


def train_another(edge: Edge) -> None:
    """Make a second version, of events that say the opposite; no alias points to it."""
    events = sample_events()
    events["bought"] = 1 - events["bought"]
    for name in ("event_time", "known_at", "shown_at"):
        events[name] = events[name] + 10 * 86_400_000_000
    with Client(edge.url) as client:
        client.events.send("clicks", events)
        run = client.runs.wait(client.runs.start("risk", deploy="none")["run_id"], timeout_s=50)
        assert run["state"] == "succeeded", run["error"]
