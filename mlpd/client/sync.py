"""The synchronous client: keep-alive connections, shared safely by threads."""

import time
from collections import deque
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from mlpd.client.address import DEFAULT_URL, parse_address
from mlpd.client.connection import Connection, build_head
from mlpd.client.operations import Operations
from mlpd.client.requests import Answer, Request, read_answer
from mlpd.client.retries import Retries
from mlpd.client.steps import Steps
from mlpd.core.errors import MlpdError

if TYPE_CHECKING:
    import polars as pl

    _Operations = Operations[dict[str, Any], str, pl.DataFrame]
else:
    _Operations = Operations

IDLE_CONNECTIONS_MAX = 16


class Client(_Operations):
    """Talks to a daemon at `http://HOST:PORT` or `unix:/path/mlpd.sock`; a context manager.

    Threads may share it: each call takes a connection out of a small pool.  `timeout_s` is for a
    whole call with its retries.  `deadline_s`: how long the daemon may take for a prediction.
    `by`: who makes changes, for the histories of models and routes.
    """

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
        self._fixed = f"x-mlpd-by: {by}\r\n" if by.isprintable() and by.isascii() else ""
        self._retries = retries or Retries()
        self._idle: deque[Connection] = deque(maxlen=IDLE_CONNECTIONS_MAX)

    def send(self, request: Request) -> Any:
        """Send a request, again where that is safe, and return the value of its answer."""
        deadline_s = time.monotonic() + max(self._timeout_s, request.timeout_s)
        attempt = 1
        while True:
            try:
                answer = read_answer(self._exchange(request, deadline_s - time.monotonic()))
            except MlpdError as error:
                left_s = deadline_s - time.monotonic()
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
