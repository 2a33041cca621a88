"""The join scenario joins the same values on both sides, and would notice if it didn't."""

from pathlib import Path

import polars as pl
import pytest

from bench.drift import drift
from bench.join import check_equal, compare_joins
from bench.options import Options


def write(path: Path, values: list[float | None], drivers: tuple[int, ...] = (1, 2)) -> Path:
    frame = pl.DataFrame({"event_time": [10, 20], "driver": drivers, "v0": values})
    frame.write_ipc(path)
    return path


def test_sums_that_differ_by_rounding_are_equal(tmp_path: Path) -> None:
    check_equal(write(tmp_path / "a", [0.3, None]), write(tmp_path / "b", [0.1 + 0.2, None]))


@pytest.mark.parametrize("values", [[0.3, 0.0], [0.31, None], [None, None]])
def test_another_value_is_noticed(tmp_path: Path, values: list[float | None]) -> None:
    with pytest.raises(RuntimeError, match="'v0'"):
        check_equal(write(tmp_path / "a", [0.3, None]), write(tmp_path / "b", values))


def test_another_order_is_noticed(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="order"):
        check_equal(write(tmp_path / "a", [0.3, 0.4]), write(tmp_path / "b", [0.3, 0.4], (2, 1)))


def test_joins_of_a_small_spine_agree_and_are_measured() -> None:
    found = compare_joins("string", Options(rounds=1, rows=2_000))
    assert list(found) == ["latest, string keys", "windows, string keys"]
    for case in found.values():
        assert case["ours"].keys() == case["against"].keys()
        assert case["ours"]["rows_per_s_core"]["median"] > 0.0


def test_drift_measures_the_same_thing_on_both_sides() -> None:
    found = drift(Options(rounds=1))  # raises where the two PSI differ
    assert all(case["ratio"]["median"] > 0.0 for case in found.values())
