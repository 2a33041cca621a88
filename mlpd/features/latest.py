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

from mlpd.core.columns import Column, Columns, DType
from mlpd.core.convert import column_of
from mlpd.core.kernels import load_kernels
from mlpd.core.specs import ViewSpec
from mlpd.features.block import Block, words_of
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

_NULLS_WORD = 4  # the fixed section is whole words of 8 bytes: four of stamps, the nulls' bitmap
_PRESENT, _MISSING, _STALE = map(int, (Status.PRESENT, Status.MISSING, Status.STALE))

KERNELS = "mlpd.features.latest_kernel"
NEVER_US = 2**63 - 1
"""A ttl that no age exceeds."""

Stamp = tuple[int, int, int]
"""(event_time_us, known_time_us, sequence) of a row: what the winner rule compares."""


class LatestQuery:
    """Features of a view, resolved: the kernels' tables, and the text features.

    `cells`: places in a row, defaults, which have one.  `texts`: (feature, type, default or empty).
    """

    def __init__(self, places: list[int], defaults: Block, dtypes: Sequence[DType]) -> None:
        self.places = np.array(places, np.int64)
        self.defaults = defaults
        self.words = words_of(defaults.words, defaults.valid)
        self.texts = [(row, dtypes[row], text[0]) for row, text in defaults.texts.items()]


class LatestPlan:
    """Reads and writes the rows of one latest-value view; immutable, any thread."""

    def __init__(self, view: ViewSpec) -> None:
        self._view = view
        self._ttl_us = NEVER_US if view.ttl_us is None else view.ttl_us
        self._kernels = load_kernels(KERNELS)
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

    def fault(self, value: bytes) -> str:
        """Return why a row can't be one of this view, empty if it can; for fsck, about 10 us."""
        if len(value) < self._layout.itemsize:
            return f"it has {len(value)} bytes, the fixed section takes {self._layout.itemsize}"
        row = np.frombuffer(value, self._layout, 1)[0]
        if (int(row["version"]), int(row["flags"])) != (_LAYOUT_VERSION, 0):
            return f"its layout is {row['version']} with flags {row['flags']}"
        if row["event_us"] > row["known_us"] or row["sequence"] < 1:
            return "its times or its sequence are out of order"
        return self._text_fault(value, row)

    def _text_fault(self, value: bytes, row: Any) -> str:
        """Texts lie one after the other, in the order of the view, up to the end."""
        start = end = self._layout.itemsize
        for name, dtype in self._view.features.items():
            if dtype.is_numeric:
                continue
            offset, length = divmod(int(row[name]), 1 << 32)
            if offset != end - start:
                return f"the text of {name!r} is out of place"
            if dtype is DType.STRING and not _is_utf8(value[end : end + length]):
                return f"the text of {name!r} is not UTF-8"
            end += length
        return "" if end == len(value) else f"it has {len(value)} bytes, its texts end at {end}"

    def read(
        self,
        values: Sequence[bytes | None],
        t_us: int,
        query: LatestQuery,
        block: Block,
        *,
        keep_stale: bool = False,
    ) -> NDArray[np.int64]:
        """Fill `block` with features of one row per value as of `t_us`; return the event times.

        An event time is 0 where there is no row.  `keep_stale`: a value older than the ttl stays
        what it is, with the status STALE.
        """
        size = self._layout.itemsize
        blank = bytes(size)
        fixed = b"".join([blank if v is None else v[:size] for v in values])
        rows, event_us = np.frombuffer(fixed, np.int64), np.empty(len(values), np.int64)
        self._kernels.read_rows.raw(
            *words_of(rows, query.places), *query.words, t_us,
            NEVER_US if keep_stale else self._ttl_us,
            *words_of(block.words, block.valid, block.state, event_us),
        )  # fmt: skip
        for row, dtype, _ in query.texts:
            block.texts[row] = self._texts(dtype, block.words[row].tolist(), values)
        _settle_texts(query, block)
        if keep_stale:
            self._mark_stale(block, t_us - event_us)
        return event_us

    def settle(
        self,
        query: LatestQuery,
        block: Block,
        missing: NDArray[np.bool_],
        age_us: NDArray[np.int64],
        *,
        keep_stale: bool = False,
    ) -> None:
        """Give a block with values and validity its statuses, as `read` does.

        `missing` [n]: whether there is no row; `age_us` [n] is that of the others.
        """
        self._kernels.settle_rows.raw(
            *words_of(missing, age_us), *query.words,
            NEVER_US if keep_stale else self._ttl_us,
            *words_of(block.words, block.valid, block.state),
        )  # fmt: skip
        _settle_texts(query, block)
        if keep_stale:
            self._mark_stale(block, age_us)

    def _mark_stale(self, block: Block, age_us: NDArray[np.int64]) -> None:
        """Give cells that were settled without a ttl the status STALE, their values as they are."""
        there = block.state != _MISSING
        block.state[there & (age_us > self._ttl_us)] = _STALE

    def query(self, features: tuple[str, ...]) -> LatestQuery:
        """Return what reads of `features` need to know; once, per layout of a frame."""
        dtypes = [self._view.features[name] for name in features]
        defaults = Block.empty(len(features), 1, with_state=0)
        defaults.words[:] = 0  # those of texts are places, too
        for row, (name, dtype) in enumerate(zip(features, dtypes, strict=True)):
            defaults.put(row, column_of(dtype, [self._view.defaults.get(name)]))
        first = self._layout.itemsize // 8 - len(self._names)
        places: list[int] = []
        for index in map(self._names.index, features):
            places += [first + index, _NULLS_WORD + index // 64, index % 64]
        return LatestQuery(places, defaults, dtypes)

    def _texts(
        self, dtype: DType, places: list[int], values: Sequence[bytes | None]
    ) -> NDArray[Any]:
        """Return the texts at `places` (offset << 32 | length) of the rows' variable sections."""
        texts = np.empty(len(values), object)
        for i, (place, value) in enumerate(zip(places, values, strict=True)):
            start = self._layout.itemsize + (place >> 32)
            raw = b"" if value is None else value[start : start + (place & 0xFFFFFFFF)]
            texts[i] = raw.decode() if dtype is DType.STRING else raw
        return texts

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


def _settle_texts(query: LatestQuery, block: Block) -> None:
    for row, _, default in query.texts:
        block.texts[row][block.state[row] != _PRESENT] = default


def _is_utf8(raw: bytes) -> bool:
    try:
        raw.decode()
    except UnicodeDecodeError:
        return False
    return True


def stamp_of(value: bytes) -> Stamp:
    """Return (event_time, known_time, sequence) of an encoded row."""
    _, _, event_us, known_us, sequence = _STAMP.unpack_from(value)
    return event_us, known_us, sequence


def empty_column(dtype: DType, n: int) -> Column:
    """Return a column of `n` nulls."""
    values = np.full(n, _zero(dtype), dtype.numpy)
    return Column(dtype, values, np.zeros(n, np.bool_))


def _zero(dtype: DType) -> Any:
    return {DType.STRING: "", DType.BYTES: b""}.get(dtype, 0)


def _append_text(tails: list[bytes], column: Column) -> list[int]:
    places = []
    for i, text in enumerate(column.values.tolist()):
        raw = text.encode() if isinstance(text, str) else text
        places.append(len(tails[i]) << 32 | len(raw))
        tails[i] += raw
    return places
