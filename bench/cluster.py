"""Scenario cluster: what a read that several shards answer costs, by the client and by the router.

Processor time of all processes that take part, so that a busy machine changes little.
"""

import asyncio
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from bench.daemon import serve, serve_router
from bench.options import Options
from bench.turns import Case, in_turns
from mlpd import Aggregate, Entity, FeatureService, FeatureView, Source, WindowView
from mlpd.client import AsyncClient, Client
from mlpd.cluster.placement import first_map
from mlpd.core.definitions import build_document
from mlpd.core.hashing import slot_of
from mlpd.core.keys import encode_texts
from mlpd.core.shards import Shard, ShardMap

FAN_OUTS = (1, 4, 16)
ROWS = 16
"""Of a request: over 16 shards one each."""
AT_ONCE = 8
REQUESTS_PER_S = 100
"""Requests of a round, per second that it is meant to take."""
USERS = 2_000

user = Entity("user")
sales = Source("sales", "event_time", {"user": "string", "amount": "float64"})
profile = FeatureView("profile", user, sales, ["amount"])
spend = WindowView(
    "spend", user, sales, ["1d"], [Aggregate.sum("amount"), Aggregate.mean("amount")]
)
person = FeatureService("person", [profile, spend])


@dataclass(frozen=True, slots=True)
class _Fleet:
    """Running daemons, a router before them, and requests whose rows lie on all of them."""

    urls: list[str]
    pids: list[int]
    router_url: str
    router_pid: int
    requests: list[list[dict[str, str]]]


def cluster(options: Options) -> dict[str, Case]:
    """Read 16 rows that lie on 1, 4 and 16 shards: through the router, against the client alone.

    `cpu_us`: of client, router and daemons together, per request; the others are its parts.
    """
    found: dict[str, Case] = {}
    count = max(1, round(REQUESTS_PER_S * options.seconds))
    for fan_out in FAN_OUTS:
        with tempfile.TemporaryDirectory() as folder, _open_fleet(Path(folder), fan_out) as fleet:
            for url in (fleet.router_url, fleet.urls):
                _read(fleet, url, 50)
            found[f"fan-out {fan_out}"] = in_turns(
                partial(_read, fleet, fleet.router_url, count),
                partial(_read, fleet, fleet.urls, count),
                rounds=options.rounds,
                measure="cpu_us",
                rows=ROWS,
            )
    return found


@contextmanager
def _open_fleet(folder: Path, shards: int) -> Iterator[_Fleet]:
    with ExitStack() as stack:
        running = [stack.enter_context(serve(folder / f"d{i}")) for i in range(shards)]
        urls = [daemon.url for daemon in running]
        members = [Shard(f"s{i:02}", url) for i, url in enumerate(urls)]
        made = first_map("0f" * 16, members)
        for shard in members if shards > 1 else ():
            with Client(shard.url) as client:
                client.cluster.put_map(made.to_dict(), shard=shard.name, expected=0)
        with Client(urls) as client:
            document = build_document([user, sales, profile, spend, person])
            for member in client.members().values() if shards > 1 else [client]:
                member.apply(document)
            now_us = int(time.time() * 1e6)
            events = [{"event_time": now_us - i, "user": u, "amount": 1.0} for i, u in _users()]
            client.events.send("sales", events)
        router = stack.enter_context(serve_router(folder / "router.log", urls))
        yield _Fleet(urls, [d.pid for d in running], router.url, router.pid, _requests(made))


def _users() -> Iterator[tuple[int, str]]:
    return ((i, f"u{i}") for i in range(USERS))


def _requests(shard_map: ShardMap) -> list[list[dict[str, str]]]:
    """Return requests with as many rows of each shard."""
    by_shard: dict[str, list[dict[str, str]]] = {}
    for _, name in _users():
        (key,) = encode_texts([name])
        by_shard.setdefault(shard_map.owner(slot_of(key)).name, []).append({"user": name})
    each = ROWS // len(by_shard)
    fewest = min(map(len, by_shard.values())) // each
    return [
        [row for rows in by_shard.values() for row in rows[i * each : (i + 1) * each]]
        for i in range(fewest)
    ]


def _read(fleet: _Fleet, url: str | list[str], count: int) -> Mapping[str, float]:
    """Return microseconds of processor time per request, of each process that takes part."""
    daemons, router, began_s = _cpu_s(*fleet.pids), _cpu_s(fleet.router_pid), time.perf_counter()
    client_s = asyncio.run(_ask(fleet, url, count))
    took_s = time.perf_counter() - began_s
    parts = {
        "client_us": client_s,
        "router_us": _cpu_s(fleet.router_pid) - router,
        "daemons_us": _cpu_s(*fleet.pids) - daemons,
    }
    found = {name: 1e6 * seconds / count for name, seconds in parts.items()}
    return {"cpu_us": sum(found.values()), **found, "requests_per_s": count / took_s}


async def _ask(fleet: _Fleet, url: str | list[str], count: int) -> float:
    """Return the processor time of this process for so many reads, a few of them at once."""
    async with AsyncClient(url) as client:
        await client.read_features("person", entities=fleet.requests[0])  # it learns the map
        began_s = time.process_time()
        turns = iter(range(count))

        async def work() -> None:
            for i in turns:
                rows: Any = fleet.requests[i % len(fleet.requests)]
                answer = await client.read_features("person", entities=rows)
                if "errors" in answer:
                    raise RuntimeError(answer["errors"][0]["message"])

        await asyncio.gather(*(work() for _ in range(AT_ONCE)))
        return time.process_time() - began_s


def _cpu_s(*pids: int) -> float:
    """Return the processor time that the threads of processes have had, in seconds."""
    return sum(
        int((task / "schedstat").read_text("ascii").split()[0]) / 1e9
        for pid in pids
        for task in Path(f"/proc/{pid}/task").iterdir()
    )
