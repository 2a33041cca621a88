"""Columns: the one in-memory and wire form of rows, a few typed numpy arrays side by side.

A log record, an ingest batch, a feature read and a prediction all carry `Columns`.  The byte form
(`encode_columns`) is described in docs/formats/columns.md; numbers travel as little-endian arrays
that decode without copying.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import msgpack
import numpy as np
from numpy.typing import NDArray

from mlpd.core.dtypes import DType
from mlpd.core.lists import unpack_list

__all__ = ["Column", "Columns", "DType", "concat", "decode_columns", "encode_columns", "height"]


@dataclass(frozen=True, slots=True)
class Column:
    """One column of `n` values.

    `values`: 1-d, C-contiguous, dtype `dtype.numpy`; where `valid` is False the value is zero or
    empty and means nothing.  `valid`: bool array of the same length, or None when all are valid.
    The values of lists and vectors are bytes, packed as `core.lists` says.
    """

    dtype: DType
    values: NDArray[Any]
    valid: NDArray[np.bool_] | None = None

    def __len__(self) -> int:
        return len(self.values)

    def mask(self) -> NDArray[np.bool_]:
        """Return validity as a bool array, never None."""
        return np.ones(len(self.values), np.bool_) if self.valid is None else self.valid

    def take(self, index: Any) -> "Column":
        """Return the rows that `index` (slice, integer or bool array) selects."""
        valid = None if self.valid is None else self.valid[index]
        return Column(self.dtype, self.values[index], valid)

    def to_list(self) -> list[Any]:
        """Return Python values, None where null; lists for lists and vectors."""
        values: list[Any] = self.values.tolist()
        if self.dtype.element is not None:
            known = zip(values, self.mask().tolist(), strict=True)
            return [unpack_list(self.dtype, v) if ok else None for v, ok in known]
        if self.valid is None:
            return values
        return [v if ok else None for v, ok in zip(values, self.valid.tolist(), strict=True)]


Columns = dict[str, Column]
"""Columns of equal length by name, in schema order."""


def concat(parts: Iterable[Column]) -> Column:
    """Return the columns of one dtype one after the other; at least one part."""
    columns = list(parts)
    values = np.concatenate([c.values for c in columns])
    if all(c.valid is None for c in columns):
        return Column(columns[0].dtype, values)
    return Column(columns[0].dtype, values, np.concatenate([c.mask() for c in columns]))


def height(columns: Mapping[str, Column]) -> int:
    """Return the common length, 0 for no columns."""
    for column in columns.values():
        return len(column)
    return 0


def encode_columns(columns: Mapping[str, Column]) -> bytes:
    """Return the byte form.  About 1 us per column and 0.1 us per string."""
    parts = [
        (name, str(c.dtype), _encode_valid(c.valid), _encode_values(c))
        for name, c in columns.items()
    ]
    packed: bytes = msgpack.packb([height(columns), parts], use_bin_type=True)
    return packed


def decode_columns(data: bytes | memoryview) -> Columns:
    """Return the columns that `encode_columns` wrote; the numeric arrays are read-only views."""
    n, parts = msgpack.unpackb(data, raw=False, use_list=False)
    return {
        name: Column(dtype, _decode_values(dtype, n, body), _decode_valid(n, valid))
        for name, dtype, valid, body in ((a, DType(b), c, d) for a, b, c, d in parts)
    }


def _encode_valid(valid: NDArray[np.bool_] | None) -> bytes | None:
    return None if valid is None or bool(valid.all()) else np.packbits(valid).tobytes()


def _decode_valid(n: int, data: bytes | None) -> NDArray[np.bool_] | None:
    if data is None:
        return None
    return np.unpackbits(np.frombuffer(data, np.uint8), count=n).view(np.bool_)


def _encode_values(column: Column) -> Any:
    if column.dtype is DType.BOOL:
        return np.packbits(column.values).tobytes()
    if column.dtype.is_numeric:
        return column.values.tobytes()
    return column.values.tolist()


def _decode_values(dtype: DType, n: int, body: Any) -> NDArray[Any]:
    if dtype is DType.BOOL:
        return np.unpackbits(np.frombuffer(body, np.uint8), count=n).view(np.bool_)
    if dtype.is_numeric:
        return np.frombuffer(body, dtype.numpy)
    values = np.empty(n, object)
    values[:] = body
    return values
