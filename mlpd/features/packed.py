"""Blocks to msgpack, as answers carry them: the bytes that the lists of `ListPlan` pack to."""

from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

import msgpack
import numpy as np
from numpy.typing import NDArray

from mlpd.core.columns import Column, DType
from mlpd.features.block import Block, words_of
from mlpd.features.pack_kernel import (
    ELSEWHERE,
    FLAG,
    HEAD_BYTES_MAX,
    INTEGER,
    REAL,
    VALUE_BYTES_MAX,
)

_KINDS: Final[Mapping[DType, int]] = {
    DType.FLOAT32: REAL,
    DType.FLOAT64: REAL,
    DType.INT64: INTEGER,
    DType.TIMESTAMP: INTEGER,
    DType.BOOL: FLAG,
}


class Packed(NamedTuple):
    """A frame's values and statuses by feature: two maps of msgpack."""

    values: bytes
    statuses: bytes


class PackPlan:
    """Where the features of a vector are in blocks; made once per layout, immutable, any thread.

    `vector`: the row of each feature in order.  `dtypes`: of all rows of a block.  `kernel`: the
    native entry `pack_features`.
    """

    def __init__(self, vector: Mapping[str, int], dtypes: Sequence[DType], kernel: Any) -> None:
        self._kernel = kernel
        names = [msgpack.packb(name) for name in vector]
        rows = [*vector.values()]
        kinds = [_KINDS.get(dtypes[row], ELSEWHERE) for row in rows]
        self._arrays = (
            np.array(rows, np.int64),
            np.array(kinds, np.int64),
            np.frombuffer(b"".join(names), np.uint8),
            np.cumsum([len(name) for name in names], dtype=np.int64),
        )
        self._words = words_of(*self._arrays)
        self._features = len(rows)
        self._fixed_bytes = 2 * (HEAD_BYTES_MAX * (1 + len(rows)) + sum(map(len, names)))
        places = enumerate(zip(kinds, rows, strict=True))
        self._elsewhere = [(i, row, dtypes[row]) for i, (k, row) in places if k == ELSEWHERE]

    def pack(self, block: Block, status: NDArray[np.uint8], start: int, stop: int) -> Packed:
        """Return values and statuses of the rows from `start` up to `stop`.

        `status`: of the whole block, uint8 [k, n].  About 10 us, 8 ns per value, and for texts and
        lists what msgpack-python takes.
        """
        n = stop - start
        size = self._fixed_bytes + self._features * n * (VALUE_BYTES_MAX + 1)
        out, cuts = np.empty(size, np.uint8), np.empty(self._features + 1, np.int64)
        end = self._kernel.raw(
            *self._words, *words_of(block.words, block.valid, status),
            block.words.shape[1], start, stop, *words_of(out, cuts),
        )  # fmt: skip
        found, middle = out[:end].tobytes(), int(cuts[-1])
        if not self._elsewhere:
            return Packed(found[:middle], found[middle:])
        parts: list[bytes] = []
        end = 0
        for feature, row, dtype in self._elsewhere:
            texts, valid = block.texts[row][start:stop], block.valid[row, start:stop]
            parts += (
                found[end : cuts[feature]],
                msgpack.packb(Column(dtype, texts, valid).to_list()),
            )
            end = int(cuts[feature])
        return Packed(b"".join((*parts, found[end:middle])), found[middle:])
