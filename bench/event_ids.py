"""Scenario event_ids: durable ingest into a source that tells events apart, against one without."""

import hashlib
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

from bench.daemon import serve
from bench.options import Options
from bench.turns import Case, in_turns
from mlpd import Aggregate, Entity, FeatureView, Source, WindowView
from mlpd.client import Client

KNOWN = 1_000_000
"""Ids that each source knows before it is measured."""
USERS = 1_000
BATCHES = (10_000, 100)
IDS: Mapping[str, Callable[[int], str]] = {
    "ordered": lambda n: f"{n:032d}",
    "random": lambda n: hashlib.blake2b(b"%d" % n, digest_size=16).hexdigest(),
}


def event_ids(options: Options) -> dict[str, Case]:
    """Ingest into a latest-value view and a window view, one client, with ids and without.

    A million ids are known.  Ordered ids grow in the order of their bytes, random ones are as
    UUIDv4: each changes a page of LMDB's of its own.
    """
    found: dict[str, Case] = {}
    for kind, make in IDS.items():
        with tempfile.TemporaryDirectory() as folder, serve(Path(folder) / "data") as daemon:
            client = Client(daemon.url)
            client.apply([*_objects("plain", None), *_objects("known", "id")])
            numbers = count()
            rows = max(BATCHES)
            for _ in range(KNOWN // rows):
                client.events.send("known", _batch(numbers, make, rows))
            for size in BATCHES:
                ours, floor = (
                    partial(_send, client, source, numbers, make, size, options.seconds)
                    for source in ("known", "plain")
                )
                found[f"{kind} ids, {size} rows"] = in_turns(
                    *(ours, floor), rounds=options.rounds, measure="rows_per_s", known=KNOWN
                )
            client.close()
    return found


def _objects(source: str, event_id: str | None) -> list[Any]:
    user = Entity("user", key="int64")
    schema = {"user": "int64", "id": "string", "x": "float64"}
    events = Source(source, timestamp="at", schema=schema, event_id=event_id)
    last = FeatureView(f"{source}_last", user, events, ["x"])
    load = WindowView(f"{source}_load", user, events, ["1h"], [Aggregate.mean("x")])
    return [user, events, last, load]


def _batch(numbers: Iterator[int], make: Callable[[int], str], rows: int) -> dict[str, list[Any]]:
    now_us = time.time_ns() // 1000
    taken = [next(numbers) for _ in range(rows)]
    return {
        "at": [now_us] * rows,
        "user": [n % USERS for n in taken],
        "id": [make(n) for n in taken],
        "x": [0.5] * rows,
    }


def _send(
    client: Client,
    source: str,
    numbers: Iterator[int],
    make: Callable[[int], str],
    size: int,
    seconds: float,
) -> dict[str, float]:
    """Send batches one after the other for `seconds` of waiting; return the rate."""
    waited, rows = 0.0, 0
    while waited < seconds:
        batch = _batch(numbers, make, size)
        started = time.perf_counter()
        answer = client.events.send(source, batch)
        waited += time.perf_counter() - started
        if answer["accepted"] != size:
            raise RuntimeError(f"{answer} for {size} new events")
        rows += size
    return {"rows_per_s": rows / waited}
