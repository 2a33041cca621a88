"""Verbs plan and apply: what new definitions would change, and making it so, atomically.

A new or changed view of a source that already has events is built from the log while serving goes
on: its rows get an id of their own, history is read in a child process and applied in blocks, and
one last transaction applies what arrived meanwhile and swaps the catalog.
"""

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from mlpd.core.columns import Columns, DType, decode_columns
from mlpd.core.convert import column_of
from mlpd.core.document import KINDS, parse_document
from mlpd.core.errors import ConflictError
from mlpd.core.hashing import canonical_json
from mlpd.daemon.column_types import Sources, check_column_types
from mlpd.daemon.dropped import DroppedViews, mark_dropped
from mlpd.daemon.offline import offline_request
from mlpd.daemon.process import Child
from mlpd.daemon.scheduler import check_schedules
from mlpd.daemon.state import CatalogState
from mlpd.features.catalog import Catalog, ViewPlan, view_key
from mlpd.features.ingest import apply_batch
from mlpd.features.latest import empty_column
from mlpd.features.stamps import Stamps
from mlpd.storage.compactor import Compactor
from mlpd.storage.environment import Environment
from mlpd.storage.files import DataDirectory
from mlpd.storage.log import RecordKind, append, compacted_through, read_records
from mlpd.storage.segments import load_manifests
from mlpd.storage.transactions import Snapshot, WriteTransaction
from mlpd.storage.writer import Writer

DEFINITIONS_SOURCE = "mlpd.definitions"
"""Name of the definition records in the log; no user source can have it."""

BLOCK_ROWS = 20_000
"""Rows that a backfill applies in one transaction: about 100 ms of the writer."""


_Types = tuple[Sources, Sources]
"""Column types before an apply and after it."""


@dataclass(frozen=True, slots=True)
class EventBlock:
    """Events of one source, in sequence order."""

    columns: Columns
    stamps: Stamps


@dataclass(frozen=True, slots=True)
class ChangePlan:
    """What an apply would do.

    `changes`: per kind the names `added`, `changed` and `removed`.  `backfill`: views to build
    from the log with the events to replay.
    """

    version: int
    changes: dict[str, dict[str, list[str]]]
    backfill: dict[str, int] = field(default_factory=dict)

    @property
    def empty(self) -> bool:
        """Whether nothing would change."""
        return not self.changes

    def to_dict(self) -> dict[str, Any]:
        """Return the wire form."""
        return {"version": self.version, "changes": self.changes, "backfill": self.backfill}


class DefinitionsVerb:
    """Plans and applies definitions; one apply at a time."""

    def __init__(
        self,
        environment: Environment,
        writer: Writer,
        state: CatalogState,
        compactor: Compactor,
        dropped: DroppedViews,
        paths: DataDirectory,
    ) -> None:
        self._environment = environment
        self._writer = writer
        self._state = state
        self._compactor = compactor
        self._dropped = dropped
        self._paths = paths
        self._lock = asyncio.Lock()

    def plan(self, document: Mapping[str, Any]) -> ChangePlan:
        """Return what `document` would change; raises DefinitionError for a wrong one."""
        wanted = parse_document(document)
        check_schedules(wanted.jobs.values())
        current = self._state.catalog
        changes = _diff(current.document, document)
        new = self._missing_views(document)
        types = current.definitions.sources, wanted.sources
        _, events = self._survey(types, {view.source for view in new.values()})
        backfill = {name: events[v.source] for name, v in new.items() if events.get(v.source)}
        return ChangePlan(current.version, changes, backfill)

    async def apply(
        self, document: Mapping[str, Any], *, expected_version: int | None = None
    ) -> ChangePlan:
        """Make `document` what runs, all of it or nothing; returns what changed.

        `expected_version`: the version that the caller planned against; another one raises
        ConflictError(code="definitions_changed").  Compiles in a child process; serving goes on.
        """
        async with self._lock:
            self._state.follow(self._environment)
            current = self._state.catalog
            if expected_version not in (None, current.version):
                raise _definitions_changed(current.version, expected_version)
            plan = await asyncio.to_thread(self.plan, document)
            if plan.empty:
                return plan
            with self._environment.snapshot() as snapshot:
                next_view_id = self._state.next_view_id(snapshot)
            catalog = await asyncio.to_thread(
                self._state.build,
                document,
                version=current.version + 1,
                view_ids=current.view_ids,
                next_view_id=next_view_id,
            )
            async with self._compactor.paused():
                await self._backfill(catalog)
            return ChangePlan(catalog.version, plan.changes, plan.backfill)

    def _missing_views(self, document: Mapping[str, Any]) -> dict[str, Any]:
        known = self._state.catalog.view_ids
        views = parse_document(document).views
        return {name: view for name, view in views.items() if view_key(view) not in known}

    def _survey(self, types: _Types, sources: set[str]) -> tuple[int, dict[str, int]]:
        """Return the newest sequence, and how many events each source has up to it.

        Raises DefinitionError if they don't agree with the new `types`.
        """
        with self._environment.snapshot() as snapshot:
            check_column_types(snapshot, *types)
            return snapshot.sequence, {name: _count_events(snapshot, name) for name in sources}

    async def _backfill(self, catalog: Catalog) -> None:
        """Build the views that don't run yet from the log, then swap."""
        current = self._state.catalog
        types = current.definitions.sources, catalog.definitions.sources
        running = set(current.view_ids.values())
        new = [plan for plan in catalog.views.values() if plan.view_id not in running]
        # Counted now, not when it was planned: first events may have come while it was compiled.
        sources = {plan.view.source for plan in new}
        through, events = await asyncio.to_thread(self._survey, types, sources)
        filled = [plan for plan in new if events[plan.view.source]]
        async with self._dropped.building(catalog, [plan.view_id for plan in filled]):
            for source in sorted({plan.view.source for plan in filled}):
                views = [plan for plan in filled if plan.view.source == source]
                await self._replay(catalog, source, views, through)
            await self._swap(catalog, new, through, types)

    async def _swap(
        self, catalog: Catalog, new: Sequence[ViewPlan], through: int, types: _Types
    ) -> None:
        """Apply to the new views what came after `through`, and run the catalog, at once."""
        previous = self._state.catalog

        def swap(txn: WriteTransaction) -> None:
            found = self._state.catalog_in(txn).version
            if found != catalog.version - 1:  # one whose caller gave up was still written
                raise _definitions_changed(found, catalog.version - 1)
            check_column_types(txn, *types, after=through)
            for view in new:
                for block in _log_tail(txn, catalog, view.view.source, through):
                    _apply(txn, [view], block)
            _append_definitions(txn, catalog)
            mark_dropped(txn, previous, catalog)
            self._state.store(txn, catalog)

        await self._writer.write(swap)
        self._state.follow(self._environment)

    async def _replay(
        self, catalog: Catalog, source: str, views: Sequence[ViewPlan], through: int
    ) -> None:
        """Apply the history of `source` to `views`, block by block, read in a child process."""
        request = offline_request(self._paths, catalog, through)
        async with Child("events", {**request, "source": source, "rows": BLOCK_ROWS}) as child:
            async for message in child.messages():
                if message["kind"] == "block":
                    await self._writer.write(partial(_apply, views=views, block=_block(message)))


