"""Groups: runs waiting operations in one transaction, commits, and survives what can fail."""

import asyncio
import logging
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import lmdb

from mlpd.core.errors import InternalError, MlpdError, StorageFullError, UnavailableError
from mlpd.core.names import TimeUs
from mlpd.storage.environment import Environment
from mlpd.storage.failures import is_storage_failure, translate_error
from mlpd.storage.feed import Feed
from mlpd.storage.transactions import WriteTransaction

T = TypeVar("T")
Operation = Callable[[WriteTransaction], T]
"""Reads and writes through the transaction; may run twice, so it must have no other effect."""

ENTRY_BYTES_MIN = 256
"""What an operation counts at least against the bounds in bytes."""

logger = logging.getLogger(__name__)

_Run = Callable[["Entry", WriteTransaction], None]


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


class Gate(Protocol):
    """Says whether anything may be written; asked on the writer thread."""

    def check_begin(self) -> None:
        """Raise UnavailableError if no group may begin."""

    def check_end(self) -> None:
        """Raise UnavailableError if what has just been committed must not be acknowledged."""


class Entry:
    """One operation, the future that waits for it (None: posted), and how it ended.

    `passes`: it may be written whatever the gate says.
    """

    __slots__ = ("error", "future", "op", "passes", "result", "size_bytes")

    def __init__(
        self,
        op: Operation[Any],
        future: "asyncio.Future[Any] | Future[Any] | None",
        size_bytes: int,
        *,
        passes: bool = False,
    ) -> None:
        self.op = op
        self.passes = passes
        self.future = future
        self.size_bytes = max(size_bytes, ENTRY_BYTES_MIN)
        self.result: Any = None
        self.error: BaseException | None = None

    @property
    def is_cancelled(self) -> bool:
        """Whether nobody waits any more."""
        return self.future is not None and self.future.cancelled()

    def resolve(self) -> None:
        """Wake who waits; in the future's own loop, if it has one."""
        future = self.future
        if future is None or future.done():
            return
        if self.error is None:
            future.set_result(self.result)
        else:
            future.set_exception(self.error)


class GroupCommitter:
    """Runs groups in the writer thread: all their effects are durable, or none is.

    Operations see the effects of those before them.  One that raises has no effect and does not
    touch the others; a failing disk fails the whole group and is mended for the next one.
    """

    def __init__(self, environment: Environment, feed: Feed | None, gate: Gate | None) -> None:
        self.stats = WriterStats()
        self._environment = environment
        self._feed = feed
        self._gate = gate

    def commit(self, group: list[Entry]) -> None:
        """Run the operations, commit, and give every entry its result or error; never raises."""
        if self._gate is not None:
            try:
                self._gate.check_begin()
            except UnavailableError as error:
                group = _refuse(group, error)
                if not group:
                    return
        self._commit_passed(group)
        if self._gate is not None:
            try:
                self._gate.check_end()
            except UnavailableError as error:
                _refuse(group, error)

    def _commit_passed(self, group: list[Entry]) -> None:
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

    def _commit(self, group: list[Entry], known_us: TimeUs) -> None:
        """Run the group in one transaction; on a failing operation once more, with savepoints.

        The second time nothing is deferred, so that every failure has its operation.
        """
        try:
            self._run_all(group, known_us, _run)
        except _OperationError:
            self._run_all(group, known_us, _run_guarded)

    def _run_all(self, group: list[Entry], known_us: TimeUs, run: _Run) -> None:
        feed = self._feed
        txn = self._environment.begin_write(known_us, noted=feed is not None and feed.is_on)
        commit = None
        try:
            for entry in group:
                run(entry, txn)
            _finish(txn)
            commit = txn.seal()
            if feed is not None and commit is not None:
                feed.begin(commit)
            txn.commit()
        except BaseException:
            txn.abort()
            raise
        if feed is not None and commit is not None:
            feed.end(commit.head, committed=True)

    def _recover(self, group: list[Entry], known_us: TimeUs, error: Exception) -> None:
        """Fail the group, unless its commit turns out to be on disk; heal the environment."""
        if not is_storage_failure(error):
            logger.error("a write group failed", exc_info=error)
        self.stats.storage_failures += 1
        committed = self._reopen_if_broken() and self._is_committed(known_us)
        if self._feed is not None:
            self._end_feed(self._feed, committed=committed)
        if committed:
            return
        failure = _failure(error)
        for entry in group:
            entry.error = entry.error or failure

    def _end_feed(self, feed: Feed, *, committed: bool) -> None:
        try:
            with self._environment.snapshot() as snapshot:
                feed.end(snapshot.head, committed=committed)
        except MlpdError:  # nothing can be read either: followers start again
            feed.stop()

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

    def _count(self, group: list[Entry], group_us: int) -> None:
        stats = self.stats
        stats.groups += 1
        stats.operations += len(group)
        stats.group_us_last = group_us
        stats.group_us_max = max(stats.group_us_max, group_us)
        stats.group_us_total += group_us
        failed = [entry for entry in group if entry.error is not None]
        posted = [entry.error for entry in failed if entry.future is None]
        stats.operation_failures += len(failed)
        stats.post_failures += len(posted)
        if posted:  # one line per group: a full disk must not flood the log
            logger.error("%d posted writes failed", len(posted), exc_info=posted[0])


class _OperationError(Exception):
    """Carries what an operation raised past the storage failures that concern its whole group."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error


def _refuse(group: list[Entry], error: UnavailableError) -> list[Entry]:
    """Fail the entries that the gate holds up; return the others."""
    for entry in group:
        if not entry.passes:
            entry.error = entry.error or error
    return [entry for entry in group if entry.passes]


def _run(entry: Entry, txn: WriteTransaction) -> None:
    with _operation_errors():
        entry.result = entry.op(txn)


def _finish(txn: WriteTransaction) -> None:
    with _operation_errors():
        txn.finish()


@contextmanager
def _operation_errors() -> Iterator[None]:
    """Let storage failures through and wrap all others."""
    try:
        yield
    except lmdb.Error as error:
        if is_storage_failure(error):
            raise
        raise _OperationError(translate_error(error)) from error
    except Exception as error:
        raise _OperationError(error) from error


def _run_guarded(entry: Entry, txn: WriteTransaction) -> None:
    try:
        with txn.savepoint():
            _run(entry, txn)
    except _OperationError as failure:
        entry.error = failure.error


def _failure(error: Exception) -> MlpdError:
    if isinstance(error, lmdb.Error):
        return translate_error(error)
    if isinstance(error, StorageFullError | UnavailableError):
        return error
    return InternalError(f"the write group failed: {error!r}", code="write_group")
