"""Summaries equal what plain Python makes of the values that are present."""

import math
import statistics
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlpd.core.columns import DType
from mlpd.core.convert import column_of
from mlpd.core.time import format_time
from mlpd.features.status import Status
from mlpd.features.summary import QUANTILES, TOP, quantiles, summarize

NUMBERS = {
    DType.INT64: st.one_of(st.integers(-(2**63), 2**63 - 1), st.sampled_from([0, 1, 2**53 + 1])),
    DType.FLOAT64: st.one_of(st.floats(-1e6, 1e6), st.sampled_from([math.nan, math.inf, -0.0])),
    DType.FLOAT32: st.floats(-1e6, 1e6, width=32),
}


def summary_of(dtype: DType, cells: list[tuple[Any, Status]]) -> dict[str, Any]:
    column = column_of(dtype, [value for value, _ in cells])
    return summarize(column, np.array([status for _, status in cells], np.uint8))


def cells_of(values: st.SearchStrategy[Any]) -> st.SearchStrategy[list[tuple[Any, Status]]]:
    statuses = st.sampled_from([Status.PRESENT, Status.PRESENT, Status.NULL, Status.STALE])
    return st.lists(st.tuples(values, statuses))


@given(st.data(), st.sampled_from(sorted(NUMBERS)))
def test_numbers_equal_brute_force(data: st.DataObject, dtype: DType) -> None:
    cells = data.draw(cells_of(NUMBERS[dtype]))
    found = summary_of(dtype, cells)
    counts = Counter(status for _, status in cells)
    for status in Status:
        assert found[status.name.lower()] == counts[status]
    present = [v for v, status in cells if status is Status.PRESENT]
    known = sorted(v for v in present if not math.isnan(v))
    assert found["nan"] == len(present) - len(known)
    assert (found["min"], found["max"]) == ((known[0], known[-1]) if known else (None, None))
    for share in QUANTILES if known else ():
        value = found["quantiles"][str(share)]
        assert sum(v <= value for v in known) >= share * len(known)
        assert sum(v < value for v in known) < share * len(known)
    if known and not any(map(math.isinf, known)):
        scale = max(map(abs, known))
        assert found["mean"] == pytest.approx(statistics.fmean(known), rel=1e-9, abs=1e-9 * scale)
    if len(known) > 1 and not any(map(math.isinf, known)):
        wanted = math.sqrt(math.fsum((v - found["mean"]) ** 2 for v in known) / (len(known) - 1))
        assert found["std"] == pytest.approx(wanted, rel=1e-6, abs=1e-6 * scale)


def test_integers_beyond_doubles_stay_exact() -> None:
    values = [2**53 + 1, 2**53, 2**63 - 1]
    found = summary_of(DType.INT64, [(value, Status.PRESENT) for value in values])
    assert (found["min"], found["quantiles"]["0.5"], found["max"]) == (2**53, 2**53 + 1, 2**63 - 1)


@given(cells_of(st.sampled_from(["", *"abcdefghijklmnop"])))
def test_the_most_frequent_texts_come_first(cells: list[tuple[str, Status]]) -> None:
    found = summary_of(DType.STRING, cells)
    counts = Counter(value for value, status in cells if status is Status.PRESENT)
    assert found["distinct"] == len(counts)
    assert len(found["top"]) == min(TOP, len(counts))
    assert all(counts[entry["value"]] == entry["rows"] for entry in found["top"])
    rows = [entry["rows"] for entry in found["top"]]
    assert rows == sorted(counts.values(), reverse=True)[:TOP]


def test_bytes_booleans_and_times_are_shown_in_json() -> None:
    found = summary_of(DType.BYTES, [(b"\x00\xff", Status.PRESENT)])
    assert found["top"] == [{"value": "00ff", "rows": 1}]
    found = summary_of(DType.BOOL, [(True, Status.PRESENT), (False, Status.STALE)])
    assert found["top"] == [{"value": True, "rows": 1}]
    found = summary_of(DType.TIMESTAMP, [(5, Status.PRESENT)])
    assert (found["min"], found["quantiles"]["0.5"]) == (format_time(5), format_time(5))
    assert "mean" not in found


def test_of_lists_the_lengths_are_told() -> None:
    dtype = DType("list[int64]")
    found = summary_of(
        dtype, [([], Status.PRESENT), ([1, 2, 3], Status.PRESENT), ([], Status.STALE)]
    )
    assert found["lengths"] == {"min": 0, "max": 3, "mean": 1.5}
    assert summary_of(dtype, [])["lengths"] == {"min": None, "max": None, "mean": None}


def test_quantiles_are_values_that_occur() -> None:
    assert quantiles(np.array([1, 2, 3, 4]), [0.0, 0.25, 0.26, 1.0]) == [1, 1, 2, 4]
