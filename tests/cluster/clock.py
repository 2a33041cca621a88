"""Virtual time: a loop whose clock jumps to the next timer, and code that takes turns with it.

Nothing waits and nothing runs at once, so a history depends on its seed alone.
"""

import asyncio
import selectors
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from greenlet import getcurrent, greenlet

START_US = 1_700_000_000_000_000


class StuckError(AssertionError):
    """Everything waits, and nothing will ever happen."""


class Loop(asyncio.SelectorEventLoop):
    """An event loop in virtual time; what goes to a thread runs on it, a little later."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.lag_s: Callable[[], float] = lambda: 0.0
        super().__init__(_Jump(self))

    def time(self) -> float:
        return self.now_s

    def run_in_executor(self, executor: Any, func: Any, *args: Any) -> Any:  # noqa: ARG002 - none
        return self.create_task(self._later(func, args))

    async def _later(self, func: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        await asyncio.sleep(self.lag_s())
        return func(*args)


class _Jump(selectors.SelectSelector):
    def __init__(self, loop: Loop) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> list[Any]:
        if timeout is None:
            raise StuckError("every task waits for something that never comes")
        self._loop.now_s += max(timeout, 0.0)
        return []


class Killed(BaseException):
    """Ends a thread as kill -9 would: no code of the product catches it."""


class Turns(greenlet):
    """Synchronous code that takes turns with the loop: it stands still where it waits.

    Its waits, `wait(...)`, are coroutines on the loop.  Cancelling `to_end` kills it.
    """

    def __init__(self, work: Callable[[], Any]) -> None:
        super().__init__()
        self._work = work
        self._killed = False

    def run(self) -> Any:
        with suppress(Killed):
            return self._work()

    async def to_end(self) -> Any:
        """Return what the work returns; raises what it raises."""
        self.parent = getcurrent()  # of the loop, whoever made this
        asked = self.switch()
        while not self.dead:
            try:
                answer = await asked()
            except asyncio.CancelledError:
                self._killed = True
                asked = self.throw(Killed)
            except Exception as error:  # noqa: BLE001 - it is raised where it is waited for
                asked = self.throw(error)
            else:
                asked = self.switch(answer)
        if self._killed:
            raise asyncio.CancelledError
        return asked

    @classmethod
    def wait(cls, asked: Callable[[], Awaitable[Any]]) -> Any:
        """Return what a coroutine function returns, on the loop; called by the work."""
        turns = getcurrent()
        assert isinstance(turns, cls), "nobody may sleep on the loop"
        if turns._killed:
            raise Killed
        return turns.parent.switch(asked)


@contextmanager
def virtual_time(loop: Loop) -> Iterator[None]:
    """Let `time.monotonic` be the loop's, and `time.sleep` a wait of the thread's turn."""

    def sleep(seconds: float) -> None:
        Turns.wait(lambda: asyncio.sleep(seconds))

    real = time.monotonic, time.sleep
    time.monotonic, time.sleep = loop.time, sleep
    try:
        yield
    finally:
        time.monotonic, time.sleep = real


def run(loop: Loop, main: Coroutine[Any, Any, Any]) -> Any:
    """Return what `main` returns, in virtual time; every task has ended then."""
    with virtual_time(loop):
        try:
            return loop.run_until_complete(main)
        finally:
            loop.run_until_complete(_end(asyncio.all_tasks(loop)))
            loop.close()


async def _end(tasks: set["asyncio.Task[Any]"]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
