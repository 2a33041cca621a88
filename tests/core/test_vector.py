import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from mlpd.core.columns import Column, Columns, DType, height
from mlpd.core.convert import column_of
from mlpd.core.errors import ValidationError
from mlpd.core.vector import CategoricalEncoder, VectorFeature, Vectorizer

CANONICAL_NAN = 0x7FF8000000000000
INT64 = st.integers(-(2**63), 2**63 - 1)
VALUES: dict[DType, st.SearchStrategy[Any]] = {
    DType.STRING: st.sampled_from(["UA", "AA", "", "ü", "B6"]),
    DType.INT64: st.sampled_from([0, 1, -1, 2**53 + 1, 2**63 - 1]) | INT64,
    DType.BOOL: st.booleans(),
    DType.FLOAT32: st.floats(width=32),
    DType.FLOAT64: st.floats(),
}
NAMED = {str(dtype): dtype for dtype in VALUES}
CATEGORICAL = ("string", "int64", "bool")


def columns_of(rows: list[dict[str, Any]]) -> Columns:
    return {n: column_of(dtype, [row[n] for row in rows], n) for n, dtype in NAMED.items()}


def vectorize_block(vectorizer: Vectorizer, columns: Columns) -> NDArray[np.float64]:
    """Return what the vectorizer makes of a block with these columns, in reverse order."""
    names = list(columns)[::-1]
    words = np.zeros((len(names), height(columns)), np.int64)
    texts = {}
    for row, name in enumerate(names):
        values = columns[name].values
        if values.dtype == object:
            texts[row] = values
        elif values.dtype.kind == "f":
            words.view(np.float64)[row] = values
        else:
            words[row] = values
    valid = np.array([columns[name].mask() for name in names], np.bool_).reshape(words.shape)
    rows = {name: row for row, name in enumerate(names)}
    placed = vectorizer.place(rows, [columns[name].dtype for name in names])
    return placed.vectorize(words, valid, texts)


def bits(vectors: NDArray[np.float64]) -> list[list[int]]:
    return vectors.view(np.uint64).tolist()


rows_strategy = st.lists(
    st.fixed_dictionaries({n: st.none() | VALUES[dtype] for n, dtype in NAMED.items()}), max_size=8
)


@given(seen=rows_strategy, asked=rows_strategy, categorical=st.sets(st.sampled_from(CATEGORICAL)))
def test_blocks_and_columns_give_the_same_bits(
    seen: list[dict[str, Any]], asked: list[dict[str, Any]], categorical: set[str]
) -> None:
    vectorizer = Vectorizer.fit(columns_of(seen), sorted(categorical | {"string"}))
    by_column = vectorizer.vectorize(columns_of(asked))
    by_block = vectorize_block(vectorizer, columns_of(asked))
    assert by_column.shape == by_block.shape == (len(asked), len(NAMED))
    assert by_block.flags.c_contiguous
    assert bits(by_column) == bits(by_block)
    fortran = vectorizer.vectorize(columns_of(asked), order="F")
    assert bits(np.ascontiguousarray(fortran)) == bits(by_column)


@given(rows_strategy)
def test_json_gives_the_same_vectorizer_back(rows: list[dict[str, Any]]) -> None:
    vectorizer = Vectorizer.fit(columns_of(rows), CATEGORICAL)
    again = Vectorizer.from_dict(json.loads(json.dumps(vectorizer.to_dict())))
    assert again == vectorizer
    columns = columns_of(rows)
    assert bits(again.vectorize(columns)) == bits(vectorizer.vectorize(columns))


@given(rows_strategy)
def test_every_nan_is_the_canonical_one(rows: list[dict[str, Any]]) -> None:
    vectors = Vectorizer.fit(columns_of(rows), ("string",)).vectorize(columns_of(rows))
    assert set(vectors.view(np.uint64)[np.isnan(vectors)].tolist()) <= {CANONICAL_NAN}


@pytest.mark.parametrize("payload", [0xFFF8000000000000, 0x7FF8000000000001, 0x7FF0000000000001])
def test_a_nan_with_another_sign_or_payload_becomes_canonical(payload: int) -> None:
    values = np.array([payload], np.uint64).view(np.float64)
    vectorizer = Vectorizer((VectorFeature("x", DType.FLOAT64),))
    columns = {"x": Column(DType.FLOAT64, values)}
    assert bits(vectorizer.vectorize(columns)) == [[CANONICAL_NAN]]
    assert bits(vectorize_block(vectorizer, columns)) == [[CANONICAL_NAN]]


