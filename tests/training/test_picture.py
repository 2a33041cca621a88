from xml.etree import ElementTree as ET

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlpd.training.auc import auc, roc_curve
from mlpd.training.evaluate import evaluate_binary
from mlpd.training.picture import draw_report

SVG = "{http://www.w3.org/2000/svg}"


def draw(labels: np.ndarray, scores: np.ndarray, title: str = "run 7") -> ET.Element:
    text = draw_report(title, labels, scores, evaluate_binary(labels, scores))
    assert len(text) < 10_000
    return ET.fromstring(text)


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


def test_the_picture_shows_the_curve_and_ten_calibration_dots() -> None:
    picture = draw(*sample())
    assert len(picture.findall(f".//{SVG}polyline")) == 2
    dots = picture.findall(f".//{SVG}circle")
    assert len(dots) == 10
    # Calibrated scores: every dot is near the diagonal, y running downwards from 260.
    assert all(abs(260 - float(d.get("cy", 0)) - float(d.get("cx", 0))) < 20 for d in dots)
    assert "AUC 0.8" in "".join(picture.itertext())


def test_one_class_leaves_the_roc_panel_empty() -> None:
    picture = draw(np.ones(50), np.linspace(0.1, 0.9, 50))
    assert len(picture.findall(f".//{SVG}polyline")) == 1
    assert "AUC" not in "".join(picture.itertext())


def test_a_title_is_text_never_markup() -> None:
    title = "<script>alert(1)</script> & co"
    picture = draw(*sample(100), title=title)
    assert picture.find(f".//{SVG}script") is None
    assert picture.findtext(f"{SVG}title") == title
