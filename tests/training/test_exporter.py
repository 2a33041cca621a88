import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import lightgbm
import numpy as np
import onnx
import pytest

from mlpd.core.errors import ValidationError
from mlpd.serving.link import Link
from mlpd.training.categories import BLOCK, build_columns
from mlpd.training.exporter import ZERO, effective_threshold, export_model
from mlpd.training.trees import parse_model

FUZZ_ROWS = 20_000
ROWS, FEATURES = 3_000, 8
BATCHES = (1, 2, 17, 256, 4096)
NUMBERS = [0.0, -0.0, 5e-324, -5e-324, 2.2e-308, ZERO, -ZERO, 1e-36, -1e-36, 1e300, -1e300]
NUMBERS += [np.nextafter(s * ZERO, s * np.inf) for s in (1, -1)]
NUMBERS += [np.nan, np.inf, -np.inf, sys.float_info.max, -sys.float_info.max, 1.0]
CODES = [-1e300, -(2.0**31) - 1, -2.0, -1.5, -1.0, -0.999, -0.5, -0.0, 0.0, 0.5, 3.7, 31.0, 32.0]
CODES += [30.999, 99.0, 2.0**31 - 1, 2.0**31, 2.0**32 + 3, 2.0**63, np.inf, -np.inf, np.nan]

Judge = Callable[..., Any]


@dataclass
class Kind:
    """One kind of model: what LightGBM is told, and how the training data differs."""

    params: dict[str, Any]
    rounds: int = 12
    categories: dict[int, int] = field(default_factory=dict)
    missing: float = 0.1
    positive: bool = False
    groups: int = 0
    chain: bool = False


FOREST = {"boosting": "rf", "bagging_freq": 1, "bagging_fraction": 0.5}
EVERY_SPLIT = {"min_sum_hessian_in_leaf": 0.0, "min_gain_to_split": 0.0, "max_bin": 1000}

KINDS = {
    "numeric": Kind({"objective": "binary"}),
    "never missing": Kind({"objective": "binary"}, missing=0),
    "missing disabled": Kind({"objective": "binary", "use_missing": False}),
    "zero is missing": Kind({"objective": "binary", "zero_as_missing": True}),
    "zero is missing, categorical": Kind(
        {"objective": "binary", "zero_as_missing": True}, categories={0: 5, 3: 60}
    ),
    "few categories": Kind({"objective": "binary"}, categories={0: 3, 1: 16, 2: 30}),
    "many categories": Kind({"objective": "binary"}, categories={0: 31, 4: 33, 5: 300}),
    "all categorical": Kind({"objective": "binary"}, categories=dict.fromkeys(range(8), 20)),
    "one against the rest": Kind(
        {"objective": "binary", "max_cat_to_onehot": 64}, categories={0: 40, 1: 2}
    ),
    "regression": Kind({"objective": "regression"}, categories={2: 12}),
    "regression on roots": Kind({"objective": "regression", "reg_sqrt": True}),
    "absolute error": Kind({"objective": "l1"}),
    "absolute error on roots": Kind({"objective": "l1", "reg_sqrt": True}),
    "huber": Kind({"objective": "huber"}, categories={2: 12}),
    "fair": Kind({"objective": "fair"}),
    "quantile": Kind({"objective": "quantile", "alpha": 0.8}),
    "mape": Kind({"objective": "mape"}, positive=True),
    "poisson": Kind({"objective": "poisson"}),
    "gamma": Kind({"objective": "gamma"}, positive=True),
    "tweedie": Kind({"objective": "tweedie", "tweedie_variance_power": 1.3}, categories={1: 40}),
    "scaled sigmoid": Kind({"objective": "binary", "sigmoid": 0.7}),
    "small sigmoid": Kind({"objective": "binary", "sigmoid": 0.0123456789}),
    "unbalanced classes": Kind({"objective": "binary", "is_unbalance": True, "sigmoid": 3.0}),
    "cross entropy": Kind({"objective": "cross_entropy"}),
    "lambdarank": Kind({"objective": "lambdarank"}, categories={0: 9}, groups=20),
    "xendcg": Kind({"objective": "rank_xendcg"}, groups=20),
    "random forest": Kind({"objective": "binary", "sigmoid": 0.7, **FOREST}, categories={0: 9}),
    "random forest of numbers": Kind({"objective": "regression", "reg_sqrt": True, **FOREST}),
    "random forest of classes": Kind({"objective": "multiclass", "num_class": 3, **FOREST}),
    "dart of numbers": Kind({"objective": "regression", "boosting": "dart", "drop_rate": 0.5}),
    "dart": Kind({"objective": "binary", "boosting": "dart"}, categories={0: 9}),
    "multiclass": Kind({"objective": "multiclass", "num_class": 3}, categories={1: 7}),
    "one versus all": Kind({"objective": "multiclassova", "num_class": 3, "sigmoid": 1.7}),
    "unbalanced": Kind({"objective": "binary", "num_leaves": 200, "min_data_in_leaf": 1}, rounds=5),
    "500 leaves": Kind(
        {"objective": "regression", "num_leaves": 500, "min_data_in_leaf": 1, **EVERY_SPLIT},
        rounds=3,
        categories={5: 200},
    ),
    "a chain of leaves": Kind(
        {"objective": "regression", "num_leaves": 500, "min_data_in_leaf": 1, **EVERY_SPLIT}
        | {"boost_from_average": False},
        rounds=2,
        chain=True,
    ),
    "two leaves": Kind({"objective": "binary", "num_leaves": 2}, rounds=3),
    "stumps": Kind({"objective": "binary", "min_data_in_leaf": ROWS}, rounds=3),
    "many trees": Kind({"objective": "binary", "num_leaves": 4}, rounds=300, categories={0: 12}),
}
_trained: dict[str, str] = {}


