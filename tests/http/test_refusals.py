"""Refusals at the door: whole requests of a full crowd, in the words of the route, and in order."""

import json
import random
import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from tests.http.test_admission import CROWDS, limited

ROUTES = {
    "/v1/predict/risk": "/v1/predict/{route}",
    "/v1/events/clicks": "/v1/events/{source}",
    "/v2/models/risk/infer": "/v2/models/{model}/infer",
}
ENDLESS = 10_000
"""Refusals: more than the buffers of a local socket and of a connection take."""
TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00"


class Wire:
    """A connection on which requests are sent as bytes, and answers read one by one."""

    def __init__(self, edge: Any) -> None:
        host, _, port = edge.host.rpartition(":")
        self.host = edge.host
        self.socket = socket.create_connection((host, int(port)), 30)
        self._file = self.socket.makefile("rb")

    def request(self, path: str, body: bytes | None = None, *fields: str) -> bytes:
        method = "GET" if body is None else "POST"
        lines = [f"{method} {path} HTTP/1.1", f"Host: {self.host}", *fields]
        if body is not None:
            lines += ["Content-Type: application/json", f"Content-Length: {len(body)}"]
        return "\r\n".join([*lines, "", ""]).encode() + (body or b"")

    def answer(self) -> tuple[int, dict[str, str], bytes]:
        status = int(self._file.readline().split()[1])
        headers = {}
        while line := self._file.readline().decode().strip():
            name, _, value = line.partition(":")
            headers[name.lower()] = value.strip()
        return status, headers, self._file.read(int(headers["content-length"]))

    def is_closed(self) -> bool:
        return self._file.read(1) == b""

    def close(self) -> None:
        self._file.close()
        self.socket.close()


@contextmanager
def wire(edge: Any) -> Iterator[Wire]:
    connection = Wire(edge)
    try:
        yield connection
    finally:
        connection.close()


def refused_total(edge: Any, path: str) -> int:
    text = edge.call("GET", "/metrics")[1].decode()
    found = re.search(
        rf'^mlpd_http_requests_total{{.*"{re.escape(path)}".*"503"}} (\d+)', text, re.MULTILINE
    )
    return 0 if found is None else int(found[1])


@pytest.mark.parametrize("path", CROWDS)
def test_the_door_says_what_the_route_says(edge: Any, path: str) -> None:
    kind, value = CROWDS[path]
    body = json.dumps(value).encode()
    route = ROUTES.get(path, path)
    before = refused_total(edge, route)
    with limited(edge, kind, 0) as limit, wire(edge) as connection:
        refused = limit.refused
        connection.socket.sendall(connection.request("/healthz"))  # it stands, and waits
        assert connection.answer()[0] == 200
        whole = connection.request(path, body)
        connection.socket.sendall(whole)
        status, headers, said = connection.answer()
        connection.socket.sendall(whole[:-1])  # the route refuses before the body is there
        by_route = connection.answer()
        connection.socket.sendall(whole[-1:])
        assert (status, said) == (503, by_route[2])
        assert by_route[0] == 503
        assert headers.items() <= by_route[1].items()
        assert limit.refused == refused + 2
        assert refused_total(edge, route) == before + 2
    assert limit.in_flight == 0


def test_a_trace_goes_on_through_a_refusal(edge: Any) -> None:
    with limited(edge, "predict", 0), wire(edge) as connection:
        body = json.dumps(CROWDS["/v1/predict/risk"][1]).encode()
        for _ in range(2):
            sent = connection.request("/v1/predict/risk", body, f"traceparent: {TRACE}")
            connection.socket.sendall(sent)
            status, headers, _ = connection.answer()
            assert (status, headers["traceparent"][:35]) == (503, TRACE[:35])


def test_the_last_request_of_a_connection_ends_it(edge: Any) -> None:
    with limited(edge, "predict", 0), wire(edge) as connection:
        body = json.dumps(CROWDS["/v1/predict/risk"][1]).encode()
        connection.socket.sendall(connection.request("/v1/predict/risk", body))
        assert connection.answer()[0] == 503
        connection.socket.sendall(connection.request("/v1/predict/risk", body, "Connection: close"))
        assert connection.answer()[0] == 503
        assert connection.is_closed()


@pytest.mark.parametrize("seed", range(20))
def test_answers_come_in_order_however_requests_are_cut(edge: Any, seed: int) -> None:
    """Several at once, halves of one, a byte of the next: as the network may bring them."""
    rng = random.Random(seed)
    predict, read = (
        (path, json.dumps(CROWDS[path][1]).encode())
        for path in ("/v1/predict/risk", "/v1/features/read")
    )
    with limited(edge, "predict", 0), wire(edge) as connection:
        kinds = {
            503: connection.request(*predict),
            200: connection.request(*read),
            204: connection.request("/healthz"),
        }
        expected = rng.choices(list(kinds), (6, 1, 1), k=12)
        stream = b"".join(kinds[status] for status in expected)
        cuts = sorted(rng.sample(range(len(stream)), rng.choice((0, 3, 20))))
        at_ends = [0]
        for status in expected:
            at_ends.append(at_ends[-1] + len(kinds[status]))
        if seed % 2:  # whole requests, one by one or in groups
            cuts = sorted(rng.sample(at_ends[1:-1], 8))
        for start, stop in zip([0, *cuts], [*cuts, len(stream)], strict=True):
            connection.socket.sendall(stream[start:stop])
            time.sleep(0.001)
        answered = [connection.answer()[0] for _ in expected]
        assert answered == [200 if status == 204 else status for status in expected]
    assert edge.daemon.limits["predict"].in_flight == 0


def test_a_refusal_waits_for_the_answer_before_it(
    edge: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, inside, go = edge.daemon.read.read_each, threading.Event(), threading.Event()

    def read_late(*args: Any, **options: Any) -> Any:
        inside.set()
        assert go.wait(30)
        return read(*args, **options)

    monkeypatch.setattr(edge.daemon.read, "read_each", read_late)
    row = {"user": "a", "age": 0.5}
    many = json.dumps({"service": "risk", "entities": [row] * 300}).encode()
    one = json.dumps({"rows": [row]}).encode()
    with limited(edge, "predict", 0), wire(edge) as connection:
        connection.socket.sendall(connection.request("/v1/features/read", many))
        try:
            assert inside.wait(30)
            connection.socket.sendall(connection.request("/v1/predict/risk", one))
            assert edge.call("GET", "/healthz")[0] == 200  # the loop has seen it
        finally:
            go.set()
        assert [connection.answer()[0] for _ in range(2)] == [200, 503]


def test_who_never_reads_is_not_written_to_forever(edge: Any) -> None:
    """What is refused at the door waits for its reader, as any answer does."""
    body = json.dumps(CROWDS["/v1/predict/risk"][1]).encode()
    with (
        limited(edge, "predict", 0) as limit,
        socket.socket(socket.AF_UNIX) as connection,
        wire(edge) as other,
    ):
        connection.connect(edge.socket_url.removeprefix("unix:"))
        before, one = limit.refused, other.request("/v1/predict/risk", body)
        for count in range(1, ENDLESS):
            connection.sendall(one)
            stop_s = time.monotonic() + 1
            while limit.refused < before + count and time.monotonic() < stop_s:
                time.sleep(0)
            if limit.refused < before + count:
                return
        pytest.fail(f"{ENDLESS} answers were written that nobody read")
