"""Ingest: rows to checked columns, and the writes that one batch makes, inside one transaction.

`parse_batch` runs before the transaction (any thread); `apply_batch` runs on the writer thread, as
part of a group commit: log record, latest rows and window tiles are on disk together or not at all.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlpd.core.columns import Column, Columns, DType
from mlpd.core.convert import column_of
from mlpd.core.errors import MlpdError, TooLargeError, ValidationError
from mlpd.core.keys import online_keys
from mlpd.core.mask import mask
from mlpd.core.specs import EntitySpec, SourceSpec
from mlpd.core.time import MINUTE_US
from mlpd.features.catalog import ViewPlan
from mlpd.features.entities import entity_codes, only_counting, only_owned
from mlpd.features.event_ids import missing_ids
from mlpd.features.latest import LatestPlan, empty_column
from mlpd.features.stamps import Stamps
from mlpd.features.tombstones import DELETED, deleted_rows, mark_deleted
from mlpd.features.windows import WindowInputs, WindowPlan
from mlpd.storage.lineage import Lineage
from mlpd.storage.tables import Table
from mlpd.storage.transactions import WriteTransaction

MAX_BATCH_ROWS = 100_000
MAX_SKEW_US = 5 * MINUTE_US
"""A producer's clock may be ahead by this much: the event time is then set to the arrival time."""

SAMPLES_MAX = 5
"""Refused rows of one batch of which a sample is made."""

KNOWN_AT = "known_at"
"""Reserved column of imports and replays: when each row became known."""

ORIGINAL_EVENT_TIME = "__original_event_time"
"""Log column that keeps the event times of a batch in which one was clamped."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows of one source, checked: `columns` of its schema, and DELETED if one is a tombstone.

    `event_us`: int64 [n].  `known_us`: int64 [n], or None for "at arrival".  `rejected`: one
    `{"index", "code", "message", "hint"}` per refused row; indexes are those of the request.
    `clamped`: rows whose event time lay after their `known_us` and was set to it.  `samples`: codes
    of the first refused rows with their masked values by column.  `size_bytes`: about what all of
    it takes, as it was checked.
    """

    source: SourceSpec
    columns: Columns
    event_us: NDArray[np.int64]
    known_us: NDArray[np.int64] | None
    rejected: list[dict[str, Any]] = field(default_factory=list)
    clamped: int = 0
    samples: Sequence[tuple[str, dict[str, str]]] = ()
    size_bytes: int = 0

    @property
    def rows(self) -> int:
        """Number of accepted rows."""
        return len(self.event_us)

    def take(self, index: NDArray[np.int64]) -> "Batch":
        """Return the accepted rows that `index` selects, with all that were refused."""
        columns = {name: column.take(index) for name, column in self.columns.items()}
        event_us, original = self.event_us[index], columns.get(ORIGINAL_EVENT_TIME)
        return Batch(
            self.source,
            mark_deleted(columns, deleted_rows(columns)),
            event_us,
            None if self.known_us is None else self.known_us[index],
            self.rejected,
            0 if original is None else int((original.values != event_us).sum()),
            self.samples,
            self.size_bytes,
        )


def parse_batch(
    source: SourceSpec,
    columns: Mapping[str, Sequence[Any] | Column],
    *,
    now_us: int,
    all_or_nothing: bool = False,
) -> Batch:
    """Return the checked batch of `columns` (Python values or typed columns, equal lengths).

    The columns are the source's timestamp, its schema (absent ones are null), for imports
    `known_at`, and DELETED where rows are tombstones.  Wrong rows are refused one by one, unless
    `all_or_nothing`, which raises the first one's error.  Raises ValidationError for unknown or
    unequal columns.
    """
    n = _check_shape(source, columns)
    try:
        return _convert(source, columns, np.arange(n), [], now_us)
    except ValidationError:
        if all_or_nothing:
            raise
    good, rejected = _sift(source, columns, n, now_us)
    samples = [_sample(columns, row) for row in rejected[:SAMPLES_MAX]]
    return replace(_convert(source, columns, good, rejected, now_us), samples=samples)