def train_text(name: str) -> str:
    if name not in _trained:
        _trained[name] = _train(KINDS[name])
    return _trained[name]


def _train(kind: Kind) -> str:
    rng = np.random.default_rng(7)
    rows = rng.normal(size=(ROWS, FEATURES)) * 10.0 ** rng.integers(-3, 4, FEATURES)
    rows[rng.random(rows.shape) < 0.1] = 0.0
    for column, cardinality in kind.categories.items():
        rows[:, column] = rng.integers(0, cardinality, ROWS)
    score = np.sin(rows * 3).sum(axis=1) + (rows[:, 0] > 0)
    rows[rng.random(rows.shape) < kind.missing] = np.nan
    classes = kind.params.get("num_class", 2)
    label = np.digitize(score, np.quantile(score, np.linspace(0, 1, classes + 1)[1:-1]))
    if kind.chain:  # one feature, 4 times as much every 50 rows: each split cuts off the largest
        rank = np.argsort(np.argsort(np.nan_to_num(rows[:, 1])))
        label = 4.0 ** (rank // 50 - 30)
        rows[:, np.arange(FEATURES) != 1] = 1.0
    label = label + kind.positive
    defaults = {"verbose": -1, "num_threads": 1, "min_data_per_group": 5, "cat_smooth": 1.0}
    data = lightgbm.Dataset(
        rows,
        label.astype(float),
        group=[kind.groups] * (ROWS // kind.groups) if kind.groups else None,
        categorical_feature=list(kind.categories),
        params=defaults,
    )
    return lightgbm.train(defaults | kind.params, data, kind.rounds).model_to_string()


def numbers_in(text: str, name: str) -> list[list[float]]:
    return [
        [float(x) for x in line.split()]
        for line in re.findall(rf"^{name}=(.*)$", text, re.MULTILINE)
    ]


def fuzz(text: str, categories: dict[int, int]) -> np.ndarray:
    """Rows of thresholds and their neighbours, ordinary values and oddities, mixed at random."""
    rng = np.random.default_rng(11)
    rows = rng.normal(size=(FUZZ_ROWS, FEATURES)) * 10.0 ** rng.integers(-4, 5, FEATURES)
    thresholds: dict[int, list[float]] = {}
    names = ("split_feature", "threshold")
    for features, values in zip(*(numbers_in(text, name) for name in names), strict=True):
        for feature, value in zip(features, values, strict=True):
            thresholds.setdefault(int(feature), []).append(value)
    for column in range(FEATURES):
        if column in categories:
            codes = np.arange(-2, categories[column] + 3)
            near = rng.choice(codes, FUZZ_ROWS) + rng.choice([0.0, 0.3, 0.999999], FUZZ_ROWS)
            odd = rng.choice(CODES, FUZZ_ROWS)
        else:
            at = rng.choice(thresholds.get(column, [0.0]), FUZZ_ROWS)
            with np.errstate(over="ignore"):
                neighbours = [at, np.nextafter(at, np.inf), np.nextafter(at, -np.inf)]
            near = np.choose(rng.integers(0, 3, FUZZ_ROWS), neighbours)
            odd = rng.choice(NUMBERS, FUZZ_ROWS)
        pick = rng.integers(0, 3, FUZZ_ROWS)
        rows[:, column] = np.choose(pick, [rows[:, column], near, odd])
    return rows


def assert_bits_equal(found: np.ndarray, expected: np.ndarray) -> None:
    assert found.shape == expected.shape
    different = np.flatnonzero((found.view(np.int64) != expected.view(np.int64)).any(axis=1))
    assert len(different) == 0, f"{len(different)} rows differ, the first is {different[0]}"


@pytest.mark.parametrize("name", KINDS)
def test_raw_scores_are_bit_equal_to_lightgbm(
    name: str, onnx_scores: Judge, lightgbm_scores: Judge
) -> None:
    text = train_text(name)
    rows = fuzz(text, KINDS[name].categories)
    exported = export_model(text)
    expected = lightgbm_scores(text)(rows)
    assert expected.shape == (FUZZ_ROWS, exported.outputs)
    assert_bits_equal(onnx_scores(exported.onnx)(rows), expected)


@pytest.mark.parametrize("name", KINDS)
def test_final_scores_are_bit_equal_to_lightgbm(name: str, onnx_scores: Judge) -> None:
    text = train_text(name)
    rows = fuzz(text, KINDS[name].categories)
    exported = export_model(text)
    booster = lightgbm.Booster(model_str=text)
    expected = np.asarray(booster.predict(rows, num_threads=1)).reshape(len(rows), -1)
    found = Link(exported.link)(onnx_scores(exported.onnx)(rows))
    assert_bits_equal(found, expected)


def test_trees_are_as_large_and_as_lopsided_as_their_names_say() -> None:
    leaves = {name: numbers_in(train_text(name), "num_leaves") for name in KINDS}
    assert max(leaves["500 leaves"])[0] == 500
    assert deepest(train_text("a chain of leaves")) > 40
    assert {count for (count,) in leaves["stumps"]} == {1}


def deepest(text: str) -> int:
    """Return the depth of the deepest leaf of all trees."""
    found = 0
    for left, right in zip(
        numbers_in(text, "left_child"), numbers_in(text, "right_child"), strict=True
    ):
        depth = {0: 1}
        for node in range(len(left)):
            for child in (int(left[node]), int(right[node])):
                depth[child] = depth[node] + 1
        found = max(found, *depth.values())
    return found


@pytest.mark.parametrize("name", ["few categories", "multiclass", "many trees", "zero is missing"])
@pytest.mark.parametrize("batch", BATCHES)
def test_the_batch_size_never_shows(
    name: str, batch: int, onnx_scores: Judge, lightgbm_scores: Judge
) -> None:
    text = train_text(name)
    rows = fuzz(text, KINDS[name].categories)[: min(64 * batch, 2 * 4096)]
    score = onnx_scores(export_model(text).onnx)
    found = np.concatenate([score(rows[i : i + batch]) for i in range(0, len(rows), batch)])
    assert_bits_equal(found, lightgbm_scores(text)(rows))


@pytest.mark.parametrize("name", ["numeric", "never missing", "missing disabled"])
@pytest.mark.parametrize(
    "threshold",
    [
        "inf",
        "-inf",
        "1e+300",
        "0",
        "-0",
        "1e-36",
        "-1e-36",
        "1.0000000180025095e-35",
        "-1.0000000180025095e-35",
        "4.9406564584124654e-324",
        "1.7976931348623157e+308",
    ],
)
def test_thresholds_at_the_ends_and_around_zero_split_like_lightgbm(
    name: str, threshold: str, onnx_scores: Judge, lightgbm_scores: Judge
) -> None:
    text = re.sub(
        r"^(threshold)=(\S+) (\S+)",
        rf"\1={threshold} {threshold}",
        train_text(name),
        flags=re.MULTILINE,
    )
    text = re.sub(r"^tree_sizes=.*\n", "", text, flags=re.MULTILINE)
    rows = fuzz(text, {})
    assert_bits_equal(onnx_scores(export_model(text).onnx)(rows), lightgbm_scores(text)(rows))


def test_effective_threshold_moves_only_what_lies_in_the_zero_band() -> None:
    inside, outside = np.array([0.0, 1e-36, ZERO, -1e-36, -ZERO]), np.array([1.0, -1e-34, np.inf])
    below = np.nextafter(-ZERO, -np.inf)
    assert effective_threshold(inside).tolist() == [ZERO, ZERO, ZERO, below, below]
    assert effective_threshold(outside).tolist() == outside.tolist()


@pytest.mark.parametrize(
    ("params", "reason"),
    [
        ({"objective": "regression", "linear_tree": True}, "linear_tree"),
        ({"objective": "cross_entropy_lambda"}, "cross_entropy_lambda"),
    ],
)
def test_what_has_no_exact_export_is_refused_by_name(params: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValidationError, match=reason) as refusal:
        export_model(_train(Kind(params)))
    assert refusal.value.code == "export_unsupported"


def test_a_custom_objective_is_refused() -> None:
    text = re.sub(r"^objective=.*\n", "", train_text("numeric"), flags=re.MULTILINE)
    with pytest.raises(ValidationError, match="None") as refusal:
        export_model(text)
    assert refusal.value.code == "export_unsupported"


def test_a_feature_with_two_readings_of_zero_is_refused() -> None:
    text = re.sub(
        r"^decision_type=\d+", "decision_type=6", train_text("numeric"), flags=re.MULTILINE
    )
    with pytest.raises(ValidationError, match="0 as missing in some splits only") as refusal:
        export_model(text)
    assert refusal.value.code == "export_unsupported"


@pytest.mark.parametrize(
    ("bound", "value", "without"),
    [("COLUMNS_MAX", BLOCK, {1, 2}), ("TABLE_BYTES_MAX", 80 * BLOCK * 8, {2})],
)
def test_sets_that_have_no_room_in_columns_are_tested_as_they_are(
    bound: str,
    value: int,
    without: set[int],
    monkeypatch: pytest.MonkeyPatch,
    onnx_scores: Judge,
    lightgbm_scores: Judge,
) -> None:
    kind = Kind({"objective": "binary"}, categories={0: 12, 1: 60, 2: 300})
    text = _train(kind)
    monkeypatch.setattr(f"mlpd.training.categories.{bound}", value)
    columns = build_columns(parse_model(text).trees, FEATURES)
    assert columns is not None
    assert {feature for feature, _ in columns.places} == {0, 1, 2} - without
    rows = fuzz(text, kind.categories)
    assert_bits_equal(onnx_scores(export_model(text).onnx)(rows), lightgbm_scores(text)(rows))


@pytest.mark.parametrize("name", ["numeric", "few categories", "zero is missing, categorical"])
def test_the_graph_is_one_float64_tree_ensemble_that_onnx_accepts(name: str) -> None:
    exported = export_model(train_text(name))
    model = onnx.load_from_string(exported.onnx)
    onnx.checker.check_model(model, full_check=True)
    *before, node = model.graph.node
    assert [(node.op_type, node.domain)] == [("TreeEnsemble", "ai.onnx.ml")]
    assert bool(before) == bool(KINDS[name].categories)
    (source,), (target,) = model.graph.input, model.graph.output
    for value, called, width in ((source, "features", FEATURES), (target, "raw_score", 1)):
        assert value.name == called
        assert value.type.tensor_type.elem_type == onnx.TensorProto.DOUBLE
        assert value.type.tensor_type.shape.dim[1].dim_value == width


def test_the_same_text_gives_the_same_bytes_and_another_tree_another_digest() -> None:
    text = train_text("numeric")
    first, again = export_model(text), export_model(text)
    assert (first.onnx, first.tree_digest) == (again.onnx, again.tree_digest)
    (leaf,) = re.search(r"^leaf_value=(\S+)", text, re.MULTILINE).groups()
    moved = text.replace(leaf, repr(float(np.nextafter(float(leaf), 1.0))), 1)
    assert export_model(moved).tree_digest != first.tree_digest


def test_names_and_outputs_travel_with_the_model() -> None:
    exported = export_model(train_text("multiclass"))
    assert exported.feature_names == tuple(f"Column_{i}" for i in range(FEATURES))
    assert exported.outputs == 3
    assert exported.link == {"kind": "softmax"}
