"""Scenario footprint: the bytes that things take on disk, in memory and on the wire."""

import contextlib
import json
import os
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import msgpack

from bench.daemon import Served, memory_mb, serve, training_children
from bench.load import Target
from bench.options import Options
from bench.turns import Case, alone
from bench.world import JOB, ROUTE, build_events, build_requests, fill, train
from mlpd.cli.definitions import conf_folder, load_folder
from mlpd.client import Client
from mlpd.core.time import system_clock
from mlpd.storage.environment import Environment
from mlpd.storage.tables import Table

FLIGHTS, MORE_FLIGHTS, PREDICTIONS, BATCH = 60_000, 200_000, 4_000, 20_000
DEADLINE_S = 120.0
_POLL_S = 0.05
JSON = "application/json"

Cases = dict[str, Case]


def footprint(options: Options) -> Cases:
    """Bytes of events, rows, predictions, labels, counts, models and requests; no ratio.

    `bytes`: keys and values.  `page_bytes`: LMDB's pages that hold them, with the free space in
    them.  Everything is sent through the API and measured on disk.
    """
    del options  # there is nothing to repeat
    found: Cases = {}
    with tempfile.TemporaryDirectory() as name:
        data = Path(name) / "data"
        with serve(data) as daemon, Client(daemon.url, timeout_s=300.0) as client:
            client.apply(load_folder(conf_folder()))
            entities = _measure_events(found, data, client)
            _measure_online(found, data, client, entities)
            with _watched_training(daemon.pid) as peaks:
                train(client)
            _put(found, "training run", rows=FLIGHTS, peak_mb=max(peaks.values()))
            _measure_predictions(found, data, daemon, client)
            _put(found, "daemon, one route", resident_mb=memory_mb(daemon.pid))
        _put(found, "model version", bytes=_tree_bytes(data / "registry"))
        _measure_segments(found, data)
        with (
            serve(Path(name) / "more") as daemon,
            Client(daemon.url, timeout_s=300.0) as client,
            _watched_training(daemon.pid) as peaks,
        ):
            fill(client, MORE_FLIGHTS)
            train(client)
            _put(found, "training run, more rows", rows=MORE_FLIGHTS, peak_mb=max(peaks.values()))
    return found


def _measure_events(found: Cases, data: Path, client: Client) -> dict[str, int]:
    """Send events in batches, by ten and alone; return the entities seen, by key column."""
    entities: dict[str, set[str]] = {}
    for source, columns in build_events(FLIGHTS, now_us=system_clock()).items():
        batches = list(_parts(columns, BATCH))

        def send(source: str = source, batches: list[Any] = batches) -> None:
            for batch in batches:
                client.events.send(source, batch, all_or_nothing=True)

        rows = len(columns["event_time"])
        grown = _grown(data, Table.LOG, send)
        _put(found, f"log, {source}, in batches", rows=rows, **_each(grown, rows))
        for column in ("carrier", "origin", "dest", "tailnum"):
            entities.setdefault(column, set()).update(columns.get(column, ()))
    departures = build_events(FLIGHTS, now_us=system_clock(), seed=3)["departures"]
    for size, requests in ((10, 300), (1, 1_000)):
        sent = list(_parts({n: v[: size * requests] for n, v in departures.items()}, size))

        def send_each(sent: list[Any] = sent) -> None:
            for batch in sent:
                client.events.send("departures", batch, all_or_nothing=True)

        rows = size * requests
        grown = _grown(data, Table.LOG, send_each)
        _put(found, f"log, departures, {size} to a request", rows=rows, **_each(grown, rows))
    stored = _bytes(data, Table.IDEMPOTENCY)
    keys = _count(data, Table.IDEMPOTENCY) // 2  # one entry by key, one by time
    _put(found, "idempotency key", **_each(stored, keys))
    return {column: len(names) for column, names in entities.items()}


def _measure_online(found: Cases, data: Path, client: Client, entities: Mapping[str, int]) -> None:
    document = client.definitions()["document"]
    with _snapshot(data) as snapshot:
        state = msgpack.unpackb(snapshot.get(Table.DEFINITIONS, b"current"))
        sizes: dict[int, int] = {}
        for key, value in snapshot.scan(Table.ONLINE):
            view_id = int.from_bytes(key[2:6], "big")
            sizes[view_id] = sizes.get(view_id, 0) + len(key) + len(value)
        pages = snapshot.table_bytes(Table.ONLINE)
    for key, view_id in state["view_ids"].items():
        view = key.partition("@")[0]
        entity = document["entities"][document["views"][view]["entity"]]
        (column,) = entity["keys"]
        size = sizes.get(view_id, 0) / entities[column]
        _put(found, f"online, {view}", entities=entities[column], bytes=size)
    _put(found, "online, pages", bytes=sum(sizes.values()), page_bytes=pages)


