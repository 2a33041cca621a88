"""Scenario labels: a million predictions joined with a million labels, while others are served."""

import asyncio
import json
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from bench.daemon import serve
from bench.load import Target, run_round
from bench.options import Options
from bench.turns import Case, in_turns, spreads
from bench.world import JOB, ROUTE, build_requests, fill, train
from mlpd.client import Client
from mlpd.core.time import DAY_US, HOUR_US, system_clock
from mlpd.daemon.predictions import Label, Prediction, PredictionIds, prediction_key
from mlpd.storage.environment import Environment
from mlpd.storage.tables import Table
from mlpd.storage.transactions import WriteTransaction
from mlpd.storage.writer import Writer

FLIGHTS, DAYS, FEATURES, BATCH = 20_000, 30, 20, 20_000
CONCURRENCY = 4
REBUILD_S, POLL_S = 1_800.0, 2.0

_Rows = list[tuple[bytes, bytes, bytes]]
"""Key, prediction and label, as they are stored."""


def labels(options: Options) -> dict[str, Case]:
    """Serve single rows while predictions are joined with their labels, against serving alone.

    `of_a_join`: what the child takes for all of them, from the request to the answer.
    """
    rows = build_requests(64)
    bodies = [json.dumps({"rows": [row]}).encode() for row in rows]
    with tempfile.TemporaryDirectory() as name:
        data = Path(name) / "data"
        with serve(data) as daemon, Client(daemon.url, timeout_s=300.0) as client:
            fill(client, FLIGHTS)
            train(client)
        _store(data, options.rows)
        with serve(data) as daemon, Client(daemon.url, timeout_s=300.0) as client:
            _wait_rebuilt(client, options.rows)
            target = Target(f"{daemon.url}/v1/predict/{ROUTE}", bodies, "application/json")
            case = _case(target, daemon.url, options)
    return {f"{options.rows} predictions": case}


def _case(target: Target, url: str, options: Options) -> Case:
    taken: list[Mapping[str, float]] = []

    def alone(seconds: float = options.seconds) -> Mapping[str, float]:
        return asyncio.run(run_round(target, concurrency=CONCURRENCY, seconds=seconds)).to_dict()

    def beside() -> Mapping[str, float]:
        with _joins(url, taken, options.rows):
            return alone()

    alone(options.seconds / 2)
    case = in_turns(
        beside,
        alone,
        rounds=options.rounds,
        measure="p99_ms",
        concurrency=CONCURRENCY,
        seconds=options.seconds,
    )
    case["notes"] |= {"joins": len(taken), "of_a_join": spreads(taken)}
    return case


@contextmanager
def _joins(url: str, taken: list[Mapping[str, float]], rows: int) -> Iterator[None]:
    """Join one time after the other while the block runs; at least one is finished."""
    stop = threading.Event()

    def work() -> None:
        with Client(url, timeout_s=300.0) as client:
            while not stop.is_set():
                found = client.analysis(JOB, end=system_clock() - HOUR_US)
                (version,) = found["versions"]
                assert version["labelled"] == rows, version["labelled"]
                taken.append({"took_s": found["took_s"]})

    with ThreadPoolExecutor(1) as pool:
        joining = pool.submit(work)
        try:
            yield
        finally:
            stop.set()
            joining.result()


def _store(data: Path, count: int) -> None:
    """Put predictions of the last month and their labels into a stopped daemon's store."""
    rows = _build(count, system_clock() - 2 * HOUR_US)
    environment = Environment.open(data / "lmdb", clock=system_clock)
    writer = Writer(environment)
    try:
        for start in range(0, count, BATCH):
            part = rows[start : start + BATCH]
            writer.write_blocking(partial(_put, rows=part))
    finally:
        writer.close()
        environment.close()


def _put(txn: WriteTransaction, rows: _Rows) -> None:
    for key, prediction, label in rows:
        txn.put(Table.PREDICTIONS, key, prediction)
        txn.put(Table.LABELS, key, label)


def _build(count: int, end_us: int) -> _Rows:
    rng, ids = np.random.default_rng(1), PredictionIds()
    times = (end_us - rng.integers(0, DAYS * DAY_US, count)).tolist()
    scores, draws = rng.beta(1, 4, count).round(4).tolist(), rng.random(count).tolist()
    vectors = rng.normal(size=(1_000, FEATURES))
    found = []
    for i, (t_us, score, draw) in enumerate(zip(times, scores, draws, strict=True)):
        given = {"carrier": f"C{i % 16:02}", "origin": "JFK"}
        served = (ids.make(t_us, f"N{i % 3_000:05}"), t_us, 1, ROUTE, "champion", JOB, 1)
        prediction = Prediction(*served, score, vectors[i % 1_000], given)
        label = Label(float(draw < score), t_us + HOUR_US)
        key = prediction_key(prediction.prediction_id)
        found.append((key, prediction.encode(), label.encode()))
    return sorted(found)


def _wait_rebuilt(client: Client, count: int) -> None:
    """Wait until the daemon has taken in the log: it does so in the background after a start."""
    stop = time.monotonic() + REBUILD_S
    while time.monotonic() < stop:
        cohorts: list[Any] = client.performance(JOB)["cohorts"]
        if sum(c["predictions"] for c in cohorts if c["period"] == "all") == count:
            return
        time.sleep(POLL_S)
    raise RuntimeError("the daemon did not take in its prediction log")
