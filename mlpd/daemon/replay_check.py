"""The deep check: replays the log into a scratch store and compares online rows with the truth.

Runs in fsck's child.  Memory: the rows of one compaction; disk: as much as the online rows take.
"""

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from mlpd.core.columns import Columns, DType
from mlpd.core.errors import MlpdError
from mlpd.core.time import MIN_TIME_US, system_clock
from mlpd.daemon.definitions import BLOCK_ROWS
from mlpd.daemon.offline import event_columns
from mlpd.features.catalog import Catalog
from mlpd.features.check import view_id_of
from mlpd.features.ingest import apply_batch, conform
from mlpd.features.stamps import Stamps, stamps_of
from mlpd.features.tombstones import DELETED
from mlpd.features.view import ViewPlan
from mlpd.features.windows import WindowPlan
from mlpd.storage.check import scan_parts
from mlpd.storage.environment import Environment
from mlpd.storage.files import DataDirectory
from mlpd.storage.frames import polars_type
from mlpd.storage.lineage import Lineage, load_lineage
from mlpd.storage.log import RecordKind, decode_record
from mlpd.storage.map_store import FileMapStore
from mlpd.storage.segments import (
    EVENT_TIME,
    KNOWN_TIME,
    SEQUENCE,
    Manifest,
    load_manifests,
)
from mlpd.storage.tables import Table, from_u64be
from mlpd.storage.transactions import WriteTransaction
from mlpd.storage.writer import Writer

_QUARTERS = 4
"""Windows are read at so many moments of their length from now on, where bytes differ."""

Schema = Mapping[str, DType]
OnDifference = Callable[[ViewPlan, bytes, str], None]
"""Called with the view, the row's key and what is wrong."""
Values = tuple[bytes, bytes | None]
"""What is stored of an entity: a row or recent tiles, and older tiles if there are any."""


@dataclass(frozen=True, slots=True)
class Block:
    """Events of one source in sequence order, in the columns that its views read."""

    source: str
    columns: Columns
    stamps: Stamps

    @property
    def rows(self) -> int:
        """Number of events, at least 1."""
        return len(self.stamps.sequences)

    @property
    def newest_us(self) -> int:
        """Newest known_time of them."""
        return int(self.stamps.known_us.max())


def compare_with_replay(
    environment: Environment, data: DataDirectory, catalog: Catalog, on_difference: OnDifference
) -> dict[str, int]:
    """Compare every online row of a running view with the replay's; return counts.

    Nobody may write the environment meanwhile.
    """
    with tempfile.TemporaryDirectory(prefix="mlpd-fsck-") as directory:
        scratch = Environment.open(directory, clock=system_clock)
        try:
            owned = _owned(data)
            events, newest_us = _replay(environment, data, catalog, scratch, owned)
            counts = _compare(environment, scratch, catalog, owned, newest_us, on_difference)
        finally:
            scratch.close()
    return {"events": events, **counts}


def _replay(
    environment: Environment,
    data: DataDirectory,
    catalog: Catalog,
    scratch: Environment,
    owned: bytes | None,
) -> tuple[int, int]:
    """Apply every event to the scratch store; return how many, and the newest known time.

    `owned`: as in `apply_batch`.
    """
    events, newest_us = 0, MIN_TIME_US
    with environment.snapshot() as snapshot:
        lineage = load_lineage(snapshot)
    apply = partial(_apply, catalog=catalog, owned=owned, lineage=lineage)
    writer = Writer(scratch)
    try:
        for blocks in _batches(_blocks(environment, data, catalog)):
            writer.write_blocking(partial(apply, blocks=blocks, after_us=newest_us))
            events += sum(block.rows for block in blocks)
            newest_us = max(newest_us, *(block.newest_us for block in blocks))
    finally:
        writer.close()
    return events, newest_us


def _batches(blocks: Iterator[Block]) -> Iterator[list[Block]]:
    """Yield blocks for one commit each: records of single rows would else take one each."""
    batch: list[Block] = []
    rows = 0
    for block in blocks:
        batch.append(block)
        rows += block.rows
        if rows >= BLOCK_ROWS:
            yield batch
            batch, rows = [], 0
    if batch:
        yield batch


def _owned(data: DataDirectory) -> bytes | None:
    """Return per slot whether this directory's shard owns it, None for all."""
    member = FileMapStore(data.root).load()
    return None if member is None else member.flags


def _apply(
    txn: WriteTransaction,
    catalog: Catalog,
    blocks: Sequence[Block],
    after_us: int,
    owned: bytes | None,
    lineage: Lineage | None,
) -> None:
    newest_us = after_us
    for block in blocks:
        newest_us = max(newest_us, block.newest_us)
        views = catalog.views_by_source[block.source]
        apply_batch(txn, views, block.columns, block.stamps, newest_us, owned, lineage)


def _blocks(environment: Environment, data: DataDirectory, catalog: Catalog) -> Iterator[Block]:
    """Yield all events of sources with views: the segments, compaction by compaction, the tail."""
    schemas = {name: catalog.schemas[name] for name, v in catalog.views_by_source.items() if v}
    with environment.snapshot() as snapshot:
        manifests = load_manifests(snapshot)
    compacted = manifests[-1].last_sequence if manifests else 0
    for manifest in manifests:
        for source, schema in schemas.items():
            yield from _segment_blocks(data, manifest, source, schema)
    yield from _tail_blocks(environment, schemas, compacted)


