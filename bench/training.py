"""Scenario training: what predictions feel of a run that trains beside them."""

import asyncio
import json
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from bench.daemon import Served, serve, training_children
from bench.load import Target, run_round
from bench.options import Options
from bench.serving import DATA, FLIGHTS, JSON, VECTORS
from bench.turns import Case, in_turns
from bench.world import JOB, ROUTE, build_requests, open_world
from mlpd.client import Client

FOREVER = 1_000_000
"""Boosting rounds of the run that is measured beside, and cancelled."""
WHOLE = 100
"""Boosting rounds of the runs that are measured from start to end."""
CONCURRENCY = 4
PAIRS, PAIRS_OF_LEVER = 4, 2
"""Pairs of short rounds beside a run for each of the options' rounds ..."""
SHORTER = 3
"""... of so much less than the options' seconds: what disturbs the machine hits both of a pair."""
WHOLE_RUNS = 3
"""At most: beside predictions a run takes 20 s, and the scenario is to take less than 4 minutes."""
SETTLE_S = 0.1
"""Between a signal to the run and the round: its threads are awake, its last round is told."""
LIMIT_S = 300.0

SETTINGS: Mapping[str, Mapping[str, object]] = {
    "as configured": {},
    "by niceness": {"idle": False},
}
"""Of [training]: the defaults of 2 threads on idle processors, and the lever beside them."""

Figures = Mapping[str, float]
"""Of a round, by name."""


def training(options: Options) -> dict[str, Case]:
    """Predict one row by key, 4 at once, while a run trains, against the same daemon idle.

    The goal is a p99 of at most twice the idle one on 2 cores.  Beside a run that boosts, it is
    stopped and continued by signals: idle and busy take turns of a second, at the same load, with
    the same processes in memory.  A whole run is measured from its start, through join, boosting
    and evaluation, to its version serving as the champion.  The last case is the other side: what
    boosting loses to the predictions.
    """
    found: dict[str, Case] = {}
    seconds = options.seconds / SHORTER
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / DATA
        with open_world(directory, FLIGHTS, model=True):
            pass
        bodies = [json.dumps({"rows": [row]}).encode() for row in build_requests(VECTORS)]
        for name, settings in SETTINGS.items():
            with (
                serve(directory, training=settings) as daemon,
                Client(daemon.url, timeout_s=LIMIT_S) as client,
            ):
                load = _Load(Target(f"{daemon.url}/v1/predict/{ROUTE}", bodies, JSON))
                load(options.seconds)
                about: dict[str, Any] = {"concurrency": CONCURRENCY, **settings}
                with _boosting(client, daemon) as run:
                    found[f"a run trains, {name}"] = in_turns(
                        partial(run.beside, partial(load, seconds)),
                        partial(load, seconds),
                        rounds=options.rounds * (PAIRS_OF_LEVER if settings else PAIRS),
                        measure="p99_ms",
                        seconds=seconds,
                        **about,
                    )
                    found[f"boosting beside predictions, {name}"] = in_turns(
                        partial(run.progress, partial(load, seconds)),
                        partial(run.progress, partial(time.sleep, seconds)),
                        rounds=options.rounds,
                        measure="rounds_per_s",
                        **about,
                    )
                if not settings:
                    found[f"a whole run, {name}"] = in_turns(
                        partial(_whole, client, daemon.url, load),
                        partial(load, options.seconds),
                        rounds=min(options.rounds, WHOLE_RUNS),
                        measure="p99_ms",
                        boosting_rounds=WHOLE,
                        **about,
                    )
    return found


class _Load:
    """Predictions, 4 at once, for some seconds or until something has ended."""

    def __init__(self, target: Target) -> None:
        self._target = target

    def __call__(self, seconds: float, ended: Callable[[], bool] | None = None) -> Figures:
        """Return requests a second and their latencies."""
        round_ = run_round(self._target, concurrency=CONCURRENCY, seconds=seconds, ended=ended)
        return asyncio.run(round_).to_dict()


class _Run:
    """A run that boosts for ever, stopped but for as long as it is measured."""

    def __init__(self, client: Client, run_id: str, child: int) -> None:
        self._client, self._run_id, self._child = client, run_id, child

    def beside(self, act: Callable[[], Figures]) -> Figures:
        """Return what `act` measures while the run works."""
        os.killpg(self._child, signal.SIGCONT)
        try:
            time.sleep(SETTLE_S)
            return act()
        finally:
            os.killpg(self._child, signal.SIGSTOP)
            time.sleep(SETTLE_S)

    def progress(self, act: Callable[[], Any]) -> Figures:
        """Return how many boosting rounds a second the run makes while `act` lasts."""

        def measure() -> Figures:
            before, started = self._rounds(), time.perf_counter()
            act()
            taken_s = time.perf_counter() - started
            return {"rounds_per_s": (self._rounds() - before) / taken_s}

        return self.beside(measure)

    def _rounds(self) -> int:
        run = self._client.runs.get(self._run_id)
        if run["state"] != "running":
            raise RuntimeError(f"the run ended while it was measured: {run}")
        return int(run["progress"]["round"])


@contextmanager
def _boosting(client: Client, daemon: Served) -> Iterator[_Run]:
    """Give a run that has come to boosting, and end it after the block."""
    _let_train(client, FOREVER)
    run_id = client.runs.start(JOB, deploy="none")["run_id"]
    try:
        _wait(client, run_id, lambda run: bool(run["progress"].get("round")))
        [child] = training_children(daemon.pid)
        os.killpg(child, signal.SIGSTOP)
        try:
            yield _Run(client, run_id, child)
        finally:
            os.killpg(child, signal.SIGCONT)
    finally:
        client.runs.cancel(run_id)


def _whole(client: Client, url: str, load: _Load) -> Figures:
    """Return what predictions feel from the start of a run until its version is the champion."""
    _let_train(client, WHOLE)
    failed: list[BaseException] = []
    thread = threading.Thread(target=_train_champion, args=(url, failed))
    thread.start()
    figures = load(LIMIT_S, lambda: not thread.is_alive())
    thread.join()
    if failed:
        raise failed[0]
    return figures


def _train_champion(url: str, failed: list[BaseException]) -> None:
    try:
        with Client(url) as client:
            run_id = client.runs.start(JOB, deploy="none")["run_id"]
            run = _wait(client, run_id, lambda run: run["state"] == "succeeded")
            client.models.move_alias(JOB, "champion", run["result"]["version"], why="bench")
    except BaseException as error:  # noqa: BLE001 - raised where the load is measured
        failed.append(error)


def _wait(
    client: Client, run_id: str, reached: Callable[[Mapping[str, Any]], bool]
) -> Mapping[str, Any]:
    ends_s = time.monotonic() + LIMIT_S
    while time.monotonic() < ends_s:
        run: Mapping[str, Any] = client.runs.get(run_id)
        if reached(run):
            return run
        if run["state"] not in ("queued", "running"):
            break
        time.sleep(0.1)
    raise RuntimeError(f"the run did not come so far: {run}")


def _let_train(client: Client, rounds: int) -> None:
    """Let the job boost for exactly so many rounds."""
    document: dict[str, Any] = client.definitions()["document"]
    changes = {"num_boost_round": rounds, "early_stopping_rounds": rounds}
    jobs: dict[str, Any] = document["jobs"]
    changed: dict[str, Any] = {**document, "jobs": {**jobs, JOB: {**jobs[JOB], **changes}}}
    client.apply(changed)
