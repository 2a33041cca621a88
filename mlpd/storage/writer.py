"""The one writer: a thread that runs waiting operations as groups, one durable commit each."""

import asyncio
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

import lmdb

from mlpd.core.errors import (
    InternalError,
    MlpdError,
    OverloadedError,
    StorageFullError,
    UnavailableError,
)
from mlpd.core.names import TimeUs
from mlpd.storage.environment import Environment, is_storage_failure, translate_error
from mlpd.storage.transactions import WriteTransaction

T = TypeVar("T")
Operation = Callable[[WriteTransaction], T]
"""Reads and writes through the transaction; may run twice, so it must have no other effect."""

logger = logging.getLogger(__name__)

QUEUE_ENTRIES_MAX = 16_384
QUEUE_BYTES_MAX = 64 << 20
GROUP_ENTRIES_MAX = 1_024
GROUP_BYTES_MAX = 16 << 20
ENTRY_BYTES_MIN = 256
"""What an operation counts at least against the bounds in bytes."""


@dataclass(slots=True)
class WriterStats:
    """Counts since the start; written by the writer thread, read by anyone."""

    groups: int = 0
    operations: int = 0
    operation_failures: int = 0
    storage_failures: int = 0
    """Groups lost to a full or failing disk or a full map."""
    reopened: int = 0
    rejected: int = 0
    """Operations refused because the queue was full."""
    post_failures: int = 0
    """Posted operations that failed or were refused: nobody else hears of them."""
    group_us_last: int = 0
    group_us_max: int = 0
    group_us_total: int = 0
    """Time from the begin of the groups to the end of their commits."""


