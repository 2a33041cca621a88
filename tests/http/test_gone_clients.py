"""Work for which nobody waits any more: dropped if it only reads, finished if it changes things."""

import asyncio
import http.client
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

from mlpd.client import Client
from mlpd.daemon.read_pool import THREADS

ROW = {"user": "a", "age": 0.5}
WIDTH = 7
MANY = {"rows": [ROW] * 300}
"""Rows enough for a thread."""


def send(edge: Any, path: str, body: Any, **headers: str) -> http.client.HTTPConnection:
    connection = http.client.HTTPConnection(edge.host, timeout=30)
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    connection.request("POST", path, data, {"Content-Type": "application/json", **headers})
    return connection


def answer_of(connection: http.client.HTTPConnection) -> tuple[int, Any]:
    response = connection.getresponse()
    value = json.loads(response.read())
    connection.close()
    return response.status, value


def wait_for(condition: Callable[[], bool], what: str) -> None:
    stop = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < stop, what
        time.sleep(0.01)


def gone(edge: Any, path: str) -> int:
    """Requests whose client went away, as /metrics counts them."""
    text = edge.call("GET", "/metrics")[1].decode()
    lines = [line for line in text.splitlines() if "mlpd_http_requests_total{" in line]
    return sum(int(float(v.split()[-1])) for v in lines if f'"{path}"' in v and '"499"' in v)


@contextmanager
def held(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> Iterator[list[int]]:
    """Calls of a method in threads wait inside this block; yields the rows of each call."""
    method, go, calls = getattr(owner, name), threading.Event(), []

    def hold(first: Any, *args: Any, **options: Any) -> Any:
        calls.append(len(args[0]["user"] if args else first))
        assert go.wait(30)
        return method(first, *args, **options)

    with monkeypatch.context() as patched:
        patched.setattr(owner, name, hold)
        try:
            yield calls
        finally:
            go.set()


def test_rows_of_a_gone_client_are_not_scored(edge: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = {
        "name": "features",
        "shape": [2000, WIDTH],
        "datatype": "FP64",
        "parameters": {"binary_data_size": 2000 * WIDTH * 8},
    }
    head = json.dumps({"inputs": [tensor]}).encode()
    length = {"Inference-Header-Content-Length": str(len(head))}
    path, before = "/v2/models/{model}/infer", gone(edge, "/v2/models/{model}/infer")
    with held(monkeypatch, edge.daemon.models.find("risk").session, "run") as runs:
        body = head + np.zeros((2000, WIDTH)).tobytes()
        connection = send(edge, "/v2/models/risk/infer", body, **length)
        wait_for(lambda: bool(runs), "the first part of the request did not run")
        connection.close()
        wait_for(lambda: gone(edge, path) > before, "nobody noticed that the client went away")
    wait_for(lambda: edge.daemon.batcher.pending_rows == 0, "rows still wait")
    assert runs == [256]


@pytest.mark.parametrize("patience", ["the client goes", "the deadline passes"])
def test_rows_that_nobody_waits_for_are_not_read(
    edge: Any, monkeypatch: pytest.MonkeyPatch, patience: str
) -> None:
    path = "/v1/predict/{route}"
    before, logged = gone(edge, path), edge.daemon.predictions.logged
    with held(monkeypatch, edge.daemon.read, "read_each") as reads:
        busy = [send(edge, "/v1/predict/risk", MANY) for _ in range(THREADS)]
        wait_for(lambda: len(reads) == THREADS, "the threads of reads are not busy")
        if patience == "the client goes":
            hopeless = send(edge, "/v1/predict/risk", MANY)
            wait_for(lambda: edge.daemon.read_pool._waiting > THREADS, "the request did not come")
            hopeless.close()
            wait_for(lambda: gone(edge, path) > before, "nobody noticed that the client went away")
        else:
            deadline = {"x-deadline-ms": "1000"}
            hopeless = send(edge, "/v1/predict/risk", MANY, **deadline)
            wait_for(lambda: edge.daemon.read_pool._waiting > THREADS, "the request did not come")
            time.sleep(1.0)
    assert [answer_of(connection)[0] for connection in busy] == [200] * THREADS
    if patience == "the deadline passes":
        status, value = answer_of(hopeless)
        assert (status, value["error"]["code"]) == (504, "deadline_exceeded")
    assert len(reads) == THREADS
    assert edge.daemon.predictions.logged == logged + 300 * THREADS


@pytest.mark.parametrize("path", ["/v1/features/read", "/v1/predict/risk", "/v2/models/risk/infer"])
def test_a_deadline_that_has_passed_on_arrival_costs_nothing(edge: Any, path: str) -> None:
    status, value, _ = edge.call("POST", path, b"never read", {"x-deadline-ms": "0"})
    assert status == 504
    assert "it arrived" in json.dumps(value)


def test_events_of_a_gone_client_are_stored(fresh: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ingest, begun, left = fresh.daemon.ingest.ingest, threading.Event(), threading.Event()

    async def ingest_late(*args: Any) -> Any:
        begun.set()
        await asyncio.to_thread(left.wait, 30)
        return await ingest(*args)

    monkeypatch.setattr(fresh.daemon.ingest, "ingest", ingest_late)
    event = {"event_time": 1, "known_at": 1, "user": "a", "amount": 1.0, "shown_at": 1, "bought": 1}
    connection = send(fresh, "/v1/events/clicks", {"rows": [event]})
    assert begun.wait(30)
    connection.close()
    for _ in range(3):  # the loop sees the end of the connection before it answers these
        assert fresh.call("GET", "/healthz")[0] == 200
    left.set()
    with Client(fresh.url) as client:
        wait_for(lambda: client.status()["events"] == {"clicks": 1}, "the event is not stored")
