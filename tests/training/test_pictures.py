from xml.etree import ElementTree as ET

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlpd.core.svg import BLUE, ORANGE, ticks
from mlpd.training.auc import auc, auc_estimate, roc_curve
from mlpd.training.evaluate import calibration_error, calibration_table, evaluate_binary
from mlpd.training.pictures import (
    draw_calibration,
    draw_contributions,
    draw_importance,
    draw_learning,
    draw_roc,
)

SVG = "{http://www.w3.org/2000/svg}"


def parse(text: str) -> ET.Element:
    """Return a picture's root; it stands alone and runs nothing."""
    root = ET.fromstring(text)
    tags = {element.tag.removeprefix(SVG) for element in root.iter()}
    assert not tags & {"script", "style", "image", "foreignObject", "a", "use"}
    assert not any(
        "href" in name or name.startswith("on") for e in root.iter() for name in e.attrib
    )
    return root


def words(root: ET.Element) -> str:
    return " ".join(root.itertext())


def sample(rows: int = 5_000) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    scores = rng.random(rows)
    return (rng.random(rows) < scores).astype(np.float64), scores


ROWS = st.lists(st.tuples(st.sampled_from([0.0, 1.0]), st.floats(0, 1)), min_size=2, max_size=60)


@given(ROWS)
def test_the_area_under_the_whole_curve_is_the_auc(rows: list[tuple[float, float]]) -> None:
    labels, scores = np.array([*rows, (0.0, 0.5), (1.0, 0.5)]).T
    false, true = roc_curve(labels, scores)
    assert (false[0], true[0], false[-1], true[-1]) == (0, 0, 1, 1)
    assert np.trapezoid(true, false) == pytest.approx(auc(labels, scores), abs=1e-12)


def test_a_long_curve_is_thinned_and_keeps_its_ends() -> None:
    labels, scores = sample()
    false, true = roc_curve(labels, scores, points_max=50)
    assert len(false) == 50
    assert (false[0], true[0], false[-1], true[-1]) == (0, 0, 1, 1)
    assert np.trapezoid(true, false) == pytest.approx(auc(labels, scores), abs=0.01)


def test_calibrated_scores_lie_on_the_diagonal() -> None:
    labels, scores = sample()
    root = parse(draw_calibration(evaluate_binary(labels, scores).calibration, "observed rate"))
    dots = root.findall(f".//{SVG}circle")
    assert len(dots) == 10
    for found in dots:
        x, y = float(found.get("cx", 0)) - 62, 334 - float(found.get("cy", 0))
        assert 0 < x < 300
        assert abs(x - y) < 22
    assert "500 rows, mean score 0." in words(root)


def test_the_roc_picture_tells_the_area() -> None:
    labels, scores = sample()
    area = auc_estimate(labels, scores)
    assert area is not None
    text = draw_roc(labels, scores, area)
    assert len(text) < 10_000
    assert f"AUC {area.value:.4f}" in words(parse(text))


def test_importance_shows_the_largest_first_and_says_how_many_there_are() -> None:
    root = parse(draw_importance({f"f{i}": (30 - i) / 465 for i in range(30)}))
    bars = root.findall(f".//{SVG}rect")[1:]
    widths = [float(found.get("width", 0)) for found in bars]
    assert widths == sorted(widths, reverse=True)
    assert len(widths) == 20
    assert widths[10] / widths[0] == pytest.approx(20 / 30, abs=0.01)
    assert "first 20 of 30 features" in words(root)
    assert parse(draw_importance({"only": 0.0})) is not None


def test_learning_marks_the_round_that_is_kept() -> None:
    history = {"auc": [0.6, 0.7, 0.65], "binary_logloss": [0.6, 0.5, 0.55]}
    root = parse(draw_learning(history, 2))
    assert "round 2: 0.7" in words(root)
    assert "binary_logloss on the validation rows" in words(root)
    assert len(root.findall(f".//{SVG}circle")) == 2
    assert parse(draw_learning({"l2": [0.25]}, 1)) is not None


def test_contributions_show_a_disc_for_each_row_at_what_it_added() -> None:
    rng = np.random.default_rng(1)
    vectors = rng.normal(size=(200, 3))
    vectors[:40, 0] = np.nan
    added = np.column_stack([vectors[:, 1] * 2, np.zeros(200), vectors[:, 2] * 0.1])
    text = draw_contributions(["big", "none", "small"], added, vectors, categorical=(2,))
    root = parse(text)
    paths = root.findall(f".//{SVG}path")
    assert sum(path.get("d", "").count("M") for path in paths) == 600
    grey = [path for path in paths if path.get("stroke") == "#868e96"]
    assert sum(path.get("d", "").count("M") for path in grey) == 40 + 200  # null, and a category
    names = [t.text for t in root.findall(f"{SVG}text") if t.get("text-anchor") == "end"]
    assert names == ["big", "small", "none"]
    reach = 1.02 * float(np.abs(added).max())
    xs = sorted(
        float(point.split(" ")[0])
        for path in paths[:13]  # twelve colours and the grey of null: the first row
        for point in path.get("d", "")[1:].split("M")
    )
    middle = sorted(150 + (value / reach + 1) / 2 * 380 for value in added[:, 0])
    assert xs == pytest.approx(middle, abs=0.06)


def test_long_names_are_shortened_and_have_room() -> None:
    name = "a_view_with_a_long_name." + "feature" * 20
    root = parse(draw_importance({name: 1.0}))
    [shown] = [t for t in root.findall(f"{SVG}text") if t.get("text-anchor") == "end"]
    assert len(shown.text or "") == 60
    assert float(shown.get("x", 0)) > 60 * 6.2


def test_lowest_values_are_blue_and_highest_orange() -> None:
    vectors = np.arange(120.0)[:, None]
    root = parse(draw_contributions(["x"], vectors / 120, vectors))
    paths = root.findall(f".//{SVG}path")
    assert (paths[0].get("stroke"), paths[-1].get("stroke")) == (BLUE, ORANGE)
    assert len({path.get("stroke") for path in paths}) == 12


def test_names_are_text_never_markup() -> None:
    name = '<script>alert(1)</script> & "co"'
    pictures = [
        draw_importance({name: 1.0}),
        draw_learning({name: [0.5, 0.4]}, 1),
        draw_contributions([name], np.ones((3, 1)), np.ones((3, 1))),
        draw_calibration(calibration_table(*sample(100)), name),
    ]
    for text in pictures:
        assert "alert(1)" in words(parse(text))


@given(st.floats(-1e12, 1e12), st.floats(1e-9, 1e12))
def test_ticks_are_round_and_within(low: float, span: float) -> None:
    high = low + span
    found = ticks(low, high)
    slack = (high - low) * 1e-6 + abs(low) * 1e-9
    assert all(low - slack <= tick <= high + slack for tick in found)
    assert len(found) <= 7
    assert high <= low or span < abs(low) * 1e-6 or len(found) >= 2


def test_a_calibrated_picture_shows_both_curves() -> None:
    labels, scores = sample()
    bins = [calibration_table(labels, found) for found in (scores, scores**2)]
    alone, both = (draw_calibration(bins[0], "rate", before) for before in ((), bins[1]))
    assert "before calibration" not in words(parse(alone))
    root = parse(both)
    assert words(root).count("before calibration") == len(bins[1])
    assert {BLUE, ORANGE} <= {line.get("stroke") for line in root.iter(f"{SVG}polyline")}
    assert calibration_error(bins[0]) < 0.03
    # E |p - p^2| of uniform p is 1/6.
    assert calibration_error(bins[1]) == pytest.approx(1 / 6, abs=0.02)
