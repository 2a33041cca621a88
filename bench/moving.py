"""Scenario moving: how long slots that move take no writes, under writers.

Three daemons in processes of their own; a third of the slots goes round.  The other side compares
all rows within the pause, as was done once.
"""

import statistics
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from unittest.mock import patch

from bench.daemon import serve
from bench.options import Options
from bench.turns import Case, in_turns
from mlpd import Aggregate, Entity, FeatureService, Source, WindowView
from mlpd.client import Client
from mlpd.cluster import moving as driver
from mlpd.cluster.members import connections
from mlpd.cluster.placement import first_map
from mlpd.core.definitions import build_document
from mlpd.core.shards import Shard, ShardMap

ROWS = {"100 rows": 300, "9,000 rows": 27_000}
"""Cases: online rows of what moves, and of all three shards."""
MOVED = range(5_461)
WRITERS = 2
MOVES_PER_S = 1.0
"""Moves of a round, per second that it is meant to take."""
_SENT = 2_000

user = Entity("user")
sales = Source("sales", "event_time", {"user": "string", "amount": "float64"})
spend = WindowView(
    "spend", user, sales, ["1d"], [Aggregate.sum("amount"), Aggregate.mean("amount")]
)
person = FeatureService("person", [spend])


@dataclass
class _Ring:
    """Running daemons, their map as it is, and who holds what moves."""

    urls: list[str]
    shard_map: ShardMap
    holder: int = 0
    stop: threading.Event = field(default_factory=threading.Event)

    def move(self) -> driver.Moved:
        """Move to the next one; returns the only part."""
        self.holder = (self.holder + 1) % len(self.urls)
        with connections("bench") as connect:
            newest = driver.newest_map(self.shard_map, connect)
            target = newest.shards[self.holder].name
            plan = driver.plan_moves(newest, driver.wanted_moves(newest, MOVED, target), connect)
            (moved,) = driver.carry_out(plan, connect, lambda _what, _rows: None)
            self.shard_map = driver.newest_map(newest, connect)
        return moved


def moving(options: Options) -> dict[str, Case]:
    """Move a third of the slots round, comparing most before the pause, against all within it.

    `pause_ms`: from the first refused write to the new map at the target; median of a round.
    """
    found: dict[str, Case] = {}
    count = max(3, round(MOVES_PER_S * options.seconds))
    for name, rows in ROWS.items():
        with tempfile.TemporaryDirectory() as folder, _open_ring(Path(folder), rows) as ring:
            ring.move()
            found[name] = in_turns(
                partial(_round, ring, count),
                partial(_round_within, ring, count),
                rounds=options.rounds,
                measure="pause_ms",
                moves=count,
                writers=WRITERS,
            )
    return found


@contextmanager
def _open_ring(folder: Path, rows: int) -> Iterator[_Ring]:
    with ExitStack() as stack:
        running = [stack.enter_context(serve(folder / f"d{i}")) for i in range(3)]
        urls = [daemon.url for daemon in running]
        made = first_map("0f" * 16, [Shard(f"s{i}", url) for i, url in enumerate(urls)])
        document = build_document([user, sales, spend, person])
        for shard in made.shards:
            with Client(shard.url) as client:
                client.cluster.put_map(made.to_dict(), shard=shard.name, expected=0)
                client.apply(document)
        with Client(urls) as client:
            for start in range(0, rows, _SENT):
                client.events.send("sales", _events(range(start, min(start + _SENT, rows))))
        ring = _Ring(urls, made)
        threads = [threading.Thread(target=_write, args=(ring, rows)) for _ in range(WRITERS)]
        for thread in threads:
            thread.start()
        try:
            yield ring
        finally:
            ring.stop.set()
            for thread in threads:
                thread.join()


def _events(users: range) -> list[dict[str, object]]:
    now_us = int(time.time() * 1e6)
    return [{"event_time": now_us, "user": f"u{i}", "amount": 1.0} for i in users]


def _write(ring: _Ring, rows: int) -> None:
    """Write three rows, wait 5 ms, and so on."""
    at = 0
    with Client(ring.urls, timeout_s=30) as client:
        while not ring.stop.is_set():
            client.events.send("sales", _events(range(at % rows, at % rows + 3)))
            at += 7
            time.sleep(0.005)


def _round(ring: _Ring, count: int) -> Mapping[str, float]:
    moved = [ring.move() for _ in range(count)]
    pauses_ms = [1000 * one.pause_s for one in moved]
    return {
        "pause_ms": statistics.median(pauses_ms),
        "pause_max_ms": max(pauses_ms),
        "events_per_s": sum(one.events for one in moved) / sum(one.seconds for one in moved),
    }


def _round_within(ring: _Ring, count: int) -> Mapping[str, float]:
    with patch("mlpd.cluster.moving._Move._compare_untouched", lambda _: None):
        return _round(ring, count)
