"""Scenario cluster: what a read costs by each way to the shards, and how fast slots move.

Processor time of all processes that take part, without what daemons use when nobody asks: so a busy
machine changes little.
"""

import asyncio
import shutil
import tempfile
import time
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import msgpack

from bench.daemon import Served, serve
from bench.fleet import (
    AT_ONCE,
    CLUSTER,
    Fleet,
    Rows,
    at_once,
    cpu_s,
    fill,
    idle_share,
    open_fleet,
    read_all,
)
from bench.haproxy import free_port, running
from bench.load import Target, connect
from bench.moves import measure_moves
from bench.options import Options, SkippedError
from bench.turns import Case, build_case, compared
from mlpd.cluster.haproxy.config import Front, parse_files, write_files
from mlpd.cluster.placement import first_map
from mlpd.core.hashing import slot_of
from mlpd.core.keys import encode_texts
from mlpd.core.shards import Shard, ShardMap

SIZES = {1: (1, 16, 100), 4: (4, 16, 100), 16: (16,)}
"""Rows of a request by fan-out: as many of each shard."""
REQUESTS_PER_S = 100
"""Requests of a round, per second that it is meant to take."""
REQUESTS = 100
"""Different ones at most."""
USERS = [f"u{i}" for i in range(2_000)]
FLOOR = "client"
"""What the other ways are compared with: `mlpd.client`, which hashes by itself."""

Figures = Mapping[str, float]
Ask = Callable[[Sequence[Rows], Iterable[int]], Coroutine[None, None, float]]
"""Makes a request in each turn; returns the processor time of this process, in seconds."""


@dataclass(frozen=True, slots=True)
class Way:
    """One way to the rows: who is asked, the process between, and who answers at last."""

    ask: Ask
    hop: Served | None
    daemons: Sequence[int]
    idle_share: float
    """Of a core, that the daemons use when nobody asks."""


def cluster(options: Options) -> dict[str, Case]:
    """Reads whose rows lie on 1, 4 and 16 shards, by each way, against the client alone; moves.

    `client`: mlpd.client, which hashes by itself.  `router`, and `router, cached`: all rows kept.
    `haproxy`: as many requests of one row, by a caller of a few lines.  `one daemon`: it holds
    everything.  `cpu_us`: of caller, hop and daemons together, per request; they are its parts.
    """
    if shutil.which("haproxy") is None:
        raise SkippedError("haproxy is missing: apt-get install haproxy")
    found: dict[str, Case] = {}
    count = max(20, round(REQUESTS_PER_S * options.seconds))
    for fan_out, sizes in SIZES.items():
        with (
            tempfile.TemporaryDirectory(prefix="bench") as name,
            _open_ways(Path(name), fan_out) as (fleet, ways),
        ):
            for rows in sizes:
                requests = pick_requests(fleet.shard_map, rows)[:REQUESTS]
                for way, figures in _measure(ways, requests, count, options.rounds).items():
                    found[f"{rows} rows, {fan_out} shards: {way}"] = figures
    return {**found, **measure_moves(options)}


@contextmanager
def _open_ways(folder: Path, shards: int) -> Iterator[tuple[Fleet, dict[str, Way]]]:
    with ExitStack() as stack:
        fleet = stack.enter_context(open_fleet(folder, shards, USERS, cache_s=3_600.0))
        one = fleet.daemons[0]
        if shards > 1:
            one = stack.enter_context(serve(folder / "one"))
            fill(first_map(CLUSTER, [Shard("one", one.url)]), USERS)
        front = stack.enter_context(_open_front(folder, fleet.shard_map))
        idle, idle_one = idle_share(fleet.pids, 2.0), idle_share([one.pid], 2.0)
        ways = {
            FLOOR: Way(partial(read_all, fleet.urls), None, fleet.pids, idle),
            "router": Way(partial(read_all, fleet.router.url), fleet.router, fleet.pids, idle),
            "router, cached": Way(
                partial(read_all, fleet.cached.url), fleet.cached, fleet.pids, idle
            ),
            "haproxy": Way(partial(read_singly, front.url), front, fleet.pids, idle),
        }
        if shards > 1:
            ways["one daemon"] = Way(partial(read_all, one.url), None, [one.pid], idle_one)
        yield fleet, ways


