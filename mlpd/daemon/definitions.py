"""Verbs plan, apply and release: what new definitions would change, and making it so, atomically.

A new or changed view of a source that already has events is built from the log while serving goes
on: its rows get an id of their own, history is read in a child process and applied in blocks, and
one last transaction applies what arrived meanwhile and swaps the catalog.

Versions of services that models pin go on running beside the new ones, until `release` finds that
nothing pins them any more.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Collection, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np

from mlpd.core.closure import build_closure
from mlpd.core.columns import Columns, DType, decode_columns
from mlpd.core.config import PluginsConfig
from mlpd.core.convert import column_of
from mlpd.core.document import KINDS, parse_document
from mlpd.core.errors import ConflictError, MlpdError
from mlpd.core.hashing import canonical_json
from mlpd.core.specs import Definitions, ViewSpec
from mlpd.daemon.column_types import Sources, check_column_types
from mlpd.daemon.dropped import DroppedViews, mark_dropped
from mlpd.daemon.offline import offline_request
from mlpd.daemon.ownership import Ownership
from mlpd.daemon.pins import Holders, Pins
from mlpd.daemon.plugins import Plugins
from mlpd.daemon.process import Child
from mlpd.daemon.scheduler import check_schedules
from mlpd.daemon.state import CatalogState
from mlpd.features.catalog import Catalog, ViewPlan, merge_schemas, view_key
from mlpd.features.ingest import apply_batch, conform
from mlpd.features.stamps import Stamps
from mlpd.storage.compactor import Compactor
from mlpd.storage.environment import Environment
from mlpd.storage.files import DataDirectory
from mlpd.storage.lineage import load_lineage
from mlpd.storage.log import RecordKind, append, compacted_through, read_records
from mlpd.storage.segments import load_manifests
from mlpd.storage.transactions import Snapshot, WriteTransaction
from mlpd.storage.writer import Writer

DEFINITIONS_SOURCE = "mlpd.definitions"
"""Name of the definition records in the log; no user source can have it."""

BLOCK_ROWS = 20_000
"""Rows that a backfill applies in one transaction: about 100 ms of the writer."""
APPLY_TRIES = 3
"""How often new views are built if aliases or routes move to other versions meanwhile."""
RELEASE_S = 5.0
"""How often pinned versions are looked at, while there are any."""

_log = logging.getLogger("mlpd.definitions")

_Types = tuple[Sources, Sources]
"""Column types before an apply and after it."""


@dataclass(frozen=True, slots=True)
class EventBlock:
    """Events of one source, in sequence order."""

    columns: Columns
    stamps: Stamps


@dataclass(frozen=True, slots=True)
class Pinned:
    """A version of a feature service that models pin and new definitions don't have.

    `views`: those that go on running for it alone.  `by`: who holds the models.
    """

    service: str
    hash: str
    views: tuple[str, ...]
    by: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ChangePlan:
    """What an apply would do.

    `changes`: per kind the names `added`, `changed` and `removed`.  `backfill`: views to build
    from the log with the events to replay.  `pinned`: versions of services that go on running.
    `cost`: by view of the backfill about how many `entities`, `seconds` and `bytes` of disk.
    """

    version: int
    changes: dict[str, dict[str, list[str]]]
    backfill: dict[str, int] = field(default_factory=dict)
    pinned: tuple[Pinned, ...] = ()
    cost: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def empty(self) -> bool:
        """Whether nothing would change."""
        return not self.changes

    def to_dict(self) -> dict[str, Any]:
        """Return the wire form."""
        return {
            "version": self.version,
            "changes": self.changes,
            "backfill": self.backfill,
            "pinned": [asdict(pinned) for pinned in self.pinned],
            "cost": dict(self.cost),
        }


class DefinitionsVerb:
    """Plans and applies definitions; one apply or release at a time."""

    def __init__(
        self,
        environment: Environment,
        writer: Writer,
        state: CatalogState,
        compactor: Compactor,
        dropped: DroppedViews,
        pins: Pins,
        plugins: PluginsConfig,
        ownership: Ownership,
        paths: DataDirectory,
    ) -> None:
        self._environment = environment
        self._writer = writer
        self._state = state
        self._compactor = compactor
        self._dropped = dropped
        self._pins = pins
        self._plugins = plugins
        self._ownership = ownership
        self._paths = paths
        self._lock = asyncio.Lock()

    async def plan(self, document: Mapping[str, Any]) -> ChangePlan:
        """Return what `document` would change, and its cost; DefinitionError for a wrong one.

        The cost of a backfill is measured in a child process: a second, and the time that it takes
        to read the sources.
        """
        plan = await asyncio.to_thread(self._plan, document, await self._pins.read())
        if not plan.backfill:
            return plan
        with self._environment.snapshot() as snapshot:
            through = snapshot.sequence
        views = {kind: document[kind] for kind in ("entities", "sources", "views")}
        request = {
            "directory": str(self._paths.root),
            "catalog": {"document": views, "version": 0, "view_ids": {}, "next_view_id": 1},
            "through": through,
            "views": sorted(plan.backfill),
        }
        async with Child("cost", request) as child:
            return replace(plan, cost=await child.result())

    async def apply(
        self, document: Mapping[str, Any], *, expected_version: int | None = None
    ) -> ChangePlan:
        """Make `document` what runs, all of it or nothing; returns what changed.

        `expected_version`: the version that the caller planned against; another one raises
        ConflictError(code="definitions_changed").  Compiles in a child process; serving goes on.
        """
        async with self.exclusive():
            current = self._state.catalog
            if expected_version not in (None, current.version):
                raise _definitions_changed(current.version, expected_version)
            for _ in range(APPLY_TRIES):
                held = await self._pins.read()
                plan = await asyncio.to_thread(self._plan, document, held)
                if plan.empty:
                    return plan
                catalog = await self._build(document, [pinned.hash for pinned in plan.pinned])
                async with self._compactor.paused():
                    if await self._backfill(catalog):
                        return replace(plan, version=catalog.version)
        raise _models_moved()

    async def release(self) -> list[str]:
        """Let go of pinned versions that no model pins any more; returns their hashes.

        Their rows are removed in the background.  Cheap while nothing is pinned.
        """
        async with self.exclusive():
            current = self._state.catalog
            held = await self._pins.read() if current.pinned else {}
            kept = {h: former.document for h, former in current.pinned.items() if h in held}
            if len(kept) == len(current.pinned):
                return []
            catalog = await asyncio.to_thread(
                self._state.build,
                current.document,
                version=current.version,
                revision=current.revision + 1,
                view_ids=current.view_ids,
                next_view_id=current.next_view_id,
                pinned=kept,
            )
            async with self._dropped.building(catalog, ()):
                released = await self._writer.write(partial(self._release, catalog=catalog))
            self._state.follow(self._environment)
            return sorted(current.pinned.keys() - kept.keys()) if released else []

    @asynccontextmanager
    async def exclusive(self) -> AsyncIterator[None]:
        """Wait for an apply under way and hold off others: the views that run stay the same."""
        async with self._lock:
            self._state.follow(self._environment)
            yield

    async def rebuild(
        self, view_ids: Collection[int], also: Callable[[WriteTransaction], object]
    ) -> None:
        """Build views that run, also pinned ones, anew from the log, and run them, at once.

        They get new ids.  In `exclusive`, with the compactor paused.  `also` is done in the
        transaction that swaps.
        """
        current = self._state.catalog
        for _ in range(APPLY_TRIES):
            await self._pins.read()
            with self._environment.snapshot() as snapshot:
                next_view_id = self._state.next_view_id(snapshot)
            catalog = await asyncio.to_thread(
                self._state.build,
                current.document,
                version=current.version + 1,
                view_ids={key: i for key, i in current.view_ids.items() if i not in view_ids},
                next_view_id=next_view_id,
                pinned={found: former.document for found, former in current.pinned.items()},
            )
            if await self._backfill(catalog, also):
                return
        raise _models_moved()

    async def release_forever(self) -> None:
        """Release what can be, every few seconds; cancel it at any time."""
        while True:
            await asyncio.sleep(RELEASE_S)
            try:
                await self.release()
            except MlpdError as error:
                _log.warning("pinned versions could not be released: %s", error.message)

    def _release(self, txn: WriteTransaction, *, catalog: Catalog) -> bool:
        current = self._state.catalog_in(txn)
        if current.key != (catalog.version, catalog.revision - 1) or self._lacks(txn, catalog):
            return False
        mark_dropped(txn, current, catalog)
        self._state.store(txn, catalog)
        return True

    def _lacks(self, txn: WriteTransaction, catalog: Catalog) -> bool:
        """Tell whether a model that is in use reads what runs now and wouldn't in `catalog`."""
        held, current = self._pins.find(txn), self._state.catalog_in(txn)
        running, hashes = _hashes_of(current), _hashes_of(catalog)
        return held is None or any(h in running and h not in hashes for h in held)

    def _plan(self, document: Mapping[str, Any], held: Holders) -> ChangePlan:
        """Return the plan for what is held; in a thread."""
        wanted = parse_document(document)
        check_schedules(wanted)
        Plugins.find(self._plugins).check_jobs(wanted.jobs.values())
        current = self._state.catalog
        changes = _diff(current.document, document)
        new = self._missing_views(wanted)
        types = current.definitions.sources, wanted.sources
        _, events = self._survey(types, {view.source for view in new.values()})
        backfill = {name: events[v.source] for name, v in new.items() if events.get(v.source)}
        filled = [(new[name], wanted.entities[new[name].entity]) for name in backfill]
        self._ownership.check_views(current, filled)
        pinned = _pinned(current, wanted, held)
        documents = (current.extract(found.hash) for found in pinned)
        merge_schemas(wanted, [parse_document(found) for found in documents])
        return ChangePlan(current.version, changes, backfill, pinned)

    async def _build(self, document: Mapping[str, Any], pinned: Sequence[str]) -> Catalog:
        """Return the next catalog, compiled, with the `pinned` versions of services."""
        current = self._state.catalog
        with self._environment.snapshot() as snapshot:
            next_view_id = self._state.next_view_id(snapshot)
        return await asyncio.to_thread(
            self._state.build,
            document,
            version=current.version + 1,
            view_ids=current.view_ids,
            next_view_id=next_view_id,
            pinned={found: current.extract(found) or {} for found in pinned},
        )

    def _missing_views(self, wanted: Definitions) -> dict[str, ViewSpec]:
        known, entities = self._state.catalog.view_ids, wanted.entities
        return {
            name: view
            for name, view in wanted.views.items()
            if view_key(view, entities[view.entity]) not in known
        }

    def _survey(self, types: _Types, sources: set[str]) -> tuple[int, dict[str, int]]:
        """Return the newest sequence, and how many events each source has up to it.

        Raises DefinitionError if they don't agree with the new `types`.
        """
        with self._environment.snapshot() as snapshot:
            check_column_types(snapshot, *types)
            return snapshot.sequence, {name: _count_events(snapshot, name) for name in sources}

    async def _backfill(
        self, catalog: Catalog, also: Callable[[WriteTransaction], object] = lambda _: None
    ) -> bool:
        """Build the views that don't run yet from the log, then swap; False as `_swap`."""
        current = self._state.catalog
        types = current.definitions.sources, catalog.definitions.sources
        running = set(current.view_ids.values())
        new = [plan for plan in catalog.running if plan.view_id not in running]
        # Counted now, not when it was planned: first events may have come while it was compiled.
        sources = {plan.view.source for plan in new}
        through, events = await asyncio.to_thread(self._survey, types, sources)
        filled = [plan for plan in new if events[plan.view.source]]
        self._ownership.check_views(current, [(plan.view, plan.entity) for plan in filled])
        async with self._dropped.building(catalog, [plan.view_id for plan in filled]):
            for source in sorted({plan.view.source for plan in filled}):
                views = [plan for plan in filled if plan.view.source == source]
                await self._replay(catalog, source, views, through)
            return await self._swap(catalog, new, through, types, also)

    async def _swap(
        self,
        catalog: Catalog,
        new: Sequence[ViewPlan],
        through: int,
        types: _Types,
        also: Callable[[WriteTransaction], object],
    ) -> bool:
        """Apply to the new views what came after `through`, and run the catalog, at once.

        False, and nothing is done, if a model came into use that pins what the catalog lacks.
        """
        previous = self._state.catalog

        def swap(txn: WriteTransaction) -> bool:
            found = self._state.catalog_in(txn)
            if found.key != previous.key:  # one whose caller gave up was still written
                raise _definitions_changed(found.version, previous.version)
            if self._lacks(txn, catalog):
                return False
            check_column_types(txn, *types, after=through)
            for view in new:
                for block in _log_tail(txn, catalog, view.view.source, through):
                    self._apply(txn, [view], block)
            _append_definitions(txn, catalog)
            mark_dropped(txn, previous, catalog)
            self._state.store(txn, catalog)
            also(txn)
            return True

        swapped = await self._writer.write(swap)
        self._state.follow(self._environment)
        return swapped

    async def _replay(
        self, catalog: Catalog, source: str, views: Sequence[ViewPlan], through: int
    ) -> None:
        """Apply the history of `source` to `views`, block by block, read in a child process."""
        request = offline_request(self._paths, catalog, through)
        async with Child("events", {**request, "source": source, "rows": BLOCK_ROWS}) as child:
            async for message in child.messages():
                if message["kind"] == "block":
                    block = _block(message)
                    await self._writer.write(partial(self._apply, views=views, block=block))

    def _apply(self, txn: WriteTransaction, views: Sequence[ViewPlan], block: EventBlock) -> None:
        owned, lineage = self._ownership.flags, load_lineage(txn)
        known_us = txn.newest_known_us
        apply_batch(txn, views, block.columns, block.stamps, known_us, owned, lineage)


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


