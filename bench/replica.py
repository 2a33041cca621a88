"""Scenario replica: what a feed of commits costs an owner, and how fast a follower applies it."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

from bench.daemon import serve
from bench.options import Options
from bench.turns import Case, alone, in_turns
from mlpd import Aggregate, Entity, FeatureView, Source, WindowView
from mlpd.client import Client
from mlpd.cluster.placement import first_map
from mlpd.core.shards import Shard

USERS = 1_000
BATCHES = (1_000, 10)
BEHIND_ROWS = 50_000


def replica(options: Options) -> dict[str, Case]:
    """Ingest into a latest-value view and a window view, with a feed that nobody reads, or none.

    Then a follower that was held up comes to where its owner is.
    """
    found: dict[str, Case] = {}
    with (
        tempfile.TemporaryDirectory() as folder,
        serve(Path(folder) / "fed") as fed,
        serve(Path(folder) / "plain") as plain,
        Client(fed.url) as ours,
        Client(plain.url) as floor,
    ):
        numbers = count()
        for client in (ours, floor):
            client.apply(_objects())
        made = first_map("0f" * 16, [Shard("a", fed.url)])
        ours.cluster.put_map(made.to_dict(), shard="a", expected=0)
        ours.cluster.forget_snapshot(ours.cluster.snapshot()["snapshot"])
        for size in BATCHES:
            send = partial(_send, numbers=numbers, size=size, seconds=options.seconds)
            before = _feed_bytes(ours), ours.status()["sequence"]
            case = in_turns(
                *(partial(send, ours), partial(send, floor)),
                rounds=options.rounds,
                measure="rows_per_s",
            )
            after = _feed_bytes(ours), ours.status()["sequence"]
            per_row = (after[0] - before[0]) / (after[1] - before[1])
            found[f"feed, batches of {size}"] = {**case, "notes": {"feed_bytes_per_row": per_row}}
        with _follower(Path(folder) / "follower", fed.url) as (pid, url), Client(url) as theirs:
            catch_up = partial(_catch_up, ours, theirs, pid, numbers)
            found["follower, catching up"] = alone(
                catch_up, rounds=options.rounds, measure="rows_per_s"
            )
    return found


def _objects() -> list[Any]:
    user = Entity("user", key="int64")
    events = Source("events", timestamp="at", schema={"user": "int64", "x": "float64"})
    last = FeatureView("last", user, events, ["x"])
    load = WindowView("load", user, events, ["1h"], [Aggregate.mean("x")])
    return [user, events, last, load]


def _batch(numbers: Iterator[int], rows: int) -> dict[str, list[Any]]:
    now_us = time.time_ns() // 1000
    users = [next(numbers) % USERS for _ in range(rows)]
    return {"at": [now_us] * rows, "user": users, "x": [0.5] * rows}


def _send(client: Client, *, numbers: Iterator[int], size: int, seconds: float) -> dict[str, float]:
    """Send batches one after the other for `seconds` of waiting; return the rate."""
    waited, rows = 0.0, 0
    while waited < seconds:
        batch = _batch(numbers, size)
        started = time.perf_counter()
        client.events.send("events", batch)
        waited += time.perf_counter() - started
        rows += size
    return {"rows_per_s": rows / waited}


def _feed_bytes(client: Client) -> float:
    """Return the bytes of the feed, which keeps all of so short a run."""
    for line in client.metrics().splitlines():
        if line.startswith("mlpd_feed_bytes "):
            return float(line.split()[1])
    raise RuntimeError("the daemon shows no feed")


@contextmanager
def _follower(directory: Path, owner: str) -> Iterator[tuple[int, str]]:
    """Run a daemon that follows; yields its pid and URL."""
    command = [sys.executable, "-m", "mlpd", "serve", "--data-dir", str(directory)]
    command += ["--port", "0", "--follow", owner]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            if process.stdout is None:
                raise RuntimeError("it has no output")
            yield process.pid, process.stdout.readline().split(" at ")[1].split()[0]
        finally:
            process.terminate()


def _catch_up(
    owner: Client, follower: Client, pid: int, numbers: Iterator[int]
) -> Mapping[str, float]:
    """Hold a follower up while rows come, then let it go; return its rate."""
    os.kill(pid, signal.SIGSTOP)
    try:
        for _ in range(BEHIND_ROWS // 1_000):
            owner.events.send("events", _batch(numbers, 1_000))
    finally:
        os.kill(pid, signal.SIGCONT)
    started, sequence = time.perf_counter(), owner.status()["sequence"]
    while follower.status()["sequence"] < sequence:
        time.sleep(0.005)
    return {"rows_per_s": BEHIND_ROWS / (time.perf_counter() - started)}
