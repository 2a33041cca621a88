"""Sets of categories in columns: every set is found again, category by category."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlpd.training.categories import BLOCK, CLASSES_MAX, COLUMNS_MAX, Columns, build_columns
from mlpd.training.trees import Tree

WIDTH = 3
Split = tuple[int, frozenset[int]]
"""A feature and the categories that go left."""

few = st.frozensets(st.integers(0, 9), min_size=1)
many = st.frozensets(st.integers(0, 400), min_size=1, max_size=40)
splits = st.lists(st.tuples(st.integers(0, WIDTH - 1), few | many), min_size=1, max_size=60)


def tree_of(splits: list[Split]) -> Tree:
    """Return a chain of categorical splits."""
    count = len(splits)
    return Tree(
        split_feature=np.array([feature for feature, _ in splits], np.int32),
        threshold=np.arange(count, dtype=np.float64),
        decision_type=np.ones(count, np.int8),
        left_child=~np.arange(count, dtype=np.int32),
        right_child=np.append(np.arange(1, count, dtype=np.int32), np.int32(~count)),
        leaf_value=np.zeros(count + 1),
        split_gain=np.ones(count),
        categories=tuple(np.array(sorted(members), np.int32) for _, members in splits),
    )


def classes_of(columns: Columns, column: int, size: int) -> np.ndarray:
    """Return what a column holds for the categories -1 to size, where those above count as size."""
    block, at = divmod(column - columns.width, BLOCK)
    codes = np.minimum(np.arange(-1, size + 1), columns.sizes[block])
    return columns.table[columns.first_rows[block] + 1 + codes, at]


@given(splits)
def test_each_set_is_what_its_classes_select(splits: list[Split]) -> None:
    columns = build_columns([tree_of(splits)], WIDTH)
    assert columns is not None
    for feature, members in splits:
        key = np.array(sorted(members), np.int32).tobytes()
        column, classes = columns.places[feature, key]
        assert columns.features[(column - WIDTH) // BLOCK] == feature
        assert set(classes) <= set(range(1, CLASSES_MAX + 1))
        selected = np.isin(classes_of(columns, column, size=405), classes)
        assert set(np.flatnonzero(selected) - 1) == members


def test_sets_of_few_categories_share_one_column() -> None:
    rng = np.random.default_rng(1)
    sets = [frozenset(np.flatnonzero(rng.random(CLASSES_MAX) < 0.5).tolist()) for _ in range(500)]
    columns = build_columns([tree_of([(1, members) for members in sets])], WIDTH)
    assert columns is not None
    assert {column for column, _ in columns.places.values()} == {WIDTH}
    assert len(columns.features) == 1


@pytest.mark.parametrize(
    "sets",
    [
        [frozenset([2**31 - 1])],
        [frozenset([1]), frozenset([100_000])],
        [frozenset(range(c, 20 * COLUMNS_MAX, 40)) for c in range(40)] * 2,
    ],
)
def test_a_table_never_grows_beyond_its_bounds(sets: list[frozenset[int]]) -> None:
    """Of a feature that has no columns nothing is kept; others are not touched by it."""
    trees = [tree_of([(0, members) for members in sets])]
    columns = build_columns(trees, WIDTH)
    beside = build_columns([*trees, tree_of([(1, frozenset([3]))])], WIDTH)
    assert beside is not None
    assert (1, np.array([3], np.int32).tobytes()) in beside.places
    for found in (columns, beside):
        if found is not None:
            assert found.table.nbytes <= 16 * 1024**2
            assert len(found.features) * BLOCK <= COLUMNS_MAX


def test_numbers_alone_need_no_columns() -> None:
    assert build_columns([], WIDTH) is None
