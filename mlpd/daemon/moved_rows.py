"""The rows and tiles of slots: counted, compared by what is read of them, and removed."""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import chain, groupby, islice
from typing import Any

import numpy as np
from numpy.typing import NDArray
from xxhash import xxh64_intdigest

from mlpd.core.columns import Column, DType
from mlpd.core.errors import TooLargeError
from mlpd.features.catalog import Catalog
from mlpd.features.check import view_id_of
from mlpd.features.latest import LatestPlan
from mlpd.features.view import ViewPlan
from mlpd.storage.environment import Environment
from mlpd.storage.tables import Table
from mlpd.storage.transactions import Snapshot, WriteTransaction
from mlpd.storage.writer import Writer

READ_ROWS = 2_000
"""Rows of one snapshot: a few milliseconds."""
LOADED_ROWS_MAX = 200_000
"""Rows that are compared at once: a slot alone may have many, where keys share a {tag}."""
REMOVED_ROWS = 1_000
"""Rows that go with one write."""
_PREFIX_BYTES = 6
_WORD = 8
FEATURES = (Table.ONLINE, Table.TILES)
SERVED = (Table.PREDICTIONS, Table.LABELS)
_Run = tuple[bytes, bytes]
"""First key, key behind the last."""
Row = tuple[bytes, bytes, bytes | None]
"""Key, row or recent tiles, older tiles."""


def runs_of(slots: Sequence[int]) -> Iterator[tuple[bytes, bytes]]:
    """Yield (first key, key behind the last) of each run of ascending slots."""
    for _, run in groupby(enumerate(slots), lambda pair: pair[1] - pair[0]):
        found = [slot for _, slot in run]
        yield found[0].to_bytes(2, "big"), (found[-1] + 1).to_bytes(2, "big")


def holds_any(
    reader: Snapshot | WriteTransaction, tables: Sequence[Table], slots: Sequence[int]
) -> bool:
    """Tell whether a table whose keys begin with the slot has one of these."""
    return any(
        next(iter(reader.scan(table, start, stop)), None) is not None
        for table in tables
        for start, stop in runs_of(slots)
    )


def count_rows(
    environment: Environment, slots: Sequence[int], table: Table = Table.ONLINE
) -> dict[int, int]:
    """Return how many rows of a table each slot has, without those that have none; blocks."""
    counts: dict[int, int] = {}
    for start, stop in runs_of(slots):
        at: bytes | None = start
        while at is not None:
            with environment.snapshot() as snapshot:
                keys = _keys(snapshot, table, at, stop, READ_ROWS)
            for key in keys:
                slot = int.from_bytes(key[:2], "big")
                counts[slot] = counts.get(slot, 0) + 1
            at = keys[-1] + b"\0" if len(keys) == READ_ROWS else None
    return counts


async def remove_rows(writer: Writer, slots: Sequence[int]) -> int:
    """Remove all that slots hold, `REMOVED_ROWS` a write; returns how many rows went."""
    removed, runs = 0, [*runs_of(slots)]
    for table in (*FEATURES, *SERVED):
        left: Sequence[_Run] = runs
        while left:
            went, left = await writer.write(partial(_remove, table=table, runs=left))
            removed += went
    return removed


def _remove(
    txn: WriteTransaction, table: Table, runs: Sequence[_Run]
) -> tuple[int, Sequence[_Run]]:
    """Remove rows of runs of slots; return how many, and the runs that may have some left."""
    removed = 0
    for number, (start, stop) in enumerate(runs):
        keys = _keys(txn, table, start, stop, REMOVED_ROWS - removed)
        for key in keys:
            txn.delete(table, key)
        removed += len(keys)
        if removed == REMOVED_ROWS:
            return removed, runs[number:]
    return removed, ()


def _keys(
    reader: Snapshot | WriteTransaction, table: Table, start: bytes, stop: bytes, rows_max: int
) -> list[bytes]:
    return [key for key, _ in islice(reader.scan(table, start, stop), rows_max)]


