"""The LMDB environment: opening, snapshots for readers, write transactions for the writer."""

import os
import threading
import time
import weakref
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import lmdb

from mlpd.core.errors import (
    ConfigurationError,
    InternalError,
    MlpdError,
    UnavailableError,
)
from mlpd.core.names import TimeUs
from mlpd.core.time import Clock
from mlpd.storage.creation import create_environment
from mlpd.storage.failures import MAX_READERS, translate_error
from mlpd.storage.files import fsync_dir, fsync_file, make_dirs
from mlpd.storage.tables import FORMAT_KEY, FORMAT_VERSION, Table
from mlpd.storage.timekeeper import TimeKeeper
from mlpd.storage.touched import TouchedLog
from mlpd.storage.transactions import MAX_SNAPSHOT_S, Databases, Snapshot, WriteTransaction

__all__ = ["DEFAULT_MAP_BYTES", "Environment", "Snapshot", "Table", "Usage", "WriteTransaction"]

DEFAULT_MAP_BYTES = 64 << 30
"""Address space reserved for the map: it costs no memory and no disk until data fills it."""

SPARE_TRANSACTIONS = 32
"""Ended read transactions kept for reuse: opening a snapshot then takes 0.2 us less."""

_REOPEN_WAIT_S = 1.0


@dataclass(frozen=True, slots=True)
class Usage:
    """How full the environment is and who reads it."""

    used_bytes: int
    map_bytes: int
    readers: int
    stale_readers_cleared: int
    lagging_snapshots: int
    """Snapshots of this process older than `MAX_SNAPSHOT_S`."""


