"""Transactions: consistent reads of all tables, and the one write transaction of a group."""

import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Protocol, Self, TypeVar, cast

import lmdb

from mlpd.core.errors import InternalError, ValidationError
from mlpd.core.names import Sequence, TimeUs
from mlpd.storage.feed import Commit, Op
from mlpd.storage.tables import HEAD_KEY, Head, Table, from_u64be, rows_key, u64be
from mlpd.storage.touched import ROWS_OF_ENTITIES, Touched, TouchedLog, touch

Databases = Mapping[Table, "lmdb._Database"]  # noqa: SLF001 - the type has no public name
_META = Table.META  # a local name: looking a member up in its enum costs 0.1 us


class _Reader:
    """The reads that snapshots and write transactions share."""

    __slots__ = ("_dbs", "_txn")
    _txn: "lmdb.Transaction[bytes]"
    _dbs: Databases

    def get(self, table: Table, key: bytes) -> bytes | None:
        """Return the value of `key`, a copy, or None.  About 1 us."""
        return self._txn.get(key, None, self._dbs[table])

    def get_many(self, table: Table, keys: Iterable[bytes]) -> list[bytes | None]:
        """Return one value or None per key, in order.  About 0.8 us per key in memory."""
        get, db = self._txn.get, self._dbs[table]
        return [get(key, None, db) for key in keys]

    def scan(
        self, table: Table, start: bytes = b"", stop: bytes | None = None, *, reverse: bool = False
    ) -> Iterator[tuple[bytes, bytes]]:
        """Yield (key, value) for start <= key < stop (None: to the end) in key order.

        `reverse` yields the same pairs, last first.  Don't change the table while scanning it.
        """
        with self._txn.cursor(self._dbs[table]) as cursor:
            if reverse:
                yield from _scan_down(cursor, start, stop)
            elif cursor.set_range(start):
                yield from _scan_up(cursor, stop)

    def count(self, table: Table) -> int:
        """Return the number of keys in `table`, without reading them."""
        return self._txn.stat(self._dbs[table])["entries"]

    def table_bytes(self, table: Table) -> int:
        """Return the bytes of the pages that `table` occupies, without reading them."""
        stat = self._txn.stat(self._dbs[table])
        return stat["psize"] * (stat["branch_pages"] + stat["leaf_pages"] + stat["overflow_pages"])


def _scan_up(cursor: "lmdb.Cursor[bytes]", stop: bytes | None) -> Iterator[tuple[bytes, bytes]]:
    if stop is None:
        yield from cursor.iternext()
        return
    for key, value in cursor.iternext():
        if key >= stop:
            return
        yield key, value


def _scan_down(
    cursor: "lmdb.Cursor[bytes]", start: bytes, stop: bytes | None
) -> Iterator[tuple[bytes, bytes]]:
    found = cursor.prev() if stop is not None and cursor.set_range(stop) else cursor.last()
    if not found:
        return
    for key, value in cursor.iterprev():
        if key < start:
            return
        yield key, value


