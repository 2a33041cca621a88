"""A crowd's limit: asked before the body is read, taken when it is there, given back always."""

import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import pytest

from mlpd.core.limits import START

ROW = {"user": "a", "age": 0.5}
Kind = Literal["predict", "features", "ingest"]
EVENT = {"event_time": 1, "user": "a", "amount": 1.0, "shown_at": 1, "bought": 1}
TENSOR = {"name": "features", "shape": [1, 7], "datatype": "FP64", "data": [0.0] * 7}
CROWDS: dict[str, tuple[Kind, Any]] = {
    "/v1/predict/risk": ("predict", {"rows": [ROW]}),
    "/v2/models/risk/infer": ("predict", {"inputs": [TENSOR]}),
    "/v1/features/read": ("features", {"service": "risk", "entities": [ROW]}),
    "/v1/events/clicks": ("ingest", {"rows": [EVENT]}),
    "/v1/events": ("ingest", {"sources": {"clicks": {"rows": [EVENT]}}}),
    "/v1/feedback": ("ingest", {"labels": []}),
}


@contextmanager
def limited(edge: Any, kind: Kind, to: int) -> Iterator[Any]:
    limit = edge.daemon.limits[kind]
    limit.limit = to
    try:
        yield limit
    finally:
        limit.limit = START


def open_request(edge: Any, path: str, body: bytes, sent: bytes) -> socket.socket:
    """Send the head of a request, which promises all of `body`, and only some of it."""
    host, _, port = edge.host.rpartition(":")
    connection = socket.create_connection((host, int(port)), 30)
    head = f"POST {path} HTTP/1.1\r\nHost: {edge.host}\r\nContent-Type: application/json\r\n"
    connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + sent)
    return connection


def read_answer(connection: socket.socket) -> tuple[int, dict[str, str], Any]:
    response = http.client.HTTPResponse(connection)
    response.begin()
    value = json.loads(response.read())
    response.close()
    connection.close()
    return response.status, dict(response.headers), value


@pytest.mark.parametrize("path", CROWDS)
def test_a_full_crowd_hears_so_before_it_has_sent_its_body(edge: Any, path: str) -> None:
    kind, body = CROWDS[path]
    with limited(edge, kind, 0) as limit:
        refused = limit.refused
        connection = open_request(edge, path, json.dumps(body).encode(), b"")
        status, headers, value = read_answer(connection)
        assert (status, headers["Content-Type"]) == (503, "application/json")
        assert int(headers["Retry-After"]) >= 1
        error = value["error"]
        assert "under way" in (error if path.startswith("/v2") else error["message"])
        assert path.startswith("/v2") or error["code"] == "too_many_requests"
        assert limit.refused == refused + 1
        for exempt in ("/healthz", "/readyz", "/v2/health/ready", "/v1/status", "/v1/routes/risk"):
            assert edge.call("GET", exempt)[0] == 200
    assert limit.in_flight == 0


def test_other_crowds_are_served(edge: Any) -> None:
    with limited(edge, "predict", 0):
        status, _, _ = edge.call("POST", "/v1/features/read", CROWDS["/v1/features/read"][1])
    assert status == 200


def test_who_sends_slowly_takes_nobodys_place(edge: Any) -> None:
    path = "/v1/predict/risk"
    body = json.dumps(CROWDS[path][1]).encode()
    with limited(edge, "predict", 1) as limit:
        slow = [open_request(edge, path, body, body[:5]) for _ in range(5)]
        assert edge.call("POST", path, body)[0] == 200
        assert limit.in_flight == 0
        for connection in slow:
            connection.sendall(body[5:])
            assert read_answer(connection)[0] == 200


def test_a_place_is_taken_until_the_answer(edge: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    read, go = edge.daemon.read.read_each, threading.Event()

    def read_late(*args: Any, **options: Any) -> Any:
        assert go.wait(30)
        return read(*args, **options)

    monkeypatch.setattr(edge.daemon.read, "read_each", read_late)
    path, body = "/v1/predict/risk", json.dumps({"rows": [ROW] * 300}).encode()
    with limited(edge, "predict", 2) as limit:
        try:
            inside = [open_request(edge, path, body, body) for _ in range(2)]
            stop = time.monotonic() + 30
            while limit.in_flight < 2:
                assert time.monotonic() < stop
                time.sleep(0.01)
            status, value, _ = edge.call("POST", path, body)
            assert (status, value["error"]["code"]) == (503, "too_many_requests")
        finally:
            go.set()
        assert [read_answer(connection)[0] for connection in inside] == [200, 200]
        assert edge.call("POST", path, body)[0] == 200
        assert limit.in_flight == 0


@pytest.mark.parametrize(
    ("path", "body", "headers", "status"),
    [
        ("/v1/predict/risk", {"rows": [{"user": "a"}]}, {}, 400),
        ("/v1/predict/risk", b"{", {}, 400),
        ("/v1/predict/nothing", {"rows": [ROW]}, {}, 404),
        ("/v1/predict/risk", {"rows": [ROW]}, {"x-deadline-ms": "0.0001"}, 504),
        ("/v2/models/nothing/infer", {"inputs": [TENSOR]}, {}, 404),
        ("/v1/features/read", {"service": "risk", "entities": [{}]}, {}, 400),
        ("/v1/events/clicks", {"rows": "x"}, {}, 400),
    ],
    ids=str,
)
def test_a_place_is_given_back_whatever_comes_of_it(
    edge: Any, path: str, body: Any, headers: dict[str, str], status: int
) -> None:
    assert edge.call("POST", path, body, headers)[0] == status
    assert {limit.in_flight for limit in edge.daemon.limits.values()} == {0}


def test_the_metrics_tell_of_every_crowd(edge: Any) -> None:
    text = edge.call("GET", "/metrics")[1].decode()
    for name in ("mlpd_requests_limit", "mlpd_requests_in_flight", "mlpd_requests_refused_total"):
        for kind in ("predict", "features", "ingest"):
            assert f'{name}{{kind="{kind}"}} ' in text
