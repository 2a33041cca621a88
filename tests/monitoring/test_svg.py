"""Pictures are well-formed XML, escaped, and drawn to scale."""

import math
from xml.etree import ElementTree as ET

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlpd.monitoring.counting import CountLayout, Counts, PlainKernels
from mlpd.monitoring.reference import FeatureKind, build_reference
from mlpd.monitoring.svg import (
    IntervalPoint,
    bin_labels,
    draw_histogram,
    draw_interval,
    draw_sparkline,
)

SVG = "{http://www.w3.org/2000/svg}"


def draw(reference: list[float], live: list[float], kind: FeatureKind, name: str) -> ET.Element:
    profile = build_reference(np.array(reference, np.float64)[:, None], names=[name], kinds=[kind])
    counts = Counts(CountLayout(profile))
    counts.add_rows(np.array(live, np.float64)[:, None], kernels=PlainKernels())
    return ET.fromstring(draw_histogram(profile.features[0], counts.column(0)))


def test_bars_have_the_heights_of_the_shares() -> None:
    root = draw([1.0, 1.0, 2.0, 3.0], [1.0, 3.0], "numeric", "x")
    heights = [float(bar.attrib["height"]) for bar in root.iter(SVG + "rect")]
    assert heights == pytest.approx([130, 130, 65, 0, 65, 130])
    titles = [title.text for title in root.iter(SVG + "title")]
    assert titles == [
        "x: reference and live",
        "1: reference 50.00%, live 50.00%",
        "2: reference 25.00%, live 0.00%",
        "3: reference 25.00%, live 50.00%",
    ]


def test_a_name_cannot_inject_markup() -> None:
    root = draw([1.0], [1.0], "categorical", '<script>"&')
    assert not list(root.iter(SVG + "script"))
    assert next(root.iter(SVG + "title")).text == '<script>"&: reference and live'


@pytest.mark.parametrize("kind", ["numeric", "categorical"])
@pytest.mark.parametrize("reference", [[], [np.nan], [5.0] * 3, list(range(40))])
@pytest.mark.parametrize("live", [[], [np.nan, np.inf], [1e6]])
def test_degenerate_columns_can_be_drawn(
    reference: list[float], live: list[float], kind: FeatureKind
) -> None:
    assert draw(reference, live, kind, "x").tag == SVG + "svg"


def test_every_bin_has_a_name() -> None:
    rng = np.random.default_rng(0)
    vectors = np.column_stack([rng.normal(size=500), rng.integers(0, 150, 500)])
    profile = build_reference(vectors, names=["a", "b"], kinds=["numeric", "categorical"])
    for column in profile.features:
        labels = bin_labels(column)
        assert len(labels) == column.bins
        assert len(set(labels)) == column.bins
    assert bin_labels(profile.features[1])[-3:] == ["other", "new", "missing"]
    assert bin_labels(profile.features[0])[-2].startswith(">= ")


@given(st.lists(st.one_of(st.none(), st.floats(-1e6, 1e6), st.just(float("nan"))), max_size=30))
def test_a_sparkline_stays_in_its_box_and_leaves_gaps(values: list[float | None]) -> None:
    root = ET.fromstring(draw_sparkline(values, "x < y"))
    points = [
        tuple(map(float, point.split(",")))
        for line in root.iter(SVG + "polyline")
        for point in line.attrib["points"].split()
    ]
    points += [(float(c.attrib["cx"]), float(c.attrib["cy"])) for c in root.iter(SVG + "circle")]
    assert len(points) == sum(value is not None and not math.isnan(value) for value in values)
    assert all(0 <= x <= 120 and 2 <= y <= 22 for x, y in points)


def numbers(points: str) -> list[tuple[float, float]]:
    pairs = (pair.split(",") for pair in points.split())
    return [(float(x), float(y)) for x, y in pairs]


def test_an_interval_is_a_band_around_its_estimate_and_cut_off_at_first() -> None:
    points = [
        IntervalPoint(10.0 * i, 5 - 100 / (i + 1), 5 + i % 2, 5 + 100 / (i + 1), f"look {i}")
        for i in range(8)
    ]
    drawn = ET.fromstring(draw_interval(points, "lift <of> x", unit="%"))
    polygon = drawn.find(f".//{SVG}polygon")
    line = drawn.find(f".//{SVG}polyline")
    assert polygon is not None
    assert line is not None
    band, middle = numbers(polygon.attrib["points"]), numbers(line.attrib["points"])
    upper, lower = band[:8], band[:7:-1]
    assert [x for x, _ in upper] == [x for x, _ in middle] == [x for x, _ in lower]
    for (_, high), (_, value), (_, low) in zip(upper, middle, lower, strict=True):
        assert 30 <= high <= value <= low <= 160  # y grows downwards
    assert upper[0][1] == 30.0  # 105 is beyond what the newer half needs
    assert upper[4][1] > 30.0
    texts = ["".join(text.itertext()) for text in drawn.iter(f"{SVG}text")]
    assert "lift <of> x" in texts
    assert "0%" in texts
    assert {"look 0", "look 7"} <= set(texts)
    assert "now 6% [-7.5, 17.5]" in texts
    zero = [at for at in drawn.iter(f"{SVG}line") if at.attrib["stroke"] == "#343a40"]
    assert len(zero) == 1


@pytest.mark.parametrize("value", [0.0, 1e-9, 3.7e8])
def test_one_point_and_none_are_pictures_too(value: float) -> None:
    one = draw_interval([IntervalPoint(1.0, value - 1e-9, value, value + 1e-9, "now")], "x")
    assert ET.fromstring(one).find(f".//{SVG}circle") is not None
    assert len(list(ET.fromstring(draw_interval([], "x")).iter(f"{SVG}polygon"))) == 0
