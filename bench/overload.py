"""More requests than the daemon can serve: what it still serves in time, and how it recovers.

Capacity is measured in a closed loop.  Then requests come by the clock, at a multiple of it, each
with a deadline, whether earlier ones were answered or not; good is what was answered 200 within the
deadline, counted from the moment at which it was due.
"""

import asyncio
import json
import tempfile
import time
from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from bench.load import Connection, Target, connect, quantile
from bench.options import Options
from bench.turns import Case, in_turns
from bench.world import ROUTE, build_requests, open_world

FLIGHTS = 20_000
ROWS = (20, 100)
"""Rows by key in a request."""
TIMES = (2.0, 5.0)
CONCURRENCY = 16
DEADLINE_S = 0.25
WAITS = 4.0
"""At least so many times what patient clients wait at capacity: a busy machine stalls longer."""
RECOVERY_S = 5.0
CALM = 0.5
"""Share of capacity that comes after the overload."""
CONNECTIONS_MAX = 1_000
_OK, _REFUSED = 200, 503
_PAUSE_S = 0.01


@dataclass(slots=True)
class Tally:
    """Answers of an open loop: seconds of the good ones, and how many had which other fate."""

    good_s: list[float] = field(default_factory=list)
    fates: Counter[str] = field(default_factory=Counter)
    last_bad_s: float = 0.0
    """When, from the start on, the last one was due that was not answered in time."""


async def offer(target: Target, *, per_s: float, seconds: float, deadline_s: float) -> Tally:
    """Send requests by the clock for `seconds`; wait for what is under way in the end."""
    patience = {"x-deadline-ms": f"{1e3 * deadline_s:.0f}"}
    requests, tally = replace(target, headers=patience).requests(), Tally()
    free: deque[Connection] = deque()
    opened, started = 0, time.perf_counter()

    async def ask(index: int, due: float) -> None:
        nonlocal opened
        if not free and opened >= CONNECTIONS_MAX:
            fate = "unsent"
        else:
            if free:
                connection = free.pop()
            else:
                opened += 1
                connection = await connect(target.url)
            status, _ = await connection.ask(requests[index % len(requests)])
            free.append(connection)
            took_s = time.perf_counter() - due
            if status == _OK and took_s <= deadline_s:
                tally.good_s.append(took_s)
                return
            fate = "late" if status == _OK else str(status)
        tally.fates[fate] += 1
        tally.last_bad_s = max(tally.last_bad_s, due - started)

    async with asyncio.TaskGroup() as group:
        for index in range(int(per_s * seconds)):
            due = started + index / per_s
            if (wait_s := due - time.perf_counter()) > 0.0:
                await asyncio.sleep(wait_s)
            group.create_task(ask(index, due))
    for connection in free:
        connection.close()
    return tally


async def saturate(target: Target, seconds: float) -> dict[str, float]:
    """Return what CONCURRENCY patient clients get, who ask again when they are refused."""
    requests, took_s = target.requests(), list[float]()
    connections = [await connect(target.url) for _ in range(CONCURRENCY)]
    started = time.perf_counter()

    async def worker(connection: Connection, index: int) -> None:
        while (asked := time.perf_counter()) < started + seconds:
            status, answer = await connection.ask(requests[index % len(requests)])
            if status == _OK:
                took_s.append(time.perf_counter() - asked)
            elif status == _REFUSED:
                await asyncio.sleep(_PAUSE_S)
            else:
                raise RuntimeError(f"{target.url}: {status} {answer[:300]!r}")
            index += CONCURRENCY

    async with asyncio.TaskGroup() as group:
        for index, connection in enumerate(connections):
            group.create_task(worker(connection, index))
    for connection in connections:
        connection.close()
    elapsed_s = time.perf_counter() - started
    return {
        "requests_per_s": len(took_s) / elapsed_s,
        "p50_ms": 1e3 * quantile(sorted(took_s), 0.5),
        "p99_ms": 1e3 * quantile(sorted(took_s), 0.99),
    }


async def overload(
    target: Target, at_capacity: Mapping[str, float], times: float, seconds: float
) -> dict[str, float]:
    """Return the figures of an overload and of the calm after it."""
    per_s = at_capacity["requests_per_s"]
    deadline_s = max(DEADLINE_S, WAITS * at_capacity["p50_ms"] / 1e3)
    tally = await offer(target, per_s=times * per_s, seconds=seconds, deadline_s=deadline_s)
    calm = await offer(target, per_s=CALM * per_s, seconds=RECOVERY_S, deadline_s=deadline_s)
    good = sorted(tally.good_s) or [0.0]
    return {
        "requests_per_s": len(tally.good_s) / seconds,
        "refused_per_s": tally.fates["503"] / seconds,
        "late_per_s": (tally.fates["504"] + tally.fates["late"]) / seconds,
        "unsent_per_s": tally.fates["unsent"] / seconds,
        "deadline_ms": 1e3 * deadline_s,
        "p50_ms": 1e3 * quantile(good, 0.5),
        "p99_ms": 1e3 * quantile(good, 0.99),
        "recovery_s": calm.last_bad_s,
    }


def overloads(options: Options) -> dict[str, Case]:
    """Goodput of predictions by key at 2 and 5 times capacity, against capacity."""
    found: dict[str, Case] = {}
    with (
        tempfile.TemporaryDirectory() as folder,
        open_world(Path(folder) / "data", FLIGHTS, model=True) as world,
    ):
        rows = build_requests(1_000)
        for size in ROWS:
            parts = [rows[i : i + size] for i in range(0, len(rows), size)]
            bodies = [json.dumps({"rows": part}).encode() for part in parts]
            target = Target(
                f"{world.daemon.url}/v1/predict/{ROUTE}",
                bodies,
                "application/json",
            )
            for times in TIMES:
                found[f"{size} rows, {times:.0f} times"] = measure(target, times, options)
    return found


def measure(target: Target, times: float, options: Options) -> Case:
    """Return the figures under `times` the capacity, which is measured anew in every turn."""

    def capacity() -> dict[str, float]:
        measured.update(asyncio.run(saturate(target, options.seconds)))
        return dict(measured)

    def more() -> dict[str, float]:
        return asyncio.run(overload(target, measured, times, options.seconds))

    measured: dict[str, float] = {}
    capacity()
    return in_turns(
        more,
        capacity,
        rounds=options.rounds,
        measure="requests_per_s",
        calm=CALM,
        seconds=options.seconds,
    )
