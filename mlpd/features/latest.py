"""Latest-value views: the row codec, the winner rule and statuses; docs/formats/rows.md.

The newest event of an entity wins: the largest (event_time, known_time, sequence).  An older event
that arrives late changes nothing.  All rows of a view share one fixed-width layout, so that a batch
of them decodes into columns with one numpy call.
"""

import struct
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlpd.core.columns import Column, Columns, DType, concat
from mlpd.core.specs import ViewSpec
from mlpd.features.stamps import Stamps
from mlpd.features.status import Status

_STAMP = struct.Struct("<IIqqq")  # layout version, flags, event_time, known_time, sequence
_LAYOUT_VERSION = 1
_FIXED: dict[DType, str] = {
    DType.BOOL: "<i8",
    DType.INT64: "<i8",
    DType.TIMESTAMP: "<i8",
    DType.FLOAT32: "<f8",
    DType.FLOAT64: "<f8",
    DType.STRING: "<u8",  # offset << 32 | length, into the variable section
    DType.BYTES: "<u8",
}

Stamp = tuple[int, int, int]
"""(event_time_us, known_time_us, sequence) of a row: what the winner rule compares."""


class LatestPlan:
    """Reads and writes the rows of one latest-value view; immutable, any thread."""

    def __init__(self, view: ViewSpec) -> None:
        self._view = view
        self._names = list(view.features)
        bitmap_bytes = -(-len(self._names) // 64) * 8
        self._layout = np.dtype(
            [
                ("version", "<u4"),
                ("flags", "<u4"),
                ("event_us", "<i8"),
                ("known_us", "<i8"),
                ("sequence", "<i8"),
                ("nulls", "u1", (bitmap_bytes,)),
                *((name, _FIXED[dtype]) for name, dtype in view.features.items()),
            ]
        )

    def update(
        self,
        values: Sequence[bytes | None],
        entity_of_row: NDArray[np.int64],
        stamps: Stamps,
        columns: Columns,
    ) -> list[bytes | None]:
        """Return the new row of each entity, None where nothing changes.

        `values`: current rows.  `entity_of_row`: index into them per batch row.  `stamps`: of
        the batch rows.
        """
        # The last of each entity after sorting by (entity, stamp) is the batch's winner.
        order = np.lexsort((stamps.sequences, stamps.known_us, stamps.event_us, entity_of_row))
        entities = entity_of_row[order]
        last = np.append(entities[1:] != entities[:-1], np.True_)[: len(entities)]
        winners = order[last]
        stamps = stamps.take(winners)
        encoded = self._encode(winners, stamps, columns)
        stamp_rows = [s.tolist() for s in stamps]
        result: list[bytes | None] = [None] * len(values)
        for entity, row, *stamp in zip(entities[last].tolist(), encoded, *stamp_rows, strict=True):
            current = values[entity]
            if current is None or tuple(stamp) > stamp_of(current):
                result[entity] = row
        return result

    def read(
        self, values: Sequence[bytes | None], t_us: NDArray[np.int64], features: Sequence[str]
    ) -> tuple[Columns, dict[str, NDArray[np.uint8]], NDArray[np.int64]]:
        """Return (columns, statuses, event times) of one row per value, as of `t_us` [n].

        Where the status is not PRESENT the value is null, or the feature's default.  The event time
        is 0 where there is no row.
        """
        found = np.array([v is not None for v in values], np.bool_)
        blank = bytes(self._layout.itemsize)
        size = self._layout.itemsize
        fixed = b"".join([blank if v is None else v[:size] for v in values])
        rows = np.frombuffer(fixed, self._layout)
        columns: Columns = {}
        statuses: dict[str, NDArray[np.uint8]] = {}
        state = self._row_status(found, t_us - rows["event_us"])
        for name in features:
            index = self._names.index(name)
            null = (rows["nulls"][:, index // 8] >> (index % 8)) & 1
            statuses[name] = np.where((state == 0) & (null == 1), Status.NULL, state)
            columns[name] = self._column(name, rows, values, statuses[name])
        return columns, statuses, rows["event_us"]

    def _row_status(self, found: NDArray[np.bool_], age_us: NDArray[np.int64]) -> NDArray[np.uint8]:
        status = np.where(found, np.uint8(Status.PRESENT), np.uint8(Status.MISSING))
        if self._view.ttl_us is not None:
            status[found & (age_us > self._view.ttl_us)] = Status.STALE
        return status

    def _column(
        self,
        name: str,
        rows: NDArray[Any],
        values: Sequence[bytes | None],
        status: NDArray[np.uint8],
    ) -> Column:
        dtype = self._view.features[name]
        present = status == Status.PRESENT
        if dtype.is_numeric:
            column = Column(dtype, np.ascontiguousarray(rows[name].astype(dtype.numpy)))
        else:
            column = self._text(dtype, rows[name].tolist(), values, present)
        return with_default(column, present, self._view.defaults.get(name))

    def _text(
        self,
        dtype: DType,
        places: list[int],
        values: Sequence[bytes | None],
        present: NDArray[np.bool_],
    ) -> Column:
        texts = np.empty(len(values), object)
        empty: Any = "" if dtype is DType.STRING else b""
        for i, (place, value, wanted) in enumerate(
            zip(places, values, present.tolist(), strict=True)
        ):
            if value is None or not wanted:
                texts[i] = empty
                continue
            start = self._layout.itemsize + (place >> 32)
            raw = value[start : start + (place & 0xFFFFFFFF)]
            texts[i] = raw.decode() if dtype is DType.STRING else raw
        return Column(dtype, texts)

    def _encode(self, index: NDArray[np.int64], stamps: Stamps, columns: Columns) -> list[bytes]:
        rows = np.zeros(len(index), self._layout)
        rows["version"] = _LAYOUT_VERSION
        rows["event_us"], rows["known_us"], rows["sequence"] = stamps
        tails = [b""] * len(index)
        for position, (name, dtype) in enumerate(self._view.features.items()):
            column = columns[name].take(index)
            null = ~column.mask()
            rows["nulls"][:, position // 8] |= null.astype(np.uint8) << np.uint8(position % 8)
            if dtype.is_numeric:
                rows[name] = column.values
            else:
                rows[name] = _append_text(tails, column)
        return [rows[i].tobytes() + tail for i, tail in enumerate(tails)]


def stamp_of(value: bytes) -> Stamp:
    """Return (event_time, known_time, sequence) of an encoded row."""
    _, _, event_us, known_us, sequence = _STAMP.unpack_from(value)
    return event_us, known_us, sequence


def with_default(column: Column, present: NDArray[np.bool_], default: Any) -> Column:
    """Return `column` with null, or `default` when there is one, wherever not `present`."""
    if bool(present.all()):
        return column
    values = column.values.copy()
    if default is not None:
        values[~present] = default
        return Column(column.dtype, values)
    values[~present] = _zero(column.dtype)
    return Column(column.dtype, values, present)


def empty_column(dtype: DType, n: int) -> Column:
    """Return a column of `n` nulls."""
    values = np.full(n, _zero(dtype), dtype.numpy)
    return Column(dtype, values, np.zeros(n, np.bool_))


def stack(parts: Sequence[Columns]) -> Columns:
    """Return batches of the same columns one after the other."""
    return {name: concat(part[name] for part in parts) for name in parts[0]}


def _zero(dtype: DType) -> Any:
    return {DType.STRING: "", DType.BYTES: b""}.get(dtype, 0)


def _append_text(tails: list[bytes], column: Column) -> list[int]:
    places = []
    for i, text in enumerate(column.values.tolist()):
        raw = text.encode() if isinstance(text, str) else text
        places.append(len(tails[i]) << 32 | len(raw))
        tails[i] += raw
    return places
