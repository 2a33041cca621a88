"""Retention: served rows, labels, orphaned labels and event ids that are old, removed bit by bit.

Every write removes a hundred rows at most, so that ingest and labels never wait for it, and
removes the rows together with their place in the list by arrival: a kill loses nothing but time.
"""

import asyncio
from collections.abc import Callable, Iterable
from functools import partial
from itertools import islice

from mlpd.core.config import PredictionsConfig
from mlpd.core.time import DAY_US, Clock
from mlpd.daemon.predictions import KEY_BYTES
from mlpd.daemon.served_left import forget_left
from mlpd.daemon.state import CatalogState
from mlpd.features.event_ids import old_buckets, purge
from mlpd.storage.environment import Environment
from mlpd.storage.tables import Table
from mlpd.storage.transactions import Snapshot, WriteTransaction
from mlpd.storage.writer import Writer

ROWS_PER_WRITE = 64
"""Predictions (with their labels), or orphans, removed in one write; predictions are listed in
parts, so there may be `SERVED_KEYS_MAX` more.  Each lies on pages of its own, which makes them
dear: among 100,000 labelled ones a write of 64 took 13 ms with its fsync, one of 256 took 32."""
IDS_PER_WRITE = 2_000
"""Event ids removed in one write: they are neighbours, some 60 on a page."""
PAUSE_S = 0.05
"""Between two writes: the writer is the others' for four fifths of the time."""

NOTES_PER_WRITE = 100
"""Notes of slots that left, removed in one run."""

_TIME_BYTES = 8
_FILE_US = 2 * DAY_US
"""A file of predictions has rows of one day, and goes when all of them are old."""

_Remove = Callable[..., dict[str, int]]
"""Removes a part of what came before `before_us`; returns how many of what."""


class Retention:
    """Removes what is older than configured; one `run` at a time, on the loop."""

    def __init__(
        self,
        environment: Environment,
        writer: Writer,
        config: PredictionsConfig,
        state: CatalogState,
        clock: Clock,
    ) -> None:
        self._environment = environment
        self._writer = writer
        self._config = config
        self._state = state
        self._clock = clock
        self.removed = {"predictions": 0, "labels": 0, "orphans": 0, "event_ids": 0}
        """Rows removed since the start, by what they were."""

    async def run(self) -> None:
        """Remove all that is due now, up to a hundred rows a write; cancel it at any time."""
        now_us, config = self._clock(), self._config
        await self._remove(Table.SERVED, now_us - config.retention_us, _remove_served)
        await self._remove(Table.ORPHANS, now_us - config.orphan_retention_us, _remove_orphans)
        before_us = now_us - config.retention_us - _FILE_US
        await self._writer.write(lambda txn: forget_left(txn, before_us, NOTES_PER_WRITE))
        await self._forget_ids()

    async def _forget_ids(self) -> None:
        def forget(txn: WriteTransaction) -> int:
            sources = self._state.catalog_in(txn).definitions.sources.values()
            return purge(txn, sources, rows_max=IDS_PER_WRITE)

        while self._has_old_ids():
            self.removed["event_ids"] += await self._writer.write(forget)
            await asyncio.sleep(PAUSE_S)

    def _has_old_ids(self) -> bool:
        now_us = self._clock()
        with self._environment.snapshot() as snapshot:
            sources = self._state.catalog_in(snapshot).definitions.sources.values()
            return bool(old_buckets(snapshot, sources, now_us))

    async def _remove(self, table: Table, before_us: int, operation: _Remove) -> None:
        while self._has_older(table, before_us):
            removed = await self._writer.write(partial(operation, before_us=before_us))
            for what, count in removed.items():
                self.removed[what] += count
            await asyncio.sleep(PAUSE_S)

    def _has_older(self, table: Table, before_us: int) -> bool:
        with self._environment.snapshot() as snapshot:
            return bool(oldest_keys(snapshot, table, 1, before_us=before_us))


def oldest_keys(
    reader: Snapshot | WriteTransaction, table: Table, count: int, *, before_us: int | None = None
) -> list[bytes]:
    """Return the first `count` keys of SERVED or ORPHANS, those before `before_us` alone."""
    stop = None if before_us is None else max(before_us, 0).to_bytes(_TIME_BYTES, "big")
    return [key for key, _ in islice(reader.scan(table, b"", stop), max(count, 0))]


def drop_orphans(txn: WriteTransaction, listed: Iterable[bytes]) -> int:
    """Remove rows of ORPHANS with their labels; returns how many labels went.

    A label whose prediction has come meanwhile is no orphan any more: it stays.
    """
    dropped = 0
    for row in listed:
        txn.delete(Table.ORPHANS, row)
        key = row[_TIME_BYTES:]
        if txn.get(Table.PREDICTIONS, key) is None:
            dropped += txn.delete(Table.LABELS, key)
    return dropped


def _remove_orphans(txn: WriteTransaction, *, before_us: int) -> dict[str, int]:
    listed = oldest_keys(txn, Table.ORPHANS, ROWS_PER_WRITE, before_us=before_us)
    return {"orphans": drop_orphans(txn, listed)}


def _remove_served(txn: WriteTransaction, *, before_us: int) -> dict[str, int]:
    predictions = labels = 0
    for row in oldest_keys(txn, Table.SERVED, ROWS_PER_WRITE, before_us=before_us):
        if predictions >= ROWS_PER_WRITE:
            break
        keys = txn.get(Table.SERVED, row) or b""
        txn.delete(Table.SERVED, row)
        for start in range(0, len(keys), KEY_BYTES):
            key = keys[start : start + KEY_BYTES]
            predictions += txn.delete(Table.PREDICTIONS, key)
            labels += txn.delete(Table.LABELS, key)
    return {"predictions": predictions, "labels": labels}
