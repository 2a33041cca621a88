"""The load generator counts what was answered, whatever the pieces it came in."""

import asyncio
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgpack
import pytest

from bench.bare import bare
from bench.load import Target, compare, connect, quantile, run_round


@pytest.fixture
def url(tmp_path: Path) -> Iterator[str]:
    with bare("ingest", tmp_path) as (found, _):
        yield found


@contextmanager
def scripted(*pieces: bytes) -> Iterator[str]:
    """Serve one connection: each request is answered with all the pieces, sent one by one."""

    def answer() -> None:
        connection, _ = listener.accept()
        with connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            while connection.recv(65_536):
                for piece in pieces:
                    connection.sendall(piece)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=answer)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/x"
        thread.join()


def ask_twice(url: str) -> list[tuple[int, bytes]]:
    async def ask() -> list[tuple[int, bytes]]:
        connection = await connect(url)
        (request,) = Target(url, [b"?"]).requests()
        try:
            return [await connection.ask(request) for _ in range(2)]
        finally:
            connection.close()

    return asyncio.run(ask())


def test_an_answer_in_pieces_is_put_together() -> None:
    head = b"HTTP/1.1 200 OK\r\nX: 1\r\ncontent-LENGTH: 6\r\n\r"
    with scripted(head, b"\nabc", b"def") as url:
        assert ask_twice(url) == [(200, b"abcdef")] * 2


def test_an_answer_without_length_is_an_error() -> None:
    with (
        scripted(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n") as url,
        pytest.raises(ConnectionError, match="without Content-Length"),
    ):
        ask_twice(url)


def test_a_request_carries_its_body_and_type() -> None:
    (request,) = Target("http://127.0.0.1:1/v1/x", [b"body"], "application/json").requests()
    head, _, body = request.partition(b"\r\n\r\n")
    assert body == b"body"
    assert head.startswith(b"POST /v1/x HTTP/1.1\r\nHost: 127.0.0.1:1\r\n")
    assert b"Content-Length: 4" in head
    assert b"Content-Type: application/json" in head


def test_a_round_counts_answers_of_a_real_server(url: str) -> None:
    found = asyncio.run(run_round(Target(url, [b"body"]), concurrency=2, seconds=0.2))
    assert found.requests_per_s > 0
    assert 0 < found.p50_ms <= found.p99_ms


def test_a_comparison_tells_both_sides_and_their_ratio(url: str) -> None:
    target = Target(url, [msgpack.packb({"x": 1})])
    found = compare(target, target, concurrency=1, seconds=0.2, rounds=2)
    assert found["ours"].keys() == found["against"].keys() == {"requests_per_s", "p50_ms", "p99_ms"}
    assert 0.05 < found["ratio"]["median"] < 20.0


def test_a_refused_request_is_an_error_not_a_figure(url: str) -> None:
    with pytest.raises(RuntimeError, match="404"):
        asyncio.run(run_round(Target(f"{url}nowhere", [b""]), concurrency=1, seconds=0.2))


@pytest.mark.parametrize(
    ("q", "expected"), [(0.0, 1), (0.5, 2), (0.51, 3), (0.75, 3), (0.99, 4), (1.0, 4)]
)
def test_a_quantile_is_the_smallest_value_that_reaches_it(q: float, expected: int) -> None:
    assert quantile([1, 2, 3, 4], q) == expected
