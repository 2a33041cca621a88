import json
from collections.abc import Callable
from functools import cache
from typing import Any

import lightgbm
import numpy as np
import onnx
import pytest

from mlpd.core.errors import ValidationError
from mlpd.core.trainers import FittedModel
from mlpd.training import parity
from mlpd.training.certificate import certify_scores
from mlpd.training.exporter import export_model
from mlpd.training.parity import parity_rows
from mlpd.training.trees import parse_model

FEATURES = 6


@cache
def train(classes: int = 1) -> tuple[str, np.ndarray]:
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(4_000, FEATURES))
    rows[:, 0] = rng.integers(0, 9, 4_000)
    rows[:, 1] = rng.integers(0, 90, 4_000)
    score = np.sin(3 * rows[:, 2:]).sum(axis=1) + (rows[:, 0] % 2) + (rows[:, 1] % 3)
    rows[rng.random(rows.shape) < 0.05] = np.nan
    labels = np.digitize(score, np.quantile(score, [0.3, 0.6])[:classes])
    quiet = {"verbose": -1, "num_threads": 1, "cat_smooth": 1, "min_data_per_group": 5}
    if classes == 1:
        params: dict[str, Any] = {"objective": "binary"}
    else:
        params = {"objective": "multiclass", "num_class": classes + 1}
    data = lightgbm.Dataset(rows, labels, categorical_feature=[0, 1], params=quiet)
    return lightgbm.train(quiet | params, data, 15).model_to_string(), rows


def certify(text: str, rows: np.ndarray, served: Callable[[np.ndarray], Any]) -> dict[str, Any]:
    """Compare `served` with LightGBM, which loads the text afresh."""
    booster = lightgbm.Booster(model_str=text)
    raw = booster.predict(rows, raw_score=True, num_threads=1)
    fitted = FittedModel(
        onnx=b"",
        rows=rows,
        scores=raw.reshape(len(rows), booster.num_model_per_iteration()),
        trainer=f"lightgbm {lightgbm.__version__}",
        params={},
        digest=parse_model(text).digest,
        raw=True,
    )
    return certify_scores(fitted, served(rows))


@pytest.mark.parametrize("classes", [1, 2])
def test_an_exported_model_is_certified_bit_equal(
    classes: int, onnx_scores: Callable[..., Any]
) -> None:
    text, sample = train(classes)
    exported = export_model(text)
    rows = parity_rows(text, sample)
    certificate = certify(text, rows, onnx_scores(exported.onnx))
    assert (certificate["verdict"], certificate["different"]) == ("bit_equal", 0)
    assert certificate["rows"] == certificate["bit_equal"] == len(rows) > len(sample) + 1_000
    assert certificate["worst_difference"] == 0.0
    assert certificate["tree_digest"] == exported.tree_digest


def test_rows_start_with_the_sample_and_differ_from_it_in_one_feature() -> None:
    text, sample = train()
    rows = parity_rows(text, sample)
    assert rows[: len(sample)].tobytes() == sample.tobytes()
    without = [{np.delete(row, i).tobytes() for row in sample} for i in range(FEATURES)]
    for row in rows[len(sample) :: 7]:
        assert any(np.delete(row, i).tobytes() in without[i] for i in range(FEATURES))


def test_every_threshold_is_met_and_passed_on_both_sides() -> None:
    text, sample = train()
    added = parity_rows(text, sample)[len(sample) :]
    for tree in parse_model(text).trees:
        for node in np.flatnonzero(~tree.categorical):
            present = set(added[:, tree.split_feature[node]].tolist())
            at = tree.threshold[node]
            assert {at, np.nextafter(at, np.inf), np.nextafter(at, -np.inf)} <= present


def test_odd_numbers_and_categories_are_among_the_rows() -> None:
    text, sample = train()
    added = parity_rows(text, sample)[len(sample) :]
    for column in range(FEATURES):
        values = added[:, column]
        assert np.isnan(values).sum() >= 16
        assert {np.inf, -np.inf, 0.0} <= set(values.tolist())
    for column in (0, 1):
        codes = added[np.isfinite(added[:, column]), column]
        assert {-1.0, -0.5, 2.0**31, 2.0**32} <= set(codes.tolist())
        assert ((codes % 1 == 0.75) & (codes > 0)).any()
    assert {5e-324, -5e-324} <= set(added[:, 3].tolist())