def wire_types(source: SourceSpec) -> dict[str, DType]:
    """Return the columns that rows of a source may have, with their types."""
    return {
        source.timestamp: DType.TIMESTAMP,
        KNOWN_AT: DType.TIMESTAMP,
        DELETED: DType.BOOL,
        **source.schema,
    }


def rows_to_columns(source: SourceSpec, rows: Sequence[Any]) -> dict[str, list[Any]]:
    """Return the columns of a list of objects; raises ValidationError for a row that is none."""
    names: dict[str, None] = {source.timestamp: None}
    for index, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise ValidationError(
                f"row {index} is {type(row).__name__}, not an object",
                code="wrong_type",
                hint="Send rows as objects: column name to value.",
                details={"index": index},
            )
        names.update(dict.fromkeys(row))
    return {name: [row.get(name) for row in rows] for name in names}


def conform(columns: Columns, schema: Mapping[str, DType], n: int) -> Columns:
    """Return `columns` in the form of `schema`: those not there are null, others are dropped.

    Marks of tombstones stay.
    """
    found = {name: columns.get(name) or empty_column(dtype, n) for name, dtype in schema.items()}
    return mark_deleted(found, deleted_rows(columns))


def apply_batch(
    txn: WriteTransaction,
    views: Sequence[ViewPlan],
    columns: Columns,
    stamps: Stamps,
    newest_known_us: int,
    owned: bytes | None = None,
    lineage: Lineage | None = None,
) -> None:
    """Update the rows and tiles of `views` with a batch already in the log.

    `columns`: of the source's schema, and DELETED where there are tombstones; windows pass these
    over.  `owned`: per slot 1 if its entities are ours, 0 if they are passed over; None for all.
    `lineage`: for rows that came before, for which slots they count.
    Cost: one get and one put per touched entity and view, about 15 us each.
    """
    rows = living = _Rows(columns, stamps, owned, lineage)
    deleted = deleted_rows(columns)
    if deleted is not None:
        kept = {name: column.take(~deleted) for name, column in columns.items()}
        living = _Rows(kept, stamps.take(~deleted), owned, lineage)
    for plan in views:
        if isinstance(plan.plan, LatestPlan):
            _apply_latest(txn, plan.view_id, plan.plan, rows.of(plan.entity))
        else:
            keyed, inputs = living.of(plan.entity), living.inputs(plan.entity, plan.plan)
            _apply_window(txn, plan.view_id, plan.plan, keyed, inputs, newest_known_us)


@dataclass(frozen=True, slots=True)
class _Keyed:
    """The rows of a batch that have an entity's key: `kept` of them all, None for all.

    `entities`: distinct entity bytes.  `codes`: int64 [n], which of them each row has.
    """

    entities: list[bytes]
    codes: NDArray[np.int64]
    columns: Columns
    stamps: Stamps
    kept: NDArray[np.int64] | None


class _Rows:
    """A batch as views see it; what several views share is made once."""

    def __init__(
        self, columns: Columns, stamps: Stamps, owned: bytes | None, lineage: Lineage | None
    ) -> None:
        self._columns, self._stamps = columns, stamps
        self._owned, self._lineage = owned, lineage
        self._keyed: dict[EntitySpec, _Keyed] = {}
        self._inputs: dict[object, WindowInputs] = {}

    def of(self, entity: EntitySpec) -> _Keyed:
        keyed = self._keyed.get(entity)
        if keyed is None:
            keyed = self._keyed[entity] = self._key(entity)
        return keyed

    def inputs(self, entity: EntitySpec, plan: WindowPlan) -> WindowInputs:
        inputs = self._inputs.get(plan.inputs_key)
        if inputs is None:
            inputs = self._inputs[plan.inputs_key] = plan.inputs(self._columns)
        kept = self.of(entity).kept
        return inputs if kept is None else inputs.take(kept)

    def _key(self, entity: EntitySpec) -> _Keyed:
        entities, codes = entity_codes(entity, self._columns)
        if self._owned is not None:
            entities, codes = only_owned(entities, codes, self._owned)
        if self._lineage is not None:
            sequences = self._stamps.sequences
            entities, codes = only_counting(entities, codes, sequences, self._lineage)
        if not len(codes) or int(codes.min()) >= 0:
            return _Keyed(entities, codes, self._columns, self._stamps, None)
        kept = np.flatnonzero(codes >= 0)
        columns = {name: column.take(kept) for name, column in self._columns.items()}
        return _Keyed(entities, codes[kept], columns, self._stamps.take(kept), kept)


