"""Rows of views that don't run: of dropped ones, and of backfills that came to nothing.

A mark in the DEFINITIONS table names the id of each such view and how far its removal has come.
The apply that drops a view sets the mark in its own transaction; a backfill marks the ids that it
is about to fill, and the swap that makes them run takes the marks away.  So whatever a kill leaves
behind is marked.  Ids are never used twice: a view that comes back has another one.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from functools import partial

from mlpd.core.errors import MlpdError
from mlpd.daemon.state import CatalogState
from mlpd.features.catalog import Catalog
from mlpd.features.sweep import find_rows
from mlpd.storage.environment import Environment
from mlpd.storage.tables import Table
from mlpd.storage.transactions import Snapshot, WriteTransaction
from mlpd.storage.writer import Writer

ROWS_PER_WRITE = 100
"""Rows removed in one write: 9 ms with its fsync, among 200,000 rows of two views."""
SEEKS_PER_READ = 128
"""Seeks in one snapshot, 1 ms: a view without rows takes 128 snapshots."""
PAUSE_S = 0.02
"""Between two writes: what waits for the writer goes first."""
RETRY_S = 60.0
"""How long to wait after a failure, such as a full disk."""

_MARK = b"g"
"""Alone: marks are kept.  Before a u32be view id: that view's rows are garbage."""

_log = logging.getLogger("mlpd.dropped")


class DroppedViews:
    """Removes the rows of views that don't run, in small writes; on the loop."""

    def __init__(self, environment: Environment, writer: Writer, state: CatalogState) -> None:
        self._environment = environment
        self._writer = writer
        self._state = state
        self._building: frozenset[int] = frozenset()
        self._wake = asyncio.Event()
        self._lock = asyncio.Lock()
        self.removed = 0
        """Rows removed since the start."""

    async def run_forever(self) -> None:
        """Remove what is marked, now and after every apply; cancel it at any time."""
        while True:
            self._wake.clear()
            try:
                await self.run()
            except MlpdError as error:
                _log.warning("rows of dropped views could not be removed: %s", error.message)
                await asyncio.sleep(RETRY_S)
            else:
                await self._wake.wait()

    async def run(self) -> None:
        """Remove the rows of all marked views that aren't being built; afterwards they are gone."""
        async with self._lock:
            with self._environment.snapshot() as snapshot:
                known = snapshot.get(Table.DEFINITIONS, _MARK)
            if known is None:
                await self._writer.write(self._mark_older)
            with self._environment.snapshot() as snapshot:
                marked = read_marks(snapshot)
            for view_id, slot in marked.items():
                await self._remove(view_id, slot)

    @asynccontextmanager
    async def building(self, catalog: Catalog, view_ids: Iterable[int]) -> AsyncIterator[None]:
        """Take ids of `catalog`, which doesn't run yet, for rows to be written in the block.

        What is still marked after the block is removed: the swap must call `mark_dropped`.
        """
        self._building = frozenset(view_ids)
        try:
            if self._building:
                await self._writer.write(partial(self._reserve, catalog=catalog))
            yield
        finally:
            self._building = frozenset()
            self._wake.set()

    def _reserve(self, txn: WriteTransaction, *, catalog: Catalog) -> None:
        self._state.reserve(txn, catalog)
        for view_id in self._building:
            txn.put(Table.DEFINITIONS, _mark_key(view_id), _slot_bytes(0))

    def _mark_older(self, txn: WriteTransaction) -> None:
        """Mark, once, what was dropped before there were marks."""
        catalog = self._state.catalog_in(txn)
        txn.put(Table.DEFINITIONS, _MARK, b"")
        for view_id in set(range(1, catalog.next_view_id)) - {*catalog.view_ids.values()}:
            txn.put(Table.DEFINITIONS, _mark_key(view_id), _slot_bytes(0))

    async def _remove(self, view_id: int, slot: int | None) -> None:
        while slot is not None:
            keys, slot = await asyncio.to_thread(self._find, view_id, slot)
            if keys or slot is None:
                delete = partial(self._delete, view_id=view_id, keys=keys, slot=slot)
                if not await self._writer.write(delete):
                    return
                self.removed += len(keys)
                await asyncio.sleep(PAUSE_S)

    def _find(self, view_id: int, slot: int) -> tuple[list[bytes], int | None]:
        with self._environment.snapshot() as snapshot:
            return find_rows(
                snapshot, view_id, slot, rows_max=ROWS_PER_WRITE, seeks_max=SEEKS_PER_READ
            )

    def _delete(
        self, txn: WriteTransaction, *, view_id: int, keys: list[bytes], slot: int | None
    ) -> bool:
        """Delete rows and note how far it has come; False if the view is none to touch."""
        mark = _mark_key(view_id)
        running = (
            view_id in self._building or view_id in self._state.catalog_in(txn).view_ids.values()
        )
        if running or txn.get(Table.DEFINITIONS, mark) is None:
            return False
        for key in keys:
            txn.delete(Table.ONLINE, key)
            txn.delete(Table.TILES, key)  # where there are older tiles, there are recent ones
        if slot is None:
            txn.delete(Table.DEFINITIONS, mark)
        else:
            txn.put(Table.DEFINITIONS, mark, _slot_bytes(slot))
        return True


def mark_dropped(txn: WriteTransaction, before: Catalog, after: Catalog) -> None:
    """Mark the views of `before` that don't run in `after`, and no longer those that do."""
    running = set(after.view_ids.values())
    for view_id in running:
        txn.delete(Table.DEFINITIONS, _mark_key(view_id))
    for view_id in set(before.view_ids.values()) - running:
        txn.put(Table.DEFINITIONS, _mark_key(view_id), _slot_bytes(0))


def read_marks(snapshot: Snapshot) -> dict[int, int]:
    """Return the marked view ids with the slots up to which they are empty."""
    marks = snapshot.scan(Table.DEFINITIONS, _MARK + b"\x00", _MARK + b"\xff" * 5)
    return {int.from_bytes(key[1:], "big"): int.from_bytes(slot, "big") for key, slot in marks}


def _mark_key(view_id: int) -> bytes:
    return _MARK + view_id.to_bytes(4, "big")


def _slot_bytes(slot: int) -> bytes:
    return slot.to_bytes(2, "big")
