"""Moves of the cluster scenario: how many slots, events and rows a second come to another shard."""

import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from bench.daemon import serve
from bench.fleet import CLUSTER, cpu_s, fill, send
from bench.options import Options
from bench.turns import Case, alone
from mlpd.client import Client
from mlpd.cluster.members import connections
from mlpd.cluster.moving import carry_out, newest_map, plan_moves, wanted_moves
from mlpd.core.hashing import SLOTS
from mlpd.core.shards import Shard, ShardMap

USERS = [f"m{i}" for i in range(20_000)]
EVENTS_EACH = 10
PARTS = 6
"""A round moves a sixth of the slots: what a sixth shard gets."""


def measure_moves(options: Options) -> dict[str, Case]:
    """Return the moves of a sixth of the slots, with their history, to an empty shard.

    All slots, 20,000 users and 200,000 events, are at the source before; nobody else asks it.
    """
    with tempfile.TemporaryDirectory(prefix="bench") as name, ExitStack() as stack:
        daemons = [stack.enter_context(serve(Path(name) / f"d{i}")) for i in range(2)]
        shards = tuple(Shard(f"s{i}", daemon.url) for i, daemon in enumerate(daemons))
        made = ShardMap(CLUSTER, 1, shards, (0,) * SLOTS)
        fill(made, USERS)
        with Client([shard.url for shard in shards]) as client:
            for _ in range(EVENTS_EACH - 1):
                send(client, USERS)
        slots = iter(
            [list(range(SLOTS * i // PARTS, SLOTS * (i + 1) // PARTS)) for i in range(PARTS)]
        )
        pids = [daemon.pid for daemon in daemons]
        found = alone(
            lambda: _move(made, next(slots), pids),
            rounds=min(PARTS - 1, options.rounds),
            measure="slots_per_s",
            users=len(USERS),
            events=EVENTS_EACH * len(USERS),
            slots=SLOTS // PARTS,
        )
    return {"moves": found}


def _move(known: ShardMap, slots: Sequence[int], pids: Sequence[int]) -> Mapping[str, float]:
    with connections("bench") as connect:
        current = newest_map(known, connect)
        before_s, began_s = cpu_s(*pids), time.perf_counter()
        plan = plan_moves(current, wanted_moves(current, slots, "s1"), connect)
        done = list(carry_out(plan, connect, lambda _what, _rows: None))
        took_s = time.perf_counter() - began_s
        events = sum(part.events for part in done)
        return {
            "slots_per_s": len(slots) / took_s,
            "events_per_s": events / took_s,
            "rows_per_s": plan.rows / took_s,
            "event_cpu_us": 1e6 * (cpu_s(*pids) - before_s) / events,
            "pause_ms": 1e3 * max(part.pause_s for part in done),
        }
