"""Scenario paced: ingest at a given rate, and reads beside it.

    python -m bench.paced URL ROWS SECONDS     ingest of so many departures to a request alone


A wait counts from the moment that the request was due: a writer that an answer keeps waiting sends
what has become due meanwhile after it, as late as it is; what is refused (503) it sends again.
"""

import asyncio
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import msgpack

from bench.load import Connection, Target, connect, quantile, run_round
from bench.options import Options
from bench.serving import DATA, FLIGHTS, departures
from bench.turns import Case, alone, in_turns
from bench.world import SERVICE, build_requests, open_world
from mlpd.core.errors import UnavailableError

ROWS_PER_S = 20_000
WRITERS = 64
SIZES = (20, 100)
"""Rows to a request."""
BESIDE = 20
"""Rows to a request of the ingest that reads are measured beside."""
SECONDS_MIN = 5.0
SETTLE_S = 0.5
RETRY_S = 0.01

Figures = Mapping[str, float]


def paced(options: Options) -> dict[str, Case]:
    """Waits of 64 writers who bring 20,000 rows a second together, and of reads beside them."""
    seconds = max(options.seconds, SECONDS_MIN)
    with tempfile.TemporaryDirectory() as folder, open_world(Path(folder) / DATA, FLIGHTS) as world:
        events = f"{world.daemon.url}/v1/events/departures"
        found = {
            f"ingest, {WRITERS} writers of {size} rows": alone(
                partial(_write, events, size, seconds),
                rounds=options.rounds,
                measure="p99_ms",
                rows_per_s=ROWS_PER_S,
            )
            for size in SIZES
        }
        bodies = [
            msgpack.packb({"service": SERVICE, "entities": [row]}) for row in build_requests(1_000)
        ]
        reads = Target(f"{world.daemon.url}/v1/features/read", bodies)
        found["read, 1 entity, beside ingest and alone"] = in_turns(
            lambda: _read_beside(reads, events, seconds),
            lambda: _read(reads, seconds),
            rounds=options.rounds,
            measure="p99_ms",
            rows_per_s=ROWS_PER_S,
        )
        return found


def _write(url: str, size: int, seconds: float) -> Figures:
    with _writers(url, size, seconds) as process:
        found = json.loads(process.communicate()[0])
    waits: list[float] = found["waits_ms"]
    return {
        "p50_ms": quantile(waits, 0.5),
        "p99_ms": quantile(waits, 0.99),
        "rows_per_s": len(waits) * size / seconds,
        "refused": found["refused"],
    }


def _read_beside(reads: Target, url: str, seconds: float) -> Figures:
    with _writers(url, BESIDE, seconds + 2 * SETTLE_S) as process:
        time.sleep(SETTLE_S)
        found = _read(reads, seconds)
        process.communicate()
    return found


def _read(reads: Target, seconds: float) -> Figures:
    return asyncio.run(run_round(reads, concurrency=1, seconds=seconds)).to_dict()


def _writers(url: str, size: int, seconds: float) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "bench.paced", url, str(size), str(seconds)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


async def write(url: str, size: int, seconds: float) -> dict[str, Any]:
    """Return the waits of all requests of `seconds`, ascending, and how many answers were 503."""
    requests = Target(url, departures(size, requests=WRITERS)).requests()
    connections = [await connect(url) for _ in range(WRITERS)]
    period_s, waits = WRITERS * size / ROWS_PER_S, list[float]()
    started, refused = time.perf_counter(), 0

    async def writer(connection: Connection, number: int) -> None:
        nonlocal refused
        for turn in range(int(seconds / period_s)):
            due = started + (turn + number / WRITERS) * period_s
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            request = requests[(number + turn) % len(requests)]
            while (found := await connection.ask(request))[0] == UnavailableError.status:
                refused += 1
                await asyncio.sleep(RETRY_S)
            status, answer = found
            if status != 200:  # noqa: PLR2004 - OK
                raise RuntimeError(f"{url}: {status} {answer[:300]!r}")
            waits.append(1e3 * (time.perf_counter() - due))

    async with asyncio.TaskGroup() as group:
        for number, connection in enumerate(connections):
            group.create_task(writer(connection, number))
    for connection in connections:
        connection.close()
    return {"waits_ms": sorted(waits), "refused": refused}


if __name__ == "__main__":
    print(json.dumps(asyncio.run(write(sys.argv[1], int(sys.argv[2]), float(sys.argv[3])))))
