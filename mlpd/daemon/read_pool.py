"""Work of requests with many rows, off the loop: two threads, and a bound on what waits."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar, TypeVarTuple

from mlpd.core.errors import OverloadedError, UnavailableError

Args = TypeVarTuple("Args")
T = TypeVar("T")

OFF_LOOP_ROWS = 128
"""More rows than these go to a thread.  256 rows of a service with two views took 1.3 ms of the
loop to be checked, read and assigned; the way to a thread and back takes 0.1 ms."""
THREADS = 2
WAITING_MAX = 64
"""Calls that wait or run; the rows of each are bounded by its request."""
RETRY_AFTER_S = 0.1


class ReadPool:
    """Runs functions of many rows in threads; `call` belongs to the loop, `close` blocks."""

    def __init__(self, threads: int = THREADS, waiting_max: int = WAITING_MAX) -> None:
        self._executor = ThreadPoolExecutor(threads, thread_name_prefix="mlpd-read")
        self._waiting_max = waiting_max
        self._waiting = 0
        self._closed = False

    async def call(self, rows: int, function: Callable[[*Args], T], *args: *Args) -> T:
        """Return `function(*args)`: computed at once for few rows, in a thread for many.

        A function reads from a snapshot of its own: it must open it where it runs.  Raises
        OverloadedError(code="read_queue_full") beyond the bound.
        """
        if rows <= OFF_LOOP_ROWS:
            return function(*args)
        if self._closed:
            raise UnavailableError("the daemon is stopping", code="shutting_down")
        if self._waiting >= self._waiting_max:
            raise OverloadedError(
                f"{self._waiting} reads of many rows wait already",
                code="read_queue_full",
                hint="Try again shortly, or send fewer at a time.",
                details={"retry_after_s": RETRY_AFTER_S},
            )
        self._waiting += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._executor, function, *args)
        finally:
            self._waiting -= 1

    def close(self) -> None:
        """Finish what waits and end the threads; idempotent."""
        self._closed = True
        self._executor.shutdown()