def load_rows(snapshot: Snapshot, slots: Sequence[int]) -> list[Row]:
    """Return what is stored of every entity of the slots; TooLargeError(code="too_many_rows")."""
    scans = (snapshot.scan(Table.ONLINE, start, stop) for start, stop in runs_of(slots))
    rows = [*islice(chain.from_iterable(scans), LOADED_ROWS_MAX + 1)]
    if len(rows) > LOADED_ROWS_MAX:
        raise too_many_rows()
    older = snapshot.get_many(Table.TILES, (key for key, _ in rows))
    return [(key, value, tiles) for (key, value), tiles in zip(rows, older, strict=True)]


def too_many_rows() -> TooLargeError:
    """Return the error for slots that can't be compared at once."""
    return TooLargeError(
        f"the slots, or one of them, hold more than {LOADED_ROWS_MAX} online rows",
        code="too_many_rows",
        hint="Fewer slots at once; one alone has so many where keys share a {tag}, and stays.",
    )


def digest_rows(catalog: Catalog, rows: Sequence[Row], at_us: int) -> tuple[str, int]:
    """Return 16 hex digits over all that can be read of the rows at a moment, and their number.

    Sequences and view ids, which differ between shards, are not in it; names of views, entities,
    event times, statuses and bits of values are.  What reads as if there were no row, windows that
    have passed, is passed over, as are views of earlier definitions.
    `at_us` must be later than every event.  About 5 us per row and 1 us per feature.
    """
    by_view: dict[int, list[Row]] = {}
    for row in rows:
        by_view.setdefault(view_id_of(row[0]), []).append(row)
    total, count = 0, 0
    for view in catalog.views.values():
        found = by_view.get(view.view_id, [])
        if found:
            digests = [*_digests(view, found, at_us)]
            total += sum(digests)
            count += len(digests)
    return f"{total % 2**64:016x}", count


def _digests(view: ViewPlan, rows: Sequence[Row], at_us: int) -> Iterator[int]:
    seed = xxh64_intdigest(view.view.name.encode())
    columns = _read(view, [*rows, (b"", b"", None)], at_us)
    *values, nothing = _values(list(columns.values()))
    for (key, *_), value in zip(rows, values, strict=True):
        if value != nothing:
            yield xxh64_intdigest(key[:2] + key[_PREFIX_BYTES:] + value, seed)


def _read(view: ViewPlan, rows: Sequence[Row], at_us: int) -> Mapping[str, Column]:
    """Return all features of all rows, and what else a read answers."""
    plan, values = view.plan, [value or None for _, value, _ in rows]
    if not isinstance(plan, LatestPlan):
        return plan.read(values, [older for *_, older in rows], at_us, tuple(plan.layout.outputs))
    types = view.view.features
    block, event_us = plan.read(values, at_us, tuple(types))
    columns = {
        name: block.column(row, dtype, whole=False)
        for row, (name, dtype) in enumerate(types.items())
    }
    columns["\0event"] = _numbers(event_us)
    for row, name in enumerate(types):
        columns[f"\0state {name}"] = _numbers(block.state[row].astype(np.int64))
    return columns


def _numbers(values: NDArray[np.int64]) -> Column:
    return Column(DType.INT64, values)


def _values(columns: Sequence[Column]) -> list[bytes]:
    """Return each row's values as bytes, numbers first; one row more than none."""
    numbers = [c for c in columns if c.values.dtype != object]
    texts = [_texts(c) for c in columns if c.values.dtype == object]
    words = [column.mask().astype(np.int64) for column in columns]
    words += [np.where(column.mask(), _words(column.values), 0) for column in numbers]
    raw, width = np.stack(words, axis=1).tobytes(), _WORD * len(words)
    fixed = [raw[start : start + width] for start in range(0, len(raw), width)]
    if not texts:
        return fixed
    return [b"\0".join(parts) for parts in zip(fixed, *texts, strict=True)]


def _words(values: NDArray[Any]) -> NDArray[np.int64]:
    """Return numbers as int64: floats as their bits, float32 widened, which is exact."""
    if values.dtype.kind == "f":
        return values.astype(np.float64).view(np.int64)
    return values.astype(np.int64)


def _texts(column: Column) -> list[bytes]:
    """Return each text's or list's bytes, empty for null."""
    texts = (v.encode() if isinstance(v, str) else bytes(v) for v in column.values.tolist())
    return [text if ok else b"" for text, ok in zip(texts, column.mask().tolist(), strict=True)]
