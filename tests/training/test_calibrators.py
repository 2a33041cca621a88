"""Calibrators: known answers, and the graph's bits are those of the reference."""

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from scipy.optimize import minimize  # type: ignore[import-untyped]  # ships no types

from mlpd.core.errors import ValidationError
from mlpd.training.calibrators import (
    Calibrator,
    Isotonic,
    Sigmoid,
    add_calibrator,
    fit_calibrator,
)

METHODS = ("isotonic", "sigmoid")


def identity_graph() -> bytes:
    """Return a graph whose raw score is its one feature."""
    graph = helper.make_graph(
        [helper.make_node("Identity", ["features"], ["raw_score"])],
        "one",
        [helper.make_tensor_value_info("features", TensorProto.DOUBLE, [None, 1])],
        [helper.make_tensor_value_info("raw_score", TensorProto.DOUBLE, [None, 1])],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("ai.onnx.ml", 5)]
    made: bytes = helper.make_model(graph, ir_version=10, opset_imports=opsets).SerializeToString()
    return made


def sample(rows: int, seed: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """Return raw scores that promise too much, and labels."""
    rng = np.random.default_rng(seed)
    raw = rng.normal(size=rows) * 3
    chances = 1 / (1 + np.exp(-(0.4 * raw - 1)))
    return raw, (rng.random(rows) < chances).astype(np.float64)


def bits(values: np.ndarray) -> list[int]:
    return np.ascontiguousarray(values).view(np.int64).ravel().tolist()


def edges(calibrator: Calibrator) -> list[float]:
    """Return values where a search could go wrong: knots, the doubles beside them, and the ends."""
    found = [0.0, -0.0, 5e-324, 1e-35, -1e-35, 1e300, -1e300, math.inf, -math.inf]
    if isinstance(calibrator, Isotonic):
        for knot in calibrator.knots.tolist():
            found += [knot, math.nextafter(knot, -math.inf), math.nextafter(knot, math.inf)]
    return found


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("rows", [90, 2_000])
def test_a_graph_gives_the_bits_of_the_reference(method: Any, rows: int, onnx_scores: Any) -> None:
    raw, labels = sample(rows)
    calibrator = fit_calibrator(method, raw, labels)
    graph = add_calibrator(identity_graph(), calibrator)
    assert graph == add_calibrator(identity_graph(), fit_calibrator(method, raw, labels))
    run = onnx_scores(graph)
    fuzz = np.random.default_rng(1).normal(size=20_000) * 4
    asked = np.array([*raw, *edges(calibrator), *fuzz]).reshape(-1, 1)
    whole = run(asked)
    assert bits(whole) == bits(calibrator(asked))
    some = asked[:: len(asked) // 50]
    alone = np.concatenate([run(some[i : i + 1]) for i in range(len(some))])
    assert bits(alone) == bits(whole[:: len(asked) // 50])


KNOTS = st.floats(-1e9, 1e9, width=32)
"""Not closer than 1e-45: what rises by 0.1 over less is steeper than any number, and stays flat."""


@given(
    st.lists(KNOTS, min_size=1, max_size=40, unique=True),
    st.lists(st.floats(-1e9, 1e9), min_size=1, max_size=20),
    st.integers(0, 2**32 - 1),
)
@settings(max_examples=60)
def test_any_knots_are_found_and_chances_never_fall(
    onnx_scores: Any, knots: list[float], asked: list[float], seed: int
) -> None:
    chances = np.sort(np.random.default_rng(seed).random(len(knots)))
    calibrator = Isotonic(np.sort(np.array(knots)), chances)
    values = np.sort(np.array([*asked, *edges(calibrator)]))
    found = calibrator(values.reshape(-1, 1))
    assert bits(onnx_scores(add_calibrator(identity_graph(), calibrator))(values[:, None])) == bits(
        found
    )
    assert (np.diff(found[:, 0]) >= 0).all()
    assert found.min() >= chances[0]
    assert found.max() <= chances[-1]
    within = np.interp(values, calibrator.knots, chances)
    steep = np.abs(np.diff(found[:, 0]) - np.diff(within)).max() if len(values) > 1 else 0.0
    assert steep < 1e-6


def test_platts_scaling_is_the_maximum_of_its_likelihood() -> None:
    raw, labels = sample(3_000)
    found = fit_calibrator("sigmoid", raw, labels)
    assert isinstance(found, Sigmoid)
    ones = labels.sum()
    zeros = len(labels) - ones
    wanted = np.where(labels == 1, (ones + 1) / (ones + 2), 1 / (zeros + 2))

    def loss(at: np.ndarray) -> float:
        logits = at[0] * raw + at[1]
        return float(np.sum(np.logaddexp(0, logits) - wanted * logits))

    best = minimize(loss, [0.0, 0.0], method="BFGS", options={"gtol": 1e-6}).x
    assert (found.slope, found.offset) == pytest.approx(best, rel=1e-5)
    assert (found.slope, found.offset) == pytest.approx((0.4, -1), abs=0.15)


@pytest.mark.parametrize("scale", [1e-9, 1.0, 1e6])
def test_platts_scaling_minds_no_scale(scale: float) -> None:
    raw, labels = sample(2_000)
    usual, scaled = (fit_calibrator("sigmoid", raw * by, labels) for by in (1.0, scale))
    assert isinstance(usual, Sigmoid)
    assert isinstance(scaled, Sigmoid)
    assert scaled.slope * scale == pytest.approx(usual.slope, rel=1e-7)


@pytest.mark.parametrize("method", METHODS)
def test_separated_classes_give_finite_chances(method: Any) -> None:
    raw = np.linspace(-1, 1, 200)
    labels = (raw > 0).astype(np.float64)
    found = fit_calibrator(method, raw, labels)
    served = found(raw.reshape(-1, 1))
    assert np.isfinite(served).all()
    assert served[0, 0] < served[-1, 0]
    if method == "isotonic":
        assert (served.min(), served.max()) == (1 / 202, 1 - 1 / 202)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["falling", "constant"])
def test_scores_that_mean_nothing_are_refused(method: Any, kind: str) -> None:
    raw = np.linspace(-1, 1, 200)
    labels = (raw < 0).astype(np.float64)
    with pytest.raises(ValidationError) as caught:
        fit_calibrator(method, raw if kind == "falling" else np.ones(200), labels)
    assert caught.value.code == "not_calibratable"


@pytest.mark.parametrize("method", METHODS)
def test_a_class_with_few_validation_rows_is_refused(method: Any) -> None:
    raw, labels = np.linspace(-1, 1, 200), np.zeros(200)
    labels[-19:] = 1
    with pytest.raises(ValidationError, match="19 validation rows are of class 1"):
        fit_calibrator(method, raw, labels)