def _measure_predictions(found: Cases, data: Path, daemon: Served, client: Client) -> None:
    rows, ids = build_requests(PREDICTIONS), []
    before = _bytes(data, Table.PREDICTIONS)
    for start in range(0, PREDICTIONS, 20):
        answer = client.predict(ROUTE, rows[start : start + 20])
        ids += [prediction["prediction_id"] for prediction in answer["predictions"]]
    _wait(lambda: client.status()["predictions"]["logged"] >= PREDICTIONS)
    (one,) = client.predict(ROUTE, rows[:1], include=["vector"])["predictions"]
    width = len(one["vector"] or ())
    each = _each(_less(_bytes(data, Table.PREDICTIONS), before), PREDICTIONS)
    _put(found, "prediction", features=width, **each)
    labels = [{"prediction_id": i, "label": n % 2 == 0} for n, i in enumerate(ids)]

    def send_labels() -> None:
        for start in range(0, len(labels), 1_000):
            client.feedback(labels[start : start + 1_000])

    _put(found, "label", **_each(_grown(data, Table.LABELS, send_labels), len(labels)))
    client.drift(JOB)  # counts what waits
    with _snapshot(data) as snapshot:
        buckets = [len(k) + len(v) for k, v in snapshot.scan(Table.MONITORING, b"b", b"c")]
    _put(found, "bucket of drift counts", features=width, bytes=sum(buckets) / len(buckets))
    for size in (1, 20):
        body = json.dumps({"rows": rows[:size]}).encode()
        sent, answered = _wire(Target(f"{daemon.url}/v1/predict/{ROUTE}", [body], JSON))
        _put(found, f"HTTP, predict {size} rows, JSON", in_bytes=sent, out_bytes=answered)


def _measure_segments(found: Cases, data: Path) -> None:
    """Compact everything and measure the files."""
    compact = {"compact_rows": 1, "compact_interval": "1s"}
    with serve(data, storage=compact) as daemon, Client(daemon.url, timeout_s=300.0) as client:
        _wait(lambda: client.status()["log_tail_rows"] == 0)
    import polars as pl  # noqa: PLC0415

    for source in ("departures", "arrivals"):
        files = list((data / "segments" / source).rglob("*.parquet"))
        rows = sum(pl.scan_parquet(file).select(pl.len()).collect().item() for file in files)
        size = sum(file.stat().st_size for file in files) / rows
        _put(found, f"segment, {source}", rows=rows, bytes=size)


@contextmanager
def _watched_training(pid: int) -> Iterator[dict[int, float]]:
    """Yield what becomes the peak memory of each training child of a daemon in the block."""
    peaks: dict[int, float] = {}
    done = threading.Event()

    def watch() -> None:
        while not done.wait(_POLL_S):
            with contextlib.suppress(OSError, ValueError):  # one that has ended
                for child in training_children(pid):
                    peaks[child] = memory_mb(child, peak=True)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield peaks
    finally:
        done.set()
        thread.join()


def _put(found: Cases, name: str, **figures: float) -> None:
    measure = next(reversed(figures))
    found[name] = alone(lambda: figures, rounds=1, measure=measure)


def _parts(columns: Mapping[str, list[Any]], size: int) -> Iterator[dict[str, list[Any]]]:
    for start in range(0, len(columns["event_time"]), size):
        yield {name: values[start : start + size] for name, values in columns.items()}


def _grown(data: Path, table: Table, act: Callable[[], None]) -> dict[str, int]:
    before = _bytes(data, table)
    act()
    return _less(_bytes(data, table), before)


def _less(after: Mapping[str, int], before: Mapping[str, int]) -> dict[str, int]:
    return {name: after[name] - before[name] for name in after}


def _each(sizes: Mapping[str, int], count: int) -> dict[str, float]:
    return {name: size / count for name, size in sizes.items()}


def _bytes(data: Path, table: Table) -> dict[str, int]:
    with _snapshot(data) as snapshot:
        pages = snapshot.table_bytes(table)
        return {"page_bytes": pages, "bytes": _total(snapshot.scan(table))}


def _total(items: Iterable[tuple[bytes, bytes]]) -> int:
    return sum(len(key) + len(value) for key, value in items)


def _count(data: Path, table: Table) -> int:
    with _snapshot(data) as snapshot:
        return int(snapshot.count(table))


@contextmanager
def _snapshot(data: Path) -> Iterator[Any]:
    with (
        Environment.open(data / "lmdb", clock=system_clock, readonly=True) as environment,
        environment.snapshot() as snapshot,
    ):
        yield snapshot


def _tree_bytes(folder: Path) -> int:
    return sum(
        (Path(root) / file).stat().st_size for root, _, files in os.walk(folder) for file in files
    )


def _wire(target: Target) -> tuple[int, int]:
    """Return the bytes of a request and of its answer, heads included."""
    (request,) = target.requests()
    parts = urlsplit(target.url)
    with socket.create_connection((parts.hostname, parts.port)) as connection:
        connection.sendall(request)
        answer = b""
        while b"\r\n\r\n" not in answer or len(answer) < _whole(answer):
            answer += connection.recv(65_536)
    return len(request), len(answer)


def _whole(answer: bytes) -> int:
    head = answer.partition(b"\r\n\r\n")[0]
    size = head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0]
    return len(head) + 4 + int(size)


def _wait(condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + DEADLINE_S
    while not condition():
        if time.monotonic() > deadline_s:
            raise TimeoutError("the daemon does not get there")
        time.sleep(_POLL_S)
