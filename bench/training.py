"""Scenario training: what predictions feel of a run that trains beside them."""

import asyncio
import json
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from bench.daemon import serve
from bench.load import Target, run_round
from bench.options import Options
from bench.serving import DATA, FLIGHTS, JSON, VECTORS
from bench.turns import Case, in_turns
from bench.world import JOB, ROUTE, build_requests, open_world
from mlpd.client import Client

ROUNDS = 3
"""At most, of each side: with three settings the scenario stays below two minutes."""
FOREVER = 1_000_000
"""Boosting rounds of the run that is measured beside, and cancelled."""
CONCURRENCY = 4
BEGIN_S = 300.0

SETTINGS: Mapping[str, Mapping[str, object]] = {
    "as configured": {},
    "1 thread": {"threads": 1},
    "nice 19": {"nice": 19},
}
"""Of [training]: the levers, beside the defaults of 2 threads at nice 10."""


def training(options: Options) -> dict[str, Case]:
    """Predict one row by key, 4 at once, while a run trains, against the same daemon idle.

    The goal is a p99 of at most twice the idle one on 2 cores.  The load is measured once the run
    has come to boosting; `begins` from the moment it was started, through start and join.
    """
    found: dict[str, Case] = {}
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / DATA
        with open_world(directory, FLIGHTS, model=True) as world:
            _let_train_forever(world.client)
        bodies = [json.dumps({"rows": [row]}).encode() for row in build_requests(VECTORS)]
        for name, settings in SETTINGS.items():
            with serve(directory, training=settings) as daemon, Client(daemon.url) as client:
                target = Target(f"{daemon.url}/v1/predict/{ROUTE}", bodies, JSON)
                idle = partial(_measure, target, options.seconds)
                idle()
                moments = ("trains", "begins") if not settings else ("trains",)
                for moment in moments:
                    found[f"a run {moment}, {name}"] = in_turns(
                        partial(_beside, client, idle, until_boosting=moment == "trains"),
                        idle,
                        rounds=min(options.rounds, ROUNDS),
                        measure="p99_ms",
                        concurrency=CONCURRENCY,
                        **settings,
                    )
    return found


def _measure(target: Target, seconds: float) -> Mapping[str, float]:
    return asyncio.run(run_round(target, concurrency=CONCURRENCY, seconds=seconds)).to_dict()


def _beside(
    client: Client, measure: Callable[[], Mapping[str, float]], *, until_boosting: bool
) -> Mapping[str, float]:
    """Measure while a run is under way, and end it."""
    run_id = client.runs.start(JOB, deploy="none")["run_id"]
    try:
        _wait(client, run_id, until_boosting)
        figures = measure()
        run = client.runs.get(run_id)
        if run["state"] != "running":
            raise RuntimeError(f"the run ended while it was measured beside: {run}")
        return figures
    finally:
        client.runs.cancel(run_id)


def _wait(client: Client, run_id: str, until_boosting: bool) -> None:
    ends_s = time.monotonic() + BEGIN_S
    while time.monotonic() < ends_s:
        run = client.runs.get(run_id)
        if run["state"] == "running" and (not until_boosting or run["progress"].get("round")):
            return
        time.sleep(0.02)
    raise RuntimeError(f"the run did not begin: {run}")


def _let_train_forever(client: Client) -> None:
    document: dict[str, Any] = client.definitions()["document"]
    rounds: dict[str, Any] = {"num_boost_round": FOREVER, "early_stopping_rounds": FOREVER}
    jobs: dict[str, Any] = document["jobs"]
    changed: dict[str, Any] = {**document, "jobs": {**jobs, JOB: {**jobs[JOB], **rounds}}}
    client.apply(changed)
