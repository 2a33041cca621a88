"""The asynchronous client, over aiohttp, which is imported when the first call is made."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar

from mlpd.client.operations import Operations
from mlpd.client.requests import (
    Answer,
    FileBody,
    Request,
    Told,
    Traceparent,
    read_answer,
    saving,
    time_left,
    with_deadline,
    with_trace,
)
from mlpd.client.retries import Retries
from mlpd.client.scatter import Scatter
from mlpd.client.steps import Steps
from mlpd.client.topology import Calls, Guide
from mlpd.core.address import DEFAULT_URL, Address, parse_address
from mlpd.core.errors import MlpdError, UnavailableError

T = TypeVar("T")

if TYPE_CHECKING:
    import aiohttp
    import polars as pl

    from mlpd.client.results import Predictions, Recorded

    _Operations = Operations[
        Awaitable[dict[str, Any]],
        Awaitable[str],
        Awaitable[pl.DataFrame],
        Awaitable[bytes],
        Awaitable[Predictions],
        Awaitable[Recorded],
    ]
else:
    _Operations = Operations

CONNECTIONS_MAX = 100
PART_BYTES = 1024 * 1024
"""Of a file in memory."""


class AsyncClient(_Operations):
    """As `Client`, with every call awaitable; use it on one loop, `async with` or `close` it."""

    def __init__(
        self,
        url: str | Sequence[str] = DEFAULT_URL,
        *,
        timeout_s: float = 60.0,
        deadline_s: float | None = None,
        by: str = "python client",
        retries: Retries | None = None,
        traceparent: Traceparent | None = None,
        max_staleness_s: float | None = None,
    ) -> None:
        super().__init__(deadline_s=deadline_s)
        self._guide = Guide([url] if isinstance(url, str) else url, max_staleness_s)
        self.address = parse_address(self._guide.urls[0])
        self._timeout_s = timeout_s
        self._by = by
        self._retries = retries or Retries()
        self._traceparent = traceparent
        self._session: aiohttp.ClientSession | None = None
        self._members: dict[str, AsyncClient] = {}

    async def send(self, request: Request | Scatter) -> Any:
        """Send a request, again where that is safe, and return the value of its answer.

        What can be split goes to all shards at once that it concerns.
        """
        if isinstance(request, Scatter):
            return await self._run(self._guide.calls(request))
        return await self._send(request)

    async def members(self) -> "dict[str, AsyncClient]":
        """Return a client of each shard, by name; as `Client.members`."""
        topology = await self._run(self._guide.learn())
        return {shard.name: self._member(shard.url) for shard in topology.shard_map.shards}

    async def _run(self, calls: Calls[T]) -> T:
        """Make the calls of a generator, those that it yields together at once."""
        try:
            asked = next(calls)
            while True:
                asked = calls.send(await asyncio.gather(*(self._try(*call) for call in asked)))
        except StopIteration as stop:
            found: T = stop.value
            return found

    async def _try(self, url: str, request: Request) -> Any:
        """Return the value of a daemon's answer, or its error."""
        try:
            return await self._member(url).send(request)
        except MlpdError as error:
            return error

    def _member(self, url: str) -> "AsyncClient":
        if url == self._guide.urls[0]:
            return self
        if url not in self._members:
            self._members[url] = AsyncClient(
                url,
                timeout_s=self._timeout_s,
                deadline_s=self._deadline_s,
                by=self._by,
                traceparent=self._traceparent,
            )
        return self._members[url]

    async def _send(self, request: Request) -> Any:
        request = with_trace(request, self._traceparent)
        began_s = time.monotonic()
        deadline_s = began_s + max(self._timeout_s, request.timeout_s)
        attempt = 1
        while True:
            asked = with_deadline(request, time.monotonic() - began_s if attempt > 1 else 0.0)
            try:
                answer = read_answer(await self._exchange(asked, deadline_s - time.monotonic()))
            except MlpdError as error:
                left_s = time_left(request, began_s, deadline_s)
                pause_s = self._retries.pause_s(request, error, attempt, left_s)
                if pause_s is None:
                    raise
                attempt += 1
                await asyncio.sleep(pause_s)
            else:
                self._retries.succeeded()
                return answer

    async def drive(self, steps: Steps[Any]) -> Any:
        """Do what `steps` say, one after the other."""
        try:
            step = next(steps)
            while True:
                if isinstance(step, float | int):
                    await asyncio.sleep(step)
                    step = next(steps)
                    continue
                try:
                    answer = await self.send(step)
                except MlpdError as error:
                    step = steps.throw(error)
                else:
                    step = steps.send(answer)
        except StopIteration as stop:
            return stop.value

    async def close(self) -> None:
        """Close all connections; idempotent."""
        for member in self._members.values():
            await member.close()
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def _exchange(self, request: Request, timeout_s: float) -> Answer:
        import aiohttp  # noqa: PLC0415 - 0.3 s that the synchronous client doesn't pay

        if self._session is None:
            self._session = open_session(self.address, self._by)
        try:
            async with (
                _opened(request.body) as body,
                self._session.request(
                    request.method,
                    build_url(self.address, request.path),
                    data=body,
                    headers=_headers(request),
                    timeout=aiohttp.ClientTimeout(total=max(timeout_s, 1e-3)),
                    allow_redirects=False,
                    skip_auto_headers=("Content-Type", "User-Agent"),
                ) as response,
            ):
                headers = {name.lower(): value for name, value in response.headers.items()}
                if request.to is not None and response.ok:
                    await _save(response, request.to, request.told)
                    return Answer(response.status, headers, b"", saved=request.to)
                return Answer(response.status, headers, await response.read())
        except TimeoutError:
            raise no_answer(self.address, "timeout", "it did not answer in time") from None
        except aiohttp.ClientConnectorError as error:
            raise no_answer(self.address, "unreachable", str(error)) from None
        except aiohttp.ClientError as error:
            raise no_answer(self.address, "connection_lost", str(error)) from None


