"""The scenarios: each returns the comparison of ours with its bare limit."""

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgpack

from bench.backup import backup
from bench.load import Target, compare
from bench.world import JOB, ROUTE, SERVICE, World, build_requests, open_world
from mlpd.core.time import SECOND_US, system_clock

FLIGHTS = 60_000
Figures = dict[str, Any]


@contextmanager
def bare(kind: str, argument: Path) -> Iterator[str]:
    """Run a bare server and yield its URL."""
    command = [sys.executable, "-m", "bench.bare", kind, str(argument)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield f"http://127.0.0.1:{int(process.stdout.readline())}/"
        finally:
            process.terminate()


def read(seconds: float, rounds: int) -> Figures:
    """Online read of the flights service: 1 and 100 entities, 1 and 16 concurrent."""
    found: Figures = {}
    with tempfile.TemporaryDirectory() as folder, open_world(Path(folder), FLIGHTS) as world:
        rows = build_requests(2_000)
        with bare("read", Path(folder) / "lmdb") as url:
            for entities in (1, 100):
                parts = [rows[i : i + entities] for i in range(0, 1_000, entities)]
                ours = [msgpack.packb({"service": SERVICE, "entities": part}) for part in parts]
                least = [msgpack.packb({"rows": part}) for part in parts]
                for concurrency in (1, 16):
                    found[f"{entities} entities, {concurrency} concurrent"] = compare(
                        Target(f"{world.daemon.url}/v1/features/read", ours),
                        Target(url, least),
                        concurrency=concurrency,
                        seconds=seconds,
                        rounds=rounds,
                    )
    return found


def predict(seconds: float, rounds: int) -> Figures:
    """Predict one row by entity key, everything on, against the bare model on a ready vector."""
    found: Figures = {}
    with (
        tempfile.TemporaryDirectory() as folder,
        open_world(Path(folder), FLIGHTS, model=True) as world,
    ):
        rows = build_requests(2_000)
        vectors = [json.dumps({"vector": _vector(world, row)}).encode() for row in rows[:20]]
        bodies = [json.dumps({"rows": [row]}).encode() for row in rows]
        model = next((Path(folder) / "runs").glob("*/out/model.onnx"))
        with bare("predict", model) as url:
            for concurrency in (1, 16):
                found[f"{JOB}, {concurrency} concurrent"] = compare(
                    Target(f"{world.daemon.url}/v1/predict/{ROUTE}", bodies, "application/json"),
                    Target(url, vectors, "application/json"),
                    concurrency=concurrency,
                    seconds=seconds,
                    rounds=rounds,
                )
    return found


def ingest(seconds: float, rounds: int) -> Figures:
    """Durable ingest: 64 writers of one row, and one writer of 10,000 rows, through four views."""
    found: Figures = {}
    with (
        tempfile.TemporaryDirectory() as folder,
        tempfile.TemporaryDirectory() as other,
        open_world(Path(folder), FLIGHTS) as world,
        bare("ingest", Path(other)) as url,
    ):
        now_us = system_clock() - 60 * SECOND_US
        for size, concurrency in ((1, 64), (10_000, 1)):
            rows = build_requests(size * 20)
            bodies = [_events(rows[i : i + size], now_us) for i in range(0, len(rows), size)]
            result = compare(
                Target(f"{world.daemon.url}/v1/events/departures", bodies),
                Target(url, bodies),
                concurrency=concurrency,
                seconds=seconds,
                rounds=rounds,
            )
            rate = result["ours"]["requests_per_s"]["median"] * size
            found[f"{size} rows, {concurrency} writers"] = {"rows_per_s": round(rate), **result}
    return found


def _vector(world: World, row: dict[str, Any]) -> list[float]:
    answer = world.client.predict(ROUTE, [row], include=["vector"])
    vector: list[float] = answer["predictions"][0]["vector"]
    return vector


def _events(rows: list[dict[str, Any]], now_us: int) -> bytes:
    keys = ("carrier", "origin", "dest", "tailnum")
    columns: dict[str, list[Any]] = {key: [row[key] for row in rows] for key in keys}
    columns["event_time"] = [now_us] * len(rows)
    columns["dep_delay"] = [row["distance"] % 90 for row in rows]
    packed: bytes = msgpack.packb({"columns": columns})
    return packed


SCENARIOS: dict[str, Callable[[float, int], Figures]] = {
    "read": read,
    "predict": predict,
    "ingest": ingest,
    "backup": backup,
}
