"""The asynchronous client, over aiohttp, which is imported when the first call is made."""

import asyncio
import time
from collections.abc import Awaitable
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from mlpd.client.address import DEFAULT_URL, Address, parse_address
from mlpd.client.operations import Operations
from mlpd.client.requests import Answer, Request, read_answer
from mlpd.client.retries import Retries
from mlpd.client.steps import Steps
from mlpd.core.errors import MlpdError, UnavailableError

if TYPE_CHECKING:
    import aiohttp
    import polars as pl

    _Operations = Operations[Awaitable[dict[str, Any]], Awaitable[str], Awaitable[pl.DataFrame]]
else:
    _Operations = Operations

CONNECTIONS_MAX = 100


class AsyncClient(_Operations):
    """As `Client`, with every call awaitable; use it on one loop, `async with` or `close` it."""

    def __init__(
        self,
        url: str = DEFAULT_URL,
        *,
        timeout_s: float = 60.0,
        deadline_s: float | None = None,
        by: str = "python client",
        retries: Retries | None = None,
    ) -> None:
        super().__init__(deadline_s=deadline_s)
        self.address = parse_address(url)
        self._timeout_s = timeout_s
        self._by = by
        self._retries = retries or Retries()
        self._session: aiohttp.ClientSession | None = None

    async def send(self, request: Request) -> Any:
        """Send a request, again where that is safe, and return the value of its answer."""
        deadline_s = time.monotonic() + max(self._timeout_s, request.timeout_s)
        attempt = 1
        while True:
            try:
                answer = read_answer(await self._exchange(request, deadline_s - time.monotonic()))
            except MlpdError as error:
                left_s = deadline_s - time.monotonic()
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
            self._session = _open_session(self.address, self._by)
        try:
            async with self._session.request(
                request.method,
                _url(self.address, request.path),
                data=request.body,
                headers=_headers(request),
                timeout=aiohttp.ClientTimeout(total=max(timeout_s, 1e-3)),
                allow_redirects=False,
                skip_auto_headers=("Content-Type", "User-Agent"),
            ) as response:
                body = await response.read()
                headers = {name.lower(): value for name, value in response.headers.items()}
                return Answer(response.status, headers, body)
        except TimeoutError:
            raise _unavailable(self.address, "timeout", "it did not answer in time") from None
        except aiohttp.ClientConnectorError as error:
            raise _unavailable(self.address, "unreachable", str(error)) from None
        except aiohttp.ClientError as error:
            raise _unavailable(self.address, "connection_lost", str(error)) from None


def _open_session(address: Address, by: str) -> "aiohttp.ClientSession":
    import aiohttp  # noqa: PLC0415 - see AsyncClient._exchange

    connector: aiohttp.BaseConnector
    if address.socket_path is None:
        connector = aiohttp.TCPConnector(limit=CONNECTIONS_MAX)
    else:
        connector = aiohttp.UnixConnector(address.socket_path, limit=CONNECTIONS_MAX)
    return aiohttp.ClientSession(
        connector=connector, headers={"x-mlpd-by": by}, auto_decompress=False
    )


def _url(address: Address, path: str) -> Any:
    import yarl  # noqa: PLC0415 - comes with aiohttp

    return yarl.URL(f"http://{address.host_header}{path}", encoded=True)


def _headers(request: Request) -> dict[str, str]:
    headers = {"Accept": request.accept, "Accept-Encoding": "identity", **request.headers}
    return headers if request.body is None else {**headers, "Content-Type": request.content_type}


def _unavailable(address: Address, code: str, why: str) -> UnavailableError:
    return UnavailableError(
        f"the daemon at {address} gave no answer: {why}",
        code=code,
        hint="Is it running? mlpd serve starts it; otherwise it is not known whether the call "
        "was carried out.",
    )
