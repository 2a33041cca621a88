"""The contract of trainers: LightGBM, scikit-learn and a user's program hold the same promises.

A new trainer adds itself to KINDS.  What a promise is for stands in docs/paths/plugins.md.
"""

import dataclasses
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlpd.core.columns import Column, DType
from mlpd.core.errors import MlpdError
from mlpd.core.specs import Objective
from mlpd.core.trainers import Examples, FittedModel, TrainingOrder
from mlpd.core.vector import Vectorizer
from mlpd.daemon.plugins import Plugins, load_trainer
from mlpd.serving.check import check_model
from mlpd.serving.package import ModelPackage, Signature
from mlpd.serving.sessions import Session
from mlpd.training.certificate import certify_scores, check_batches, check_fitted, sample_rows

ROWS, VALID_ROWS = 1_200, 300
CITIES = ("a", "b", "c", "d", "e")
BATCHES = (1, 2, 17, 256)
SKLEARN_REASON = "extra `sklearn`: pip install mlpd[sklearn]"


@dataclass
class Kind:
    """One trainer with what a job would tell it; `wrong` are params that it must refuse."""

    trainer: str
    objective: Objective = "binary"
    params: dict[str, Any] = field(default_factory=dict)
    wrong: dict[str, Any] = field(default_factory=lambda: {"no_such_parameter": 1})


def _sklearn(estimator: str, objective: Objective = "binary", **params: Any) -> Kind:
    return Kind("sklearn", objective, {"estimator": estimator, **params})


KINDS = {
    "lightgbm": Kind("lightgbm"),
    "lightgbm regression": Kind("lightgbm", "regression"),
    "logistic": _sklearn("LogisticRegression", C=0.5),
    "network": _sklearn("MLPClassifier", hidden_layer_sizes=[8], max_iter=30),
    "forest": _sklearn("RandomForestClassifier", n_estimators=20),
    "extra trees": _sklearn("ExtraTreesClassifier", n_estimators=20),
    "boosting": _sklearn("GradientBoostingClassifier", n_estimators=20),
    "linear": _sklearn("LinearRegression", "regression"),
    "ridge": _sklearn("Ridge", "regression"),
    "lasso": _sklearn("Lasso", "regression", alpha=0.01),
    "elastic net": _sklearn("ElasticNet", "regression", alpha=0.01),
    "poisson": _sklearn("PoissonRegressor", "regression"),
    "network of numbers": _sklearn("MLPRegressor", "regression", hidden_layer_sizes=[8]),
    "forest of numbers": _sklearn("RandomForestRegressor", "regression", n_estimators=20),
    "extra trees of numbers": _sklearn("ExtraTreesRegressor", "regression", n_estimators=20),
    "boosting of numbers": _sklearn("GradientBoostingRegressor", "regression", n_estimators=20),
    "multiclass": _sklearn("LogisticRegression", "multiclass"),
    "command": Kind("command", "binary", {"command": "ridge"}, {"command": "rm"}),
    "command of numbers": Kind("command", "regression", {"command": "ridge"}, {"timeout": "soon"}),
}


@dataclass
class Made:
    """An order, what was made of it, and a session that serves it."""

    order: TrainingOrder
    fitted: FittedModel
    session: Session
    told: list[dict[str, Any]]


def build_order(kind: Kind, plugins: Plugins, folder: Path, seed: int = 0) -> TrainingOrder:
    """Three numbers, one of them with nulls, and a category that null and unseen values have."""
    rng = np.random.default_rng(7)
    rows = ROWS + VALID_ROWS
    vectors = np.asfortranarray(rng.normal(size=(rows, 4)) * [1.0, 1e3, 1e-3, 1.0])
    vectors[:, 3] = rng.integers(0, len(CITIES), rows)
    latent = vectors[:, 0] + vectors[:, 1] / 1e3 + (vectors[:, 3] == 2) + rng.normal(size=rows)
    vectors[rng.random(rows) < 0.2, 2] = np.nan
    vectors[rng.random(rows) < 0.1, 3] = np.nan
    labels = {
        "binary": (latent > 0).astype(float),
        "regression": np.exp(latent / 4),
        "multiclass": np.digitize(latent, [-0.5, 1.0]).astype(float),
    }[kind.objective]
    folder.mkdir()
    return TrainingOrder(
        objective=kind.objective,
        train=Examples(vectors[:ROWS], labels[:ROWS]),
        valid=Examples(vectors[ROWS:], labels[ROWS:]),
        features=("risk.amount", "income", "trend", "city"),
        categorical={3: len(CITIES)},
        params={**kind.params, "seed": seed},
        rounds=10,
        patience=5,
        threads=1,
        sample=sample_rows(vectors, {3: len(CITIES)}, most=300),
        folder=folder,
        commands=plugins.commands,
    )


def open_session(order: TrainingOrder, fitted: FittedModel) -> Session:
    columns = {
        name: Column(DType.FLOAT64, order.train.vectors[:, i])
        for i, name in enumerate(order.features)
    }
    cities = np.array(CITIES, dtype=object)
    columns["city"] = Column(DType.STRING, cities)
    columns = {name: column.take(slice(0, len(CITIES))) for name, column in columns.items()}
    signature = Signature.of_vectors(Vectorizer.fit(columns, ("city",)), fitted.outputs)
    return Session(ModelPackage("m", 1, "", fitted.onnx, signature, link=fitted.link))


def fit(kind: Kind, plugins: Plugins, folder: Path) -> Made:
    order = build_order(kind, plugins, folder)
    told: list[dict[str, Any]] = []
    fitted = load_trainer(plugins, kind.trainer).fit(order, lambda **step: told.append(step))
    return Made(order, fitted, open_session(order, fitted), told)