def _apply_latest(txn: WriteTransaction, view_id: int, plan: LatestPlan, rows: _Keyed) -> None:
    keys = online_keys([view_id], rows.entities)
    values = txn.get_many(Table.ONLINE, keys)
    _put_all(txn, keys, plan.update(values, rows.codes, rows.stamps, rows.columns))


def _apply_window(
    txn: WriteTransaction,
    view_id: int,
    plan: WindowPlan,
    rows: _Keyed,
    inputs: WindowInputs,
    newest_known_us: int,
) -> None:
    keys = online_keys([view_id], rows.entities)

    def get_older(entities: Sequence[int]) -> Sequence[bytes | None]:
        return txn.get_many(Table.TILES, [keys[entity] for entity in entities])

    values = txn.get_many(Table.ONLINE, keys)
    update = plan.update(values, get_older, rows.codes, rows.stamps, inputs, newest_known_us)
    _put_all(txn, keys, update.recent)
    for entity, older in update.older.items():
        if older is None:
            txn.delete(Table.TILES, keys[entity])
        else:
            txn.put(Table.TILES, keys[entity], older)


def _put_all(txn: WriteTransaction, keys: Sequence[bytes], updated: Sequence[bytes | None]) -> None:
    for key, value in zip(keys, updated, strict=True):
        if value is not None:
            txn.put(Table.ONLINE, key, value)


def _check_shape(source: SourceSpec, columns: Mapping[str, Sequence[Any] | Column]) -> int:
    known = wire_types(source)
    for name in columns:
        if name not in known:
            raise ValidationError(
                f"source {source.name!r} has no column {name!r}; "
                f"it has: {', '.join([source.timestamp, *source.schema])}",
                code="unknown_column",
                hint="Drop the column, or add it to the source and run mlpd apply.",
            )
    if source.timestamp not in columns:
        raise ValidationError(
            f"source {source.name!r} needs the timestamp column {source.timestamp!r}",
            code="missing_timestamp",
            hint="Send each event's time as RFC 3339 with an offset, or microseconds UTC.",
        )
    lengths = {name: len(values) for name, values in columns.items()}
    if len(set(lengths.values())) > 1:
        raise ValidationError(f"columns of unequal length: {lengths}", code="unequal_columns")
    n = lengths[source.timestamp]
    if n > MAX_BATCH_ROWS:
        raise TooLargeError(
            f"the batch has {n} rows; the limit is {MAX_BATCH_ROWS}",
            code="batch_too_large",
            hint="Send it in parts.",
        )
    return n


def _convert(
    source: SourceSpec,
    columns: Mapping[str, Sequence[Any] | Column],
    index: NDArray[np.int64],
    rejected: list[dict[str, Any]],
    now_us: int,
) -> Batch:
    times = _column(DType.TIMESTAMP, source.timestamp, columns, index)
    _refuse(times.mask(), "has no event time", "missing_timestamp", source.timestamp)
    event_us = times.values
    known_us = _known_times(source, columns, index, event_us)
    latest = now_us if known_us is None else known_us
    _refuse(event_us <= latest + MAX_SKEW_US, "lies in the future", "future_event", source.name)
    if known_us is not None:
        _refuse(known_us <= now_us, "is known in the future", "future_known_at", source.name)
    converted = {
        name: _column(dtype, name, columns, index) for name, dtype in source.schema.items()
    }
    if source.event_id is not None:
        missing = missing_ids(source, converted)
        _refuse(~missing, "has no event id", "missing_event_id", source.event_id)
    if DELETED in columns:
        mark = {DELETED: _column(DType.BOOL, DELETED, columns, index)}
        converted = mark_deleted(converted, deleted_rows(mark))
    clamped = 0
    if known_us is not None:
        clamped = int((event_us > known_us).sum())
        event_us = _clamp(event_us, known_us, converted)
    size_bytes = 2 * event_us.nbytes + sum(map(_size_bytes, converted.values()))
    return Batch(source, converted, event_us, known_us, rejected, clamped, size_bytes=size_bytes)


