"""Upstream: one shard as a router sees it: its connections, its breaker, what came of calls."""

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import aiohttp

from mlpd.client import requests as r
from mlpd.client.aio import build_url, no_answer, open_session
from mlpd.cluster.router.breaker import FAILURES, Breaker
from mlpd.cluster.router.hedging import Hedging
from mlpd.core.address import parse_address
from mlpd.core.deadlines import too_late
from mlpd.core.errors import DeadlineExceededError, MlpdError, UnavailableError
from mlpd.core.trace import TRACEPARENT, get_span

CONNECT_S = 1.0
"""What connecting may take."""
LATE_S = 1.0
"""A shard that says nothing for so long may be down; earlier only its caller is in a hurry."""
SILENCE_S = 2.0
"""A shard that has answered nothing for so long, while several wait, counts as down: whoever comes
later shouldn't wait as well.  A read that waits for a sequence takes 1 s."""
BY = "router"


@dataclass(frozen=True, slots=True)
class Until:
    """When a call must be over, on `time.monotonic()`; `is_deadline`: its caller said so."""

    at_s: float
    is_deadline: bool = False

    @classmethod
    def after(cls, seconds: float, deadline_s: float | None = None) -> "Until":
        """Return the moment in `seconds`, or the caller's deadline if that is sooner."""
        at_s = time.monotonic() + seconds
        if deadline_s is None or deadline_s > at_s:
            return cls(at_s)
        return cls(deadline_s, is_deadline=True)


class Upstream:
    """Asks one shard; made and used on the loop, `close` it.  `name`: its URL until it is known."""

    def __init__(self, url: str, hedging: Hedging, draw: Callable[[], float]) -> None:
        self.url = self.name = url
        self.breaker = Breaker(draw)
        self.outcomes: Counter[str] = Counter()
        """Calls by what came of them: answered, or the code of why not."""
        self._address = parse_address(url)
        self._hedging = hedging
        self._waiting = 0
        self._heard_s = 0.0
        """When it last answered, or when the first of those that wait now came."""
        self._session: aiohttp.ClientSession | None = None

    async def ask(self, request: r.Request, until: Until) -> r.Answer:
        """Return the answer, whatever its status.

        A lost connection is opened anew once, if sending twice does what sending once does.
        Raises UnavailableError (`unreachable`, `connection_lost`, `timeout`, `shard_down`) and
        DeadlineExceededError.
        """
        self._listen(time.monotonic())
        self._waiting += 1
        try:
            return await self._ask(request, until)
        except UnavailableError as error:
            if error.code != "connection_lost" or not request.repeatable:
                raise
        finally:
            self._waiting -= 1
        return await self._ask(request, until)

    async def ask_hedged(self, request: r.Request, until: Until) -> r.Answer:
        """Return what `ask` does of a read, which is sent once more if it is slow."""
        hedging, began_s = self._hedging, time.monotonic()
        if hedging.delay_s is None:
            answer = await self.ask(request, until)
        else:
            answer = await self._race(request, until, hedging.delay_s)
        hedging.note(time.monotonic() - began_s)
        return answer

    async def _race(self, request: r.Request, until: Until, delay_s: float) -> r.Answer:
        first = asyncio.ensure_future(self.ask(request, until))
        tasks = {first}
        try:
            await asyncio.wait(tasks, timeout=delay_s)
            if not first.done() and self._hedging.take():
                tasks.add(asyncio.ensure_future(self.ask(request, until)))
            while True:
                done, left = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                good = next((task for task in done if task.exception() is None), None)
                if good is not None or not left:
                    self._hedging.won += good is not None and good is not first
                    return (good or first).result()
                tasks = left
        finally:
            for task in {first, *tasks}:
                task.cancel()
            await asyncio.gather(first, *tasks, return_exceptions=True)

    @asynccontextmanager
    async def stream(
        self, method: str, path: str, headers: Mapping[str, str], body: Any, until: Until
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """Yield an answer whose body is still to be read; raises as `ask`, also while it is read.

        `body`: bytes, or an open file.
        """
        self.breaker.check(self.name, time.monotonic())
        began_s = time.monotonic()
        left_s = until.at_s - began_s
        if left_s <= 0.0:
            raise too_late("a shard was to be asked")
        sent = dict(headers)
        if until.is_deadline:
            sent[r.DEADLINE] = f"{1000.0 * left_s:.3f}"
        if (span := get_span()) is not None and span.trace_id:
            sent[TRACEPARENT] = span.traceparent
        try:
            async with self._open().request(
                *(method, build_url(self._address, path)),
                data=body,
                headers=sent,
                timeout=aiohttp.ClientTimeout(total=left_s, sock_connect=min(CONNECT_S, left_s)),
                allow_redirects=False,
                skip_auto_headers=("Content-Type", "User-Agent"),
            ) as response:
                self.breaker.succeeded()
                self._heard_s = time.monotonic()
                yield response
                self.outcomes["answered"] += 1
        except (TimeoutError, aiohttp.ClientError) as error:
            raise self._failed(error, until, began_s) from None

    async def close(self) -> None:
        """Close all connections; idempotent."""
        if self._session is not None:
            await self._session.close()
            self._session = None

    def _listen(self, now_s: float) -> None:
        """Count a shard as down that has been silent for too long."""
        if not self._waiting:
            self._heard_s = now_s
        elif self._waiting >= FAILURES and now_s - self._heard_s >= SILENCE_S:
            self.breaker.trip(now_s)

    async def _ask(self, request: r.Request, until: Until) -> r.Answer:
        headers = {"Accept": request.accept, "Accept-Encoding": "identity", **request.headers}
        if request.body is not None:
            headers["Content-Type"] = request.content_type
        call = request.method, request.path, headers, request.body, until
        async with self.stream(*call) as response:
            found = {name.lower(): value for name, value in response.headers.items()}
            return r.Answer(response.status, found, await response.read())

    def _open(self) -> aiohttp.ClientSession:
        if self._session is None:
            self._session = open_session(self._address, BY)
        return self._session

    def _failed(self, error: Exception, until: Until, began_s: float) -> MlpdError:
        now_s = time.monotonic()
        connecting = isinstance(error, aiohttp.ClientConnectorError | aiohttp.ServerTimeoutError)
        if isinstance(error, TimeoutError) and not connecting:
            if now_s - began_s >= LATE_S:
                self.breaker.failed(now_s)
            if until.is_deadline:
                self.outcomes["deadline_exceeded"] += 1
                return DeadlineExceededError(
                    f"shard {self.name} had not answered when the deadline passed",
                    hint="Allow more time; it is not known whether the call was carried out.",
                    details={"shard": self.name},
                )
            code, why = "timeout", "it did not answer in time"
        else:
            self.breaker.failed(now_s)
            code = "unreachable" if connecting else "connection_lost"
            why = _reason(error)
        self.outcomes[code] += 1
        found = no_answer(self._address, code, why)
        found.details["shard"] = self.name
        return found


def _reason(error: Exception) -> str:
    if isinstance(error, aiohttp.ClientConnectorError):
        return error.os_error.strerror or str(error.os_error)
    return str(error) or type(error).__name__
