"""Verb prediction files: vectors and requests of served rows go from LMDB into Parquet files.

A child writes a file, one transaction makes it count, then LMDB is rid of what it holds, bit by
bit.  What labels, performance and experiments need stays in LMDB for the retention.
"""

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from mlpd.core.errors import ValidationError
from mlpd.core.time import DAY_US, Clock
from mlpd.daemon.predictions import KEY_BYTES, PredictionLog, without_vector
from mlpd.daemon.process import Child
from mlpd.daemon.served_files import (
    ServedFile,
    delete_files,
    find_unnamed,
    load_files,
    put_file,
    remove_paths,
    served_through,
    store_file,
)
from mlpd.daemon.served_left import listed_keys, load_left
from mlpd.daemon.served_pages import ServedSelection
from mlpd.storage.compactor import Compactor
from mlpd.storage.environment import Environment
from mlpd.storage.files import DataDirectory
from mlpd.storage.tables import Table
from mlpd.storage.transactions import WriteTransaction
from mlpd.storage.writer import Writer

PAGE_ROWS = 10_000
"""Rows of a page: they become Python values in the daemon."""
ARROW_ROWS = 100_000
"""Rows of a page as Arrow: some 20 MB."""
MOVED_PER_WRITE = 128
"""Rows of which one write takes the vectors: neighbours in the table, on some dozens of pages."""
PAUSE_S = 0.02
"""Between two writes: what waits for the writer goes first."""
CHILDREN_MAX = 2
_MEMORY_BYTES_MAX = 4 << 30
_POSITION_CHARS = 48

_logger = logging.getLogger("mlpd.predictions")


