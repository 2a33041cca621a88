import os
from collections.abc import Callable
from typing import Any

import lightgbm
import numpy as np
import pytest

from mlpd.core.columns import Column, DType
from mlpd.core.convert import column_of
from mlpd.core.errors import DefinitionError, MlpdError, ValidationError
from mlpd.core.vector import Vectorizer
from mlpd.training.exporter import export_model
from mlpd.training.trainer import Dataset, Progress, TrainedModel, resolve_params, train
from mlpd.training.trees import parse_model

# One thread: idle OpenMP threads spin, which costs seconds where the cores are taken.
PARAMS = {"objective": "binary", "num_leaves": 15, "min_data_per_group": 10, "num_threads": 1}
NAMES = ("carrier", "weather.visib", "carrier_load.dep_delay_mean_1h", "distance", "hour")


def make_data(rows: int = 3_000, seed: int = 5) -> Dataset:
    rng = np.random.default_rng(seed)
    vectors = rng.normal(size=(rows, len(NAMES)))
    vectors[:, 0] = rng.integers(0, 12, rows)
    chance = 1 / (1 + np.exp(-vectors[:, 1] - (vectors[:, 0] % 3 == 0)))
    vectors[rng.random(vectors.shape) < 0.05] = np.nan
    return Dataset(vectors, (rng.random(rows) < chance).astype(np.float64), NAMES)


EMPTY = Dataset(np.empty((0, len(NAMES))), np.empty(0), NAMES)


def run(
    train_rows: Dataset | None = None, valid_rows: Dataset | None = None, **changes: Any
) -> TrainedModel:
    settings: dict[str, Any] = {
        "params": PARAMS,
        "num_boost_round": 20,
        "early_stopping_rounds": 0,
        "categorical": [0],
        "on_progress": lambda _: None,
        "should_stop": lambda: False,
    }
    settings["params"] = PARAMS | changes.pop("params", {})
    return train(
        make_data() if train_rows is None else train_rows,
        make_data(1_000, seed=6) if valid_rows is None else valid_rows,
        **settings | changes,
    )


def test_threads_and_repetition_never_show_in_the_trees() -> None:
    models = [run(params={"num_threads": threads}) for threads in (1, 2, 1)]
    assert len({parse_model(model.model_text).digest for model in models}) == 1
    assert [model.params["num_threads"] for model in models] == [1, 2, 1]


def test_what_was_used_is_recorded() -> None:
    model = run(params={"learning_rate": 0.2, "random_state": 9})
    expected = {"learning_rate": 0.2, "seed": 9, "deterministic": True, "force_row_wise": True}
    expected |= {"num_iterations": 20, "early_stopping_round": 0}
    assert model.params.items() >= expected.items()
    assert resolve_params({})["num_threads"] == len(os.sched_getaffinity(0))
    assert model.lightgbm_version == lightgbm.__version__


@pytest.mark.parametrize("metric", ["binary_logloss", "auc"])
def test_early_stopping_finds_the_round_that_lightgbm_finds(metric: str) -> None:
    params = {"metric": metric, "learning_rate": 0.3, "num_threads": 1}
    fitted, judged = make_data(), make_data(1_000, seed=6)
    model = run(fitted, judged, params=params, num_boost_round=200, early_stopping_rounds=10)
    data = lightgbm.Dataset(
        fitted.vectors, fitted.labels, categorical_feature=[0], feature_name=list(NAMES)
    )
    reference = lightgbm.train(
        {name: value for name, value in model.params.items() if "iter" not in name},
        data,
        200,
        valid_sets=[data.create_valid(judged.vectors, judged.labels)],
        callbacks=[lightgbm.early_stopping(10, verbose=False)],
    )
    assert 0 < model.best_iteration == reference.best_iteration < 150
    assert len(model.history[metric]) == model.best_iteration + 10
    assert len(parse_model(model.model_text).trees) == model.best_iteration
    best = reference.model_to_string(num_iteration=reference.best_iteration)
    assert parse_model(model.model_text).digest == parse_model(best).digest


def test_the_first_of_several_metrics_decides() -> None:
    changes = {"num_boost_round": 100, "early_stopping_rounds": 5}
    both = run(params={"metric": ["auc", "binary_logloss"], "learning_rate": 0.3}, **changes)
    auc = run(params={"metric": "auc", "learning_rate": 0.3}, **changes)
    logloss = run(params={"metric": "binary_logloss", "learning_rate": 0.3}, **changes)
    assert both.history.keys() == {"auc", "binary_logloss"}
    assert both.best_iteration == auc.best_iteration != logloss.best_iteration


def test_without_validation_rows_every_round_runs() -> None:
    model = run(valid_rows=EMPTY, early_stopping_rounds=3)
    assert (model.best_iteration, model.history, model.stopped) == (20, {}, False)
    assert len(parse_model(model.model_text).trees) == 20


