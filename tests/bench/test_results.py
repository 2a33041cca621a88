"""Saved results: pages can't drift from them."""

import re
from pathlib import Path
from typing import Any

import pytest

from bench.results import PAGES, PARTS, load, render
from bench.results.table import number, overview, unit_of
from bench.scenarios import SCENARIOS


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_generated_parts_of_a_page_are_those_of_the_saved_results(page: Path) -> None:
    text = page.read_text()
    assert re.search("<!-- bench: end -->", text)
    assert text == render(text, load()), "run python -m bench table"


def test_a_page_with_another_figure_would_be_noticed() -> None:
    page = PAGES[0].read_text()
    ratio = re.search(r"\| ([\d.]+) \(", page)
    assert ratio is not None
    changed = page.replace(ratio[1], "123456")
    assert render(changed, load()) == page


def test_every_scenario_has_saved_results() -> None:
    assert set(load()) == set(SCENARIOS)


def test_every_part_is_in_a_page() -> None:
    shown = {
        name for page in PAGES for name in re.findall(r"<!-- bench: (\w+) -->", page.read_text())
    }
    assert shown - {"end"} == set(PARTS)


def test_the_overview_shows_both_sides_and_the_ratio() -> None:
    spread = {"median": 2.0, "min": 1.5, "max": 3.0}
    case: dict[str, Any] = {"measure": "p50_ms", "ratio": spread, "ours": {"p50_ms": spread}}
    case["against"] = {"p50_ms": {"median": 1.0, "min": 1.0, "max": 1.0}}
    shown = overview({"x": {"cases": {"small": case, "alone": {"ours": {}}}}})
    assert "**x**" in shown
    assert "| small | p50 ms | 2 | 1 | 2 (1.5 to 3) |  |" in shown
    assert "alone" not in shown


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.000012345, "0.0000123"),
        (0.0, "0"),
        (4.5678, "4.57"),
        (99.96, "100"),
        (123.4, "123"),
        (12345.0, "12,300"),
    ],
)
def test_numbers_have_three_digits(value: float, text: str) -> None:
    assert number(value) == text


def test_a_figure_carries_its_unit_in_its_name() -> None:
    assert [unit_of(name) for name in ("requests_per_s", "idle_mb", "stall_max_ms", "s")] == [
        "requests/s",
        "MB",
        "ms",
        "s",
    ]