class Environment:
    """One open LMDB environment; make it with `Environment.open`.

    Snapshots may be opened from any thread.  Writes go through `mlpd.storage.writer.Writer`.
    """

    def __init__(self, directory: Path, clock: Clock, map_bytes: int, readonly: bool) -> None:
        self.directory = directory
        self.readonly = readonly
        self._map_bytes = map_bytes
        self._live: set[Snapshot] = set()
        self.touched = TouchedLog()
        self._open = threading.Event()
        self._closed = self._forked = False
        self._lmdb = self._open_lmdb()
        self._dbs = self._open_databases()
        self._check_format()
        self._open.set()
        _environments.add(self)
        with self.snapshot() as snapshot:
            self.times = TimeKeeper(clock, last_us=snapshot.group_us)

    @classmethod
    def open(
        cls,
        directory: str | os.PathLike[str],
        *,
        clock: Clock,
        map_bytes: int = DEFAULT_MAP_BYTES,
        readonly: bool = False,
    ) -> Self:
        """Open the environment in `directory`, creating it durably unless `readonly`.

        `readonly` is for child processes: the environment must exist and another process may be
        writing it.  Raises UnavailableError(code="no_environment") if there is none to read,
        ConfigurationError if the directory has another format.
        """
        path = Path(directory)
        if readonly and not (path / "data.mdb").is_file():
            raise UnavailableError(
                f"there is no LMDB environment in {path}",
                code="no_environment",
                hint="Start the daemon on this data directory once: it creates the environment.",
            )
        if not readonly:
            _create(path, map_bytes)
        return cls(path, clock, map_bytes, readonly)

    def _open_lmdb(self) -> lmdb.Environment:
        # The default sync mode: data, then the meta page, each flushed before commit() returns.
        # A read-only child takes the map size from the file, so that it can follow a bigger one.
        try:
            return lmdb.open(
                str(self.directory),
                map_size=0 if self.readonly else self._map_bytes,
                readonly=self.readonly,
                create=not self.readonly,
                mode=0o600,
                readahead=self.readonly,
                max_readers=MAX_READERS,
                max_dbs=len(Table) + 8,
                max_spare_txns=SPARE_TRANSACTIONS,
            )
        except lmdb.Error as error:
            raise translate_error(error) from error

    def _open_databases(self) -> Databases:
        if self.readonly:
            return {t: self._lmdb.open_db(t.encode(), create=False) for t in Table}
        with self._lmdb.begin(write=True) as txn:
            return {t: self._lmdb.open_db(t.encode(), txn=txn) for t in Table}

    def _check_format(self) -> None:
        wanted, meta = b"%d" % FORMAT_VERSION, self._dbs[Table.META]
        with self._lmdb.begin(write=not self.readonly) as txn:
            found = txn.get(FORMAT_KEY, None, meta)
            if found is None and not self.readonly:
                txn.put(FORMAT_KEY, wanted, db=meta)
        if found not in (None, wanted):
            self._lmdb.close()
            raise ConfigurationError(
                f"{self.directory} has format {found!r}, this version reads {wanted!r}",
                code="unknown_format",
                hint="Open it with the version of mlpd that wrote it.",
            )

    def snapshot(self) -> Snapshot:
        """Return a view of the last commit, for use in a `with`.  About 1 us to open and close.

        After `close` it raises UnavailableError(code="storage_closed").
        """
        deadline_s = 0.0
        while True:
            snapshot = Snapshot(self._live)
            # It joins the live ones before it looks at the gate, and `_quiesce` closes the gate
            # before it looks at the live ones: so the map is never unmapped under a reader.
            self._live.add(snapshot)
            if self._open.is_set():
                try:
                    return snapshot.attach(self._lmdb.begin(), self._dbs)
                except lmdb.PanicError as error:
                    # A failed commit; the writer is about to reopen the environment.
                    failure = translate_error(error)
                except lmdb.Error as error:
                    self._live.discard(snapshot)
                    raise translate_error(error) from error
            else:
                failure = self._closed_error()
            self._live.discard(snapshot)
            deadline_s = deadline_s or time.monotonic() + _REOPEN_WAIT_S
            if self._closed or time.monotonic() > deadline_s:
                raise failure
            time.sleep(0.001)

    def read_at(self) -> "ReadAt":
        """Return a context manager that yields (snapshot, t_us) under the time protocol.

        The rows in the snapshot are exactly those with known_time <= t_us, now and for ever
        (see `mlpd.storage.timekeeper`).  Only in the process that writes.  About 5 us.
        """
        if self.readonly:
            raise InternalError("a read-only environment has no part in the time protocol")
        return ReadAt(self)

    def begin_write(self, known_us: TimeUs, *, noted: bool = False) -> WriteTransaction:
        """Begin the write transaction of a group; only the Writer's thread calls this."""
        if not self._open.is_set():
            raise self._closed_error()
        return WriteTransaction(self._lmdb, self._dbs, known_us, self.touched, noted=noted)

    def usage(self) -> Usage:
        """Return how full the map is, after clearing the slots of readers that died."""
        cleared = self._lmdb.reader_check()
        info, psize = self._lmdb.info(), self._lmdb.stat()["psize"]
        oldest_s = time.monotonic() - MAX_SNAPSHOT_S
        return Usage(
            used_bytes=(info["last_pgno"] + 1) * psize,
            map_bytes=info["map_size"],
            readers=info["num_readers"],
            stale_readers_cleared=cleared,
            lagging_snapshots=sum(s.opened_s < oldest_s for s in self._live.copy()),
        )

    def copy(self, directory: Path) -> None:
        """Write a compacted copy of the last commit's state as `directory`/data.mdb, durably.

        Reads in one transaction from beginning to end, however long that takes: the pages that it
        sees are not reused meanwhile.  The GIL is free.  Only for a child process that its parent
        watches (mlpd/daemon/backup.py).
        """
        make_dirs(directory)
        try:
            self._lmdb.copy(str(directory), compact=True)
        except lmdb.Error as error:
            raise translate_error(error) from error
        path = directory / "data.mdb"
        path.chmod(0o600)
        fsync_file(path)
        fsync_dir(directory)

    def sync(self) -> None:
        """Flush everything to disk again; used when the fate of a commit is in doubt."""
        self._lmdb.sync(force=True)

    def reopen(self) -> None:
        """Close and open again: heals MDB_PANIC.  Only the Writer's thread calls this.

        Readers wait meanwhile, a few ms.  If opening fails, they get errors until a later call
        succeeds.
        """
        self._quiesce()
        self._lmdb.close()
        self._lmdb = self._open_lmdb()
        self._dbs = self._open_databases()
        self._open.set()

    def close(self) -> None:
        """Wait for open snapshots (up to 1 s) and close; idempotent."""
        if self._closed:
            return
        self._closed = True
        self._quiesce()
        self._lmdb.close()

    def disown(self) -> None:
        """Refuse all further use, without touching the files: this process is a forked child."""
        self._closed = self._forked = True
        self._open.clear()

    def _closed_error(self) -> MlpdError:
        if self._forked:
            return InternalError(
                "an LMDB environment was used in a forked process",
                code="forked_environment",
                hint="Start child processes with spawn and open the environment readonly there.",
            )
        return UnavailableError(
            f"the storage in {self.directory} is closed",
            code="storage_closed",
            hint="The daemon is stopping or mending its storage; try again shortly.",
        )

    def _quiesce(self) -> None:
        self._open.clear()
        deadline_s = time.monotonic() + _REOPEN_WAIT_S
        while self._live and time.monotonic() < deadline_s:
            time.sleep(0.001)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _create(directory: Path, map_bytes: int) -> None:
    try:
        create_environment(directory, [table.encode() for table in Table], map_bytes)
    except lmdb.Error as error:
        raise translate_error(error) from error


class ReadAt:
    """Context manager of `Environment.read_at`: opens the snapshot and takes t at entry."""

    __slots__ = ("_environment", "_snapshot")

    def __init__(self, environment: Environment) -> None:
        self._environment = environment

    def __enter__(self) -> tuple[Snapshot, TimeUs]:
        environment = self._environment
        self._snapshot, t_us = environment.times.open_read(environment.snapshot)
        return self._snapshot, t_us

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._snapshot.close()


_environments: "weakref.WeakSet[Environment]" = weakref.WeakSet()


def _after_fork() -> None:
    for environment in _environments:
        environment.disown()


# LMDB's locks belong to the process that opened the files: a forked child must not use them.
os.register_at_fork(after_in_child=_after_fork)
