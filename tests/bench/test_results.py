"""Saved results: pages can't drift from them."""

import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest

from bench.results import PAGES, PARTS, PICTURES, ROOT, load, render
from bench.results.table import number, overview, unit_of
from bench.scenarios import SCENARIOS


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_generated_parts_of_a_page_are_those_of_the_saved_results(page: Path) -> None:
    text = page.read_text()
    assert re.search("<!-- bench: end -->", text)
    assert text == render(text, load()), "run python -m bench table"


@pytest.mark.parametrize("name", PICTURES)
def test_pictures_are_those_of_the_saved_results(name: str) -> None:
    assert (ROOT / name).read_text() == PICTURES[name](load()), "run python -m bench table"


def test_growth_shows_each_size_beside_the_smallest() -> None:
    def spread(value: float) -> dict[str, float]:
        return {"median": value, "min": value / 2, "max": value * 2}

    def case(**figures: tuple[float, float]) -> dict[str, Any]:
        sides = ("ours", "against")
        found = {s: {n: spread(v[i]) for n, v in figures.items()} for i, s in enumerate(sides)}
        return {**found, "ratio": {}}

    cases = {
        **{
            f"fill, {n} entities": case(online_bytes=(240, 0), online_page_bytes=(390, 0))
            for n in ("10,000", "100,000")
        },
        **{f"memory, {n} entities": case(resident_mb=(99, 0)) for n in ("10,000", "100,000")},
        "read, 100,000 entities": case(p50_ms=(4.0, 3.0)),
        "ingest, 100,000 entities": case(rows_per_s=(500.0, 700.0)),
        "start, 100,000 entities": case(ready_s=(0.8, 0.9)),
    }
    for name in ("fill, 10,000 entities", "fill, 100,000 entities"):
        del cases[name]["against"]
    results = {"growth": {"cases": cases}}
    shown = PARTS["growth"](results)
    assert "| 10,000 | 3 | 700 | 0.9 | 240 | 390 | 99 |" in shown
    assert "| 100,000 | 4 (3) | 500 (700) | 0.8 (0.9) | 240 | 390 | 99 |" in shown
    picture = ET.fromstring(PICTURES["bench/results/growth.svg"](results))
    circles = picture.findall(".//{http://www.w3.org/2000/svg}circle")
    assert len(circles) == 3 * 2 * 2 + 2


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