def test_edge_rows_reach_the_node_whose_edge_they_stand_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One tree: a row at the threshold and a row just past it must differ in their leaf."""
    monkeypatch.setattr(parity, "_ROWS_PER_ODD", 0)
    rng = np.random.default_rng(1)
    sample = rng.normal(size=(3_000, 3))
    params = {"verbose": -1, "num_threads": 1, "objective": "l2", "num_leaves": 40}
    booster = lightgbm.train(params, lightgbm.Dataset(sample, np.sin(4 * sample).sum(axis=1)), 1)
    (tree,) = parse_model(booster.model_to_string()).trees
    edges = parity_rows(booster.model_to_string(), sample)[len(sample) :]
    leaves = booster.predict(edges, pred_leaf=True).reshape(len(tree.threshold), 3)
    assert (leaves[:, 0] != leaves[:, 2]).all()  # the threshold goes left, the double above right


def test_the_same_call_gives_the_same_rows_and_too_many_edges_are_thinned(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    text, sample = train()
    assert parity_rows(text, sample).tobytes() == parity_rows(text, sample).tobytes()
    monkeypatch.setattr(parity, "EDGE_ROWS_MAX", 500)
    assert len(parity_rows(text, sample)) == len(sample) + 500


def test_a_single_bit_in_a_single_row_is_seen(lightgbm_scores: Callable[..., Any]) -> None:
    text, sample = train()

    def almost(rows: np.ndarray) -> np.ndarray:
        scores = lightgbm_scores(text)(rows)
        scores[17] = np.nextafter(scores[17], np.inf)
        return scores

    certificate = certify(text, sample, almost)
    assert (certificate["verdict"], certificate["different"]) == ("different", 1)
    assert certificate["bit_equal"] == len(sample) - 1
    assert 0 < certificate["worst_difference"] < 1e-12


def test_the_sign_of_a_zero_is_a_bit_too() -> None:
    _, sample = train()
    fitted = FittedModel(
        b"", sample[:2], np.zeros((2, 1)), trainer="t", params={}, digest="d", raw=True
    )
    assert certify_scores(fitted, np.array([[0.0], [-0.0]]))["different"] == 1


def test_a_score_that_is_not_finite_has_no_size(
    lightgbm_scores: Callable[..., Any],
) -> None:
    text, sample = train()
    certificate = certify(text, sample, lambda rows: lightgbm_scores(text)(rows) * np.nan)
    assert certificate["different"] == len(sample)
    assert certificate["worst_difference"] is None


def test_a_wrong_graph_is_found(onnx_scores: Callable[..., Any]) -> None:
    """Thresholds as float32, as other exporters write them."""
    text, sample = train()
    graph = onnx.load_from_string(export_model(text).onnx)
    (splits,) = (a for a in graph.graph.node[-1].attribute if a.name == "nodes_splits")
    rounded = onnx.numpy_helper.to_array(splits.t).astype(np.float32).astype(np.float64)
    splits.t.CopyFrom(onnx.numpy_helper.from_array(rounded))
    certificate = certify(text, parity_rows(text, sample), onnx_scores(graph.SerializeToString()))
    assert certificate["verdict"] == "different"


def test_no_rows_prove_nothing(lightgbm_scores: Callable[..., Any]) -> None:
    text, sample = train()
    certificate = certify(text, sample[:1], lightgbm_scores(text))
    assert certificate["verdict"] == "bit_equal"
    with pytest.raises(ValidationError) as refusal:
        certify(text, sample[:0], lambda _: np.zeros((0, 1)))
    assert refusal.value.code == "wrong_shape"


def test_the_certificate_is_json_and_its_digests_follow_rows_and_scores(
    lightgbm_scores: Callable[..., Any],
) -> None:
    text, sample = train()
    score = lightgbm_scores(text)
    document = certify(text, sample, score)
    assert json.loads(json.dumps(document, allow_nan=False)) == document
    assert document["verdict"] == "bit_equal"
    other = certify(text, sample[:-1], score)
    assert {"rows_digest", "scores_digest"} <= {k for k in other if other[k] != document[k]}


@pytest.mark.parametrize("shape", [(5, FEATURES - 1), (0, FEATURES), (FEATURES,)])
def test_a_sample_of_another_width_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValidationError) as refusal:
        parity_rows(train()[0], np.zeros(shape))
    assert refusal.value.code == "wrong_shape"


def test_scores_of_another_shape_are_refused() -> None:
    text, sample = train()
    with pytest.raises(ValidationError) as refusal:
        certify(text, sample, lambda rows: np.zeros((len(rows), 2)))
    assert refusal.value.code == "wrong_shape"