class Snapshot(_Reader):
    """A consistent view of all tables at one moment; use it in a `with` and close it soon.

    Any thread may open one; one thread at a time may use it.  It keeps the pages that it can see
    from being reused, so it must not live longer than `MAX_SNAPSHOT_S`.
    """

    __slots__ = ("_head", "_live", "opened_s")

    def __init__(self, live: "set[Snapshot]") -> None:
        self._live = live
        self._head: Head | None = None
        self.opened_s = time.monotonic()

    def attach(self, txn: "lmdb.Transaction[bytes]", dbs: Databases) -> Self:
        """Begin to read through `txn`; called by the Environment alone."""
        self._txn = txn
        self._dbs = dbs
        return self

    @property
    def txn_id(self) -> int:
        """Number of the newest commit that is seen; they grow, also across restarts.  0.1 us."""
        return self._txn.id()

    @property
    def head(self) -> Head:
        """Sequence and newest times, read once.  About 1 us."""
        if self._head is None:
            self._head = Head.decode(self._txn.get(HEAD_KEY, None, self._dbs[_META]))
        return self._head

    @property
    def sequence(self) -> Sequence:
        """Newest committed sequence, 0 before the first event."""
        return self.head.sequence

    @property
    def group_us(self) -> TimeUs:
        """Arrival time K of the newest committed group."""
        return self.head.group_us

    @property
    def newest_known_us(self) -> TimeUs:
        """Newest known_time of any event here, `MIN_TIME_US` before the first."""
        return self.head.known_us

    @property
    def newest_event_us(self) -> TimeUs:
        """Newest event_time of any event here, `MIN_TIME_US` before the first."""
        return self.head.event_us

    def close(self) -> None:
        """End the snapshot; idempotent."""
        if self in self._live:
            self._txn.abort()
            self._live.discard(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


MAX_SNAPSHOT_S = 1.0
"""Longest life of a snapshot before it counts as lagging."""


class Deferred(Protocol):
    """Work of several operations of a group that is done once, at its end."""

    def finish(self, txn: "WriteTransaction") -> None:
        """Do it; raising fails the whole group, which is then run again without deferring."""


D = TypeVar("D", bound=Deferred)


class WriteTransaction(_Reader):
    """All writes of one group; reads see them at once, other threads after the commit.

    Made and committed by the Writer, in its thread; operations use the methods down to
    `deferred`.  An operation may run twice (when another one of its group fails), so it must be
    a pure function of this transaction.
    """

    __slots__ = (
        *(
            "_deferred",
            "_lmdb",
            "_newest_event_us",
            "_newest_known_us",
            "_ops",
            "_replays",
            "_rows",
        ),
        *("_savepoints", "_sequence", "_touched", "_touched_log", "known_us", "previous"),
    )

    def __init__(
        self,
        env: lmdb.Environment,
        dbs: Databases,
        known_us: TimeUs,
        touched_log: TouchedLog,
        *,
        noted: bool = False,
    ) -> None:
        """`noted`: keep what is put and deleted, for `seal` to return."""
        self._lmdb = env
        self._touched_log = touched_log
        self._touched: Touched = set()
        self._txn = env.begin(write=True)
        self._dbs = dbs
        self._ops: list[Op] | None = [] if noted else None
        self._replays = False
        self.previous = head = Head.decode(self.get(_META, HEAD_KEY))
        """What the commit before left."""
        self._sequence: int = head.sequence
        self._newest_known_us: int = head.known_us
        self._newest_event_us: int = head.event_us
        self._rows: dict[str, int] = {}
        self._deferred: dict[Hashable, Deferred] = {}
        self._savepoints = 0
        self.known_us = known_us
        """Arrival time K of this group: later than every time handed out before."""

    @property
    def sequence(self) -> Sequence:
        """Newest sequence in the log, those taken in this group included."""
        return Sequence(self._sequence)

    @property
    def newest_known_us(self) -> TimeUs:
        """Newest known_time of any event, those of this group included."""
        return TimeUs(self._newest_known_us)

    @property
    def newest_event_us(self) -> TimeUs:
        """Newest event_time of any event, those of this group included."""
        return TimeUs(self._newest_event_us)

    def put(self, table: Table, key: bytes, value: bytes, *, append: bool = False) -> None:
        """Set `key` (1 to 511 bytes) to `value`, replacing what was there.

        `append` is a promise that the key sorts after all others of the table (InternalError if it
        doesn't): pages then fill up entirely.
        """
        if not self._txn.put(key, value, True, True, append, self._dbs[table]):
            raise InternalError(
                f"key {key.hex()} does not sort after the last key of table {table}",
                code="append_out_of_order",
            )
        self._touch(table, key)
        if self._ops is not None:
            self._ops.append((table, key, value))

    def put_many(self, table: Table, items: Iterable[tuple[bytes, bytes]]) -> None:
        """Set keys to values, replacing what was there; sorted ones find their pages sooner.

        About 0.5 us each where neighbours share a page.
        """
        if self._ops is not None or table in ROWS_OF_ENTITIES:
            items = list(items)
            for key, _ in items:
                self._touch(table, key)
        if self._ops is not None:
            self._ops += [(table, key, value) for key, value in items]
        with self._txn.cursor(self._dbs[table]) as cursor:
            cursor.putmulti(items)

    def delete(self, table: Table, key: bytes) -> bool:
        """Remove `key`; return whether it was there."""
        found = self._txn.delete(key, b"", self._dbs[table])
        self._touch(table, key)
        if found and self._ops is not None:
            self._ops.append((table, key, None))
        return found

    def replay(self, ops: Iterable[Op]) -> None:
        """Do what a commit of another environment did, its head included.

        The group then leaves that head, so it must consist of replays alone, in their order.  About
        1 us per put.
        """
        self._replays = True
        for table, key, value in ops:
            self._touch(table, key)
            if value is None:
                self._txn.delete(key, b"", self._dbs[table])
            else:
                self._txn.put(key, value, True, True, False, self._dbs[table])

    def _touch(self, table: Table, key: bytes) -> None:
        if self._touched is not None:
            self._touched = touch(self._touched, table, key)

    def take_sequences(self, count: int) -> Sequence:
        """Reserve `count` dense sequences and return the first of them."""
        first = self._sequence + 1
        self._sequence += count
        return Sequence(first)

    def note_times(self, known_us: int, event_us: int) -> None:
        """Raise the newest known and event time of the environment to at least these.

        A known time later than this group's K raises ValidationError(code="known_time_ahead"): the
        time protocol rests on it.
        """
        if known_us > self.known_us:
            raise ValidationError(
                f"known_time {known_us} is later than the arrival time {self.known_us}",
                code="known_time_ahead",
                hint="A supplied known_time must not lie in the future.",
            )
        self._newest_known_us = max(self._newest_known_us, known_us)
        self._newest_event_us = max(self._newest_event_us, event_us)

    def count_rows(self, source: str, count: int) -> None:
        """Count event rows of a source; the commit adds them to what is stored, once a group."""
        self._rows[source] = self._rows.get(source, 0) + count

    def deferred(self, key: Hashable, make: Callable[[], D]) -> D | None:
        """Return the work kept under `key` for the end of the group, made by the first who asks.

        Operations add to it what they would have done one by one.  None inside of a savepoint:
        what may be undone alone must be done at once.
        """
        if self._savepoints:
            return None
        if key not in self._deferred:
            self._deferred[key] = make()
        return cast("D", self._deferred[key])

    def finish(self) -> None:
        """Do what operations have deferred, in that order; the group's last step."""
        deferred, self._deferred = self._deferred, {}
        for work in deferred.values():
            work.finish(self)

    @contextmanager
    def savepoint(self) -> Iterator[None]:
        """Undo everything done in the `with` block if it raises.  About 11 us."""
        outer = self._txn
        numbers = self._sequence, self._newest_known_us, self._newest_event_us
        rows = dict(self._rows)
        noted = 0 if self._ops is None else len(self._ops)
        self._txn = inner = self._lmdb.begin(write=True, parent=outer)
        self._savepoints += 1
        try:
            yield
            inner.commit()
        except BaseException:
            inner.abort()
            self._sequence, self._newest_known_us, self._newest_event_us = numbers
            self._rows = rows
            if self._ops is not None:
                del self._ops[noted:]
            raise
        finally:
            self._savepoints -= 1
            self._txn = outer

    def seal(self) -> Commit | None:
        """Write head and counts, once and last; return what the commit does if it is noted."""
        if self._replays:
            return None
        for source, count in self._rows.items():
            key = rows_key(source)
            self.put(_META, key, u64be(from_u64be(self.get(_META, key) or u64be(0)) + count))
        head = Head(
            self.sequence,
            self.known_us,
            self.newest_known_us,
            self.newest_event_us,
        )
        self.put(_META, HEAD_KEY, head.encode())
        return None if self._ops is None else Commit(self.previous, head, self._ops)

    def commit(self) -> None:
        """Make everything durable (fsync); the transaction has ended.  `seal` comes first."""
        self._touched_log.note(self._txn.id(), self._touched)
        self._txn.commit()

    def abort(self) -> None:
        """Forget everything; the transaction has ended.  Idempotent."""
        self._txn.abort()