class _Entry:
    """One operation in the queue and the future that waits for it (None: posted)."""

    __slots__ = ("error", "future", "op", "result", "size_bytes")

    def __init__(
        self,
        op: Operation[Any],
        future: "asyncio.Future[Any] | Future[Any] | None",
        size_bytes: int,
    ) -> None:
        self.op = op
        self.future = future
        self.size_bytes = max(size_bytes, ENTRY_BYTES_MIN)
        self.result: Any = None
        self.error: BaseException | None = None

    def run(self, txn: WriteTransaction) -> None:
        self.result = self.op(txn)

    def resolve(self) -> None:
        future = self.future
        if future is None or future.done():
            return
        if self.error is None:
            future.set_result(self.result)
        else:
            future.set_exception(self.error)


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
    ) -> None:
        self.stats = WriterStats()
        self._environment = environment
        self._entries_max = queue_entries_max
        self._bytes_max = queue_bytes_max
        self._queue: SimpleQueue[_Entry | None] = SimpleQueue()
        self._lock = threading.Lock()  # guards the two below and the order of the last entry
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

    async def write(self, op: Operation[T], *, size_bytes: int = 0) -> T:
        """Run `op` in the next group and return its result once it is on disk.

        `size_bytes`: about what it holds and writes, for the bounds.  Raises what `op` raised,
        OverloadedError when the queue is full (nothing was done; `retry_after_s` in the details),
        StorageFullError when the disk is full or failing (nothing was written).  Cancelling the
        caller drops an operation that has not begun; one that has begun may still be written.
        """
        future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._submit(_Entry(op, future, size_bytes))
        return await future

    def write_blocking(self, op: Operation[T], *, size_bytes: int = 0) -> T:
        """Do the same from a thread other than the event loop's and the writer's."""
        future: Future[T] = Future()
        self._submit(_Entry(op, future, size_bytes))
        return future.result()

    def post(self, op: Operation[Any], *, size_bytes: int = 0) -> bool:
        """Queue `op` and return at once; False when the queue is full or closed.

        A failure is logged and counted in `stats.post_failures`: only for what may be lost.
        """
        try:
            self._submit(_Entry(op, None, size_bytes))
        except MlpdError:
            self.stats.post_failures += 1
            return False
        return True

    def close(self) -> None:
        """Write what is queued, end the thread and refuse further writes; idempotent, blocking."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._queue.put(None)
        self._thread.join()

    def _submit(self, entry: _Entry) -> None:
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
        group: list[_Entry] = []
        while group is not None:
            group, more = self._next_group()
            if group:
                self._write_group(group)
            if not more:
                break
        self._write_group([])  # so that the newest K on disk lies above every t handed out

    def _next_group(self) -> tuple[list[_Entry], bool]:
        """Wait for an operation, take what else is there; False when the writer is closing."""
        group: list[_Entry] = []
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
        return [e for e in group if e.future is None or not e.future.cancelled()], more

    def _write_group(self, group: list[_Entry]) -> None:
        started_ns = time.perf_counter_ns()
        times = self._environment.times
        known_us = times.begin_group()
        try:
            self._commit(group, known_us)
        except Exception as error:  # noqa: BLE001 - the boundary: every waiting caller is told
            self._recover(group, known_us, error)
        finally:
            times.end_group()
        self._count(group, (time.perf_counter_ns() - started_ns) // 1000)
        _resolve(group)

    def _commit(self, group: list[_Entry], known_us: TimeUs) -> None:
        """Run the group in one transaction; on a failing operation once more, with savepoints."""
        try:
            self._run_plain(group, known_us)
        except _OperationError:
            self._run_guarded(group, known_us)

    def _run_plain(self, group: list[_Entry], known_us: TimeUs) -> None:
        txn = self._environment.begin_write(known_us)
        try:
            for entry in group:
                _run(entry, txn)
            txn.commit()
        except BaseException:
            txn.abort()
            raise

    def _run_guarded(self, group: list[_Entry], known_us: TimeUs) -> None:
        txn = self._environment.begin_write(known_us)
        try:
            for entry in group:
                try:
                    with txn.savepoint():
                        _run(entry, txn)
                except _OperationError as failure:
                    entry.error = failure.error
            txn.commit()
        except BaseException:
            txn.abort()
            raise

    def _recover(self, group: list[_Entry], known_us: TimeUs, error: Exception) -> None:
        """Fail the group, unless its commit turns out to be on disk; heal the environment."""
        if not is_storage_failure(error):
            logger.error("a write group failed", exc_info=error)
        self.stats.storage_failures += 1
        if self._reopen_if_broken() and self._is_committed(known_us):
            return
        failure = _failure(error)
        for entry in group:
            entry.error = entry.error or failure

    def _reopen_if_broken(self) -> bool:
        """Reopen after MDB_PANIC, where no transaction can begin; True if that succeeded."""
        try:
            self._environment.begin_write(TimeUs(0)).abort()
        except (lmdb.Error, MlpdError):
            try:
                self._environment.reopen()
            except MlpdError as error:
                logger.error("the storage could not be reopened: %s", error)  # noqa: TRY400 - the cause is in the message
                return False
            self.stats.reopened += 1
            return True
        return False

    def _is_committed(self, known_us: TimeUs) -> bool:
        """Tell whether the group's meta page reached the file although its commit failed."""
        try:
            with self._environment.snapshot() as snapshot:
                if snapshot.group_us != known_us:
                    return False
            self._environment.sync()
        except (lmdb.Error, MlpdError):
            return False
        return True

    def _count(self, group: list[_Entry], group_us: int) -> None:
        stats = self.stats
        stats.groups += 1
        stats.operations += len(group)
        stats.group_us_last = group_us
        stats.group_us_max = max(stats.group_us_max, group_us)
        stats.group_us_total += group_us
        for entry in group:
            if entry.error is not None:
                stats.operation_failures += 1
                if entry.future is None:
                    stats.post_failures += 1
                    logger.error("a posted write failed", exc_info=entry.error)


class _OperationError(Exception):
    """Carries what an operation raised past the storage failures that concern its whole group."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error


def _run(entry: _Entry, txn: WriteTransaction) -> None:
    try:
        entry.result = entry.op(txn)
    except lmdb.Error as error:
        if is_storage_failure(error):
            raise
        raise _OperationError(translate_error(error)) from error
    except Exception as error:
        raise _OperationError(error) from error


def _resolve(group: list[_Entry]) -> None:
    """Wake every caller: one call into each event loop, whatever the size of the group."""
    by_loop: dict[asyncio.AbstractEventLoop, list[_Entry]] = {}
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


def _resolve_all(entries: list[_Entry]) -> None:
    for entry in entries:
        entry.resolve()


def _failure(error: Exception) -> MlpdError:
    if isinstance(error, lmdb.Error):
        return translate_error(error)
    if isinstance(error, StorageFullError | UnavailableError):
        return error
    return InternalError(f"the write group failed: {error!r}", code="write_group")


def _closed_error() -> UnavailableError:
    return UnavailableError(
        "the storage is closing; nothing was written",
        code="shutting_down",
        hint="The daemon is stopping; retry when it is back.",
    )