def _block(message: Mapping[str, Any]) -> "EventBlock":
    stamps = (np.frombuffer(stamp, np.int64) for stamp in message["stamps"])
    return EventBlock(decode_columns(message["columns"]), Stamps(*stamps))


def _count_events(snapshot: Snapshot, source: str) -> int:
    compacted = sum(
        segment.rows
        for manifest in load_manifests(snapshot)
        for segment in manifest.segments
        if segment.source == source and segment.kind is RecordKind.EVENTS
    )
    tail = read_records(
        snapshot, compacted_through(snapshot) + 1, kinds=frozenset({RecordKind.EVENTS})
    )
    return compacted + sum(record.count for record in tail if record.source == source)


def _apply(txn: WriteTransaction, views: Sequence[ViewPlan], block: EventBlock) -> None:
    apply_batch(txn, views, block.columns, block.stamps, txn.newest_known_us)


def _log_tail(
    txn: WriteTransaction, catalog: Catalog, source: str, after: int
) -> Iterator[EventBlock]:
    """Yield what the log holds after sequence `after`, in the columns of the new schema."""
    schema = catalog.definitions.sources[source].schema
    for record in read_records(txn, after + 1, kinds=frozenset({RecordKind.EVENTS})):
        if record.source == source:
            stamps = Stamps(record.event_us, record.known_us, record.sequences())
            yield EventBlock(conform(record.columns(), schema, record.count), stamps)


def conform(columns: Columns, schema: Mapping[str, DType], n: int) -> Columns:
    """Return `columns` in the form of `schema`: those not there are null, others are dropped."""
    return {name: columns.get(name) or empty_column(dtype, n) for name, dtype in schema.items()}


def _append_definitions(txn: WriteTransaction, catalog: Catalog) -> None:
    text = canonical_json(catalog.document).decode()
    append(
        txn,
        kind=RecordKind.DEFINITIONS,
        source=DEFINITIONS_SOURCE,
        columns={"document": column_of(DType.STRING, [text])},
        event_us=np.array([txn.known_us], np.int64),
    )


def _definitions_changed(found: int, expected: int | None) -> ConflictError:
    return ConflictError(
        f"the definitions are at version {found}, not {expected}",
        code="definitions_changed",
        hint="Plan again and look at the difference.",
    )


def _diff(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, dict[str, list[str]]]:
    """Return per kind what is added, changed and removed; kinds without a difference are not in."""
    changes = {}
    for kind in KINDS:
        before, after = old.get(kind) or {}, new.get(kind) or {}
        difference = {
            "added": sorted(after.keys() - before.keys()),
            "changed": sorted(n for n in after.keys() & before.keys() if after[n] != before[n]),
            "removed": sorted(before.keys() - after.keys()),
        }
        if any(difference.values()):
            changes[kind] = difference
    return changes
