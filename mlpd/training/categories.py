"""Sets of categories as columns of small numbers, which onnxruntime tests with one mask.

A categorical split asks whether a category is in a set.  onnxruntime looks large sets up in a hash
table per split, of which a row visits hundreds, each with cold caches.  Here the sets of a feature
are packed into columns instead: a column cuts the categories into at most `CLASSES_MAX` classes,
so that each of its sets is a union of some, and a table holds every category's class.  A row
looks its categories up once; what a split tests then is a class.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from mlpd.training.trees import Tree

if TYPE_CHECKING:
    from onnx import NodeProto, TensorProto

CLASSES_MAX = 30
"""onnxruntime turns a set of numbers from 1 to 30 into the bits of one mask."""
BLOCK = 32
"""Columns that lie in a row of the table: 16 to 64 are as quick, more would stay empty."""
COLUMNS_MAX = 1_024
"""Of all features: each takes 8 bytes per row while a batch is scored."""
TABLE_BYTES_MAX = 16 * 1024**2

Sets = Mapping[bytes, int]
"""Distinct sets of one feature: their int32 members as bytes, and as the bits of a number."""


@dataclass(frozen=True, slots=True)
class Columns:
    """Columns behind the `width` features of a vector.

    `places`: by feature and members (bytes of int32, ascending), the column that tests the set and
    the ascending classes that it consists of.  `features`, `sizes`, `first_rows` are per block of
    `BLOCK` columns: the feature that it is of, the number of its categories, and where in `table`
    (float64 [rows, BLOCK]) its rows begin: one for negative numbers, one per category, one for all
    others.  Class 0 is in none of a column's sets.
    """

    width: int
    places: Mapping[tuple[int, bytes], tuple[int, NDArray[np.float64]]]
    features: Sequence[int]
    sizes: Sequence[int]
    first_rows: Sequence[int]
    table: NDArray[np.float64]

    def nodes(self, source: str, read: str, target: str) -> "list[NodeProto]":
        """Return the nodes that put the columns of `source`'s categories behind `read`.

        A value counts as LightGBM takes it, truncated towards 0: -0.5 is category 0.
        """
        from onnx import TensorProto, helper  # noqa: PLC0415

        node = helper.make_node
        return [
            node("Gather", [source, "block_features"], ["values"], axis=1),
            node("Less", ["values", "block_sizes"], ["is_below"]),  # NaN is not
            node("Where", ["is_below", "values", "block_sizes"], ["bounded"]),
            node("Max", ["bounded", "negative"], ["bounded_below"]),
            node("Cast", ["bounded_below"], ["categories"], to=TensorProto.INT64),
            node("Add", ["categories", "block_rows"], ["rows"]),
            node("Gather", ["class_table", "rows"], ["blocks"], axis=0),
            node("Reshape", ["blocks", "flat"], ["classes"]),
            node("Concat", [read, "classes"], [target], axis=1),
        ]

    def constants(self) -> "list[TensorProto]":
        """Return what the nodes refer to."""
        from onnx.numpy_helper import from_array  # noqa: PLC0415

        return [
            from_array(np.array(self.features, np.int64), "block_features"),
            from_array(np.array(self.sizes, np.float64), "block_sizes"),
            from_array(np.array(-1.0), "negative"),
            from_array(np.array(self.first_rows, np.int64) + 1, "block_rows"),
            from_array(self.table, "class_table"),
            from_array(np.array([-1, len(self.features) * BLOCK], np.int64), "flat"),
        ]


def build_columns(trees: Iterable[Tree], width: int) -> Columns | None:
    """Return columns for the categorical splits of `trees` over `width` features, if there are any.

    A feature whose columns would go beyond `COLUMNS_MAX` or `TABLE_BYTES_MAX` has none, and no
    places.  Costs about 0.1 s for 5,000 splits.
    """
    places: dict[tuple[int, bytes], tuple[int, NDArray[np.float64]]] = {}
    features: list[int] = []
    sizes: list[int] = []
    tables: list[NDArray[np.float64]] = []
    for feature, sets in sorted(_collect(trees).items()):
        packed = _pack(sets.values())
        blocks = -(-len(packed.columns) // BLOCK)
        size = max(members.bit_length() for members in sets.values())
        held_bytes = sum(table.nbytes for table in tables) + blocks * _block_bytes(size)
        if (len(features) + blocks) * BLOCK > COLUMNS_MAX or held_bytes > TABLE_BYTES_MAX:
            continue
        first = width + len(features) * BLOCK
        for members, bits in sets.items():
            column = packed.column_of[bits]
            classes = [n for n, each in enumerate(packed.columns[column], 1) if each & bits]
            places[feature, members] = first + column, np.array(classes, np.float64)
        features += [feature] * blocks
        sizes += [size] * blocks
        tables += np.split(_tabulate(packed.columns, size, blocks), blocks, axis=1)
    if not features:
        return None
    first_rows = np.cumsum([0, *(len(table) for table in tables[:-1])]).tolist()
    return Columns(width, places, features, sizes, first_rows, np.concatenate(tables))


@dataclass(frozen=True, slots=True)
class _Packed:
    """`columns`: of each its classes, disjoint; `column_of`: of each set the one it is put in."""

    columns: Sequence[Sequence[int]]
    column_of: Mapping[int, int]


def _collect(trees: Iterable[Tree]) -> dict[int, dict[bytes, int]]:
    """Return the sets of each feature in the trees' order, but of those with too many categories.

    Sets of neighbouring trees come to lie in the same columns: half as many as in order of size.
    """
    found: dict[int, dict[bytes, int]] = {}
    largest: dict[int, int] = {}
    for tree in trees:
        at = tree.categorical
        indices = tree.threshold[at].astype(int).tolist()
        for feature, index in zip(tree.split_feature[at].tolist(), indices, strict=True):
            members = tree.categories[index]
            if not len(members):
                continue  # the exporter refuses it
            largest[feature] = max(largest.get(feature, 0), int(members[-1]))
            if _block_bytes(largest[feature] + 1) > TABLE_BYTES_MAX:
                found[feature] = {}
            else:
                found.setdefault(feature, {})[members.tobytes()] = _to_bits(members)
    return {feature: sets for feature, sets in found.items() if sets}


def _block_bytes(size: int) -> int:
    return (size + 2) * BLOCK * 8


def _pack(sets: Iterable[int]) -> _Packed:
    """Put sets into columns one after the other; a new one begins where the last has no room."""
    columns: list[list[int]] = [[]]
    column_of: dict[int, int] = {}
    for members in sets:
        refined = _refine(columns[-1], members)
        if len(refined) > CLASSES_MAX:
            refined = [members]
            columns.append(refined)
        columns[-1] = refined
        column_of[members] = len(columns) - 1
    return _Packed(columns, column_of)


def _refine(classes: Sequence[int], members: int) -> list[int]:
    """Return the classes cut so that `members` is a union of some of them."""
    parts = [part for each in classes for part in (each & members, each & ~members) if part]
    rest = members & ~sum(classes)  # they are disjoint: the sum is the union
    return [*parts, rest] if rest else parts


def _tabulate(columns: Sequence[Sequence[int]], size: int, blocks: int) -> NDArray[np.float64]:
    """Return the class of each category in each column: [1 + size + 1, blocks * BLOCK]."""
    table = np.zeros((size + 2, blocks * BLOCK))
    for column, classes in enumerate(columns):
        for number, members in enumerate(classes, 1):
            table[1 + _from_bits(members), column] = number
    return table


def _to_bits(members: NDArray[np.int32]) -> int:
    flags = np.zeros(int(members[-1]) + 1, np.bool_)
    flags[members] = True
    return int.from_bytes(np.packbits(flags, bitorder="little").tobytes(), "little")


def _from_bits(bits: int) -> NDArray[np.intp]:
    data = np.frombuffer(bits.to_bytes(-(-bits.bit_length() // 8), "little"), np.uint8)
    return np.flatnonzero(np.unpackbits(data, bitorder="little"))