def test_numbers_keep_their_value() -> None:
    names = {"b": DType.BOOL, "i": DType.INT64, "f": DType.FLOAT32, "t": DType.TIMESTAMP}
    vectorizer = Vectorizer(tuple(VectorFeature(n, dtype) for n, dtype in names.items()))
    row = {"b": True, "i": -(2**53), "f": float(np.float32(0.1)), "t": 1_700_000_000_000_001}
    columns = {name: column_of(dtype, [row[name]]) for name, dtype in names.items()}
    for vectors in (vectorizer.vectorize(columns), vectorize_block(vectorizer, columns)):
        assert vectors.tolist() == [[1.0, -(2.0**53), row["f"], row["t"]]]


def test_codes_rank_by_frequency_then_by_value() -> None:
    column = column_of(DType.STRING, ["b", "c", "a", "c", None, None, None, "b", "d"])
    assert CategoricalEncoder.fit(column).categories == ("b", "c", "a", "d")
    numbers = column_of(DType.INT64, [10, 9, -1, 9, 10, 2])
    assert CategoricalEncoder.fit(numbers).categories == (9, 10, -1, 2)


@given(st.lists(st.sampled_from(["x", "y", "z", "w", None])), st.randoms())
def test_the_order_of_training_rows_never_shows(values: list[str | None], random: Any) -> None:
    first = CategoricalEncoder.fit(column_of(DType.STRING, values))
    random.shuffle(values)
    assert CategoricalEncoder.fit(column_of(DType.STRING, values)) == first


def test_only_the_most_frequent_categories_are_kept() -> None:
    column = column_of(DType.STRING, ["a", "b", "b", "c", "c", "c"])
    encoder = CategoricalEncoder.fit(column, max_categories=2)
    assert encoder.categories == ("c", "b")
    assert math.isnan(encoder.codes(["a"])[0])


def test_null_and_unseen_are_nan_and_a_null_is_never_the_zero_that_fills_it() -> None:
    encoder = CategoricalEncoder(("", "UA"))
    column = column_of(DType.STRING, ["UA", None, "ZZ", ""])
    assert encoder.encode(column).tolist()[::3] == [1.0, 0.0]
    assert np.isnan(encoder.encode(column)[1:3]).all()
    zero = Vectorizer((VectorFeature("x", DType.INT64),))
    assert np.isnan(zero.vectorize({"x": column_of(DType.INT64, [None])})).all()


@pytest.mark.parametrize("categories", [("a", "a"), ("a", 1), (1.5,), (True, 1)])
def test_categories_must_differ_and_be_of_one_kind(categories: tuple[Any, ...]) -> None:
    with pytest.raises(ValidationError) as refusal:
        CategoricalEncoder(categories)
    assert refusal.value.code == "wrong_categories"


@pytest.mark.parametrize(
    ("dtype", "categorical"),
    [(DType.STRING, False), (DType.BYTES, False), (DType.BYTES, True), (DType.FLOAT64, True)],
)
def test_a_feature_that_is_no_number_is_refused(dtype: DType, categorical: bool) -> None:
    columns = {"x": Column(dtype, np.zeros(3, dtype.numpy))}
    with pytest.raises(ValidationError, match="'x'") as refusal:
        Vectorizer.fit(columns, ("x",) if categorical else ())
    assert refusal.value.code == "not_a_number"


def test_a_missing_feature_is_named_not_filled() -> None:
    vectorizer = Vectorizer((VectorFeature("x", DType.INT64), VectorFeature("y", DType.INT64)))
    for call in (
        lambda: vectorizer.place({"x": 0}, [DType.INT64]),
        lambda: vectorizer.vectorize({"x": column_of(DType.INT64, [1])}),
        lambda: Vectorizer.fit({"x": column_of(DType.INT64, [1])}, ("y",)),
    ):
        with pytest.raises(ValidationError, match="'y'") as refusal:
            call()
        assert refusal.value.code == "missing_feature"


def test_a_column_of_the_wrong_type_is_refused() -> None:
    text, number = column_of(DType.STRING, ["3"]), column_of(DType.INT64, [3])
    for feature, column in (
        (VectorFeature("x", DType.FLOAT64), text),
        (VectorFeature("x", DType.STRING, CategoricalEncoder(("3",))), number),
    ):
        vectorizer = Vectorizer((feature,))
        for call in (
            lambda v, c: v.vectorize({"x": c}),
            lambda v, c: v.place({"x": 0}, [c.dtype]),
        ):
            with pytest.raises(ValidationError, match="'x'") as refusal:
                call(vectorizer, column)
            assert refusal.value.code == "wrong_type"


def test_positions_of_categorical_features_are_those_of_the_vector() -> None:
    vectorizer = Vectorizer.fit(columns_of([]), CATEGORICAL)
    assert vectorizer.names == tuple(NAMED)
    assert vectorizer.categorical == (0, 1, 2)