@asynccontextmanager
async def _opened(body: bytes | FileBody | None) -> AsyncIterator[Any]:
    """Yield what aiohttp sends: of a file, as it is read."""
    if not isinstance(body, FileBody):
        yield body
        return
    file = await asyncio.to_thread(body.path.open, "rb")
    try:
        yield file
    finally:
        file.close()


async def _save(response: "aiohttp.ClientResponse", to: Path, told: Told | None) -> None:
    length, received = response.content_length or 0, 0
    with saving(to) as write:
        async for part in response.content.iter_chunked(PART_BYTES):
            await asyncio.to_thread(write, part)
            received += len(part)
            if told is not None:
                told("received", received, length)


def open_session(address: Address, by: str) -> "aiohttp.ClientSession":
    """Return a session to one daemon; its requests say who calls.  On the loop."""
    import aiohttp  # noqa: PLC0415 - see AsyncClient._exchange

    connector: aiohttp.BaseConnector
    if address.socket_path is None:
        connector = aiohttp.TCPConnector(limit=CONNECTIONS_MAX)
    else:
        connector = aiohttp.UnixConnector(address.socket_path, limit=CONNECTIONS_MAX)
    return aiohttp.ClientSession(
        connector=connector, headers={"x-mlpd-by": by}, auto_decompress=False
    )


def build_url(address: Address, path: str) -> Any:
    """Return the URL of an encoded path, which stays as it is."""
    import yarl  # noqa: PLC0415 - comes with aiohttp

    return yarl.URL(f"http://{address.host_header}{path}", encoded=True)


def _headers(request: Request) -> dict[str, str]:
    headers = {"Accept": request.accept, "Accept-Encoding": "identity", **request.headers}
    return headers if request.body is None else {**headers, "Content-Type": request.content_type}


def no_answer(address: Address, code: str, why: str) -> UnavailableError:
    """Return the error for a daemon that can't be reached, or says nothing."""
    return UnavailableError(
        f"the daemon at {address} gave no answer: {why}",
        code=code,
        hint="Is it running? mlpd serve starts it; otherwise it is not known whether the call "
        "was carried out.",
    )
