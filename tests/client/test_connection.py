"""One connection against servers that behave, and others that don't."""

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from mlpd.client.connection import Connection, build_head
from mlpd.client.requests import Answer, Request
from mlpd.core.address import Address
from mlpd.core.errors import InternalError, MlpdError, UnavailableError

GET = Request("GET", "/")
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello"


@contextmanager
def server(serve: Callable[[socket.socket], None]) -> Iterator[Address]:
    """Serve one connection in a thread."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def run() -> None:
            accepted, _ = listener.accept()
            with accepted:
                serve(accepted)

        thread = threading.Thread(target=run)
        thread.start()
        yield Address("127.0.0.1", listener.getsockname()[1])
        thread.join(40)


@contextmanager
def connect(address: Address) -> Iterator[Connection]:
    connection = Connection(address, 5.0)
    try:
        yield connection
    finally:
        connection.close()


def sends(*parts: bytes) -> Callable[[socket.socket], None]:
    def serve(accepted: socket.socket) -> None:
        accepted.recv(65536)
        for part in parts:
            accepted.sendall(part)

    return serve


def ask(*parts: bytes, timeout_s: float = 40.0) -> Answer:
    with server(sends(*parts)) as address, connect(address) as connection:
        return connection.exchange(GET, build_head(address, GET, ""), timeout_s)


def test_an_answer_may_come_in_any_pieces() -> None:
    assert ask(OK).body == b"hello"
    assert ask(*(OK[i : i + 1] for i in range(len(OK)))).body == b"hello"


def test_an_answer_may_come_in_chunks() -> None:
    head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    chunks = b"5;x=y\r\nhello\r\n10\r\n" + b"w" * 16 + b"\r\n0\r\nTrailer: t\r\n\r\n"
    assert ask(head + chunks).body == b"hello" + b"w" * 16
    whole = head + chunks
    assert ask(*(whole[i : i + 3] for i in range(0, len(whole), 3))).body == b"hello" + b"w" * 16


@pytest.mark.parametrize(
    ("parts", "code"),
    [
        ([OK[:20]], "connection_lost"),
        ([OK[:-2]], "connection_lost"),
        ([b""], "connection_lost"),
        ([b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhe"], "connection_lost"),
        ([b"SSH-2.0-OpenSSH\r\n\r\n"], "invalid_answer"),
        ([b"HTTP/1.1 200 OK\r\n\r\n"], "invalid_answer"),
        ([b"HTTP/1.1 200 OK\r\nContent-Length: many\r\n\r\n"], "invalid_answer"),
        ([b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n"], "invalid_answer"),
        ([b"x" * 70_000], "invalid_answer"),
        ([b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999\r\n\r\n"], "answer_too_large"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_broken_answer_is_an_error(parts: list[bytes], code: str) -> None:
    with pytest.raises(MlpdError) as caught:
        ask(*parts)
    assert caught.value.code == code


def test_a_silent_server_is_left_in_time() -> None:
    def serve(accepted: socket.socket) -> None:
        while accepted.recv(65536):
            pass

    with server(serve) as address, connect(address) as connection:
        with pytest.raises(UnavailableError) as caught:
            connection.exchange(GET, build_head(address, GET, ""), 0.1)
        assert caught.value.code == "timeout"


def test_a_slow_server_cannot_stretch_the_timeout_by_dripping() -> None:
    def serve(accepted: socket.socket) -> None:
        accepted.recv(65536)
        stop = threading.Event()
        try:
            while not stop.wait(0.02):
                accepted.sendall(b"x")
        except OSError:
            pass

    with server(serve) as address, connect(address) as connection:
        with pytest.raises(UnavailableError) as caught:
            connection.exchange(GET, build_head(address, GET, ""), 0.3)
        assert caught.value.code == "timeout"
        connection.close()


def test_a_closed_connection_is_seen_before_it_is_used_again() -> None:
    with server(sends(OK)) as address, connect(address) as connection:
        connection.exchange(GET, build_head(address, GET, ""), 40.0)
        for _ in range(4_000):
            if connection.is_stale:
                break
            threading.Event().wait(0.01)
        assert connection.is_stale


def test_a_connection_that_the_server_will_close_is_not_kept() -> None:
    closing = OK.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")
    with server(sends(closing)) as address, connect(address) as connection:
        connection.exchange(GET, build_head(address, GET, ""), 40.0)
        assert not connection.reusable


@pytest.mark.parametrize("address", [Address("127.0.0.1", 1), Address("x", 0, "/none/mlpd.sock")])
def test_nobody_there_is_said_with_what_to_do(address: Address) -> None:
    with pytest.raises(UnavailableError, match="no daemon answers") as caught:
        Connection(address, 1.0)
    assert caught.value.code == "unreachable"
    assert "mlpd serve" in caught.value.hint
    assert not isinstance(caught.value, InternalError)
