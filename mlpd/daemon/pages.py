"""Verb pages: the stored events of a source, page by page in the order of the log.

What is compacted is read by a child process, one page each, and so is all that is asked for as
Arrow; other pages of the log's tail are read here.
"""

import asyncio
from dataclasses import asdict, dataclass, replace
from itertools import islice
from typing import Any

import numpy as np

from mlpd.core.columns import Column, Columns, DType, decode_columns
from mlpd.core.errors import ValidationError
from mlpd.core.specs import SourceSpec
from mlpd.daemon.at_home import Home
from mlpd.daemon.ownership import Ownership
from mlpd.daemon.process import Child
from mlpd.daemon.routing import concerned_by
from mlpd.daemon.state import CatalogState
from mlpd.features.ingest import KNOWN_AT, conform
from mlpd.features.stamps import Stamps
from mlpd.features.tombstones import DELETED, concat_events
from mlpd.storage.environment import Environment
from mlpd.storage.files import DataDirectory
from mlpd.storage.lineage import load_lineage
from mlpd.storage.log import (
    LogRecord,
    RecordKind,
    compacted_through,
    copy_records,
    decode_record,
    record_rows,
    record_source,
)
from mlpd.storage.segments import SEQUENCE

ROWS_MAX = 10_000
"""Rows of one page: they become Python values in the daemon."""
ARROW_ROWS_MAX = 200_000
"""Rows of one page as Arrow: a child makes the bytes, some 20 MB."""
RECORDS_MAX = 50_000
"""Records of the log's tail that one page looks at: 0.15 s."""
CHILDREN_MAX = 2
MAX_SEQUENCE = 2**63 - 1
_EVENTS = frozenset({RecordKind.EVENTS})


@dataclass(frozen=True, slots=True)
class Selection:
    """Which rows: after a sequence and up to one, of the log; event times from one on, before one.

    `limit`: rows at most, None for as many as a page may have.
    """

    after: int = 0
    through: int = MAX_SEQUENCE
    limit: int | None = None
    start_us: int | None = None
    end_us: int | None = None
    numbered_from: int | None = None
    """None for all rows; else only those at home here, their sequences told as counted from it."""

    @property
    def rows_max(self) -> int:
        """The limit that `EventPages` has set."""
        assert self.limit is not None
        return self.limit


@dataclass(frozen=True, slots=True)
class Page:
    """Rows in the order of the log, and the last sequence that was looked at.

    `columns`: the source's timestamp, `known_at`, `__sequence`, its schema, `__deleted`.
    """

    columns: Columns
    sequence: int
    through: int


def read_tail(
    environment: Environment, source: SourceSpec, selection: Selection, home: Home | None = None
) -> Page | None:
    """Return a page of the log's tail, None if its beginning has left it; blocks.

    `home`: of rows of several shards which to take; None for all.
    """
    copies: list[tuple[int, bytes]] = []
    rows, scanned = 0, selection.through
    with environment.snapshot() as snapshot:
        if selection.after < compacted_through(snapshot):
            return None
        found = copy_records(snapshot, selection.after + 1, selection.through, kinds=_EVENTS)
        for start, value in islice(found, RECORDS_MAX):
            scanned = start + record_rows(value) - 1
            if record_source(value) == source.name:
                copies.append((start, value))
                rows += record_rows(value)
                if rows >= selection.rows_max:
                    break
        else:
            if next(found, None) is None:
                scanned = selection.through
    return _tail_page(source, selection, [decode_record(v, s) for s, v in copies], scanned, home)


