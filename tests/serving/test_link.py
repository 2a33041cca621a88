import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlpd.core.errors import ValidationError
from mlpd.serving.link import NATIVE_FROM, Link

SIGMOID = {"kind": "sigmoid", "scale": 1.7}
ODD = [0.0, -0.0, 1.0, -1.0, 709.7, 710.0, -746.0, 1e308, -1e308, math.inf, -math.inf, 5e-324]


def bits(values: np.ndarray) -> list[int]:
    return values.view(np.int64).ravel().tolist()


def test_sigmoid_is_the_written_formula_with_its_own_scale() -> None:
    raw = np.random.default_rng(1).normal(size=(1000, 1)) * 5
    expected = [1.0 / (1.0 + math.exp(-1.7 * x)) for x in raw.ravel().tolist()]
    assert Link(SIGMOID)(raw).ravel().tolist() == expected


@pytest.mark.parametrize("spec", [SIGMOID, {"kind": "exp"}])
def test_few_and_many_rows_give_the_same_bits(spec: dict[str, Any]) -> None:
    raw = np.concatenate([ODD, np.random.default_rng(2).normal(size=5000) * 30])[:, None]
    link = Link(spec)
    one_by_one = np.concatenate([link(row[None, :]) for row in raw])
    assert len(raw) > NATIVE_FROM
    assert bits(link(raw)) == bits(one_by_one)


@pytest.mark.parametrize("spec", [SIGMOID, {"kind": "identity"}, {"kind": "softmax"}])
def test_a_forests_sums_are_divided_first(spec: dict[str, Any]) -> None:
    raw = np.random.default_rng(3).normal(size=(40, 3)) * 30
    assert bits(Link({**spec, "average_of": 7})(raw)) == bits(Link(spec)(raw / 7))


@pytest.mark.parametrize("rounds", [0, -1, 2.5, None])
def test_a_number_of_trees_that_is_none_is_refused(rounds: Any) -> None:
    with pytest.raises(ValidationError):
        Link({"kind": "identity", "average_of": rounds})


@pytest.mark.parametrize("spec", [SIGMOID, {"kind": "exp"}])
def test_nan_stays_nan(spec: dict[str, Any]) -> None:
    for rows in (1, NATIVE_FROM):
        assert np.isnan(Link(spec)(np.full((rows, 1), math.nan))).all()


@given(st.lists(st.floats(-800, 800), min_size=2, max_size=6), st.integers(1, 3))
def test_softmax_is_summed_from_the_first_output_upwards(values: list[float], rows: int) -> None:
    exps = [math.exp(x - max(values)) for x in values]
    total = 0.0
    for value in exps:
        total += value
    scores = Link({"kind": "softmax"})(np.array([values] * rows))
    assert scores.tolist() == [[value / total for value in exps]] * rows


def test_identity_and_reg_sqrt() -> None:
    raw = np.array([[-3.0], [0.0], [2.5]])
    scores = Link({"kind": "identity"})(raw)
    assert scores.tolist() == raw.tolist()
    assert scores is not raw
    assert Link({"kind": "reg_sqrt"})(raw).ravel().tolist() == [-9.0, 0.0, 6.25]


@pytest.mark.parametrize(
    "spec",
    [{}, {"kind": "tanh"}, {"kind": "sigmoid"}, {"kind": "exp", "scale": 2.0}, {"scale": 1.0}],
)
def test_an_unknown_link_is_refused(spec: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="unknown") as caught:
        Link(spec)
    assert caught.value.code == "unknown_link"


@pytest.mark.parametrize(
    "params",
    [
        {"objective": "binary"},
        {"objective": "binary", "sigmoid": 2.5},
        {"objective": "cross_entropy"},
        {"objective": "multiclass", "num_class": 3},
        {"objective": "multiclassova", "num_class": 3, "sigmoid": 0.7},
        {"objective": "regression"},
        {"objective": "regression", "reg_sqrt": True},
        {"objective": "poisson"},
    ],
    ids=lambda params: "-".join(map(str, params.values())),
)
def test_scores_equal_lightgbm_to_the_bit(params: dict[str, Any]) -> None:
    import lightgbm  # noqa: PLC0415 - slow to import, only this test pays

    from mlpd.training.exporter import export_model  # noqa: PLC0415

    rng = np.random.default_rng(3)
    rows = rng.normal(size=(3000, 4))
    classes = params.get("num_class", 2)
    label = np.clip(rows[:, 0] + rng.normal(size=3000) + 1, 0, classes - 1).astype(int)
    data = lightgbm.Dataset(rows, label)
    booster = lightgbm.train(
        {**params, "verbosity": -1, "num_threads": 1, "seed": 1}, data, num_boost_round=8
    )
    text = booster.model_to_string()
    booster = lightgbm.Booster(model_str=text)
    raw = booster.predict(rows, raw_score=True, num_threads=1).reshape(3000, -1)
    expected = booster.predict(rows, num_threads=1).reshape(3000, -1)
    link = Link(export_model(text).link)
    assert bits(link(raw)) == bits(expected)
    assert bits(np.concatenate([link(row[None, :]) for row in raw[:200]])) == bits(expected[:200])
