"""Scenario growth: what ten times as many entities change, and what they don't."""

import asyncio
import random
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import msgpack

from bench.daemon import Served, memory_mb, serve
from bench.load import Target, run_round
from bench.options import Options
from bench.turns import Case, alone, in_turns
from mlpd import Aggregate, Entity, FeatureService, FeatureView, Source, WindowView
from mlpd.client import Client
from mlpd.core.definitions import build_document
from mlpd.core.time import SECOND_US, system_clock
from mlpd.storage.environment import Environment
from mlpd.storage.tables import Table

SMALLEST = 10_000
BATCH = 20_000
READS, READERS = 20_000, 8
"""Entities that are read, drawn by lot, and requests at once."""
WRITES, WRITE_ROWS, WRITERS = 200, 1_000, 4
"""Requests that are sent in turns, their rows, and how many at once."""
SEED = 7

Figures = dict[str, float]


@dataclass(frozen=True, slots=True)
class _Store:
    """A filled data directory."""

    data: Path
    entities: int


def growth(options: Options) -> dict[str, Case]:
    """Reads, ingest and start of 10^5, 10^6 ... entities, against 10^4, and the bytes of each.

    An entity has a latest-value row of four floats and a window view (count and mean, 1 h and 1 d).
    `fill`: its first event, 20,000 to a request.  `read`: one entity to a request, drawn by lot.
    `ingest`: 1,000 rows to a request, by lot.  `start`: from exec to the first 200 of /readyz.
    """
    found: dict[str, Case] = {}
    sizes = [SMALLEST]
    while sizes[-1] * 10 <= options.entities:
        sizes.append(sizes[-1] * 10)
    with tempfile.TemporaryDirectory() as folder:
        stores = [_Store(Path(folder) / f"{size}", size) for size in sizes]
        for store in stores:
            figures = _fill(store)
            name = f"fill, {store.entities:,} entities"
            found[name] = _once(figures, measure="online_page_bytes")
        _measure_load(found, stores, options)
        for store in stores[1:]:
            found[f"start, {store.entities:,} entities"] = in_turns(
                partial(_start, store),
                partial(_start, stores[0]),
                rounds=options.rounds,
                measure="ready_s",
            )
    return found


def _measure_load(found: dict[str, Case], stores: Sequence[_Store], options: Options) -> None:
    """Read and write all stores, a daemon for each, the smallest in turns with the others."""
    with ExitStack() as stack:
        daemons = {store.entities: stack.enter_context(serve(store.data)) for store in stores}
        for what, act in (("read", _read), ("ingest", _ingest)):
            for store in stores[1:]:
                large, small = store.entities, stores[0].entities
                found[f"{what}, {large:,} entities"] = in_turns(
                    partial(act, daemons[large], large, options),
                    partial(act, daemons[small], small, options),
                    rounds=options.rounds,
                    measure="p50_ms" if what == "read" else "rows_per_s",
                    seconds=options.seconds,
                )
        for store in stores:
            resident = {"resident_mb": memory_mb(daemons[store.entities].pid)}
            found[f"memory, {store.entities:,} entities"] = _once(resident, measure="resident_mb")


def _once(figures: Figures, *, measure: str) -> Case:
    return alone(lambda: figures, rounds=1, measure=measure)


def build_definitions() -> dict[str, Any]:
    """Return the definitions: one source, one entity, a view of each kind, a service of both."""
    user = Entity("user")
    values = dict.fromkeys("abcd", "float64")
    clicks = Source("clicks", timestamp="at", schema={"user": "string", **values})
    last = FeatureView("last", user, clicks, list(values))
    aggregates = [Aggregate.count(), Aggregate.mean("a")]
    load = WindowView("load", user, clicks, ["1h", "1d"], aggregates)
    return build_document([user, clicks, last, load, FeatureService("s", [last, load])])


def _fill(store: _Store) -> Figures:
    """Send an event of each entity; return rows per second, and bytes by entity."""
    with serve(store.data) as daemon, Client(daemon.url, timeout_s=300.0) as client:
        client.apply(build_definitions())
        started = time.perf_counter()
        for first in range(0, store.entities, BATCH):
            rows = _columns(range(first, min(store.entities, first + BATCH)))
            client.events.send("clicks", rows, all_or_nothing=True)
        rate = store.entities / (time.perf_counter() - started)
    return {"rows_per_s": rate, **_bytes(store)}


def _columns(users: Sequence[int]) -> dict[str, list[Any]]:
    values = {name: [user % 97 / 8 for user in users] for name in "abcd"}
    now_us = system_clock() - SECOND_US
    return {"at": [now_us] * len(users), "user": [f"user-{user}" for user in users], **values}


def _bytes(store: _Store) -> Figures:
    """Return keys and values of the online rows, and the pages that hold them, by entity."""
    with (
        Environment.open(store.data / "lmdb", clock=system_clock, readonly=True) as environment,
        environment.snapshot() as snapshot,
    ):
        tables = (Table.ONLINE, Table.TILES)
        rows = (row for table in tables for row in snapshot.scan(table))
        size = sum(len(key) + len(value) for key, value in rows)
        pages = sum(snapshot.table_bytes(table) for table in tables)
    return {"online_bytes": size / store.entities, "online_page_bytes": pages / store.entities}


def _read(daemon: Served, entities: int, options: Options) -> Figures:
    drawn = random.Random(SEED)
    keys = (f"user-{drawn.randrange(entities)}" for _ in range(READS))
    bodies = [msgpack.packb({"service": "s", "entities": [{"user": key}]}) for key in keys]
    target = Target(f"{daemon.url}/v1/features/read", bodies)
    return asyncio.run(run_round(target, concurrency=READERS, seconds=options.seconds)).to_dict()


def _ingest(daemon: Served, entities: int, options: Options) -> Figures:
    target = Target(f"{daemon.url}/v1/events/clicks", list(_writes(entities)))
    found = asyncio.run(run_round(target, concurrency=WRITERS, seconds=options.seconds))
    return {"rows_per_s": found.requests_per_s * WRITE_ROWS, **found.to_dict()}


def _writes(entities: int) -> Iterator[bytes]:
    drawn = random.Random(SEED)
    for _ in range(WRITES):
        users = [drawn.randrange(entities) for _ in range(WRITE_ROWS)]
        yield msgpack.packb({"columns": _columns(users)})


def _start(store: _Store) -> Figures:
    with serve(store.data) as daemon:
        return {"ready_s": daemon.start_s}
