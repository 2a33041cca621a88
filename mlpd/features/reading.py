"""Reading stored values: the tables of `read_kernel` for a set of views, and the call."""

import threading
from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mlpd.core.kernels import MEMORY, word_numbers
from mlpd.features.block import Block, words_of
from mlpd.features.read_kernel import FAULT_BITS
from mlpd.features.state_kernel import OK

Int64s = NDArray[np.int64]
Stored = Sequence[bytes | None]
_NOTHING = np.empty(0, np.int64)
_FAULT = (1 << FAULT_BITS) - 1


class Source(NamedTuple):
    """Features of one view, as `read_kernel` knows them: a part of its tables.

    `tables`: of a latest-value view its query, of a window view plan and query.  `features` of
    `width` columns; the others are the values of lists.  `fixed_words`: of a stored row of a
    latest-value view; `work_words`: of scratch for a window view.
    """

    kind: int
    tables: tuple[Int64s, ...]
    features: int
    width: int
    ttl_us: int = 0
    fixed_words: int = 0
    work_words: int = 0


class Place(NamedTuple):
    """Where a view's values come from, and where its features go.

    The `value`-th of the views of its `group`, of those with older tiles the `older`-th, else -1.
    `row`: of its first feature in the block; `extra_row`: of its lists' first value; `event_row`:
    of its event times.
    """

    group: int = 0
    value: int = 0
    older: int = -1
    row: int = 0
    extra_row: int = 0
    event_row: int = 0


class Scratch(threading.local):
    """Each thread's scratch words for the kernels, also seen as float64."""

    def __init__(self, words: int) -> None:
        self.work = np.zeros(words, np.int64)
        self.work_f = self.work.view(np.float64)


class _Room(threading.local):
    """Each thread's scratch for a reader: work, the cells of a row, which of them are there."""

    def __init__(self, words: int, width: int) -> None:
        self._arrays = work, cells, present = (
            np.zeros(words, np.int64),
            np.zeros(width, np.int64),
            np.zeros(width, np.uint8),
        )
        self.words = (
            *words_of(work, work),
            *words_of(cells, cells),
            *words_of(present),
        )


class ViewReader:
    """Reads the features of some views at once; immutable, any thread."""

    def __init__(self, kernel: Any, parts: Sequence[tuple[Source, Place]]) -> None:
        """`kernel`: the native entry `read_views`."""
        self._kernel = kernel
        table: list[int] = []
        tables: list[Int64s] = [np.empty(0, np.int64)]
        end = 0
        for source, place in parts:
            group, value, older, row, extra_row, event_row = place
            table += [source.kind, group, value, older, row, extra_row]
            table += [source.features, source.width]
            for words in source.tables:
                table += [end, end := end + len(words)]
                tables.append(words)
            table += [0, 0] * (2 - len(source.tables))
            table += [source.ttl_us, event_row, source.fixed_words]
        self._arrays = np.array(table, np.int64), np.concatenate(tables)
        self._words = words_of(*self._arrays)
        widths, works = (
            max((getattr(source, name) for source, _ in parts), default=0)
            for name in ("width", "work_words")
        )
        self._room = _Room(works, widths)

    def read(
        self,
        groups: Sequence[int],
        codes: NDArray[np.int64],
        stored: Stored,
        t_us: Int64s,
        block: Block,
        *,
        extra: Int64s = _NOTHING,
        event_us: Int64s = _NOTHING,
        keep_stale: bool = False,
    ) -> tuple[int, int] | None:
        """Fill a block with the features of n rows; return None, or a part's number and its fault.

        `groups`: per key the number of its first value in `stored`, of its entities, and of its
        first older value; values of a view lie side by side.  `codes`: int64 [keys, n], entities
        numbered in the order of first use, -1 for none.  `t_us`: one moment, or int64 [n].
        `extra`: for the values of lists, int64 [e, n].  `event_us`: int64 [views, n].
        """
        firsts, lasts = _places(stored)
        first_rows = np.empty(codes.shape[-1], np.int64)
        keys = np.array(groups, np.int64)
        result = self._kernel.raw(
            *self._words, *words_of(keys, codes), *MEMORY, *words_of(firsts, lasts, t_us),
            keep_stale, *words_of(first_rows), *self._room.words,
            *words_of(block.words, extra, block.valid, block.state, event_us),
        )  # fmt: skip
        return None if result == OK else (result >> FAULT_BITS, -(result & _FAULT))


def _places(values: Stored) -> tuple[Int64s, Int64s]:
    """Return where values begin and end, in words of memory: they are read where they lie."""
    firsts = word_numbers(values)
    sizes = (0 if value is None else len(value) >> 3 for value in values)
    return firsts, firsts + np.fromiter(sizes, np.int64, len(values))


def join_values(values: Stored) -> tuple[Int64s, Int64s]:
    """Return (words of all values, where each starts and, last, the end)."""
    parts = [value or b"" for value in values]
    joined = np.frombuffer(b"".join(parts), np.int64)
    ends = accumulate((len(part) >> 3 for part in parts), initial=0)
    return joined, np.fromiter(ends, np.int64, len(parts) + 1)
