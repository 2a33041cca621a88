"""Verb ingest: batches of events into the log, the rows and the tiles, in one transaction."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import msgpack
import numpy as np

from mlpd.core.columns import Columns, concat
from mlpd.core.errors import ConflictError, InvalidRequestError
from mlpd.core.time import DAY_US
from mlpd.daemon.state import CatalogState
from mlpd.features.catalog import ViewPlan
from mlpd.features.ingest import Batch, apply_batch, clamp_to_arrival
from mlpd.features.stamps import Stamps
from mlpd.monitoring.freshness import Freshness
from mlpd.storage.log import RecordKind, append
from mlpd.storage.tables import Table
from mlpd.storage.transactions import WriteTransaction
from mlpd.storage.writer import Writer

IDEMPOTENCY_US = DAY_US
"""How long an Idempotency-Key is remembered at least."""

_EXPIRED_PER_WRITE = 4
"""Expired keys removed per stored one: the table shrinks faster than it grows."""


@dataclass(frozen=True, slots=True)
class Ingested:
    """What became of a request's events; durable when the caller holds it.

    `sequence`: of the last accepted row, or the newest before when none was.  `known_us`: arrival
    time of rows that brought no known_at.  `clamped`: rows whose event time lay ahead of the time
    at which they were known and was set to it; `clamped_by_batch` in the order of the request.
    """

    accepted: int
    sequence: int
    rejected: list[dict[str, Any]] = field(default_factory=list)
    clamped: int = 0
    known_us: int = 0
    replayed: bool = False
    clamped_by_batch: tuple[int, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return the wire form."""
        return {
            "accepted": self.accepted,
            "sequence": self.sequence,
            "rejected": self.rejected,
            "clamped": self.clamped,
            "known_us": self.known_us,
            "replayed": self.replayed,
        }


