import re
from collections.abc import Iterator
from typing import Any

import lightgbm
import numpy as np
import pytest

from mlpd.core.errors import ValidationError
from mlpd.training.trees import MISSING_NAN, MISSING_NONE, MISSING_ZERO, parse_model


def train(*, rounds: int = 3, categorical: tuple[int, ...] = (), **params: Any) -> lightgbm.Booster:
    rng = np.random.default_rng(1)
    rows = rng.normal(size=(500, 3))
    rows[:, 2] = rng.integers(0, 70, 500)
    label = (rows[:, 0] + (rows[:, 2] % 3 == 0)).round()
    defaults = {
        "verbose": -1,
        "num_threads": 1,
        "min_data_in_leaf": 2,
        "min_data_per_group": 2,
        "cat_smooth": 1,
    }
    data = lightgbm.Dataset(rows, label, categorical_feature=list(categorical))
    return lightgbm.train(defaults | {"objective": "l2"} | params, data, rounds)


def walk(node: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield dump_model's inner nodes in split order: an independent reading of the same trees."""
    if "split_index" in node:
        yield node
        yield from walk(node["left_child"])
        yield from walk(node["right_child"])


def test_the_text_parses_to_what_dump_model_shows() -> None:
    booster = train(categorical=(2,))
    model = parse_model(booster.model_to_string())
    dump = booster.dump_model()
    assert model.feature_names == tuple(dump["feature_names"])
    assert len(model.trees) == len(dump["tree_info"])
    seen = {"<=": 0, "==": 0}
    for tree, shown in zip(model.trees, dump["tree_info"], strict=True):
        for node in walk(shown["tree_structure"]):
            i = node["split_index"]
            assert tree.split_feature[i] == node["split_feature"]
            assert tree.default_left[i] == node["default_left"]
            assert tree.categorical[i] == (node["decision_type"] == "==")
            seen[node["decision_type"]] += 1
            if tree.categorical[i]:
                members = [int(code) for code in node["threshold"].split("||")]
                assert tree.categories[int(tree.threshold[i])].tolist() == members
            else:
                assert tree.threshold[i] == node["threshold"]
    assert min(seen.values()) > 5


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({}, MISSING_NONE),
        ({"zero_as_missing": True}, MISSING_ZERO),
    ],
)
def test_missing_types_are_read_from_the_decision_bits(
    params: dict[str, Any], expected: int
) -> None:
    trees = parse_model(train(**params).model_to_string()).trees
    assert {int(kind) for tree in trees for kind in tree.missing_type} == {expected}


def test_missing_nan_is_read_where_training_saw_nan() -> None:
    rows = np.array([[1.0], [2.0], [np.nan], [4.0]] * 50)
    data = lightgbm.Dataset(rows, np.array([0.0, 1.0, 2.0, 3.0] * 50))
    text = lightgbm.train({"verbose": -1, "objective": "l2"}, data, 1).model_to_string()
    (tree,) = parse_model(text).trees
    assert set(tree.missing_type.tolist()) == {MISSING_NAN}


def test_a_tree_without_splits_has_one_leaf() -> None:
    (tree,) = parse_model(train(rounds=1, min_data_in_leaf=500).model_to_string()).trees
    assert (len(tree.split_feature), len(tree.leaf_value)) == (0, 1)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("version", ""),
        ("version", "tree\nversion=v3\n"),
        ("feature_names", "tree\nversion=v4\nnum_tree_per_iteration=1\n"),
    ],
)
def test_a_text_that_is_no_model_is_an_error_that_names_the_field(name: str, text: str) -> None:
    with pytest.raises(ValidationError, match=name) as refusal:
        parse_model(text)
    assert refusal.value.code == "model_text"


def test_a_truncated_tree_is_an_error() -> None:
    text = re.sub(r"^leaf_value=\S+ ", "leaf_value=", train().model_to_string(), flags=re.MULTILINE)
    with pytest.raises(ValidationError, match="'leaf_value' has") as refusal:
        parse_model(text)
    assert refusal.value.code == "model_text"


def test_the_digest_sees_structure_and_values_but_not_names() -> None:
    text = train().model_to_string()
    digest = parse_model(text).digest
    assert parse_model(text.replace("Column_0", "renamed")).digest == digest
    for line in ("split_feature", "threshold", "decision_type", "leaf_value"):
        changed = re.sub(rf"^({line}=)\S+", r"\g<1>1", text, count=1, flags=re.MULTILINE)
        assert parse_model(changed).digest != digest, line
