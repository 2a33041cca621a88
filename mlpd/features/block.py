"""Blocks: values of k features for n rows, as kernels write them and models read them."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mlpd.core.columns import Column, DType
from mlpd.core.kernels import address_of

_REALS = frozenset((DType.FLOAT32, DType.FLOAT64))
_VALUES: dict[DType, Callable[[NDArray[np.int64]], NDArray[Any]]] = {
    DType.BOOL: lambda words: words.astype(np.bool_),
    DType.INT64: lambda words: words,
    DType.TIMESTAMP: lambda words: words,
    DType.FLOAT32: lambda words: words.view(np.float64).astype(np.float32),
    DType.FLOAT64: lambda words: words.view(np.float64),
}


class Block(NamedTuple):
    """Values of k features for n rows; a feature is a row of the arrays.

    `words`: int64 [k, n], C-contiguous: an integer, 0 or 1, or the bits of a float64 (a float32
    widened), 0 where not valid.  `valid`: bool [k, n].  `state`: uint8 [l, n], the `Status` of the
    first l features, those of latest-value views.  `texts`: the values of a string or bytes
    feature by its row, object [n]; its words mean nothing.
    """

    words: NDArray[np.int64]
    valid: NDArray[np.bool_]
    state: NDArray[np.uint8]
    texts: dict[int, NDArray[Any]]

    @classmethod
    def empty(cls, k: int, n: int, *, with_state: int) -> "Block":
        """Return a block to be filled, the first `with_state` features with a status."""
        words, valid = np.empty((k, n), np.int64), np.empty((k, n), np.bool_)
        return cls(words, valid, np.empty((with_state, n), np.uint8), {})

    def part(self, rows: slice) -> "Block":
        """Return the features of `rows`, sharing memory; texts are its own, by row of the part."""
        return Block(self.words[rows], self.valid[rows], self.state[rows], {})

    def take(self, index: NDArray[np.int64]) -> "Block":
        """Return the rows that `index` selects, of all features."""
        return Block(
            self.words.take(index, axis=1),
            self.valid.take(index, axis=1),
            self.state.take(index, axis=1),
            {row: values[index] for row, values in self.texts.items()},
        )

    def fill(self, rows: slice, part: "Block") -> None:
        """Set the features of `rows` to those of another block."""
        self.words[rows], self.valid[rows], self.state[rows] = part.words, part.valid, part.state
        self.fill_texts(rows, part)

    def place(self, rows: slice, index: NDArray[np.int64], part: "Block") -> None:
        """Set the features of `rows`, in the columns at `index`, to those of a block of that many.

        `part` has all features, in the same rows.
        """
        self.words[rows, index] = part.words[rows]
        self.valid[rows, index] = part.valid[rows]
        self.state[rows, index] = part.state[rows]
        for row, texts in part.texts.items():
            if rows.start <= row < rows.stop:
                whole = self.texts.setdefault(row, np.empty(self.words.shape[1], object))
                whole[index] = texts

    def fill_texts(self, rows: slice, part: "Block") -> None:
        """Take over the texts of a part."""
        for row, texts in part.texts.items():
            self.texts[rows.start + row] = texts

    def put(self, row: int, column: Column) -> None:
        """Set a feature to a column of n values."""
        if not column.dtype.is_numeric:
            self.texts[row] = column.values
        elif column.dtype in _REALS:
            self.words[row].view(np.float64)[:] = column.values
        else:
            self.words[row] = column.values
        self.valid[row] = True if column.valid is None else column.valid

    def gather(self, row: int, column: Column, index: NDArray[np.int64]) -> None:
        """Set a feature to the values of a column at `index`, which is within its bounds."""
        words = self.words[row].view(np.float64) if column.dtype in _REALS else self.words[row]
        if column.values.dtype != words.dtype:
            self.put(row, column.take(index))
            return
        np.take(column.values, index, out=words, mode="clip")  # "raise" would copy
        self.valid[row] = True if column.valid is None else column.valid[index]

    def column(self, row: int, dtype: DType, *, whole: bool) -> Column:
        """Return a feature as a column, sharing memory; `whole`: all its values are valid."""
        text = self.texts.get(row)
        values = _VALUES[dtype](self.words[row]) if text is None else text
        return Column(dtype, values, None if whole else self.valid[row])


def words_of(*arrays: NDArray[Any]) -> list[int]:
    """Return what `Kernel.raw` takes for C-contiguous arrays: address and length of each."""
    words: list[int] = []
    for array in arrays:
        words += address_of(array), array.size
    return words