class Ingest:
    """Writes event batches; one instance per daemon."""

    def __init__(self, writer: Writer, state: CatalogState, freshness: Freshness) -> None:
        self._writer = writer
        self._state = state
        self._freshness = freshness
        self.rows_by_source: dict[str, int] = {}
        self.rejected_by_source: dict[str, int] = {}
        self.clamped_by_source: dict[str, int] = {}

    async def ingest(
        self, batches: Sequence[Batch], idempotency_key: str | None = None
    ) -> Ingested:
        """Store the batches of one request, all in one transaction, and return once it is durable.

        A repeated `idempotency_key` (1 to 255 characters) stores nothing and gives the first
        answer again, marked `replayed`.
        """
        key = _check_key(idempotency_key)

        def write(txn: WriteTransaction) -> Ingested:
            known = _stored_answer(txn, key)
            if known is not None:
                return known
            done = self._write(txn, batches)
            if key is not None and done.accepted:  # what stored nothing may be sent again
                self._remember(txn, key, done)
            return done

        size = sum(batch.event_us.nbytes * (2 + len(batch.columns)) for batch in batches)
        done = await self._writer.write(write, size_bytes=size)
        if not done.replayed:
            self._count(batches, done)
        return done

    def _write(self, txn: WriteTransaction, batches: Sequence[Batch]) -> Ingested:
        clamped = tuple(self._write_batch(txn, batch) if batch.rows else 0 for batch in batches)
        accepted = sum(batch.rows for batch in batches)
        rejected = [
            {"source": batch.source.name, **row} for batch in batches for row in batch.rejected
        ]
        return Ingested(
            accepted=accepted,
            sequence=txn.sequence,
            rejected=rejected,
            clamped=sum(clamped),
            known_us=txn.known_us,
            clamped_by_batch=clamped,
        )

    def _write_batch(self, txn: WriteTransaction, batch: Batch) -> int:
        """Store a batch; return how many of its rows were clamped."""
        catalog = self._state.catalog_in(txn)
        if catalog.definitions.sources.get(batch.source.name) != batch.source:
            raise ConflictError(
                f"the definition of source {batch.source.name!r} changed while events arrived",
                code="definitions_changed",
                hint="Send the request again.",
            )
        event_us, columns = batch.event_us, batch.columns
        if batch.known_us is None:
            event_us, columns = clamp_to_arrival(batch, txn.known_us)
        first, last = append(
            txn,
            kind=RecordKind.EVENTS,
            source=batch.source.name,
            columns=columns,
            event_us=event_us,
            known_us=batch.known_us,
        )
        known_us = batch.known_us
        if known_us is None:
            known_us = np.full(len(event_us), txn.known_us, np.int64)
        stamps = Stamps(event_us, known_us, np.arange(first, last + 1, dtype=np.int64))
        views = catalog.views_by_source[batch.source.name]
        pending = txn.deferred((_Pending, batch.source.name, catalog.version), _Pending)
        if pending is None:
            apply_batch(txn, views, columns, stamps, txn.newest_known_us)
        else:
            pending.add(views, {name: columns[name] for name in batch.source.schema}, stamps)
        return batch.clamped + int((event_us != batch.event_us).sum())

    def _remember(self, txn: WriteTransaction, key: bytes, done: Ingested) -> None:
        answer = msgpack.packb([txn.known_us, done.to_dict()])
        txn.put(Table.IDEMPOTENCY, b"k" + key, answer)
        txn.put(Table.IDEMPOTENCY, b"t" + txn.known_us.to_bytes(8, "big") + key, b"")
        expired = (txn.known_us - IDEMPOTENCY_US).to_bytes(8, "big")
        old = [
            stamp
            for stamp, _ in zip(
                (k for k, _ in txn.scan(Table.IDEMPOTENCY, b"t", b"t" + expired)),
                range(_EXPIRED_PER_WRITE),
                strict=False,
            )
        ]
        for stamp in old:
            txn.delete(Table.IDEMPOTENCY, stamp)
            txn.delete(Table.IDEMPOTENCY, b"k" + stamp[9:])

    def _count(self, batches: Sequence[Batch], done: Ingested) -> None:
        for batch, clamped in zip(batches, done.clamped_by_batch, strict=True):
            name = batch.source.name
            for counts, more in (
                (self.rows_by_source, batch.rows),
                (self.rejected_by_source, len(batch.rejected)),
                (self.clamped_by_source, clamped),
            ):
                counts[name] = counts.get(name, 0) + more
            if batch.rows:
                known_us = batch.known_us if batch.known_us is not None else done.known_us
                self._freshness.note_ingest(
                    name,
                    event_time_us_max=int(batch.event_us.max()),
                    lag_us_max=int((known_us - batch.event_us).max()),
                )


class _Pending:
    """Events of one source that the requests of a group bring: views take them as one batch.

    64 writers of one row each are 64 log records, but one update per entity and view.
    """

    def __init__(self) -> None:
        self._views: Sequence[ViewPlan] = ()
        self._columns: list[Columns] = []
        self._stamps: list[Stamps] = []

    def add(self, views: Sequence[ViewPlan], columns: Columns, stamps: Stamps) -> None:
        """Add a batch, in the order of the log; `views` are the same each time."""
        self._views = views
        self._columns.append(columns)
        self._stamps.append(stamps)

    def finish(self, txn: WriteTransaction) -> None:
        """Update the views."""
        columns = {name: concat(c[name] for c in self._columns) for name in self._columns[0]}
        stamps = Stamps(*(np.concatenate(parts) for parts in zip(*self._stamps, strict=True)))
        apply_batch(txn, self._views, columns, stamps, txn.newest_known_us)


def _check_key(idempotency_key: str | None) -> bytes | None:
    if idempotency_key is None:
        return None
    if 1 <= len(idempotency_key) <= 255 and idempotency_key.isprintable():  # noqa: PLR2004 - said
        return hashlib.blake2b(idempotency_key.encode(), digest_size=16).digest()
    raise InvalidRequestError(
        "an Idempotency-Key has 1 to 255 printable characters", code="invalid_idempotency_key"
    )


def _stored_answer(txn: WriteTransaction, key: bytes | None) -> Ingested | None:
    stored = None if key is None else txn.get(Table.IDEMPOTENCY, b"k" + key)
    if stored is None:
        return None
    _, answer = msgpack.unpackb(stored)
    return Ingested(**{**answer, "replayed": True})
