"""Three real daemons of one cluster, and one that holds everything, with the same events."""

import asyncio
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from mlpd import (
    Aggregate,
    Entity,
    FeatureService,
    FeatureView,
    Job,
    Source,
    Spine,
    WindowView,
    transform,
)
from mlpd.client import Client
from mlpd.cluster.placement import first_map
from mlpd.cluster.router.app import Router, RouterConfig
from mlpd.core.columns import DType
from mlpd.core.config import ServerConfig
from mlpd.core.definitions import build_document
from mlpd.core.hashing import slot_of
from mlpd.core.kernels import precompile
from mlpd.core.keys import encode_entity
from mlpd.core.shards import Shard, ShardMap, decode_map
from mlpd.core.time import parse_time
from mlpd.daemon.app import KERNEL_MODULES
from mlpd.daemon.ownership import Sender
from mlpd.features.ingest import parse_batch
from mlpd.http.server import HttpServer
from tests.conftest import SHARED_DAEMON
from tests.http import edge as edges

__all__ = ["Sender", "Shard", "decode_map", "first_map", "parse_batch"]

START_US = 1_356_998_400_000_000  # 2013-01-01T00:00:00Z
AT_US = parse_time("2999-01-01T00:00:00Z")
USERS, SHOPS = [f"u{i}" for i in range(40)], list(range(12))

user, shop = Entity("user"), Entity("shop", key="int64")
sales = Source(
    "sales",
    timestamp="event_time",
    schema={
        "user": "string",
        "shop": "int64",
        "amount": "float64",
        "age": "float64",
        "bought": "int64",
        "shown_at": "timestamp",
    },
)
notes = Source("notes", timestamp="event_time", schema={"text": "string"}, event_id="text")
profile = FeatureView("profile", user, sales, ["amount"])
spend = WindowView("spend", user, sales, ["1h", "1d"], [Aggregate.mean("amount")])
takings = WindowView("takings", shop, sales, ["1d"], [Aggregate.count(), Aggregate.sum("amount")])


@transform
def per_sale(total: "takings.amount_sum_1d", count: "takings.count_1d") -> "float64":  # noqa: F821
    return total / count if count > 0 else 0.0


person = FeatureService("person", features=[profile, spend], request={"age": "float64"})
place = FeatureService("place", features=[takings, per_sale])
both = FeatureService("both", features=[profile, takings])
bare = FeatureService("bare", features=["request.age"], request={"age": "float64"})
train = Job(
    "person",
    person,
    Spine(sales, time="shown_at"),
    label="bought",
    params={"min_data_in_leaf": 5},
    num_boost_round=5,
    deploy="champion",
)
OBJECTS: list[Any] = [user, shop, sales, notes, profile, spend, takings, per_sale]
OBJECTS += [person, place, both, bare, train]
DOCUMENT = build_document(OBJECTS)


def pytest_collection_finish() -> None:
    """Compile kernels before any test's clock runs."""
    precompile(KERNEL_MODULES)


def sale_columns(n: int = 800) -> dict[str, Any]:
    """Columns of sales, one a minute, known as they happened; some lack one key or both."""
    rng = np.random.default_rng(7)
    times = (START_US + np.arange(n) * 60_000_000).tolist()
    return {
        "event_time": times,
        "known_at": times,
        "shown_at": times,
        "user": [None if i % 31 == 0 else USERS[i * 7 % 40] for i in range(n)],
        "shop": [None if i % 62 == 0 else SHOPS[i * 5 % 12] for i in range(n)],
        "amount": rng.normal(size=n).tolist(),
        "age": rng.normal(size=n).tolist(),
        "bought": (rng.normal(size=n) > 0).astype(int).tolist(),
    }


def map_of(running: list[edges.Edge], cluster: str = "0f" * 16) -> ShardMap:
    """Return the first map of daemons: a, b, c ..."""
    return first_map(cluster, [Shard("abcdef"[i], edge.url) for i, edge in enumerate(running)])


def give_map(running: list[edges.Edge]) -> ShardMap:
    """Make a cluster of running, empty daemons."""
    made = map_of(running)
    for shard, edge in zip(made.shards, running, strict=True):
        with Client(edge.url) as client:
            client.cluster.put_map(made.to_dict(), shard=shard.name, expected=0)
    return made


@contextmanager
def serve_all(root: Path, count: int, cache: Path) -> Iterator[list[edges.Edge]]:
    """Run empty daemons that share compiled transforms."""
    with ExitStack() as stack:
        running = []
        for i in range(count):
            (root / f"d{i}" / "cache").mkdir(parents=True)
            (root / f"d{i}" / "cache" / "kernels").symlink_to(cache)
            running.append(stack.enter_context(edges.serve(root / f"d{i}")))
        yield running


