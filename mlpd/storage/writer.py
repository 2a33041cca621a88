"""The one writer: a thread that runs waiting operations as groups, one durable commit each."""

import asyncio
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from queue import Empty, SimpleQueue

from mlpd.core.errors import MlpdError, OverloadedError, UnavailableError
from mlpd.storage.environment import Environment
from mlpd.storage.feed import Feed
from mlpd.storage.groups import Entry, Gate, GroupCommitter, Operation, T, WriterStats
from mlpd.storage.tables import Head
from mlpd.storage.transactions import Snapshot, WriteTransaction

__all__ = ["Gate", "Operation", "Writer", "WriterStats"]

logger = logging.getLogger(__name__)

QUEUE_ENTRIES_MAX = 16_384
QUEUE_BYTES_MAX = 64 << 20
GROUP_ENTRIES_MAX = 1_024
GROUP_BYTES_MAX = 16 << 20
"""A group takes what waits up to these bounds (bench: 64 waiting writers make groups of 64)."""
REACH_WAIT_S = 1.0
"""How long `Writer.reach` waits at most."""

_Test = Callable[[Snapshot], bool]


class Writer:
    """Owns all writes of an environment.

    An operation's effects are on disk, or none of them is.  Operations of one group see the
    effects of those before them.  `close` flushes what is queued.
    """

    def __init__(
        self,
        environment: Environment,
        *,
        queue_entries_max: int = QUEUE_ENTRIES_MAX,
        queue_bytes_max: int = QUEUE_BYTES_MAX,
        feed: Feed | None = None,
        gate: Gate | None = None,
    ) -> None:
        """`feed`: gets every commit, while it is on.  `gate`: may refuse groups."""
        self._environment = environment
        self._committer = GroupCommitter(environment, feed, gate)
        self.stats = self._committer.stats
        self._entries_max = queue_entries_max
        self._bytes_max = queue_bytes_max
        self._queue: SimpleQueue[Entry | None] = SimpleQueue()
        self._lock = threading.Lock()  # guards the three below and the order of the last entry
        self._watchers: set[Entry] = set()
        self._queued_bytes = 0
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="mlpd-writer", daemon=True)
        self._thread.start()

    @property
    def queued_entries(self) -> int:
        """Operations waiting now."""
        return self._queue.qsize()

    @property
    def queued_bytes(self) -> int:
        """Bytes waiting now, as their callers gave them."""
        return self._queued_bytes

    async def write(self, op: Operation[T], *, size_bytes: int = 0, passes: bool = False) -> T:
        """Run `op` in the next group and return its result once it is on disk.

        `passes`: whatever the gate says; else it may raise UnavailableError with its code.
        `size_bytes`: about what it holds and writes, for the bounds.  Raises what `op` raised,
        OverloadedError when the queue is full (nothing was done; `retry_after_s` in the details),
        StorageFullError when the disk is full or failing (nothing was written).  Cancelling the
        caller drops an operation that has not begun; one that has begun may still be written.
        """
        future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._submit(Entry(op, future, size_bytes, passes=passes))
        return await future

    def write_blocking(self, op: Operation[T], *, size_bytes: int = 0) -> T:
        """Do the same from a thread other than the event loop's and the writer's."""
        future: Future[T] = Future()
        self._submit(Entry(op, future, size_bytes))
        return future.result()

    def post(
        self, op: Operation[T], *, size_bytes: int = 0, done: Callable[[T], None] | None = None
    ) -> bool:
        """Queue `op` and return at once; False when the queue is full or closed.

        `done` is called on the loop that posts with what `op` returned, once it is on disk.  A
        failure is logged and counted in `stats.post_failures`: only for what may be lost.
        """
        future = None if done is None else self._future_of(done)
        try:
            self._submit(Entry(op, future, size_bytes))
        except MlpdError:
            self.stats.post_failures += 1
            return False
        return True

    def _future_of(self, done: Callable[[T], None]) -> "asyncio.Future[T]":
        def tell(future: "asyncio.Future[T]") -> None:
            error = future.exception()
            if error is None:
                done(future.result())
            else:
                self.stats.post_failures += 1
                logger.error("a posted write failed: %s", error)

        found: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        found.add_done_callback(tell)
        return found

    async def reach(self, sequence: int, *, deadline_s: float | None = None) -> bool:
        """Tell whether `sequence` is on disk, after waiting for it.

        Waits until `deadline_s` on `time.monotonic()`, a second at most.
        """
        return sequence <= 0 or await self._reach(
            lambda snapshot: snapshot.sequence >= sequence, deadline_s
        )

    async def follow(self, head: Head, *, deadline_s: float | None = None) -> bool:
        """Tell whether the newest commit is another one than that of `head`; waits as `reach`."""
        return await self._reach(lambda snapshot: snapshot.head != head, deadline_s)

    async def _reach(self, is_there: _Test, deadline_s: float | None) -> bool:
        if self._is_true(is_there):
            return True
        latest_s = time.monotonic() + REACH_WAIT_S
        latest_s = latest_s if deadline_s is None else min(latest_s, deadline_s)
        try:
            async with asyncio.timeout(latest_s - time.monotonic()):
                while not await self._next_commit(is_there):
                    pass
        except TimeoutError:
            return False
        return True

    def close(self) -> None:
        """Write what is queued, end the thread and refuse further writes; idempotent, blocking."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._queue.put(None)
        self._thread.join()

    async def _next_commit(self, is_there: _Test) -> bool:
        """Wait for the next group, unless the test is true already; tell whether it is now."""
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        watcher = Entry(_do_nothing, future, 0)
        with self._lock:
            self._watchers.add(watcher)
        try:
            # Looked at while the watcher waits, so that no commit falls between the two.
            if not self._is_true(is_there):
                await future
        finally:
            with self._lock:
                self._watchers.discard(watcher)
        return self._is_true(is_there)

    def _is_true(self, test: _Test) -> bool:
        with self._environment.snapshot() as snapshot:
            return test(snapshot)

    def _submit(self, entry: Entry) -> None:
        with self._lock:
            if self._closed:
                raise _closed_error()
            if not self._has_room(entry.size_bytes):
                self.stats.rejected += 1
                raise self._overloaded_error()
            self._queued_bytes += entry.size_bytes
            self._queue.put(entry)

    def _has_room(self, size_bytes: int) -> bool:
        # An empty queue takes an operation of any size: otherwise a big one could never pass.
        entries = self._queue.qsize()
        return entries < self._entries_max and (
            entries == 0 or self._queued_bytes + size_bytes <= self._bytes_max
        )

    def _overloaded_error(self) -> OverloadedError:
        groups = 1 + self._queue.qsize() / GROUP_ENTRIES_MAX
        retry_after_s = round(max(0.05, groups * self.stats.group_us_last / 1e6), 2)
        return OverloadedError(
            f"the write queue is full ({self.queued_entries} operations, "
            f"{self.queued_bytes} bytes); nothing was written",
            code="write_queue_full",
            hint=f"Retry after {retry_after_s} s, with fewer writers or bigger batches.",
            details={"retry_after_s": retry_after_s},
        )

    # Everything below runs in the writer thread.

    def _work(self) -> None:
        more = True
        while more:
            group, more = self._next_group()
            if group:
                self._committer.commit(group)
                _resolve([*group, *self._take_watchers()])
        self._committer.commit([])  # so that the newest K on disk lies above every t handed out

    def _take_watchers(self) -> set[Entry]:
        with self._lock:
            watchers, self._watchers = self._watchers, set()
        return watchers

    def _next_group(self) -> tuple[list[Entry], bool]:
        """Wait for an operation, take what else is there; False when the writer is closing."""
        group: list[Entry] = []
        size_bytes, more = 0, True
        entry = self._queue.get()
        while entry is not None:
            group.append(entry)
            size_bytes += entry.size_bytes
            if len(group) >= GROUP_ENTRIES_MAX or size_bytes >= GROUP_BYTES_MAX:
                break
            try:
                entry = self._queue.get_nowait()
            except Empty:
                break
        else:
            more = False
        with self._lock:
            self._queued_bytes -= size_bytes
        return [entry for entry in group if not entry.is_cancelled], more


def _do_nothing(txn: WriteTransaction) -> None:
    """The operation of an entry that only waits."""


def _resolve(group: list[Entry]) -> None:
    """Wake every caller: one call into each event loop, whatever the size of the group."""
    by_loop: dict[asyncio.AbstractEventLoop, list[Entry]] = {}
    for entry in group:
        if isinstance(entry.future, asyncio.Future):
            by_loop.setdefault(entry.future.get_loop(), []).append(entry)
        else:
            entry.resolve()
    for loop, entries in by_loop.items():
        try:
            loop.call_soon_threadsafe(_resolve_all, entries)
        except RuntimeError:
            logger.warning("%d writes ended after their event loop was closed", len(entries))


def _resolve_all(entries: list[Entry]) -> None:
    for entry in entries:
        entry.resolve()


def _closed_error() -> UnavailableError:
    return UnavailableError(
        "the storage is closing; nothing was written",
        code="shutting_down",
        hint="The daemon is stopping; retry when it is back.",
    )
