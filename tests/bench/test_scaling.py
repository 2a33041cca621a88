"""The growth of shards as it is saved and shown."""

from itertools import pairwise
from typing import Any
from xml.etree import ElementTree as ET

import pytest

from bench.growth_model import Keys, draw_slots, fit_costs, grow
from bench.results import load, scaling, scaling_picture
from bench.scaling import ASKED, KEYS, SHARDS, _tail, stall_us_of
from bench.tail_model import Loop

AGAIN = "run python -m bench scaling --save"


def test_the_saved_growth_is_the_models_of_the_saved_costs() -> None:
    found = load()
    costs = fit_costs(found["cluster"]["cases"])
    keys = Keys(draw_slots(KEYS, 1), 0.99)
    for name in ("1 row", "16 rows", "100 rows, tagged"):
        saved = found["scaling"]["cases"][f"growth, 0.99, {name}"]["notes"]
        points = [grow(keys, ASKED[name], count, costs) for count in SHARDS]
        assert points[0].requests_per_s == pytest.approx(saved["requests_per_s"][0], 1e-3), AGAIN
        for i, point in enumerate(points):  # these texts are one of those that it spans
            assert saved["skew_min"][i] * 0.999 <= point.skew <= saved["skew_max"][i] * 1.001, AGAIN
    cached = found["scaling"]["cases"]["growth, 0.99, 1 row, cached"]["notes"]
    most = grow(keys, ASKED["1 row, cached"], SHARDS[-1], costs)
    assert most.hits == pytest.approx(cached["hits"][-1], rel=0.02), AGAIN
    assert most.requests_per_s == pytest.approx(cached["requests_per_s"][-1], rel=0.02), AGAIN
    tail = _tail(Loop(costs.call + costs.row, stall_us_of(found), 0.6))
    assert tail == found["scaling"]["cases"]["tail, 60% used"], AGAIN


def notes(*requests_per_s: float, **figures: Any) -> dict[str, Any]:
    shards = [1, 2, 4, 8][: len(requests_per_s)]
    return {"notes": {"shards": shards, "requests_per_s": [*requests_per_s], **figures}}


@pytest.fixture
def results() -> dict[str, Any]:
    """Return growth and tails of two exponents, small enough to reckon by hand."""
    plain = {"skew": [1, 1.5, 2, 3], "skew_min": [1, 1.5, 2, 3], "skew_max": [1, 2, 3, 4]}
    plain["routers"] = [1, 2, 3, 5]
    others = ("16 rows", "16 rows, cached", "100 rows", "100 rows, tagged")
    cases = {
        "tail, 60% used": {"notes": {"fan_outs": [1, 100], "plain, p99_ms": [2.0, 8.0]}},
        "growth, 0.8, 1 row": notes(100, 200, 390, 700, hottest_share=0.02, **plain),
        "growth, 0.8, 1 row, cached": notes(200, 400, 800, 1600, hits=[0.5] * 4),
        "growth, 0.99, 1 row": notes(100, 150, 180, 190, hottest_share=0.5, **plain),
        "growth, 0.99, 1 row, cached": notes(200, 300, 400, 450, hits=[0.5] * 4),
        **{f"growth, 0.99, {name}": notes(10, 11, 12, 13, fan_out=[1, 2, 4, 7]) for name in others},
    }
    return {"scaling": {"cases": cases}}


def test_doubling_pays_while_it_brings_a_quarter(results: dict[str, Any]) -> None:
    rows = scaling.hot(results).splitlines()[2:]
    assert rows == [
        "| 0.8 | 2 % | the end | 7 | the end | 16 | 50% |",
        "| 0.99 | 50 % | 2 | 1.9 | 4 | 4.5 | 50% |",
    ]


def test_growth_is_over_one_shard_without_a_cache(results: dict[str, Any]) -> None:
    rows = scaling.shards(results).splitlines()[2:]
    assert rows[1] == "| 2 | 1.5 | 3 | 1.1 | 1.1 | 1.1 | 1.1 | 1.5 to 2 | 2 | 2 |"
    assert scaling.relative(results, 0.99, "1 row, cached") == [2.0, 3.0, 4.0, 4.5]


def test_the_picture_has_a_curve_for_each_series(results: dict[str, Any]) -> None:
    picture = ET.fromstring(scaling_picture.draw(results))
    lines = picture.findall(".//{http://www.w3.org/2000/svg}polyline")
    assert len(lines) == 4 + 5 + 2 + 1
    assert len(lines[0].attrib["points"].split()) == 4
    labels = [text.text for text in picture.findall(".//{http://www.w3.org/2000/svg}text")]
    assert {"0.99, cached", "100 rows, tagged", "60% used"} <= set(labels)


def test_labels_of_curves_that_end_together_do_not_touch() -> None:
    places = scaling_picture._spread_out([190.0, 189.0, 50.0, 190.0])
    found = sorted(places)
    assert all(b - a >= scaling_picture._APART for a, b in pairwise(found))
    assert found[-1] <= scaling_picture._HEIGHT
    assert places[2] == 50.0
