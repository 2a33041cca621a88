"""Logged against recomputed vectors, bit for bit."""

import math
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlpd.core.errors import ValidationError
from mlpd.monitoring.consistency import MISMATCHES_MAX, Mismatch, compare

VALUES = st.one_of(st.floats(), st.sampled_from([0.0, -0.0, 1.0, math.nan]))


def same_bits(first: float, second: float) -> bool:
    if math.isnan(first) or math.isnan(second):
        return math.isnan(first) and math.isnan(second)
    return struct.pack("<d", first) == struct.pack("<d", second)


@given(st.lists(st.tuples(VALUES, VALUES, VALUES, VALUES), max_size=20))
def test_every_differing_value_is_found(rows: list[tuple[float, float, float, float]]) -> None:
    both = np.array(rows, np.float64).reshape(-1, 4)
    logged, recomputed = both[:, :2], both[:, 2:]
    found = compare([f"p{i}" for i in range(len(rows))], ["a", "b"], logged, recomputed)
    expected = [
        (f"p{i}", name)
        for i, row in enumerate(rows)
        for j, name in enumerate("ab")
        if not same_bits(row[j], row[j + 2])
    ]
    assert [(m.prediction_id, m.feature) for m in found.mismatches] == expected
    assert found.mismatched_values == len(expected)
    assert found.mismatched_rows == len({prediction for prediction, _ in expected})
    assert sum(found.by_feature.values()) == len(expected)
    assert (found.rows, found.values) == (len(rows), 2 * len(rows))


def test_one_unit_in_the_last_place_and_the_sign_of_zero_are_differences() -> None:
    logged = np.array([[0.1 + 0.2, 0.0, 1.0]])
    found = compare(["p"], ["a", "b", "c"], logged, np.array([[0.3, -0.0, 1.0]]))
    assert found.mismatches == (
        Mismatch("p", "a", 0.1 + 0.2, 0.3),
        Mismatch("p", "b", 0.0, -0.0),
    )
    assert found.by_feature == {"a": 1, "b": 1}


def test_all_nans_are_one_value() -> None:
    odd = np.array([[0x7FF8_0000_0000_0001, -1]], np.int64).view(np.float64)
    assert np.isnan(odd).all()
    found = compare(["p"], ["a", "b"], odd, np.full((1, 2), np.nan))
    assert found.mismatched_values == 0


def test_all_are_counted_and_the_first_hundred_described() -> None:
    rows = MISMATCHES_MAX + 60
    ids = [str(index) for index in range(rows)]
    found = compare(ids, ["a"], np.zeros((rows, 1)), np.ones((rows, 1)))
    assert (found.mismatched_rows, found.by_feature) == (rows, {"a": rows})
    assert [m.prediction_id for m in found.mismatches] == ids[:MISMATCHES_MAX]


def test_matrices_of_other_shapes_or_types_are_refused() -> None:
    good = np.zeros((2, 1))
    for bad in (np.zeros((1, 1)), np.zeros((2, 2)), np.zeros((2, 1), np.float32)):
        with pytest.raises(ValidationError, match="recomputed vectors are"):
            compare(["p", "q"], ["a"], good, bad)