def test_progress_tells_each_round_in_turn() -> None:
    seen: list[Progress] = []
    model = run(on_progress=seen.append)
    assert [progress.round for progress in seen] == list(range(1, 21))
    assert {progress.rounds for progress in seen} == {20}
    losses = [progress.metrics["binary_logloss"] for progress in seen]
    assert losses == model.history["binary_logloss"]
    assert [p.best_round for p in seen] == [int(np.argmin(losses[: i + 1])) + 1 for i in range(20)]


def test_a_stop_keeps_the_best_round_so_far() -> None:
    seen: list[Progress] = []
    model = run(on_progress=seen.append, should_stop=lambda: len(seen) == 4)
    assert (len(seen), model.stopped) == (4, True)
    assert model.best_iteration == seen[-1].best_round


def test_training_ends_when_no_leaf_can_be_split() -> None:
    seen: list[Progress] = []
    model = run(params={"min_data_in_leaf": 2_000}, on_progress=seen.append)
    assert (len(seen), model.best_iteration) == (1, 1)
    assert len(parse_model(model.model_text).trees) == 1


@pytest.mark.parametrize(
    ("params", "code"),
    [
        ({"learning_rat": 0.1}, "unknown_parameter"),
        ({"n_jobs": 1}, "duplicate_parameter"),
        ({"deterministic": False}, "fixed_parameter"),
        ({"force_col_wise": True}, "fixed_parameter"),
        ({"n_estimators": 5}, "fixed_parameter"),
        ({"early_stopping_rounds": 5}, "fixed_parameter"),
        ({"cat_feature": [1]}, "fixed_parameter"),
        ({"num_leaves": 1}, "training_failed"),
        ({"objective": "no_such_objective"}, "training_failed"),
        ({"objective": "cross_entropy_lambda"}, "export_unsupported"),
        ({"linear_tree": True, "objective": "l2"}, "export_unsupported"),
    ],
)
def test_what_cannot_be_trained_or_served_is_refused_before_the_first_report(
    params: dict[str, Any], code: str
) -> None:
    seen: list[Progress] = []
    with pytest.raises(MlpdError) as refusal:
        run(params=params, on_progress=seen.append, categorical=[])
    assert isinstance(refusal.value, DefinitionError | ValidationError)
    assert (refusal.value.code, seen) == (code, [])


@pytest.mark.parametrize("rounds", [{"num_boost_round": 0}, {"early_stopping_rounds": -1}])
def test_rounds_out_of_range_are_refused(rounds: dict[str, int]) -> None:
    with pytest.raises(DefinitionError) as refusal:
        run(**rounds)
    assert refusal.value.code == "rounds"


def test_vectors_of_another_shape_or_type_are_refused() -> None:
    for vectors in (np.zeros((3, 2)), np.zeros((2, 3), np.float64), np.zeros((3, 3), np.float32)):
        with pytest.raises(ValidationError, match="expected float64") as refusal:
            Dataset(vectors, np.zeros(3), ("a", "b", "c"))
        assert refusal.value.code == "wrong_shape"


def test_null_and_unseen_categories_train_alike_as_nan_or_negative() -> None:
    data = make_data()
    negative = data.vectors.copy()
    negative[np.isnan(negative[:, 0]), 0] = -1.0
    assert np.isnan(data.vectors[:, 0]).any()
    models = [run(data), run(Dataset(negative, data.labels, NAMES))]
    assert len({parse_model(model.model_text).digest for model in models}) == 1


def test_columns_to_scores_agree_online_and_offline(
    onnx_scores: Callable[..., Any], lightgbm_scores: Callable[..., Any]
) -> None:
    rng = np.random.default_rng(8)
    carriers = [None if x == 6 else f"C{x}" for x in rng.integers(0, 7, 2_000)]
    numbers = rng.normal(size=2_000)
    columns = {
        "carrier": column_of(DType.STRING, carriers),
        "visib": Column(DType.FLOAT64, numbers, rng.random(2_000) > 0.1),
        "hour": Column(DType.INT64, rng.integers(0, 24, 2_000)),
    }
    labels = (numbers + np.array([c in ("C1", "C4") for c in carriers]) > 0.3).astype(np.float64)
    vectorizer = Vectorizer.fit(columns, ("carrier",))
    vectors = vectorizer.vectorize(columns, order="F")
    data = Dataset(vectors, labels, vectorizer.names)
    model = run(data, data, categorical=list(vectorizer.categorical))
    assert any(tree.categories for tree in parse_model(model.model_text).trees)
    assert parse_model(model.model_text).feature_names == vectorizer.names
    unseen = {"carrier": "unseen", "visib": None, "hour": None}
    asked = {
        name: column_of(column.dtype, [*column.to_list(), unseen[name]])
        for name, column in columns.items()
    }
    online = onnx_scores(export_model(model.model_text).onnx)(vectorizer.vectorize(asked))
    offline = lightgbm_scores(model.model_text)(vectors)
    assert online[:-1].tobytes() == offline.tobytes()
    assert np.isfinite(online[-1, 0])
