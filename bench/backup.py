"""Scenario backup: durable ingest while backups are taken, against ingest alone."""

import asyncio
import shutil
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bench.load import Target, run_round
from bench.options import Options
from bench.serving import departures
from bench.turns import Case, in_turns, spreads
from bench.world import World, open_world
from mlpd.client import Client

FLIGHTS = 300_000
INGEST_SIZES = ((1, 64), (1_000, 4))
"""Rows to a request, and writers."""
MIB = 1 << 20


def backup(options: Options) -> dict[str, Case]:
    """Ingest while backups are taken one after the other, against ingest alone."""
    found: dict[str, Case] = {}
    with (
        tempfile.TemporaryDirectory() as folder,
        tempfile.TemporaryDirectory() as other,
        open_world(Path(folder) / "data", FLIGHTS, model=True) as world,
    ):
        for copy in (False, True):
            for size, writers in INGEST_SIZES:
                name = f"{'copies' if copy else 'links'}, {size} rows, {writers} writers"
                case = _case(world, Path(other), options, size, writers, copy=copy)
                found[name] = case
    return found


def _case(
    world: World, folder: Path, options: Options, size: int, writers: int, *, copy: bool
) -> Case:
    url = f"{world.daemon.url}/v1/events/departures"
    target = Target(url, departures(size, requests=20))
    taken: list[dict[str, Any]] = []

    def alone(seconds: float = options.seconds) -> Mapping[str, float]:
        one = asyncio.run(run_round(target, concurrency=writers, seconds=seconds))
        return {"rows_per_s": one.requests_per_s * size, **one.to_dict()}

    def beside() -> Mapping[str, float]:
        with _backups(world, folder, taken, copy=copy):
            return alone()

    alone(options.seconds / 2)
    case = in_turns(
        beside,
        alone,
        rounds=options.rounds,
        measure="rows_per_s",
        rows_per_request=size,
        concurrency=writers,
        seconds=options.seconds,
    )
    case["notes"]["backups"] = len(taken)
    case["notes"]["of_a_backup"] = spreads(
        [
            {
                "took_s": done["took_s"],
                "size_mib": done["size_bytes"] / MIB,
                "lmdb_growth_mib": done["lmdb_growth_bytes"] / MIB,
            }
            for done in taken
        ]
    )
    return case


@contextmanager
def _backups(
    world: World, folder: Path, taken: list[dict[str, Any]], *, copy: bool
) -> Iterator[None]:
    """Take backups one after the other while the block runs; `taken` gets their figures."""
    stop = threading.Event()

    def work() -> None:
        with Client(world.daemon.url, timeout_s=300.0) as client:
            while not stop.is_set():
                destination = folder / str(len(taken))
                taken.append(client.backup(str(destination), copy=copy))

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        for path in folder.iterdir():
            shutil.rmtree(path)
