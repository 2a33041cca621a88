"""Bytes that no client should send: answered below 500 or cut off, and life goes on."""

import socket
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

BODY = b'{"rows": []}'


def exchange(edge: Any, data: bytes, *, end: bool = True) -> bytes:
    """Send bytes as they are, `end` the sending side, return all that comes back."""
    host, _, port = edge.host.rpartition(":")
    with socket.create_connection((host, int(port)), 10) as connection:
        connection.sendall(data)
        if end:
            connection.shutdown(socket.SHUT_WR)
        parts = []
        try:
            while part := connection.recv(65536):
                parts.append(part)
        except ConnectionResetError:
            pass
        return b"".join(parts)


def check(edge: Any, data: bytes) -> bytes:
    answer = exchange(edge, data)
    if answer:
        assert answer.startswith(b"HTTP/"), answer[:100]
        assert int(answer.split(b" ", 2)[1]) < 500, answer[:300]
    assert edge.call("GET", "/healthz")[0] == 200
    return answer


def post(
    edge: Any, *headers: bytes, body: bytes = BODY, path: bytes = b"/v1/predict/risk"
) -> bytes:
    lines = [b"POST " + path + b" HTTP/1.1", b"Host: " + edge.host.encode(), *headers]
    return b"\r\n".join([*lines, b"", body])


@pytest.mark.parametrize(
    "data",
    [
        b"\r\n" * 100,
        b"\x00" * 1000,
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET /\r\n\r\n",
        b"NONSENSE / HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"X: y\r\n" * 10_000 + b"\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"y" * 100_000 + b"\r\n\r\n",
        b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nX : y\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
        b"GET /v1/models/%zz%00%ff HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET /v1/runs/\xff\xfe HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET //evil.example/v1/status HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET http://evil.example/v1/status HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"OPTIONS * HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"CONNECT localhost:1 HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 100,
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    ],
    ids=lambda data: repr(data[:40]),
)
def test_a_strange_request(edge: Any, data: bytes) -> None:
    check(edge, data)


def test_without_a_host_nobody_is_answered(edge: Any) -> None:
    answer = exchange(edge, b"GET /v1/status HTTP/1.0\r\n\r\n", end=False)
    assert b" 403 " in answer.split(b"\r\n", 1)[0]
    assert b"foreign_host" in answer


@pytest.mark.parametrize(
    ("headers", "body"),
    [
        ([b"Content-Length: 1000"], BODY),
        ([b"Transfer-Encoding: chunked"], b"zz\r\nhello"),
        ([b"Transfer-Encoding: chunked"], b"ffffffffffffffff\r\nhello"),
        ([b"Transfer-Encoding: chunked"], b"-5\r\nhello\r\n0\r\n\r\n"),
        ([b"Transfer-Encoding: chunked", b"Content-Length: 12"], BODY),
        ([b"Content-Length: 12", b"Content-Encoding: gzip"], BODY),
        ([b"Content-Length: 12", b"Content-Encoding: br"], BODY),
        ([b"Content-Length: 12", b"Content-Encoding: nonsense"], BODY),
        ([b"Content-Length: 12", b"Content-Type: ;;;="], BODY),
        ([b"Content-Length: 12", b"Content-Type: application/json; charset=\xff"], BODY),
        ([b"Content-Length: 12", b"Expect: nonsense"], BODY),
        ([b"Content-Length: 12", b"Accept: " + b"," * 5000], BODY),
        ([b"Content-Length: 12", b"x-deadline-ms: 1e999"], BODY),
        ([b"Content-Length: 12", b"x-mlpd-by: \xff\xfe"], BODY),
    ],
    ids=repr,
)
@pytest.mark.parametrize(
    "path", [b"/v1/predict/risk", b"/v1/events/clicks", b"/v2/models/risk/infer"]
)
def test_a_strange_body(edge: Any, headers: list[bytes], body: bytes, path: bytes) -> None:
    check(edge, post(edge, *headers, body=body, path=path))


def test_a_body_that_is_not_what_it_says_is_malformed(edge: Any) -> None:
    headers = {"Content-Encoding": "gzip", "Connection": "close"}
    status, value, _ = edge.call("POST", "/v1/predict/risk", BODY, headers)
    assert (status, value["error"]["code"]) == (400, "malformed_body")


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_mutated_requests(edge: Any, data: st.DataObject) -> None:
    whole = post(edge, b"Content-Length: 12", b"Content-Type: application/json")
    at = data.draw(st.integers(0, len(whole) - 1))
    junk = data.draw(st.binary(max_size=8))
    cut = data.draw(st.integers(0, 8))
    check(edge, whole[:at] + junk + whole[at + cut :])
