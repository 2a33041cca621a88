"""Scenario feast: online reads of the same rows from Feast's Python server and from mlpd."""

import http.client
import json
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import numpy as np

from bench.daemon import run_server, serve
from bench.load import Target, compare
from bench.options import Options
from bench.peers import FOLDER, python_of, version_of
from bench.turns import Case
from mlpd import Entity, FeatureService, FeatureView, Source
from mlpd.client import Client
from mlpd.core.time import HOUR_US, system_clock

if TYPE_CHECKING:
    import polars as pl

NAME, SERVICE = "feast", "bench"
ENTITIES, FEATURES, CONCURRENCY = 10_000, 20, 16
READ_SIZES = (1, 100)
BODIES = 200
JSON = "application/json"
START_S = 120.0
OFFLINE = {"FEAST_TELEMETRY": "False", "FEAST_USAGE": "False"}
"""Nothing is sent home from a benchmark."""


def feast(options: Options) -> dict[str, Case]:
    """Read 20 floats of 1 and 100 entities, 16 concurrent, against Feast's Python server.

    JSON both ways, one worker each, the same rows and requests; Feast on SQLite and, where
    redis-server is installed, on Redis.
    """
    python = python_of(NAME, options.peers)
    found: dict[str, Case] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = _rows()
        rows.write_parquet(folder / "rows.parquet")
        with serve(folder / "data") as daemon, Client(daemon.url, timeout_s=120.0) as client:
            client.apply(_definitions(rows))
            client.events.send("drivers", rows, all_or_nothing=True)
            for store, versions in _stores():
                with (
                    _online_store(store, folder) as settings,
                    _feast_server(python, folder / store, settings) as url,
                ):
                    for size in READ_SIZES:
                        ours, theirs = _targets(daemon.url, url, size)
                        check_same(ours, theirs)
                        found[f"{store}, {size} entities, {CONCURRENCY} concurrent"] = compare(
                            ours,
                            theirs,
                            concurrency=CONCURRENCY,
                            seconds=options.seconds,
                            rounds=options.rounds,
                            features=FEATURES,
                            feast=version_of(NAME, python),
                            **versions,
                        )
    return found


def check_same(ours: Target, theirs: Target) -> None:
    """Raise RuntimeError unless both answer the first request with the same values."""
    mine = list(_ask(ours)["columns"].values())
    names = _ask(theirs)["metadata"]["feature_names"]
    results = dict(zip(names, _ask(theirs)["results"], strict=True))
    other = [results[f"f{i}"]["values"] for i in range(FEATURES)]
    if mine != other:
        raise RuntimeError(f"Feast answers {other[:2]}, mlpd {mine[:2]}")


def _rows() -> "pl.DataFrame":
    import polars as pl  # noqa: PLC0415

    rng = np.random.default_rng(1)
    values = {f"f{i}": rng.normal(size=ENTITIES) for i in range(FEATURES)}
    times = pl.Series([system_clock() - HOUR_US] * ENTITIES).cast(pl.Datetime("us", "UTC"))
    return pl.DataFrame({"event_time": times, "driver": np.arange(ENTITIES), **values})


def _definitions(rows: "pl.DataFrame") -> list[Any]:
    names = rows.columns[2:]
    driver = Entity("driver", key="int64")
    schema = {"driver": "int64", **dict.fromkeys(names, "float64")}
    source = Source("drivers", timestamp="event_time", schema=schema)
    view = FeatureView("latest", entity=driver, source=source, features=names)
    return [driver, source, view, FeatureService(SERVICE, [view])]


def _targets(daemon: str, feast_url: str, size: int) -> tuple[Target, Target]:
    rng = np.random.default_rng(2)
    drivers = [rng.choice(ENTITIES, size, replace=False).tolist() for _ in range(BODIES)]
    ours = [json.dumps({"service": SERVICE, "entities": {"driver": d}}).encode() for d in drivers]
    theirs = [
        json.dumps({"feature_service": SERVICE, "entities": {"driver": d}}).encode()
        for d in drivers
    ]
    return (
        Target(f"{daemon}/v1/features/read", ours, JSON),
        Target(f"{feast_url}/get-online-features", theirs, JSON),
    )


def _stores() -> Iterator[tuple[str, dict[str, str]]]:
    yield "SQLite", {}
    server = shutil.which("redis-server")
    if server is not None:
        said = subprocess.run([server, "--version"], check=True, capture_output=True, text=True)
        version = next(word[2:] for word in said.stdout.split() if word.startswith("v="))
        yield "Redis", {"redis": version}


@contextmanager
def _online_store(store: str, folder: Path) -> Iterator[Mapping[str, str]]:
    """Yield the settings of Feast's online store; Redis runs until the block ends."""
    (folder / store).mkdir()
    if store == "SQLite":
        yield {"type": "sqlite", "path": str(folder / store / "online.db")}
        return
    port = _free_port()
    command = ["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--save", ""]
    with run_server([*command, "--dir", str(folder / store)], subprocess.DEVNULL) as (process, _):
        _wait_port(port, process, "redis-server")
        yield {"type": "redis", "connection_string": f"127.0.0.1:{port}"}


@contextmanager
def _feast_server(python: Path, repository: Path, settings: Mapping[str, str]) -> Iterator[str]:
    """Fill a repository's online store and run its feature server."""
    environment = {**OFFLINE, "PYTHONPATH": ""}
    fill = [str(FOLDER / "feast_fill.py"), str(repository), str(repository.parent / "rows.parquet")]
    subprocess.run(
        [str(python), *fill, json.dumps(settings)],
        check=True,
        capture_output=True,
        env={**os.environ, **environment},
    )
    port = _free_port()
    command = [str(python.with_name("feast")), "-c", str(repository), "serve", "-p", str(port)]
    # Its worker would end after 1,000 requests, and cut off those under way.
    command += ["--no-access-log", "--max-requests", "0", "--max-requests-jitter", "0"]
    log = repository / "feast.log"
    with log.open("wb") as out, run_server(command, out.fileno(), environment) as (process, _):
        _wait_port(port, process, f"feast serve ({log})")
        yield f"http://127.0.0.1:{port}"


def _wait_port(port: int, process: "subprocess.Popen[bytes]", what: str) -> None:
    stop = time.monotonic() + START_S
    while time.monotonic() < stop and process.poll() is None:
        try:
            socket.create_connection(("127.0.0.1", port)).close()
        except OSError:
            time.sleep(0.05)
        else:
            return
    raise RuntimeError(f"{what} does not listen on port {port}")


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def _ask(target: Target) -> Any:
    parts = urlsplit(target.url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=60.0)
    headers = {"Content-Type": JSON, "Accept": JSON}
    try:
        connection.request("POST", parts.path, target.bodies[0], headers)
        return json.loads(connection.getresponse().read())
    finally:
        connection.close()