class PredictionFiles:
    """Keeps the files of one data directory; lives on the loop, one run at a time."""

    def __init__(
        self,
        environment: Environment,
        writer: Writer,
        log: PredictionLog,
        compactor: Compactor,
        paths: DataDirectory,
        rows_max: int,
        clock: Clock,
        is_moving: Callable[[], bool] = lambda: False,
    ) -> None:
        """`is_moving`: whether slots move just now; their rows then stay where they are found."""
        self._environment = environment
        self._writer = writer
        self._log = log
        self._compactor = compactor
        self._paths = paths
        self._rows_max = rows_max
        self._clock = clock
        self._is_moving = is_moving
        self._readers = asyncio.Semaphore(CHILDREN_MAX)
        self.moved = 0
        """Rows whose vectors have left LMDB since the start."""

    async def start(self) -> None:
        """Remove what a killed export, or removal, has left."""
        left = await asyncio.to_thread(self._remove_unnamed)
        if left:
            _logger.warning("removed %d files of predictions that nothing names", left)

    async def run_if_due(self) -> None:
        """Write files while rows enough wait, or a day is over; empty LMDB of what is in files."""
        while True:
            await self._move_all()
            if not await asyncio.to_thread(self._is_due) or not await self.run():
                return

    async def run(self) -> bool:
        """Write one file of the oldest rows; False if there are none.  Cancelling ends the child.

        Nothing is written while slots move.

        Raises StorageFullError if it could not be written; LMDB has the rows then, as before.
        """
        async with self._compactor.paused():  # no erasure, no backup meanwhile
            if self._is_moving():
                return False
            written = await self._work("export", rows_max=self._rows_max)
            if written is None:
                return False
            file = ServedFile.decode(written)
            await self._writer.write(partial(store_file, file=file))
        await self._move_all()
        return True

    async def erase(
        self, columns: Sequence[str], keys: Sequence[Any]
    ) -> tuple[list[str], list[ServedFile]]:
        """Write files anew without the predictions of keys; return their ids and the new files.

        The caller holds the compactor off, removes the rows of the ids, and gives the files to
        `switch` then.
        """
        if not self._files():
            return [], []
        done = await self._work("erase", columns=list(columns), keys=list(keys))
        return done["ids"], [ServedFile.decode(file) for file in done["files"]]

    async def switch(self, files: Sequence[ServedFile]) -> None:
        """Make files that were written anew the ones that count, and remove the former ones."""
        if not files:
            return
        numbers = {file.number for file in files}
        former = [file.path for file in self._files() if file.number in numbers]

        def write(txn: WriteTransaction) -> None:
            known = {file.number: file for file in load_files(txn)}
            for file in files:
                put_file(txn, replace(file, moved=known[file.number].moved))

        await self._writer.write(write)
        await asyncio.to_thread(remove_paths, self._paths.predictions, former)

    async def remove_old(self, before_us: int) -> int:
        """Remove files whose rows all came before; returns how many rows they had."""
        old = [file for file in self._files() if file.last_us < before_us and file.moved]
        if not old:
            return 0
        async with self._compactor.paused():
            numbers = {file.number for file in old}
            old = [file for file in self._files() if file.number in numbers]
            await self._writer.write(partial(delete_files, files=old))
            paths = [file.path for file in old]
            await asyncio.to_thread(remove_paths, self._paths.predictions, paths)
        return sum(file.rows for file in old)

    async def page(self, selection: ServedSelection, *, arrow: bool) -> dict[str, Any]:
        """Return a page as `columns`, or as `data`, an Arrow IPC stream, and its `position`.

        A page without rows is the last.

        Raises ValidationError(code="invalid_page").
        """
        check_page(selection.limit, selection.after, arrow=arrow)
        async with self._readers:
            self._log.flush()
            await self._writer.write(lambda _: None)  # what was flushed is stored now
            done: dict[str, Any] = await self._work(
                "page", selection=asdict(selection), arrow=arrow
            )
            return done

    def sizes(self) -> dict[str, int]:
        """Return what the files take: files, rows, size_bytes."""
        files = self._files()
        return {
            "files": len(files),
            "rows": sum(file.rows for file in files),
            "size_bytes": sum(file.size_bytes for file in files),
        }

    async def _work(self, work: str, **fields: Any) -> Any:
        request: Mapping[str, Any] = {"directory": str(self._paths.root), "work": work, **fields}
        async with Child("served", request, memory_bytes_max=_MEMORY_BYTES_MAX) as child:
            return await child.result()

    def _files(self) -> list[ServedFile]:
        with self._environment.snapshot() as snapshot:
            return load_files(snapshot)

    def _is_due(self) -> bool:
        """Tell whether rows enough wait, or some of a day that is over; 1 us for each 32 rows."""
        rows = 0
        with self._environment.snapshot() as snapshot:
            after = served_through(snapshot)
            for key, value in snapshot.scan(Table.SERVED, after + b"\x00" if after else b""):
                if not rows and int.from_bytes(key[:8], "big") // DAY_US < self._clock() // DAY_US:
                    return True
                rows += len(value) // KEY_BYTES
                if rows >= self._rows_max:
                    return True
        return False

    async def _move_all(self) -> None:
        for file in self._files():
            if not file.moved:
                await self._move(file)

    async def _move(self, file: ServedFile) -> None:
        """Take the vectors of a file's rows out of LMDB; done again from the start after a kill."""
        keys = await asyncio.to_thread(self._keys, file)
        for start in range(0, len(keys), MOVED_PER_WRITE):
            part = keys[start : start + MOVED_PER_WRITE]
            self.moved += await self._writer.write(partial(_take_vectors, keys=part))
            await asyncio.sleep(PAUSE_S)
        await self._writer.write(partial(_note_moved, number=file.number))

    def _keys(self, file: ServedFile) -> list[bytes]:
        """Return the keys of a file's rows, as they lie in the table."""
        start = bytes.fromhex(file.after) + b"\x00" if file.after else b""
        stop = bytes.fromhex(file.through) + b"\x00"
        keys: list[bytes] = []
        with self._environment.snapshot() as snapshot:
            left = load_left(snapshot)
            for position, value in snapshot.scan(Table.SERVED, start, stop):
                keys += listed_keys(position, value, left)
        return sorted(map(bytes, keys))

    def _remove_unnamed(self) -> int:
        if not self._paths.predictions.is_dir():
            return 0
        left: list[Path] = find_unnamed(self._files(), self._paths.predictions)
        for path in left:
            path.unlink()
        return len(left)


def _take_vectors(txn: WriteTransaction, *, keys: Sequence[bytes]) -> int:
    moved = 0
    for key in keys:
        value = txn.get(Table.PREDICTIONS, key)
        left = None if value is None else without_vector(value)
        if left is not None:
            txn.put(Table.PREDICTIONS, key, left)
            moved += 1
    return moved


def _note_moved(txn: WriteTransaction, *, number: int) -> None:
    for file in load_files(txn):
        if file.number == number:
            put_file(txn, replace(file, moved=True))


def check_page(limit: int, after: str, *, arrow: bool) -> None:
    """Raise ValidationError(code="invalid_page") for a page that nobody gives out."""
    rows_max = ARROW_ROWS if arrow else PAGE_ROWS
    if not 1 <= limit <= rows_max or not _is_position(after):
        raise ValidationError(
            f"a page has 1 to {rows_max} rows, after the `position` of the one before",
            code="invalid_page",
            hint="As Arrow it may have more rows." if not arrow else "",
        )


def _is_position(text: str) -> bool:
    try:
        return not text or len(bytes.fromhex(text)) * 2 == _POSITION_CHARS == len(text)
    except ValueError:
        return False
