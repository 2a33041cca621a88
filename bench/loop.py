"""Scenario loop: how long the daemon's event loop is held up while writers keep it busy."""

import asyncio
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from bench.bare import bare
from bench.load import Target, quantile, run_round
from bench.options import Options
from bench.serving import DATA, FLIGHTS, departures
from bench.turns import Case, in_turns
from bench.watch import FILE, ask_delays
from bench.world import open_world

WRITERS = 64
SIZES = (1, 100)

SECONDS_MIN = 5.0
"""Of a round: one in a thousand is a figure only where there are some thousand ticks."""

Figures = Mapping[str, float]


def loop(options: Options) -> dict[str, Case]:
    """Stalls of the event loop under ingest by 64 writers, against the bare ingest's.

    `stall_*`: how late a 1 ms timer in the server's own loop comes.  `health_*`: how long after its
    moment a request to /healthz is answered, sent 200 times a second by another process; it waits
    behind the writers' requests, too, and for a core.
    """
    found: dict[str, Case] = {}
    seconds = max(options.seconds, SECONDS_MIN)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = {"ours": folder / "ours.jsonl", "floor": folder / "floor.jsonl"}
        environments = {side: {FILE: str(file)} for side, file in files.items()}
        with (
            open_world(
                folder / DATA, FLIGHTS, module="bench.watch", environment=environments["ours"]
            ) as world,
            bare("ingest", folder / "bare", environments["floor"]) as (url, pid),
        ):
            for size in SIZES:
                bodies = departures(size, requests=64)
                ours = Target(f"{world.daemon.url}/v1/events/departures", bodies)
                sides = {"ours": (ours, world.daemon.pid), "floor": (Target(url, bodies), pid)}

                one, other = (
                    partial(_round, *sides[side], files[side], seconds)
                    for side in ("ours", "floor")
                )
                one(), other()
                found[f"{size} rows, {WRITERS} writers"] = in_turns(
                    one,
                    other,
                    rounds=options.rounds,
                    measure="stall_p999_ms",
                    seconds=seconds,
                )
    return found


def _round(target: Target, pid: int, file: Path, seconds: float) -> Figures:
    ask_delays(pid, file)  # what came before is nobody's
    command = [sys.executable, "-m", "bench.health", target.url, str(seconds)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as sampler:
        done = asyncio.run(run_round(target, concurrency=WRITERS, seconds=seconds))
        delays = ask_delays(pid, file)
        waits = json.loads(sampler.communicate()[0])
    return {
        "requests_per_s": done.requests_per_s,
        "stall_p50_ms": quantile(delays, 0.5),
        "stall_p999_ms": quantile(delays, 0.999),
        "stall_max_ms": delays[-1],
        "health_p50_ms": quantile(waits, 0.5),
        "health_p99_ms": quantile(waits, 0.99),
        "health_max_ms": waits[-1],
    }
