"""Files of joins: there while one is under way, gone after its end, however it ends."""

import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from mlpd.client import Client
from mlpd.core.definitions import (
    Entity,
    FeatureService,
    FeatureView,
    Job,
    Source,
    Spine,
    build_document,
)
from mlpd.daemon.app import Daemon
from mlpd.daemon.offline import Offline
from mlpd.daemon.training_set import build_training_set
from mlpd.features.ingest import parse_batch
from tests.conftest import START_US

DEADLINE_S = 40.0


def wait_for(reached: Callable[[], Any]) -> Any:
    """Return what `reached` returns once it is true."""
    deadline_s = time.monotonic() + DEADLINE_S
    while not (found := reached()):
        assert time.monotonic() < deadline_s, "it never happened"
        time.sleep(0.01)
    return found


def spines(directory: Path) -> list[Path]:
    """Return the files of spines that are on disk."""
    return list(directory.glob("cache/joins/*/spine"))


@contextmanager
def half_a_spine(url: str, trainable: Any) -> Iterator[socket.socket]:
    """Send the head of a join and a part of its spine."""
    with Client(url) as client:
        client.apply(trainable)
    host, _, port = url.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port)), DEADLINE_S) as connection:
        connection.sendall(
            f"POST /v1/features/history?service=risk HTTP/1.1\r\nHost: {host}:{port}\r\n"
            "Content-Type: application/vnd.apache.parquet\r\n"
            "Content-Length: 10000000\r\n\r\n".encode()
            + bytes(2_000_000)
        )
        yield connection


@pytest.mark.parametrize("end", ["client", "daemon"])
def test_a_join_that_is_broken_off_leaves_no_files(
    serve_process: Any, trainable: Any, end: str
) -> None:
    directory = serve_process.directory
    with half_a_spine(serve_process.url, trainable):
        wait_for(lambda: [path for path in spines(directory) if path.stat().st_size])
        if end == "daemon":
            serve_process.kill()
            assert spines(directory)
    if end == "daemon":
        serve_process.start()
    wait_for(lambda: not list(directory.glob("cache/joins/*")))


@pytest.mark.parametrize(
    ("closed", "seen"), [("right", [0.0, 1.0, 2.0]), ("left", [None, 0.0, 1.0])]
)
async def test_a_spine_with_an_open_end_does_not_see_itself(
    daemon: Daemon, closed: Any, seen: list[Any]
) -> None:
    user = Entity("user")
    schema = {"user": "string", "x": "float64", "shown": "timestamp"}
    visits = Source("visits", timestamp="at", schema=schema)
    last = FeatureView("last", user, visits, ["x"])
    service = FeatureService("s", [last])
    job = Job("job", service, Spine(visits, time="shown", closed=closed), label="x")
    await daemon.definitions.apply(build_document([user, visits, last, service, job]))
    moments = [START_US + i for i in range(3)]
    columns: dict[str, list[Any]] = {name: list(moments) for name in ("at", "known_at", "shown")}
    columns |= {"user": ["a"] * 3, "x": [0.0, 1.0, 2.0]}
    source = daemon.state.catalog.definitions.source("visits")
    batch = parse_batch(source, columns, now_us=moments[-1])
    done = await daemon.ingest.ingest([batch])
    catalog = daemon.state.catalog
    offline = Offline(daemon.paths, daemon.environment, catalog, done.sequence)
    data = build_training_set(offline, catalog.definitions.job("job"), catalog.closures["s"])
    assert data.frame.columns["last.x"].to_list() == seen