class EventPages:
    """Reads pages; one instance per daemon, on the loop."""

    def __init__(
        self,
        environment: Environment,
        state: CatalogState,
        ownership: Ownership,
        paths: DataDirectory,
    ) -> None:
        self._environment = environment
        self._state = state
        self._ownership = ownership
        self._paths = paths
        self._slots = asyncio.Semaphore(CHILDREN_MAX)

    async def read(self, source: str, selection: Selection) -> Page:
        """Return the first rows after a sequence; where none are left the page is at `through`.

        A page may have fewer rows than `limit`, or none, before that.  Raises NotFoundError(
        code="unknown_source"), ValidationError(code="invalid_page").
        """
        spec = self._state.catalog.definitions.source(source)
        selection = self._within(selection, ROWS_MAX)
        if selection.after < selection.through:
            # It may be compacted between the two looks: then it lies in segments.
            page = None
            if selection.after >= self._compacted():
                home = self._home(source, selection)
                asked = (self._environment, spec, selection, home)
                page = await asyncio.to_thread(read_tail, *asked)
            return page or await self._read_segments(spec, selection)
        return Page(form(spec, {}, NO_STAMPS), selection.through, selection.through)

    async def read_arrow(self, source: str, selection: Selection) -> bytes:
        """Return a page as an Arrow IPC stream; one with fewer rows than `limit` is the last."""
        spec = self._state.catalog.definitions.source(source)
        request = self._request(spec, self._within(selection, ARROW_ROWS_MAX))
        async with self._slots, Child("page", {**request, "arrow": True}) as child:
            data: bytes = await child.result()
        return data

    def _within(self, selection: Selection, rows_max: int) -> Selection:
        limit = rows_max if selection.limit is None else selection.limit
        if not (1 <= limit <= rows_max and 0 <= selection.after <= MAX_SEQUENCE):
            raise ValidationError(
                f"a page has 1 to {rows_max} rows after a sequence of 0 or more",
                code="invalid_page",
                hint="As Arrow it may have more rows." if rows_max < ARROW_ROWS_MAX else "",
            )
        with self._environment.snapshot() as snapshot:
            newest = int(snapshot.sequence)
        return replace(selection, limit=limit, through=max(min(selection.through, newest), 0))

    def _home(self, source: str, selection: Selection) -> Home | None:
        if selection.numbered_from is None:
            return None
        with self._environment.snapshot() as snapshot:
            lineage = load_lineage(snapshot)
        entities = concerned_by(self._state.catalog, source)
        return Home(source, entities, self._ownership.part, lineage)

    def _compacted(self) -> int:
        with self._environment.snapshot() as snapshot:
            return compacted_through(snapshot)

    async def _read_segments(self, source: SourceSpec, selection: Selection) -> Page:
        request = self._request(source, selection)
        async with self._slots, Child("page", {**request, "arrow": False}) as child:
            done = await child.result()
        columns = await asyncio.to_thread(decode_columns, done["columns"])
        return Page(columns, done["sequence"], selection.through)

    def _request(self, source: SourceSpec, selection: Selection) -> dict[str, Any]:
        home = self._home(source.name, selection)
        return {
            "directory": str(self._paths.root),
            "source": source.name,
            "timestamp": source.timestamp,
            "schema": {name: str(dtype) for name, dtype in source.schema.items()},
            "selection": asdict(selection),
            "home": None if home is None else home.to_request(),
        }


def _tail_page(
    source: SourceSpec,
    selection: Selection,
    records: list[LogRecord],
    scanned: int,
    home: Home | None,
) -> Page:
    scanned = min(scanned, selection.through)
    if not records:
        return Page(form(source, {}, NO_STAMPS), scanned, selection.through)
    columns = concat_events([conform(r.columns(), source.schema, r.count) for r in records])
    parts = ([r.event_us for r in records], [r.known_us for r in records])
    stamps = Stamps(*map(np.concatenate, (*parts, [r.sequences() for r in records])))
    wanted = (stamps.sequences > selection.after) & (stamps.sequences <= selection.through)
    if selection.start_us is not None:
        wanted &= stamps.event_us >= selection.start_us
    if selection.end_us is not None:
        wanted &= stamps.event_us < selection.end_us
    if home is not None:
        wanted &= home.find(columns, stamps.sequences)
    kept = np.flatnonzero(wanted)
    if len(kept) > selection.rows_max:
        kept = kept[: selection.rows_max]
        scanned = int(stamps.sequences[kept[-1]])
    taken = {name: column.take(kept) for name, column in columns.items()}
    found = form(source, taken, stamps.take(kept), selection.numbered_from or 0)
    return Page(found, scanned, selection.through)


NO_STAMPS = Stamps(*(np.empty(0, np.int64) for _ in range(3)))


def form(source: SourceSpec, columns: Columns, stamps: Stamps, numbered_from: int = 0) -> Columns:
    """Return the columns of a page, always the same ones; `columns`: of the schema, and marks."""
    n = len(stamps.sequences)
    marks = columns.get(DELETED) or Column(DType.BOOL, np.zeros(n, np.bool_))
    return {
        source.timestamp: Column(DType.TIMESTAMP, stamps.event_us),
        KNOWN_AT: Column(DType.TIMESTAMP, stamps.known_us),
        SEQUENCE: Column(DType.INT64, stamps.sequences + numbered_from),
        **conform({name: c for name, c in columns.items() if name != DELETED}, source.schema, n),
        DELETED: Column(DType.BOOL, marks.values & marks.mask()),
    }
