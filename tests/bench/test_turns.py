"""Turns: who begins alternates, medians are compared, spreads are those of the rounds."""

from collections.abc import Callable
from pathlib import Path

from bench.turns import alone, filesystem, in_turns, spread


def side(name: str, values: list[float], order: list[str]) -> Callable[[], dict[str, float]]:
    left = iter(values)

    def run() -> dict[str, float]:
        order.append(name)
        return {"ms": next(left)}

    return run


def test_the_ratio_is_that_of_the_medians_with_the_spread_of_the_rounds() -> None:
    order: list[str] = []
    found = in_turns(
        side("ours", [1.0, 4.0, 9.0], order),
        side("floor", [1.0, 2.0, 3.0], order),
        rounds=3,
        measure="ms",
        rows=7,
    )
    assert found["ratio"] == {"median": 2.0, "min": 1.0, "max": 3.0}
    assert found["ours"]["ms"] == {"median": 4.0, "min": 1.0, "max": 9.0}
    assert found["notes"] == {"rows": 7}
    assert order == ["ours", "floor", "floor", "ours", "ours", "floor"]


def test_what_has_no_floor_has_no_ratio() -> None:
    found = alone(side("ours", [2.0, 1.0], []), rounds=2, measure="ms")
    assert found["ours"]["ms"] == {"median": 1.5, "min": 1.0, "max": 2.0}
    assert "ratio" not in found
    assert "against" not in found


def test_spread_is_median_least_and_greatest() -> None:
    assert spread([3.0, 1.0, 2.0]) == {"median": 2.0, "min": 1.0, "max": 3.0}


def test_the_file_system_of_a_folder_is_named() -> None:
    assert filesystem(Path("/proc/self")) == "proc"
