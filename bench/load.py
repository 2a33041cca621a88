"""Closed-loop load on one endpoint over HTTP, and two endpoints under it in turns.

The client is a few lines of asyncio over a socket: aiohttp's takes as long for a request as the
bare servers do to answer it, and would hide what lies between them and ours.
"""

import asyncio
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from bench.turns import Case, in_turns

_END = b"\r\n\r\n"
_LENGTH = b"content-length:"


@dataclass(frozen=True, slots=True)
class Target:
    """What is asked: POST with the same headers for every request, `bodies` in turn."""

    url: str
    bodies: Sequence[bytes]
    content_type: str = "application/msgpack"
    headers: Mapping[str, str] = field(default_factory=dict)

    def requests(self) -> list[bytes]:
        """Return the bytes of every request, head and body."""
        parts = urlsplit(self.url)
        fields = {
            "Host": parts.netloc,
            "Accept": self.content_type,
            "Content-Type": self.content_type,
            **self.headers,
        }
        lines = [f"POST {parts.path} HTTP/1.1", *(f"{k}: {v}" for k, v in fields.items())]
        head = "\r\n".join([*lines, "Content-Length: "])
        return [f"{head}{len(body)}\r\n\r\n".encode() + body for body in self.bodies]


@dataclass(frozen=True, slots=True)
class Round:
    """One measured round of one target."""

    requests_per_s: float
    p50_ms: float
    p99_ms: float

    def to_dict(self) -> dict[str, float]:
        """Return the figures by name."""
        return {
            "requests_per_s": self.requests_per_s,
            "p50_ms": self.p50_ms,
            "p99_ms": self.p99_ms,
        }


class Connection(asyncio.Protocol):
    """One keep-alive connection that carries one request at a time."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._answer: asyncio.Future[tuple[int, bytes]] | None = None
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        head = self._buffer.find(_END)
        if head < 0:
            return
        fields = bytes(self._buffer[:head])
        at = fields.lower().find(_LENGTH)
        if at < 0:
            self._fail(f"an answer without Content-Length: {fields[:200]!r}")
            return
        size = int(fields[at + len(_LENGTH) :].split(b"\r\n", 1)[0])
        end = head + len(_END) + size
        if len(self._buffer) >= end:
            body = bytes(self._buffer[head + len(_END) : end])
            del self._buffer[:end]
            assert self._answer is not None
            self._answer.set_result((int(fields[9:12]), body))

    def connection_lost(self, exc: Exception | None) -> None:
        self._fail(f"the server hung up: {exc}")

    async def ask(self, request: bytes) -> tuple[int, bytes]:
        """Send the bytes of a request; return the answer's status and body."""
        assert self._transport is not None
        self._answer = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        return await self._answer

    def close(self) -> None:
        """Hang up."""
        if self._transport is not None:
            self._transport.close()

    def _fail(self, why: str) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(ConnectionError(why))


async def connect(url: str) -> Connection:
    """Return an open connection to the host and port of `url`."""
    parts = urlsplit(url)
    loop = asyncio.get_running_loop()
    host, port = parts.hostname or "127.0.0.1", parts.port or 80
    _, connection = await loop.create_connection(Connection, host, port)
    return connection


async def run_round(
    target: Target,
    *,
    concurrency: int,
    seconds: float,
    ended: Callable[[], bool] | None = None,
) -> Round:
    """Ask `target` with `concurrency` requests under way for `seconds`; all must be answered.

    `ended` is asked before each request, and may end the round sooner.  Raises RuntimeError for any
    answer but 200.
    """
    requests = target.requests()
    connections = [await connect(target.url) for _ in range(concurrency)]
    latencies: list[float] = []
    started = time.perf_counter()
    stop = started + seconds

    async def worker(connection: Connection, index: int) -> None:
        while (asked := time.perf_counter()) < stop and not (ended and ended()):
            status, answer = await connection.ask(requests[index % len(requests)])
            if status != 200:  # noqa: PLR2004 - OK
                raise RuntimeError(f"{target.url}: {status} {answer[:300]!r}")
            latencies.append(time.perf_counter() - asked)
            index += concurrency

    try:
        async with asyncio.TaskGroup() as group:
            for index, connection in enumerate(connections):
                group.create_task(worker(connection, index))
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from None
    finally:
        for connection in connections:
            connection.close()
    elapsed = time.perf_counter() - started
    latencies.sort()
    return Round(
        len(latencies) / elapsed, 1e3 * quantile(latencies, 0.5), 1e3 * quantile(latencies, 0.99)
    )


def quantile(ordered: Sequence[float], q: float) -> float:
    """Return the smallest of the ascending values that at least a share `q` doesn't exceed."""
    return ordered[max(0, math.ceil(q * len(ordered)) - 1)]


def compare(
    ours: Target, floor: Target, *, concurrency: int, seconds: float, rounds: int, **notes: Any
) -> Case:
    """Return both targets' figures and the ratio of their throughputs, after a warm-up of each."""

    def one(target: Target, length: float) -> dict[str, float]:
        return asyncio.run(run_round(target, concurrency=concurrency, seconds=length)).to_dict()

    for target in (ours, floor):
        one(target, seconds / 2)
    return in_turns(
        lambda: one(ours, seconds),
        lambda: one(floor, seconds),
        rounds=rounds,
        measure="requests_per_s",
        concurrency=concurrency,
        seconds=seconds,
        **notes,
    )
