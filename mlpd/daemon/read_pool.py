"""Work of requests with many rows, off the loop: two threads, and a bound on what waits."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from typing import TypeVar, TypeVarTuple

from mlpd.core.errors import OverloadedError, UnavailableError
from mlpd.core.specs import Closure
from mlpd.core.trace import end_step

Args = TypeVarTuple("Args")
T = TypeVar("T")

OFF_LOOP_ROWS = 128
"""More rows than these go to a thread.  256 rows of a service with two views took 1.3 ms of the
loop to be checked, read and assigned; the way to a thread and back takes 0.1 ms."""
OFF_LOOP_ELEMENTS = 512
"""Elements of lists and vectors that are as much work as `OFF_LOOP_ROWS` rows: writing so many
widened float32 as JSON takes 0.9 ms (as msgpack 0.01)."""
THREADS = 2
WAITING_MAX = 64
"""Calls that wait or run; the rows of each are bounded by its request."""
RETRY_AFTER_S = 0.1


def rows_worth(closure: Closure, rows: int) -> int:
    """Return as how many rows of scalars to count `rows` of a service, for `ReadPool.call`.

    A vector counts by its length; a list, which may be as long as it likes, for as many as leave
    the loop.  About 2 us for 40 features.
    """
    elements = sum(
        dtype.length or OFF_LOOP_ELEMENTS + 1
        for dtype in closure.dtypes.values()
        if dtype.element is not None
    )
    return rows + rows * elements * OFF_LOOP_ROWS // OFF_LOOP_ELEMENTS


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

        def work() -> T:
            end_step("wait")
            return function(*args)

        self._waiting += 1
        try:
            loop = asyncio.get_running_loop()
            # With the context, so that what the thread logs carries the ids of the request's trace.
            return await loop.run_in_executor(self._executor, copy_context().run, work)
        finally:
            self._waiting -= 1

    def close(self) -> None:
        """Finish what waits and end the threads; idempotent."""
        self._closed = True
        self._executor.shutdown()
