"""Scenario start: from exec to ready, memory at rest, and the time of `mlpd --help`."""

import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from bench.daemon import START_S, is_ready, memory_mb, run_server, serve
from bench.options import Options
from bench.turns import Case, in_turns
from bench.world import JOB, SERVICE, fill, train_version
from mlpd.client import Client

MODELS, FLIGHTS = 10, 20_000
SETTLE_S = 3.0
"""Background work after a start (states rebuilt, the scheduler imported) is over by then."""
HELP_REPEATS = 5
_POLL_S = 0.005


def start(options: Options) -> dict[str, Case]:
    """Start of a daemon, against importing its libraries and serving /readyz with aiohttp.

    `ready_s`: from exec to the first 200 of /readyz.  `idle_mb`: resident memory 3 s later.
    `10 models`: as many versions of a trained model, each behind a route of its own.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        filled, fresh = folder / "filled", iter(range(1_000_000))
        _prepare(filled)

        def empty() -> Mapping[str, float]:
            return _start(folder / f"empty-{next(fresh)}")

        _start(filled)
        return {
            "empty": in_turns(empty, _bare, rounds=options.rounds, measure="ready_s"),
            f"{MODELS} models": in_turns(
                lambda: _start(filled), _bare, rounds=options.rounds, measure="ready_s"
            ),
            "mlpd --help": in_turns(
                lambda: _run("-m", "mlpd", "--help"),
                lambda: _run("-c", "import click"),
                rounds=options.rounds,
                measure="ms",
                floor_runs='python -c "import click"',
            ),
        }


def _prepare(directory: Path) -> None:
    """Train versions of the flights' model and give each its route."""
    with serve(directory) as daemon, Client(daemon.url, timeout_s=300.0) as client:
        fill(client, FLIGHTS)
        for number in range(1, MODELS + 1):
            train_version(client)
            arms = [{"name": "only", "model": f"{JOB}@{number}"}]
            client.routes.put(f"route-{number}", {"service": SERVICE, "arms": arms})


def _start(directory: Path) -> Mapping[str, float]:
    with serve(directory) as daemon:
        time.sleep(SETTLE_S)
        return {"ready_s": daemon.start_s, "idle_mb": memory_mb(daemon.pid)}


def _bare() -> Mapping[str, float]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    command = [sys.executable, "-m", "bench.bare_start", str(port)]
    with run_server(command, subprocess.DEVNULL) as (process, started):
        while not is_ready(f"http://127.0.0.1:{port}"):
            if process.poll() is not None or time.perf_counter() - started > START_S:
                raise RuntimeError("the bare server did not start")
            time.sleep(_POLL_S)
        ready_s = time.perf_counter() - started
        time.sleep(SETTLE_S)
        return {"ready_s": ready_s, "idle_mb": memory_mb(process.pid)}


def _run(*arguments: str) -> Mapping[str, float]:
    """Return the fastest of some runs of the interpreter: what is slower is the machine."""
    taken = []
    for _ in range(HELP_REPEATS):
        started = time.perf_counter()
        subprocess.run([sys.executable, *arguments], check=True, capture_output=True)
        taken.append(1e3 * (time.perf_counter() - started))
    return {"ms": min(taken)}