def _segment_blocks(
    data: DataDirectory, manifest: Manifest, source: str, schema: Schema
) -> Iterator[Block]:
    import polars as pl  # noqa: PLC0415 - in the child alone

    paths = [
        data.segments / segment.path
        for segment in manifest.segments
        if segment.source == source and segment.kind is RecordKind.EVENTS
    ]
    if not paths:
        return
    stamps = (EVENT_TIME, KNOWN_TIME, SEQUENCE)
    columns: dict[str, pl.DataType] = {name: pl.Int64() for name in stamps}
    types = {**schema, DELETED: DType.BOOL}
    columns |= {name: polars_type(dtype) for name, dtype in types.items()}
    frames = [pl.read_parquet(path, glob=False) for path in paths]
    empty = pl.DataFrame(schema=columns)
    frame = pl.concat([empty, *frames], how="diagonal").select(list(columns)).sort(SEQUENCE)
    for start in range(0, len(frame), BLOCK_ROWS):
        part = frame[start : start + BLOCK_ROWS]
        yield Block(source, event_columns(part, schema, schema), stamps_of(part))


def _tail_blocks(
    environment: Environment, schemas: Mapping[str, Schema], compacted: int
) -> Iterator[Block]:
    for part in scan_parts(environment, Table.LOG):
        for key, value in part.rows:
            record = decode_record(value, from_u64be(key))
            known = record.kind is RecordKind.EVENTS and record.source in schemas
            if known and record.first > compacted:
                schema = schemas[record.source]
                stamps = Stamps(record.event_us, record.known_us, record.sequences())
                columns = conform(record.columns(), schema, record.count)
                yield Block(record.source, columns, stamps)


def _compare(
    environment: Environment,
    scratch: Environment,
    catalog: Catalog,
    owned: bytes | None,
    newest_us: int,
    on_difference: OnDifference,
) -> dict[str, int]:
    views = {view.view_id: view for view in catalog.running}
    counts = {"equal_bytes": 0, "equal_values": 0, "different": 0}
    for key, stored, replayed in _pairs(_rows(environment, views), _rows(scratch, views)):
        if owned is not None and not owned[int.from_bytes(key[:2], "big")]:
            continue  # rows of a move that is under way
        if stored == replayed:
            counts["equal_bytes"] += 1
            continue
        view = views[view_id_of(key)]
        difference = _difference(view, stored, replayed, newest_us)
        counts["different" if difference else "equal_values"] += 1
        if difference:
            on_difference(view, key, difference)
    return counts


def _rows(
    environment: Environment, views: Mapping[int, ViewPlan]
) -> Iterator[tuple[bytes, Values]]:
    for part in scan_parts(environment, Table.ONLINE, Table.TILES):
        for (key, value), older in zip(part.rows, part.beside, strict=True):
            if view_id_of(key) in views:
                yield key, (value, older)


def _pairs(
    left: Iterator[tuple[bytes, Values]], right: Iterator[tuple[bytes, Values]]
) -> Iterator[tuple[bytes, Values | None, Values | None]]:
    """Merge two scans in key order: (key, values there or None, values here or None)."""
    a, b = next(left, None), next(right, None)
    while a is not None or b is not None:
        key = min(row[0] for row in (a, b) if row is not None)
        mine = a[1] if a is not None and a[0] == key else None
        theirs = b[1] if b is not None and b[0] == key else None
        yield key, mine, theirs
        a = a if mine is None else next(left, None)
        b = b if theirs is None else next(right, None)


def _difference(
    view: ViewPlan, stored: Values | None, replayed: Values | None, newest_us: int
) -> str:
    """Return how two entities of different bytes differ, empty if no read can tell them apart."""
    if isinstance(view.plan, WindowPlan):
        return _window_difference(view.plan, stored, replayed, newest_us)
    if stored is None:
        return "the log has events of this entity, the row is missing"
    if replayed is None:
        return "the log has no event of this entity"
    return "it is not the row that the log makes"


def _window_difference(
    plan: WindowPlan, stored: Values | None, replayed: Values | None, newest_us: int
) -> str:
    """Read all features of both at moments from now to the end of the longest window.

    What lies so far back that no read from now on sees it may be in one value alone: when it is
    dropped depends on how events came in batches.
    """
    windows = plan.layout.view.windows_us
    moments = {window * i // _QUARTERS for window in windows for i in range(_QUARTERS + 1)}
    features = tuple(plan.layout.outputs)
    recent, older = zip(stored or (None, None), replayed or (None, None), strict=True)
    for moment in sorted(moments):
        try:
            columns = plan.read(recent, older, newest_us + 1 + moment, features)
        except MlpdError as error:
            return error.message
        for feature, column in columns.items():
            mine, theirs = (column.take(np.array([i])) for i in (0, 1))
            if mine.mask().tolist() != theirs.mask().tolist() or (
                bool(mine.mask()[0]) and mine.values.tobytes() != theirs.values.tobytes()
            ):
                found, wanted = (c.to_list()[0] for c in (mine, theirs))
                return f"{feature} is {found}, the log makes it {wanted}"
    return ""