@contextmanager
def _open_front(folder: Path, shard_map: ShardMap) -> Iterator[Served]:
    """Run HAProxy before the shards, by the configuration that `mlpd shard haproxy` writes."""
    program, port = shutil.which("haproxy"), free_port()
    assert program is not None
    files = parse_files(str(folder / "lb.cfg"), None)
    write_files(shard_map, Front(f"127.0.0.1:{port}", 0), files)
    with running(program, files.config, port) as pid:
        time.sleep(1.0)  # its health checks have to find the daemons
        yield Served(f"http://127.0.0.1:{port}", pid, 0.0)


def pick_requests(shard_map: ShardMap, rows: int) -> list[Rows]:
    """Return requests of `rows` users, as many of each shard."""
    by_shard: dict[str, list[dict[str, str]]] = {}
    for name, key in zip(USERS, encode_texts(USERS), strict=True):
        by_shard.setdefault(shard_map.owner(slot_of(key)).name, []).append({"user": name})
    each = rows // len(by_shard)
    fewest = min(map(len, by_shard.values())) // each
    return [
        [row for found in by_shard.values() for row in found[i * each : (i + 1) * each]]
        for i in range(fewest)
    ]


async def read_singly(url: str, requests: Sequence[Rows], turns: Iterable[int]) -> float:
    """Read each row by a request of its own, with its key in the header; returns as `read_all`."""
    sent = [[_single(url, row["user"]) for row in rows] for rows in requests]
    connections = [await connect(url) for _ in range(AT_ONCE)]
    free = [*connections]

    async def ask(i: int) -> None:
        connection = free.pop()
        for request in sent[i % len(sent)]:
            status, answer = await connection.ask(request)
            if status != 200:  # noqa: PLR2004 - OK
                raise RuntimeError(f"{url}: {status} {answer[:300]!r}")
        free.append(connection)

    try:
        return await at_once(ask, turns)
    finally:
        for connection in connections:
            connection.close()


def _single(url: str, name: str) -> bytes:
    body = msgpack.packb({"service": "person", "entities": [{"user": name}]})
    target = Target(f"{url}/v1/features/read", [body], headers={"x-mlpd-key": name})
    return target.requests()[0]


def _measure(
    ways: Mapping[str, Way], requests: Sequence[Rows], count: int, rounds: int
) -> dict[str, Case]:
    """Return each way against the client, all measured in every round; who begins changes."""
    for way in ways.values():
        with suppress(RuntimeError):  # on a crowded machine connecting may take too long
            asyncio.run(way.ask(requests, range(AT_ONCE)))
        asyncio.run(way.ask(requests, range(len(requests))))
    found: list[dict[str, Figures]] = []
    for number in range(rounds):
        names = [*ways][number % len(ways) :] + [*ways][: number % len(ways)]
        found.append({name: _round(ways[name], requests, count) for name in names})
    cases = {FLOOR: build_case([figures[FLOOR] for figures in found], measure="cpu_us")}
    for name in ways.keys() - {FLOOR}:
        pairs = [(figures[name], figures[FLOOR]) for figures in found]
        cases[name] = compared(pairs, measure="cpu_us")
    return {
        name: {**cases[name], "notes": {"idle_share": round(ways[name].idle_share, 5)}}
        for name in ways
    }


def _round(way: Way, requests: Sequence[Rows], count: int) -> Figures:
    """Return microseconds of processor time per request, of each process that takes part."""
    hop = [] if way.hop is None else [way.hop.pid]
    before_hop, before, began_s = cpu_s(*hop), cpu_s(*way.daemons), time.perf_counter()
    caller_s = asyncio.run(way.ask(requests, range(count)))
    took_s = time.perf_counter() - began_s
    parts = {
        "caller_us": caller_s,
        "hop_us": cpu_s(*hop) - before_hop,
        "daemons_us": max(0.0, cpu_s(*way.daemons) - before - way.idle_share * took_s),
    }
    found = {name: 1e6 * seconds / count for name, seconds in parts.items()}
    return {"cpu_us": sum(found.values()), **found, "requests_per_s": count / took_s}
