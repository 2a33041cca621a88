"""The scenario `backup`: durable ingest while backups are taken, against ingest alone."""

import asyncio
import shutil
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgpack

from bench.load import Round, Target, run_round, spread
from bench.world import World, build_requests, open_world
from mlpd.client import Client
from mlpd.core.time import SECOND_US, system_clock

FLIGHTS = 300_000
Figures = dict[str, Any]


def backup(seconds: float, rounds: int) -> Figures:
    """Ingest while backups are taken one after the other, against ingest alone."""
    found: Figures = {}
    with (
        tempfile.TemporaryDirectory() as folder,
        tempfile.TemporaryDirectory() as other,
        open_world(Path(folder) / "data", FLIGHTS, model=True) as world,
    ):
        for copy in (False, True):
            for size, concurrency in ((1, 64), (1_000, 4)):
                kind = "copies" if copy else "links"
                name = f"{kind}, {size} rows, {concurrency} writers"
                target = _ingest(world, size)
                _round(target, concurrency, seconds / 2)
                pairs = [
                    _pair(world, target, concurrency, seconds, Path(other), copy=copy)
                    for _ in range(rounds)
                ]
                found[name] = _figures(pairs, size)
        found["lmdb_bytes"] = world.client.status()["lmdb_bytes"]
    return found


def _pair(
    world: World, target: Target, concurrency: int, seconds: float, folder: Path, *, copy: bool
) -> tuple[Round, Round, list[Figures]]:
    alone = _round(target, concurrency, seconds)
    with _backups(world, folder, copy=copy) as taken:
        beside = _round(target, concurrency, seconds)
    return alone, beside, taken


def _round(target: Target, concurrency: int, seconds: float) -> Round:
    return asyncio.run(run_round(target, concurrency=concurrency, seconds=seconds))


@contextmanager
def _backups(world: World, folder: Path, *, copy: bool) -> Iterator[list[Figures]]:
    """Take backups one after the other while the block runs; yield their figures as they come."""
    taken: list[Figures] = []
    stop = threading.Event()

    def work() -> None:
        with Client(world.daemon.url, timeout_s=300.0) as client:
            while not stop.is_set():
                destination = folder / str(len(taken))
                taken.append(client.backup(str(destination), copy=copy))

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield taken
    finally:
        stop.set()
        thread.join()
        for path in folder.iterdir():
            shutil.rmtree(path)


def _ingest(world: World, size: int) -> Target:
    now_us = system_clock() - 60 * SECOND_US
    keys = ("carrier", "origin", "dest", "tailnum")
    bodies = []
    rows = build_requests(size * 20)
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        columns: dict[str, list[Any]] = {key: [row[key] for row in part] for key in keys}
        columns["event_time"] = [now_us] * len(part)
        columns["dep_delay"] = [row["distance"] % 90 for row in part]
        bodies.append(msgpack.packb({"columns": columns}))
    return Target(f"{world.daemon.url}/v1/events/departures", bodies)


def _figures(pairs: list[tuple[Round, Round, list[Figures]]], size: int) -> Figures:
    taken = [figures for _, _, each in pairs for figures in each]
    return {
        "ratio": spread(
            [beside.requests_per_s / alone.requests_per_s for alone, beside, _ in pairs]
        ),
        "rows_per_s_alone": spread([alone.requests_per_s * size for alone, _, _ in pairs]),
        "rows_per_s_beside": spread([beside.requests_per_s * size for _, beside, _ in pairs]),
        "p99_ms_alone": spread([alone.p99_ms for alone, _, _ in pairs]),
        "p99_ms_beside": spread([beside.p99_ms for _, beside, _ in pairs]),
        "backups": len(taken),
        "took_s": spread([figures["took_s"] for figures in taken]),
        "size_mib": spread([figures["size_bytes"] / (1 << 20) for figures in taken]),
        "lmdb_growth_mib": spread([figures["lmdb_growth_bytes"] / (1 << 20) for figures in taken]),
    }