@contextmanager
def serve_router(urls: list[str], **how: Any) -> Iterator[edges.Edge]:
    """Run a router until the block ends, as an Edge whose `daemon` is the router."""
    config = RouterConfig(
        tuple(urls),
        server=ServerConfig(port=0),
        **how,
    )
    started: list[Any] = []
    up, stop = threading.Event(), asyncio.Event()

    async def main() -> None:
        router = Router(config)
        server = HttpServer(config.server, router.routes, router.metrics.observe)
        await server.start(None)
        try:
            await router.start()
            loop = asyncio.get_running_loop()
            started.append(edges.Edge(server.url, "", router, loop, server._slow))
            up.set()
            await stop.wait()
            router.refuse()
        finally:
            await server.stop()
            await router.stop()

    def run() -> None:
        try:
            asyncio.run(main())
        except BaseException as error:  # noqa: BLE001 - told to the test
            started.append(error)
            up.set()

    thread = threading.Thread(target=run, name=SHARED_DAEMON)
    thread.start()
    assert up.wait(20), "the router did not start"
    try:
        if isinstance(started[0], BaseException):
            raise started[0]
        yield started[0]
    finally:
        if not isinstance(started[0], BaseException):
            started[0].loop.call_soon_threadsafe(stop.set)
        thread.join(20)


@dataclass
class Trio:
    """Three `shards` by one map, and a `single` daemon; tests leave them as they are."""

    shards: list[edges.Edge]
    shard_map: ShardMap
    single: edges.Edge

    def at(self, name: str) -> edges.Edge:
        """Return the daemon of a shard."""
        return self.shards[self.shard_map.index(name)]


def slots_of_row(row: dict[str, Any]) -> list[int]:
    """Return the slots that a sale or note concerns, by the definition alone."""
    keys = [(DType.STRING, row.get("user")), (DType.INT64, row.get("shop"))]
    entities = [encode_entity([t], (value,), "e") for t, value in keys if value is not None]
    return [slot_of(e) for e in entities if e is not None] or [slot_of(b"sales")]


def send_split(made: ShardMap, running: list[edges.Edge], columns: dict[str, Any]) -> list[int]:
    """Send sales to all shards that they concern, by brute force; return how many each got."""
    rows = [
        dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)
    ]
    sent = []
    for shard, edge in zip(made.shards, running, strict=True):
        mine = [r for r in rows if shard in map(made.owner, slots_of_row(r))]
        _, routing, _ = edge.call("GET", "/v1/cluster/routing")
        headers = {"x-mlpd-epoch": str(made.epoch), "x-mlpd-routing": routing["version"]}
        status, answer, _ = edge.call("POST", "/v1/events/sales", {"rows": mine}, headers)
        assert (status, answer["accepted"]) == (200, len(mine)), answer
        sent.append(len(mine))
    return sent


def catch_up(running: list[edges.Edge]) -> None:
    """Wait until all members have what was decided: one that was silent isn't waited for by it."""
    until_s = time.monotonic() + 20.0
    while len({e.daemon.shared.describe()["revision"] for e in running}) > 1:
        assert time.monotonic() < until_s, [e.daemon.shared.describe() for e in running]
        time.sleep(0.01)


def serve_person(edge: edges.Edge, archive: bytes) -> None:
    """Let a daemon serve the route person by the model in an archive."""
    with Client(edge.url) as client:
        client.models.adopt(archive)
        client.models.move_alias("person", "champion", 1)
        client.routes.put("person", {"service": "person", "arms": [{"model": "person@champion"}]})


@pytest.fixture(scope="session")
def trio(tmp_path_factory: pytest.TempPathFactory, transform_cache: Path) -> Iterator[Trio]:
    """A cluster of three, and one daemon that holds the same; all serve the route person."""
    with serve_all(tmp_path_factory.mktemp("trio"), 4, transform_cache) as (single, *running):
        made = give_map(running)
        for edge in (single, *running):
            with Client(edge.url) as client:
                client.apply(DOCUMENT)
        with Client(single.url) as client:
            client.events.send("sales", sale_columns())
            run = client.runs.wait(client.runs.start("person")["run_id"], timeout_s=50)
            assert run["state"] == "succeeded", run["error"]
            archive = client.models.archive("person", 1)
            route = {"service": "person", "arms": [{"model": "person@champion"}]}
            client.routes.put("person", route)
        send_split(made, running, sale_columns())
        for edge in running:
            serve_person(edge, archive)
        yield Trio(running, made, single)


@pytest.fixture(scope="session")
def routed(trio: Trio) -> Iterator[edges.Edge]:
    """A router over the trio's shards; tests leave it as it is."""
    with serve_router([edge.url for edge in trio.shards]) as edge:
        yield edge


@pytest.fixture
def three(tmp_path: Path, transform_cache: Path) -> Iterator[list[edges.Edge]]:
    """Three daemons without a map, for tests that change things."""
    with serve_all(tmp_path, 3, transform_cache) as running:
        yield running


@pytest.fixture(scope="session")
def cluster_module() -> ModuleType:
    """This module: its helpers and constants."""
    return sys.modules[__name__]