def _size_bytes(column: Column) -> int:
    """Return about what a column takes; 50 ns per text or list."""
    texts = 0 if column.dtype.is_numeric else sum(map(len, column.values.tolist()))
    return column.values.nbytes + texts


def _known_times(
    source: SourceSpec,
    columns: Mapping[str, Sequence[Any] | Column],
    index: NDArray[np.int64],
    event_us: NDArray[np.int64],
) -> NDArray[np.int64] | None:
    if KNOWN_AT not in columns:
        return None
    known = _column(DType.TIMESTAMP, KNOWN_AT, columns, index)
    if source.delay_us is not None:
        return np.where(known.mask(), known.values, event_us + source.delay_us)
    _refuse(known.mask(), "has no known_at", "missing_known_at", source.name)
    return known.values


def clamp_to_arrival(batch: Batch, arrival_us: int) -> tuple[NDArray[np.int64], Columns]:
    """Return (event times, columns) of a live batch with no event later than its arrival."""
    columns = dict(batch.columns)
    return _clamp(batch.event_us, np.int64(arrival_us), columns), columns


def _clamp(event_us: NDArray[np.int64], known_us: Any, columns: Columns) -> NDArray[np.int64]:
    if bool((event_us <= known_us).all()):
        return event_us
    columns[ORIGINAL_EVENT_TIME] = Column(DType.TIMESTAMP, event_us)
    clamped: NDArray[np.int64] = np.minimum(event_us, known_us)
    return clamped


def _column(
    dtype: DType,
    name: str,
    columns: Mapping[str, Sequence[Any] | Column],
    index: NDArray[np.int64],
) -> Column:
    values = columns.get(name)
    if values is None:
        values = [None] * len(index)
    elif isinstance(values, Column):
        if values.dtype is not dtype:
            raise ValidationError(
                f"column {name!r} takes {dtype}, got {values.dtype}", code="wrong_type"
            )
        return values if len(index) == len(values) else values.take(index)
    elif len(index) < len(values):
        values = [values[i] for i in index.tolist()]
    return column_of(dtype, values, f"column {name!r}")


def _refuse(ok: NDArray[np.bool_], reason: str, code: str, name: str) -> None:
    if bool(ok.all()):
        return
    row = int(np.argmin(ok))
    raise ValidationError(
        f"row {row} of {name!r} {reason}", code=code, hint=_HINTS[code], details={"index": row}
    )


_HINTS = {
    "missing_timestamp": "Every event needs its time.",
    "missing_event_id": "Its source tells events apart by it; send one that a retry repeats.",
    "missing_known_at": "Bring known_at for every row, or declare the source's delay.",
    "future_event": "Event times may run at most 5 minutes ahead; check the producer's clock.",
    "future_known_at": "known_at is for history: it must not lie after the daemon's clock.",
}


def _sift(
    source: SourceSpec, columns: Mapping[str, Sequence[Any] | Column], n: int, now_us: int
) -> tuple[NDArray[np.int64], list[dict[str, Any]]]:
    """Return (good rows, refusals) by halving: cheap when few rows are bad."""
    good: list[int] = []
    rejected: list[dict[str, Any]] = []
    pending = [(0, n)]
    while pending:
        start, stop = pending.pop()
        try:
            _convert(source, columns, np.arange(start, stop), [], now_us)
            good.extend(range(start, stop))
        except MlpdError as error:
            if stop - start == 1:
                shape = error.to_dict()
                rejected.append({"index": start, **{k: shape[k] for k in _REFUSAL}})
                continue
            middle = (start + stop) // 2
            pending += [(middle, stop), (start, middle)]
    return np.array(good, np.int64), rejected


def _sample(
    columns: Mapping[str, Sequence[Any] | Column], rejected: Mapping[str, Any]
) -> tuple[str, dict[str, str]]:
    """Return a refused row's code and the form of its values, those that are null left out."""
    row = {name: _value_at(values, rejected["index"]) for name, values in columns.items()}
    return rejected["code"], {name: mask(value) for name, value in row.items() if value is not None}


def _value_at(values: Sequence[Any] | Column, index: int) -> Any:
    if isinstance(values, Column):
        return values.take(np.array([index])).to_list()[0]
    return values[index]


_REFUSAL = ("code", "message", "hint")
