"""Fleet: daemons that share the slots, routers before them, and a daemon that holds everything.

Reads are of 2 views by one entity; processor time is that of processes, not of the clock.
"""

import asyncio
import re
import time
import urllib.request
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.daemon import Served, serve, serve_router
from mlpd import Aggregate, Entity, FeatureService, FeatureView, Source, WindowView
from mlpd.client import AsyncClient, Client
from mlpd.cluster.placement import first_map
from mlpd.core.definitions import build_document
from mlpd.core.shards import Shard, ShardMap

AT_ONCE = 8
"""Requests under way."""
CLUSTER = "0f" * 16
_COUNTED = re.compile(
    r"mlpd_router_(?:(cache_hits|cache_misses|hedged|hedges_won)_total"
    r"|calls_total\{shard=\"(\w+)\",outcome=\"answered\"\})$"
)

user = Entity("user")
sales = Source("sales", "event_time", {"user": "string", "amount": "float64"})
profile = FeatureView("profile", user, sales, ["amount"])
spend = WindowView(
    "spend", user, sales, ["1d"], [Aggregate.sum("amount"), Aggregate.mean("amount")]
)
person = FeatureService("person", [profile, spend])
DOCUMENT = build_document([user, sales, profile, spend, person])

Rows = Sequence[dict[str, str]]
"""Entities of a request."""


@dataclass(frozen=True, slots=True)
class Fleet:
    """`daemons` in the order of the map's shards, and routers without and with a cache."""

    shard_map: ShardMap
    daemons: Sequence[Served]
    router: Served
    cached: Served

    @property
    def urls(self) -> list[str]:
        """Of the daemons."""
        return [daemon.url for daemon in self.daemons]

    @property
    def pids(self) -> list[int]:
        """Of the daemons."""
        return [daemon.pid for daemon in self.daemons]


@contextmanager
def open_fleet(
    folder: Path, shards: int, users: Sequence[str], *, cache_s: float
) -> Iterator[Fleet]:
    """Run `shards` daemons with a map and an event of each user.

    `cache_s`: what the second router keeps rows for.
    """
    with ExitStack() as stack:
        daemons = [stack.enter_context(serve(folder / f"d{i}")) for i in range(shards)]
        members = [Shard(f"s{i:02}", daemon.url) for i, daemon in enumerate(daemons)]
        made = first_map(CLUSTER, members)
        fill(made, users)
        urls = [daemon.url for daemon in daemons]
        router = stack.enter_context(serve_router(folder / "router.log", urls))
        keeps = ("--cache-max-age", str(cache_s), "--cache-rows", str(len(users)))
        cached = stack.enter_context(serve_router(folder / "cached.log", urls, *keeps))
        yield Fleet(made, daemons, router, cached)


def fill(shard_map: ShardMap, users: Sequence[str]) -> None:
    """Give empty daemons the map, the definitions, and an event of each user."""
    for shard in shard_map.shards:
        with Client(shard.url) as client:
            client.cluster.put_map(shard_map.to_dict(), shard=shard.name, expected=0)
            client.apply(DOCUMENT)
    with Client([shard.url for shard in shard_map.shards]) as client:
        send(client, users)


def send(client: Client, users: Sequence[str]) -> None:
    """Send an event of each user, a thousand to a request."""
    now_us = int(time.time() * 1e6)
    for first in range(0, len(users), 1_000):
        names = users[first : first + 1_000]
        columns = {
            "event_time": [now_us - i for i in range(len(names))],
            "user": list(names),
            "amount": [1.0] * len(names),
        }
        client.events.send("sales", columns)


async def read_all(url: str | list[str], requests: Sequence[Rows], turns: Iterable[int]) -> float:
    """Return the processor time of this process for a read in each of `turns`, in seconds.

    `requests` come one after the other, `AT_ONCE` under way.  Raises RuntimeError for a row that
    fails.
    """
    async with AsyncClient(url) as client:
        await client.read_features("person", entities=list(requests[0]))  # it learns the map

        async def ask(i: int) -> None:
            rows: Any = requests[i % len(requests)]
            answer = await client.read_features("person", entities=rows)
            if "errors" in answer:
                raise RuntimeError(answer["errors"][0]["message"])

        return await at_once(ask, turns)


async def at_once(ask: Callable[[int], Awaitable[None]], turns: Iterable[int]) -> float:
    """Call `ask` with each of `turns`, `AT_ONCE` at a time; return this process's CPU seconds."""
    began_s, left = time.process_time(), iter(turns)

    async def work() -> None:
        for i in left:
            await ask(i)

    await asyncio.gather(*(work() for _ in range(AT_ONCE)))
    return time.process_time() - began_s


def cpu_s(*pids: int) -> float:
    """Return the processor time that the threads of processes have had, in seconds."""
    return sum(
        int((task / "schedstat").read_text("ascii").split()[0]) / 1e9
        for pid in pids
        for task in Path(f"/proc/{pid}/task").iterdir()
    )


def idle_share(pids: Sequence[int], seconds: float) -> float:
    """Return the share of a core that processes use while nobody asks them anything."""
    before, began_s = cpu_s(*pids), time.perf_counter()
    time.sleep(seconds)
    return (cpu_s(*pids) - before) / (time.perf_counter() - began_s)


def count(url: str) -> dict[str, float]:
    """Return a router's counts: rows that its cache had and hadn't, hedges, calls by shard."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=60.0) as answer:
        lines = [line.rpartition(" ") for line in answer.read().decode().splitlines()]
    found = {}
    for name, _, value in lines:
        if known := _COUNTED.match(name):
            found[known[1] or f"calls {known[2]}"] = float(value)
    return found
