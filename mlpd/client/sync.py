"""The synchronous client: keep-alive connections, shared safely by threads."""

import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar

from mlpd.client.connection import Connection, build_head
from mlpd.client.operations import Operations
from mlpd.client.requests import (
    Answer,
    Request,
    Traceparent,
    read_answer,
    time_left,
    with_deadline,
    with_trace,
)
from mlpd.client.retries import Retries
from mlpd.client.scatter import Scatter
from mlpd.client.steps import Steps
from mlpd.client.topology import Calls, Guide
from mlpd.core.address import DEFAULT_URL, parse_address
from mlpd.core.errors import MlpdError

T = TypeVar("T")

if TYPE_CHECKING:
    import polars as pl

    from mlpd.client.results import Predictions, Recorded

    _Operations = Operations[dict[str, Any], str, pl.DataFrame, bytes, Predictions, Recorded]
else:
    _Operations = Operations

IDLE_CONNECTIONS_MAX = 16
CALLS_AT_ONCE = 32
"""Shards that are asked at the same time."""


class Client(_Operations):
    """Talks to a daemon at `http://HOST:PORT` or `unix:/path/mlpd.sock`; a context manager.

    `url`: of one daemon, or of several members of a cluster.  Events, reads, predictions and labels
    go to the shards that own their keys; everything else to the first URL, see `members`.  A client
    of one daemon learns that there are others when that one says so.

    Threads may share it: each call takes a connection out of a small pool.  `timeout_s` is for a
    whole call with its retries.  `deadline_s`: how long a prediction may take, with its retries.
    `by`: who makes changes, for the histories of models and routes.  `traceparent`: called for the
    W3C header of the trace that a call belongs to; the daemon's logs carry its ids.
    `max_staleness_s`: reads of a shard that can't be reached go to its followers, whose answers may
    be so old; None: they fail.
    """

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
        self._timeout_s, self._by = timeout_s, by
        self._fixed = f"x-mlpd-by: {by}\r\n" if by.isprintable() and by.isascii() else ""
        self._retries = retries or Retries()
        self._traceparent = traceparent
        self._idle: deque[Connection] = deque(maxlen=IDLE_CONNECTIONS_MAX)
        self._members: dict[str, Client] = {}
        self._pool: ThreadPoolExecutor | None = None
        self._lock = threading.Lock()

    def send(self, request: Request | Scatter) -> Any:
        """Send a request, again where that is safe, and return the value of its answer.

        What can be split goes to all shards at once that it concerns.
        """
        if isinstance(request, Scatter):
            return self._run(self._guide.calls(request))
        return self._send(request)

    def members(self) -> dict[str, "Client"]:
        """Return a client of each shard, by name, which talks to that one alone; closed with this.

        For what the cluster doesn't share yet: definitions, models, routes, orders to erase.
        Raises ConfigurationError(code="no_cluster").
        """
        topology = self._run(self._guide.learn())
        return {shard.name: self._member(shard.url) for shard in topology.shard_map.shards}

    def _run(self, calls: Calls[T]) -> T:
        """Make the calls of a generator, those that it yields together at once."""
        try:
            asked = next(calls)
            while True:
                if len(asked) == 1:
                    outcomes = [self._try(*asked[0])]
                else:
                    outcomes = list(self._threads().map(lambda call: self._try(*call), asked))
                asked = calls.send(outcomes)
        except StopIteration as stop:
            found: T = stop.value
            return found

    def _try(self, url: str, request: Request) -> Any:
        """Return the value of a daemon's answer, or its error."""
        try:
            return self._member(url).send(request)
        except MlpdError as error:
            return error

    def _member(self, url: str) -> "Client":
        if url == self._guide.urls[0]:
            return self
        with self._lock:
            if url not in self._members:
                self._members[url] = Client(
                    url,
                    timeout_s=self._timeout_s,
                    deadline_s=self._deadline_s,
                    by=self._by,
                    traceparent=self._traceparent,
                )
            return self._members[url]

    def _threads(self) -> ThreadPoolExecutor:
        with self._lock:
            if self._pool is None:
                self._pool = ThreadPoolExecutor(CALLS_AT_ONCE, "mlpd-client")
            return self._pool

    def _send(self, request: Request) -> Any:
        request = with_trace(request, self._traceparent)
        began_s = time.monotonic()
        deadline_s = began_s + max(self._timeout_s, request.timeout_s)
        attempt = 1
        while True:
            asked = with_deadline(request, time.monotonic() - began_s if attempt > 1 else 0.0)
            try:
                answer = read_answer(self._exchange(asked, deadline_s - time.monotonic()))
            except MlpdError as error:
                left_s = time_left(request, began_s, deadline_s)
                pause_s = self._retries.pause_s(request, error, attempt, left_s)
                if pause_s is None:
                    raise
                attempt += 1
                time.sleep(pause_s)
            else:
                self._retries.succeeded()
                return answer

    def drive(self, steps: Steps[Any]) -> Any:
        """Do what `steps` say, one after the other."""
        try:
            step = next(steps)
            while True:
                if isinstance(step, float | int):
                    time.sleep(step)
                    step = next(steps)
                    continue
                try:
                    answer = self.send(step)
                except MlpdError as error:
                    step = steps.throw(error)
                else:
                    step = steps.send(answer)
        except StopIteration as stop:
            return stop.value

    def close(self) -> None:
        """Close all idle connections; idempotent."""
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None
        for member in self._members.values():
            member.close()
        while self._idle:
            self._idle.pop().close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _exchange(self, request: Request, timeout_s: float) -> Answer:
        head = build_head(self.address, request, self._fixed)
        connection = self._take(timeout_s)
        try:
            answer = connection.exchange(request, head, timeout_s)
        except BaseException:
            connection.close()
            raise
        self._give_back(connection)
        return answer

    def _take(self, timeout_s: float) -> Connection:
        """Return an idle connection that is still open, else a new one."""
        while self._idle:
            try:
                connection = self._idle.pop()
            except IndexError:
                break  # another thread was quicker
            if not connection.is_stale:
                return connection
            connection.close()
        return Connection(self.address, timeout_s)

    def _give_back(self, connection: Connection) -> None:
        if not connection.reusable or len(self._idle) >= IDLE_CONNECTIONS_MAX:
            connection.close()
        else:
            self._idle.append(connection)
