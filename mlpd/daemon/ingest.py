"""Verb ingest: batches of events into the log, the rows and the tiles, in one transaction."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgpack
import numpy as np

from mlpd.core.columns import Columns
from mlpd.core.errors import ConflictError, InvalidRequestError
from mlpd.core.hashing import SLOTS
from mlpd.core.routing import NO_SLOT, Entities
from mlpd.core.time import DAY_US
from mlpd.daemon.ownership import Checked, Ownership
from mlpd.daemon.routing import concerned_by, concerned_slots
from mlpd.daemon.state import CatalogState
from mlpd.features.catalog import Catalog, ViewPlan
from mlpd.features.event_ids import add_sequences, take_new, take_rows
from mlpd.features.ingest import Batch, apply_batch, clamp_to_arrival, conform
from mlpd.features.stamps import Stamps
from mlpd.features.tombstones import concat_events
from mlpd.monitoring.freshness import Freshness
from mlpd.monitoring.violations import Sample, Violations
from mlpd.storage.lineage import load_lineage, note_part
from mlpd.storage.log import RecordKind, append
from mlpd.storage.moves_store import flags_of
from mlpd.storage.tables import Table
from mlpd.storage.transactions import Snapshot, WriteTransaction
from mlpd.storage.writer import Writer

IDEMPOTENCY_US = DAY_US
"""How long an Idempotency-Key is remembered at least."""

_ALL = b"\x01" * SLOTS
_EXPIRED_PER_WRITE = 4
"""Expired keys removed per stored one: the table shrinks faster than it grows."""


@dataclass(frozen=True, slots=True)
class Ingested:
    """What became of a request's events; durable when the caller holds it.

    `sequence`: of the last accepted row, or the newest before when none was.  `known_us`: arrival
    time of rows that brought no known_at.  `clamped`: rows whose event time lay ahead of the time
    at which they were known and was set to it.  `duplicates`: rows left out since their event id
    came before.  `by_batch`: in the order of the request.
    """

    accepted: int
    sequence: int
    rejected: list[dict[str, Any]] = field(default_factory=list)
    clamped: int = 0
    known_us: int = 0
    replayed: bool = False
    duplicates: int = 0
    by_batch: "tuple[Stored, ...]" = ()

    def to_dict(self) -> dict[str, Any]:
        """Return the wire form."""
        return {
            "accepted": self.accepted,
            "sequence": self.sequence,
            "rejected": self.rejected,
            "clamped": self.clamped,
            "duplicates": self.duplicates,
            "known_us": self.known_us,
            "replayed": self.replayed,
        }


@dataclass(frozen=True, slots=True)
class Stored:
    """What became of the good rows of one batch: `batch` holds those that were stored."""

    batch: Batch
    clamped: int
    duplicates: int


class Ingest:
    """Writes event batches; one instance per daemon."""

    def __init__(
        self,
        writer: Writer,
        state: CatalogState,
        freshness: Freshness,
        violations: Violations,
        ownership: Ownership,
    ) -> None:
        self._writer = writer
        self._ownership = ownership
        self._state = state
        self._freshness = freshness
        self.violations = violations
        self.rows_by_source: dict[str, int] = {}
        self.rejected_by_source: dict[str, int] = {}
        self.clamped_by_source: dict[str, int] = {}
        self.duplicates_by_source: dict[str, int] = {}

    async def ingest(
        self,
        batches: Sequence[Batch],
        idempotency_key: str | None = None,
        checked: Checked | None = None,
    ) -> Ingested:
        """Store the batches of one request, all in one transaction, and return once it is durable.

        `checked`: what `Ownership.check_events` said of them; MisdirectedError if it holds no more.
        A repeated `idempotency_key` (1 to 255 characters) stores nothing and gives the first
        answer again, marked `replayed`.
        """
        key = _check_key(idempotency_key)

        def write(txn: WriteTransaction) -> Ingested:
            known = _stored_answer(txn, key)
            if known is not None:
                return known
            self._ownership.check_still(checked, self._state.catalog_in(txn))
            done = self._write(txn, batches, None if checked is None else checked.only)
            if key is not None and done.accepted:  # what stored nothing may be sent again
                self._remember(txn, key, done)
            return done

        size = sum(batch.size_bytes for batch in batches)
        done = await self._writer.write(write, size_bytes=size)
        if not done.replayed:
            self._count(done)
        return done

    def known_answer(self, snapshot: Snapshot, idempotency_key: str | None) -> Ingested | None:
        """Return the answer that was given under a key, None if it stored nothing here."""
        return _stored_answer(snapshot, _check_key(idempotency_key))

    def _write(
        self, txn: WriteTransaction, batches: Sequence[Batch], only: bytes | None
    ) -> Ingested:
        stored = tuple(self._write_batch(txn, batch, only) for batch in batches)
        rejected = [
            {"source": batch.source.name, **row} for batch in batches for row in batch.rejected
        ]
        return Ingested(
            accepted=sum(part.batch.rows for part in stored),
            sequence=txn.sequence,
            rejected=rejected,
            clamped=sum(part.clamped for part in stored),
            known_us=txn.known_us,
            duplicates=sum(part.duplicates for part in stored),
            by_batch=stored,
        )

    def _write_batch(self, txn: WriteTransaction, batch: Batch, only: bytes | None) -> Stored:
        """Store the rows of a batch that did not come before; `only`: for these slots alone."""
        if not batch.rows:
            return Stored(batch, 0, 0)
        catalog = self._state.catalog_in(txn)
        if catalog.definitions.sources.get(batch.source.name) != batch.source:
            raise ConflictError(
                f"the definition of source {batch.source.name!r} changed while events arrived",
                code="definitions_changed",
                hint="Send the request again.",
            )
        if batch.source.event_id is None:
            return Stored(batch, self._append(txn, catalog, batch, only), 0)
        entities = concerned_by(catalog, batch.source.name)
        if len(entities) > 1:
            return self._write_once(txn, catalog, batch, entities, only)
        new = take_new(txn, batch.source, batch.columns)
        if new is None:
            return Stored(batch, self._append(txn, catalog, batch, only), 0)
        fresh = batch.take(new)
        clamped = self._append(txn, catalog, fresh, only) if fresh.rows else 0
        return Stored(fresh, clamped, batch.rows - fresh.rows)

    def _write_once(
        self,
        txn: WriteTransaction,
        catalog: Catalog,
        batch: Batch,
        entities: Entities,
        only: bytes | None,
    ) -> Stored:
        """Store each event once for each of its slots here.

        An event may have come for some of them alone: its sender lost the shard of the others, and
        these have moved here since.  It is stored for those that it lacks.
        """
        source, first = batch.source, int(txn.sequence) + 1
        rows = take_rows(txn, source, batch.columns, first)
        fresh = batch.take(rows.new)
        clamped = self._append(txn, catalog, fresh, only) if fresh.rows else 0
        stored = [rows.new]
        lacking = self._lacking(txn, batch, entities, rows.known, only)
        for slots, numbers in lacking.items():
            part = batch.take(np.array(numbers, np.int64))
            add_sequences(txn, source, part.columns, int(txn.sequence) + 1)
            clamped += self._append(txn, catalog, part, flags_of(slots))
            stored.append(np.array(numbers, np.int64))
        kept = batch.take(np.sort(np.concatenate(stored)))
        return Stored(kept, clamped, batch.rows - kept.rows)

    def _lacking(
        self,
        txn: WriteTransaction,
        batch: Batch,
        entities: Entities,
        known: Mapping[int, tuple[int, ...]],
        only: bytes | None,
    ) -> dict[tuple[int, ...], list[int]]:
        """Return rows whose id came, by the slots here that they have not come for."""
        lineage = load_lineage(txn) if known else None
        if lineage is None:
            return {}
        owned = self._ownership.flags or _ALL
        if only is not None:
            owned = _owned_of(txn, owned, only)
        concerned = concerned_slots(batch.source.name, entities, batch.columns, batch.rows)
        found: dict[tuple[int, ...], list[int]] = {}
        for row, sequences in sorted(known.items()):
            slots = {int(s) for s in concerned[:, row] if s != NO_SLOT and owned[s]}
            lacks = tuple(sorted(s for s in slots if not lineage.has(s, sequences)))
            if lacks:
                found.setdefault(lacks, []).append(row)
        return found

    def _append(
        self, txn: WriteTransaction, catalog: Catalog, batch: Batch, only: bytes | None
    ) -> int:
        """Store all rows of a batch; return how many of them were clamped."""
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
        columns = conform(columns, catalog.schemas[batch.source.name], len(event_us))
        owned, pending = self._ownership.flags, None
        if only is not None:
            owned = _owned_of(txn, owned, only)
            note_part(txn, (slot for slot, flag in enumerate(owned) if flag), first, last)
            txn.finish()  # what came before in this group, so that all is applied in order
        else:
            pending = txn.deferred((_Pending, batch.source.name, catalog.key), _Pending)
        if pending is None:
            apply_batch(txn, views, columns, stamps, txn.newest_known_us, owned)
        else:
            pending.add(views, columns, stamps, owned)
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

    def _count(self, done: Ingested) -> None:
        for part in done.by_batch:
            batch = part.batch
            name = batch.source.name
            for counts, more in (
                (self.rows_by_source, batch.rows),
                (self.rejected_by_source, len(batch.rejected)),
                (self.clamped_by_source, part.clamped),
                (self.duplicates_by_source, part.duplicates),
            ):
                counts[name] = counts.get(name, 0) + more
            if batch.rejected:
                codes = [row["code"] for row in batch.rejected]
                samples = [Sample(*sample) for sample in batch.samples]
                self.violations.note_rows(name, codes, samples, done.known_us)
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
        self._owned: bytes | None = None

    def add(
        self, views: Sequence[ViewPlan], columns: Columns, stamps: Stamps, owned: bytes | None
    ) -> None:
        """Add a batch, in the order of the log; `views` and `owned` are the same each time."""
        self._views, self._owned = views, owned
        self._columns.append(columns)
        self._stamps.append(stamps)

    def finish(self, txn: WriteTransaction) -> None:
        """Update the views."""
        columns = concat_events(self._columns)
        stamps = Stamps(*(np.concatenate(parts) for parts in zip(*self._stamps, strict=True)))
        apply_batch(txn, self._views, columns, stamps, txn.newest_known_us, self._owned)


def _owned_of(txn: WriteTransaction, owned: bytes | None, only: bytes) -> bytes:
    """Return, per slot, whether it is owned, and among those that events are for alone."""
    slots = [slot for slot, flag in enumerate(only) if flag]
    lineage = load_lineage(txn)
    meant = only if lineage is None else flags_of(tuple(lineage.with_companions(slots)))
    return bytes(map(min, owned or meant, meant))


def _check_key(idempotency_key: str | None) -> bytes | None:
    if idempotency_key is None:
        return None
    if 1 <= len(idempotency_key) <= 255 and idempotency_key.isprintable():  # noqa: PLR2004 - said
        return hashlib.blake2b(idempotency_key.encode(), digest_size=16).digest()
    raise InvalidRequestError(
        "an Idempotency-Key has 1 to 255 printable characters", code="invalid_idempotency_key"
    )


def _stored_answer(txn: WriteTransaction | Snapshot, key: bytes | None) -> Ingested | None:
    stored = None if key is None else txn.get(Table.IDEMPOTENCY, b"k" + key)
    if stored is None:
        return None
    _, answer = msgpack.unpackb(stored)
    return Ingested(**{**answer, "replayed": True})
