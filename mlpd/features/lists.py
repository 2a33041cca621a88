"""Blocks to Python lists, as answers carry them: all features of one kind of number at once."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlpd.core.columns import Column, DType
from mlpd.features.block import Block

_Read = Callable[[NDArray[np.int64]], NDArray[Any]]

_NUMBERS: tuple[tuple[tuple[DType, ...], _Read], ...] = (
    ((DType.FLOAT32, DType.FLOAT64), lambda words: words.view(np.float64)),
    ((DType.INT64, DType.TIMESTAMP), lambda words: words),
    ((DType.BOOL,), lambda words: words.astype(np.bool_)),
)


class ListPlan:
    """Where the features of a vector are in blocks; made once per layout, immutable.

    `vector`: the row of each feature in order.  `dtypes`: of all rows of a block.
    """

    def __init__(self, vector: Mapping[str, int], dtypes: Sequence[DType]) -> None:
        self._names = tuple(vector)
        self._rows = np.array([*vector.values()], np.int64)
        places = list(enumerate(vector.values()))
        self._numbers: list[tuple[list[int], NDArray[np.int64], _Read]] = []
        for kinds, read in _NUMBERS:
            mine = [place for place in places if dtypes[place[1]] in kinds]
            if mine:
                rows = np.array([row for _, row in mine], np.int64)
                self._numbers.append(([place for place, _ in mine], rows, read))
        self._objects = [(p, row, dtypes[row]) for p, row in places if not dtypes[row].is_numeric]

    def values(self, block: Block) -> dict[str, list[Any]]:
        """Return the values by feature, None where null.

        About 20 us for one row of 40 features, and 40 ns for each further value.
        """
        found: list[list[Any]] = [[]] * len(self._names)
        for places, rows, read in self._numbers:
            for place, values in zip(places, read(block.words[rows]).tolist(), strict=True):
                found[place] = values
        for place, row, dtype in self._objects:
            found[place] = Column(dtype, block.texts[row], block.valid[row]).to_list()
        nulls = np.nonzero(~block.valid[self._rows])
        for place, i in zip(*(index.tolist() for index in nulls), strict=True):
            found[place][i] = None
        return dict(zip(self._names, found, strict=True))

    def statuses(self, status: NDArray[np.uint8]) -> dict[str, list[int]]:
        """Return the statuses by feature; `status`: of all rows of the block, uint8 [k, n]."""
        return dict(zip(self._names, status[self._rows].tolist(), strict=True))