@pytest.fixture(scope="module")
def made(plugins: Plugins, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Made]:
    """Each kind fitted once for all tests."""
    done: dict[str, Made] = {}

    def once(name: str) -> Made:
        if KINDS[name].trainer == "sklearn":
            pytest.importorskip("sklearn", reason=SKLEARN_REASON)
            pytest.importorskip("skl2onnx", reason=SKLEARN_REASON)
        if name not in done:
            done[name] = fit(KINDS[name], plugins, tmp_path_factory.mktemp("fit") / "folder")
        return done[name]

    return once


every_kind = pytest.mark.parametrize("name", KINDS)


@every_kind
def test_what_is_given_back_is_whole(
    name: str, made: Callable[[str], Made], plugins: Plugins
) -> None:
    result = made(name)
    check_fitted(result.fitted, result.order.sample)
    assert KINDS[name].objective in load_trainer(plugins, KINDS[name].trainer).objectives
    json.dumps(dict(result.fitted.params), allow_nan=False)
    assert result.fitted.params["seed"] == 0
    assert result.fitted.params["num_threads"] == 1
    assert set(result.fitted.importance) <= set(result.order.features)
    total = math.fsum(result.fitted.importance.values())
    assert total == pytest.approx(1) or total == 0
    assert all(value >= 0 for value in result.fitted.importance.values())


@every_kind
def test_served_scores_are_the_trainers_within_its_bound(
    name: str, made: Callable[[str], Made]
) -> None:
    fitted, session = made(name).fitted, made(name).session
    raw = session.run(np.ascontiguousarray(fitted.rows))
    certificate = certify_scores(fitted, raw if fitted.raw else session.score(raw))
    assert certificate["different"] == 0, certificate
    assert certificate["verdict"] in ("bit_equal", "within")
    assert len(np.unique(fitted.scores)) > 10  # it learned something to be wrong about
    if KINDS[name].objective != "regression":
        scores = session.score(raw)
        assert ((scores >= 0) & (scores <= 1)).all()


@every_kind
def test_a_score_off_by_more_than_the_bound_is_found(
    name: str, made: Callable[[str], Made]
) -> None:
    fitted, session = made(name).fitted, made(name).session
    raw = session.run(np.ascontiguousarray(fitted.rows))
    found = raw.copy() if fitted.raw else session.score(raw)
    room = fitted.bound.absolute + fitted.bound.relative * abs(fitted.scores[5, 0])
    found[5, 0] = np.nextafter(fitted.scores[5, 0] + 1.01 * room, np.inf)
    assert certify_scores(fitted, found)["different"] == 1


@every_kind
def test_a_score_does_not_depend_on_the_batch(name: str, made: Callable[[str], Made]) -> None:
    rows, session = np.ascontiguousarray(made(name).order.sample), made(name).session
    whole = session.run(rows)
    for batch in BATCHES:
        parts = [session.run(rows[i : i + batch]) for i in range(0, len(rows), batch)]
        assert np.concatenate(parts).tobytes() == whole.tobytes(), batch
    check_batches(session.run, rows)


@every_kind
def test_the_same_order_gives_the_same_bytes(
    name: str, made: Callable[[str], Made], plugins: Plugins, tmp_path: Path
) -> None:
    first, again = made(name).fitted, fit(KINDS[name], plugins, tmp_path / "again").fitted
    assert again.onnx == first.onnx
    assert again.digest == first.digest
    assert again.params == first.params
    assert again.scores.tobytes() == first.scores.tobytes()


@every_kind
def test_the_graph_passes_the_check_of_foreign_models(
    name: str, made: Callable[[str], Made]
) -> None:
    checked = check_model(made(name).fitted.onnx)
    (source,), (target,) = checked.signature.inputs, checked.signature.outputs
    assert (source.name, source.datatype, source.shape) == ("features", "FP64", (-1, 4))
    assert (target.name, target.datatype) == ("raw_score", "FP64")


@every_kind
def test_missing_and_unseen_values_have_scores(name: str, made: Callable[[str], Made]) -> None:
    session = made(name).session
    nothing = session.score(session.run(np.full((3, 4), np.nan)))
    assert np.isfinite(nothing).all()


@every_kind
def test_progress_is_told_in_json(name: str, made: Callable[[str], Made]) -> None:
    told = made(name).told
    assert told
    assert all(step.keys() <= {"round", "rounds", "metrics"} for step in told)
    json.dumps(told, allow_nan=False)


@every_kind
def test_the_order_is_left_as_it_was(name: str, made: Callable[[str], Made]) -> None:
    order = made(name).order
    fresh = np.random.default_rng(7).normal(size=(ROWS + VALID_ROWS, 4))[:, 0]
    assert order.train.vectors[:, 0].tobytes() == fresh[:ROWS].tobytes()
    assert math.isnan(order.sample[-1, 3])


@every_kind
def test_wrong_params_are_named(
    name: str, made: Callable[[str], Made], plugins: Plugins, tmp_path: Path
) -> None:
    made(name)
    kind = KINDS[name]
    wrong = dataclasses.replace(kind, params={**kind.params, **kind.wrong})
    with pytest.raises(MlpdError) as refused:
        fit(wrong, plugins, tmp_path / "folder")
    assert refused.value.status == 400
    assert str(next(iter(kind.wrong.values() if kind.trainer == "command" else kind.wrong))) in (
        refused.value.message
    )
    assert refused.value.hint