def _log_tail(
    txn: WriteTransaction, catalog: Catalog, source: str, after: int
) -> Iterator[EventBlock]:
    """Yield what the log holds after sequence `after`, in the columns of the new schema."""
    schema = catalog.schemas[source]
    for record in read_records(txn, after + 1, kinds=frozenset({RecordKind.EVENTS})):
        if record.source == source:
            stamps = Stamps(record.event_us, record.known_us, record.sequences())
            yield EventBlock(conform(record.columns(), schema, record.count), stamps)


def _pinned(current: Catalog, wanted: Definitions, held: Holders) -> tuple[Pinned, ...]:
    """Return the versions of services that run now, are held, and aren't in `wanted`."""
    hashes = {build_closure(wanted, service).hash for service in wanted.services.values()}
    keys = {view_key(view, wanted.entities[view.entity]) for view in wanted.views.values()}
    found = []
    for service_hash, by in sorted(held.items()):
        document = None if service_hash in hashes else current.extract(service_hash)
        if document is not None:
            old = parse_document(document)
            views = (
                name
                for name, view in old.views.items()
                if view_key(view, old.entities[view.entity]) not in keys
            )
            service = next(iter(old.services))
            found.append(Pinned(service, service_hash, tuple(sorted(views)), by))
    return tuple(found)


def _hashes_of(catalog: Catalog) -> set[str]:
    """Return the hashes of all versions of services that run."""
    return {*catalog.pinned, *(closure.hash for closure in catalog.closures.values())}


def _append_definitions(txn: WriteTransaction, catalog: Catalog) -> None:
    text = canonical_json(catalog.document).decode()
    append(
        txn,
        kind=RecordKind.DEFINITIONS,
        source=DEFINITIONS_SOURCE,
        columns={"document": column_of(DType.STRING, [text])},
        event_us=np.array([txn.known_us], np.int64),
    )


def _models_moved() -> ConflictError:
    return ConflictError(
        "aliases and routes moved each time that the new views were built",
        code="definitions_changed",
        hint="Try again.",
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
