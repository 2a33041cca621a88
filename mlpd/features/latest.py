"""Latest-value views: the row codec, the winner rule and statuses; docs/formats/rows.md.

The newest event of an entity wins: the largest (event_time, known_time, sequence).  An older event
that arrives late changes nothing.  A tombstone is an event like others; its row reads as none.  All
rows of a view share one fixed-width layout, so that a batch of them decodes into columns with one
numpy call.
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlpd.core.columns import Column, Columns, DType
from mlpd.core.convert import column_of
from mlpd.core.errors import InternalError
from mlpd.core.lists import list_fault
from mlpd.core.specs import ViewSpec
from mlpd.features.block import Block, words_of
from mlpd.features.kernels import FeatureKernels
from mlpd.features.latest_kernel import ELSEWHERE, FEATURE_WIDTH, TOMBSTONE
from mlpd.features.read_kernel import LATEST
from mlpd.features.reading import Place, Source, ViewReader
from mlpd.features.stamps import Stamps
from mlpd.features.tombstones import deleted_rows

_STAMP = struct.Struct("<IIqqq")  # layout version, flags, event_time, known_time, sequence
_LAYOUT_VERSION = 1
_FIXED: dict[DType, str] = {
    DType.BOOL: "<i8",
    DType.INT64: "<i8",
    DType.TIMESTAMP: "<i8",
    DType.FLOAT32: "<f8",
    DType.FLOAT64: "<f8",
}
_PLACE = "<u8"
"""Of texts and lists: offset << 32 | length, into the variable section."""

_NULLS_WORD = 4  # the fixed section is whole words of 8 bytes: four of stamps, the nulls' bitmap
NEVER_US = 2**63 - 1
"""A ttl that no age exceeds."""

Stamp = tuple[int, int, int]
"""(event_time_us, known_time_us, sequence) of a row: what the winner rule compares."""


@dataclass(frozen=True, slots=True)
class LatestQuery:
    """Features of a view, resolved: the kernels' table as a source, and the text features.

    `texts`: (feature, type, default or empty).  `words`: the table's address and length.
    """

    source: Source
    texts: tuple[tuple[int, DType, Any], ...]
    words: list[int]


class LatestPlan:
    """Reads and writes the rows of one latest-value view; immutable, any thread."""

    def __init__(self, view: ViewSpec, kernels: FeatureKernels) -> None:
        self._view = view
        self._ttl_us = NEVER_US if view.ttl_us is None else view.ttl_us
        self._kernels = kernels
        self.has_texts = any(not dtype.is_numeric for dtype in view.features.values())
        self._names = list(view.features)
        bitmap_bytes = -(-len(self._names) // 64) * 8
        features = [(name, _FIXED.get(dtype, _PLACE)) for name, dtype in view.features.items()]
        self._layout = np.dtype(
            [
                ("version", "<u4"),
                ("flags", "<u4"),
                ("event_us", "<i8"),
                ("known_us", "<i8"),
                ("sequence", "<i8"),
                ("nulls", "u1", (bitmap_bytes,)),
                ("features", features),  # apart: one may be called `flags`
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
        if int(row["version"]) != _LAYOUT_VERSION or int(row["flags"]) not in (0, TOMBSTONE):
            return f"its layout is {row['version']} with flags {row['flags']}"
        if row["event_us"] > row["known_us"] or row["sequence"] < 1:
            return "its times or its sequence are out of order"
        return self._text_fault(value, row)

    def _text_fault(self, value: bytes, row: Any) -> str:
        """Texts and lists lie one after the other, in the order of the view, up to the end."""
        start = end = self._layout.itemsize
        for i, (name, dtype) in enumerate(self._view.features.items()):
            if dtype.is_numeric:
                continue
            offset, length = divmod(int(row["features"][name]), 1 << 32)
            if offset != end - start:
                return f"the text of {name!r} is out of place"
            raw = value[end : end + length]
            if dtype is DType.STRING and not _is_utf8(raw):
                return f"the text of {name!r} is not UTF-8"
            is_null = row["nulls"][i // 8] >> (i % 8) & 1
            if dtype.element is not None and not is_null and (fault := list_fault(dtype, raw)):
                return f"the list of {name!r} can't be read: {fault}"
            end += length
        return "" if end == len(value) else f"it has {len(value)} bytes, its texts end at {end}"

    def read(
        self, values: Sequence[bytes | None], t_us: int, features: tuple[str, ...]
    ) -> tuple[Block, NDArray[np.int64]]:
        """Return the features of one row per value as of `t_us`, and the event times.

        An event time is 0 where there is no row, or a tombstone.
        """
        query, n = self.query(features), len(values)
        block, event_us = Block.empty(len(features), n, with_state=len(features)), np.empty(n, int)
        reader = ViewReader(self._kernels.read_views, [(query.source, Place())])
        fault = reader.read(
            [0, n, n],
            np.arange(n),
            self.fixed(values),
            np.array([t_us]),
            block,
            event_us=event_us,
        )
        if fault is not None:
            raise self.failure(fault[1])
        self.take_texts(query, values, block)
        return block, event_us

    def failure(self, fault: int) -> InternalError:
        """Return the error for a fault of the kernel that reads."""
        return InternalError(
            f"view {self._view.name!r}: a stored row is damaged (fault {fault})", code="row_damaged"
        )

    def fixed(self, values: Sequence[bytes | None]) -> Sequence[bytes | None]:
        """Return the rows' fixed sections, which are whole words; all of a row without texts."""
        if not self.has_texts:
            return values
        size = self._layout.itemsize
        return [None if value is None else value[:size] for value in values]

    def take_texts(self, query: LatestQuery, values: Sequence[bytes | None], block: Block) -> None:
        """Set the texts of a block whose words say where they are; one value per row."""
        for row, dtype, default in query.texts:
            block.texts[row] = self._texts(dtype, block.words[row].tolist(), values, default)

    def settle(
        self,
        query: LatestQuery,
        block: Block,
        missing: NDArray[np.bool_],
        age_us: NDArray[np.int64],
        *,
        keep_stale: bool = False,
    ) -> None:
        """Give a block with values and validity its statuses, as an online read does.

        `missing` [n]: whether there is no row; `age_us` [n] is that of the others.
        """
        for row, *_ in query.texts:
            block.words[row] = 0
        self._kernels.settle_rows.raw(
            *query.words, *words_of(missing, age_us), self._ttl_us, keep_stale,
            *words_of(block.words, block.valid, block.state),
        )  # fmt: skip
        for row, _, default in query.texts:
            block.texts[row][block.words[row] == ELSEWHERE] = default

    def query(self, features: tuple[str, ...]) -> LatestQuery:
        """Return what reads of `features` need to know; once, per layout of a frame."""
        dtypes = [self._view.features[name] for name in features]
        defaults = Block.empty(len(features), 1, with_state=0)
        for row, (name, dtype) in enumerate(zip(features, dtypes, strict=True)):
            defaults.put(row, column_of(dtype, [self._view.defaults.get(name)]))
            if not dtype.is_numeric:
                defaults.words[row] = ELSEWHERE
        first = self._layout.itemsize // 8 - len(self._names)
        words = np.empty((len(features), FEATURE_WIDTH), np.int64)
        for row, index in enumerate(map(self._names.index, features)):
            words[row, :3] = first + index, _NULLS_WORD + index // 64, index % 64
        words[:, 3], words[:, 4] = defaults.words[:, 0], defaults.valid[:, 0]
        table = words.reshape(-1)
        source = Source(
            LATEST,
            (table,),
            len(features),
            len(features),
            ttl_us=self._ttl_us,
            fixed_words=self._layout.itemsize // 8,
        )
        texts = ((row, dtypes[row], text[0]) for row, text in defaults.texts.items())
        return LatestQuery(source, tuple(texts), words_of(table))

    def _texts(
        self, dtype: DType, places: list[int], values: Sequence[bytes | None], default: Any
    ) -> NDArray[Any]:
        """Return the texts at `places` (offset << 32 | length) of the rows' variable sections."""
        texts = np.empty(len(values), object)
        for i, (place, value) in enumerate(zip(places, values, strict=True)):
            if place == ELSEWHERE or value is None:
                texts[i] = default
                continue
            start = self._layout.itemsize + (place >> 32)
            raw = value[start : start + (place & 0xFFFFFFFF)]
            texts[i] = raw.decode() if dtype is DType.STRING else raw
        return texts

    def _encode(self, index: NDArray[np.int64], stamps: Stamps, columns: Columns) -> list[bytes]:
        rows = np.zeros(len(index), self._layout)
        rows["version"] = _LAYOUT_VERSION
        rows["event_us"], rows["known_us"], rows["sequence"] = stamps
        deleted = deleted_rows(columns)
        gone = None if deleted is None else deleted[index]
        if gone is not None:
            rows["flags"] = np.where(gone, TOMBSTONE, 0)
        tails = [b""] * len(index)
        features = rows["features"]
        for position, (name, dtype) in enumerate(self._view.features.items()):
            column = columns[name].take(index)
            if gone is not None:
                column = _blank(column, gone)
            null = ~column.mask()
            rows["nulls"][:, position // 8] |= null.astype(np.uint8) << np.uint8(position % 8)
            if dtype.is_numeric:
                features[name] = column.values
            else:
                features[name] = _append_text(tails, column)
        return [rows[i].tobytes() + tail for i, tail in enumerate(tails)]


def _blank(column: Column, gone: NDArray[np.bool_]) -> Column:
    """Return the column with null where `gone`."""
    values = column.values.copy()
    values[gone] = _zero(column.dtype)
    return Column(column.dtype, values, column.mask() & ~gone)


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
    if dtype.is_numeric:
        return 0
    return "" if dtype is DType.STRING else b""


def _append_text(tails: list[bytes], column: Column) -> list[int]:
    places = []
    for i, text in enumerate(column.values.tolist()):
        raw = text.encode() if isinstance(text, str) else text
        places.append(len(tails[i]) << 32 | len(raw))
        tails[i] += raw
    return places
