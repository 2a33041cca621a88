"""From a training set to a scored model: what a run and its reproduction do alike, in a child."""

import os
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlpd.core.errors import DefinitionError
from mlpd.core.specs import LIGHTGBM_OBJECTIVES, Calibration, JobSpec, Objective
from mlpd.core.trainers import Examples, FittedModel, Tell, TrainingOrder
from mlpd.core.vector import Vectorizer
from mlpd.daemon.plugins import BUILT_IN, Plugins, load_trainer
from mlpd.daemon.training_set import TrainingSet, Vectors
from mlpd.registry.lineage import Lineage
from mlpd.serving.check import check_model
from mlpd.serving.package import ModelPackage, Signature
from mlpd.serving.sessions import Scores, Session
from mlpd.training.backend import canonical_params
from mlpd.training.calibrators import Calibrator, add_calibrator, fit_calibrator
from mlpd.training.certificate import certify_scores, check_batches, check_fitted, sample_rows
from mlpd.training.classes import evaluate_classes
from mlpd.training.evaluate import Evaluation, evaluate_binary, evaluate_regression
from mlpd.training.ranking import TOP, evaluate_ranking

SLICES_MAX = 3
"""Categorical features by which the report splits its metrics."""

_USUAL: Mapping[Objective, Mapping[str, Any]] = {
    "binary": {"metric": "auc"},
    "regression": {},
    "multiclass": {"metric": "multi_logloss"},
    "ranking": {"metric": "ndcg", "eval_at": [TOP]},
}
"""What early stopping watches, where the job's parameters say nothing."""

PARITY_SAMPLE_ROWS = 10_000
LIGHTGBM = "lightgbm"

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a model is trained: by whom, with which parameters and how many rounds."""

    trainer: str
    objective: Objective
    params: Mapping[str, Any]
    num_boost_round: int
    early_stopping_rounds: int
    calibration: Calibration | None = None

    @classmethod
    def of_job(cls, job: JobSpec, threads: int, labels: Floats) -> "Recipe":
        """Return what a job asks for; its own parameters go before what is usual for LightGBM.

        `labels` of all rows tell how many classes there are.  Raises as `canonical_params`.
        """
        params = dict(job.params)
        if job.trainer == LIGHTGBM:
            objective = LIGHTGBM_OBJECTIVES[job.objective][0]
            params = {"objective": objective, "num_threads": threads, **_USUAL[job.objective]}
            if job.objective == "multiclass":
                params["num_class"] = int(labels.max()) + 1
            params |= canonical_params(job.params)
        rounds = job.num_boost_round, job.early_stopping_rounds
        return cls(job.trainer, job.objective, params, *rounds, job.calibration)

    def with_params(self, params: Mapping[str, Any]) -> "Recipe":
        """Return the recipe with some parameters, under any of their names, in place of its own."""
        return replace(self, params={**self.params, **canonical_params(params)})

    @classmethod
    def of_lineage(cls, lineage: Lineage, job: JobSpec) -> "Recipe":
        """Return what a version of `job` was trained with, whatever the defaults are now."""
        if job.trainer != LIGHTGBM:
            rounds = job.num_boost_round, job.early_stopping_rounds
            return cls(job.trainer, job.objective, job.params, *rounds)
        params = dict(lineage.params)
        rounds = params.pop("num_iterations"), params.pop("early_stopping_round")
        return cls(job.trainer, job.objective, params, *rounds, job.calibration)


@dataclass(frozen=True, slots=True)
class Workshop:
    """What a trainer works with: plugins, threads, a folder that is removed afterwards."""

    plugins: Plugins
    threads: int
    folder: Path


@contextmanager
def working_folder(parent: Path) -> Iterator[Path]:
    """Give an empty folder below `parent`, one per process, and remove it after the block."""
    folder = parent / f"work-{os.getpid()}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@dataclass(frozen=True, slots=True)
class Fitted:
    """A model with the session that serves it, and what that gives for every row: [n, K].

    Of a calibrated one also the calibrator, and the scores of all rows without it.
    """

    model: FittedModel
    session: Session
    scores: Scores
    calibrator: Calibrator | None = None
    uncalibrated: Scores | None = None


def fit(vectors: Vectors, recipe: Recipe, workshop: Workshop, tell: Tell) -> FittedModel:
    """Train on the part `train`, watched on `valid`; raises as the trainer does.

    Raises DefinitionError: `unsupported_objective`, `invalid_plugin` for a trainer that breaks its
    contract; and what `serving.check` raises for a plugin's graph.
    """
    trainer = load_trainer(workshop.plugins, recipe.trainer)
    if recipe.objective not in trainer.objectives:
        raise DefinitionError(
            f"trainer {recipe.trainer!r} can't do objective {recipe.objective!r}; "
            f"it can {', '.join(trainer.objectives)}",
            code="unsupported_objective",
            hint="Change the job's trainer or objective.",
        )
    order = _order(vectors, recipe, workshop)
    fitted = trainer.fit(order, tell)
    check_fitted(fitted, order.sample)
    if recipe.trainer not in BUILT_IN:
        check_model(fitted.onnx)
    return fitted


def _order(vectors: Vectors, recipe: Recipe, workshop: Workshop) -> TrainingOrder:
    encoders = enumerate(feature.encoder for feature in vectors.vectorizer.features)
    categorical = {i: len(found.categories) for i, found in encoders if found is not None}
    train, valid = (vectors.sets[part] for part in ("train", "valid"))
    return TrainingOrder(
        objective=recipe.objective,
        train=Examples(train.vectors, train.labels, train.groups),
        valid=Examples(valid.vectors, valid.labels, valid.groups),
        features=vectors.vectorizer.names,
        categorical=categorical,
        params=recipe.params,
        rounds=recipe.num_boost_round,
        patience=recipe.early_stopping_rounds,
        threads=workshop.threads,
        sample=sample_rows(vectors.rows, categorical, most=PARITY_SAMPLE_ROWS),
        folder=workshop.folder,
        commands=workshop.plugins.commands,
    )


def serve(
    name: str,
    model: FittedModel,
    vectors: Vectors,
    threads: int,
    calibration: Calibration | None = None,
) -> Fitted:
    """Load the model as the server would, and score every row.

    With `calibration` that is done twice: the calibrator is fitted to what the validation rows
    score, and is part of the graph that is loaded then.  Raises as `fit_calibrator`.
    """
    session = _load(name, model, vectors)
    scores = _score(session, vectors.rows, threads)
    if calibration is None:
        return Fitted(model, session, scores)
    valid = vectors.sets["valid"]
    raw = _score(session, valid.vectors, threads).raw
    calibrator = fit_calibrator(calibration, raw[:, 0], valid.labels)
    model = _calibrated(model, calibrator)
    session = _load(name, model, vectors)
    return Fitted(model, session, _score(session, vectors.rows, threads), calibrator, scores)


def _load(name: str, model: FittedModel, vectors: Vectors) -> Session:
    return Session(
        ModelPackage(
            name=name,
            version=0,
            digest="",
            onnx=model.onnx,
            signature=Signature.of_vectors(vectors.vectorizer, model.outputs),
            link=model.link,
        )
    )


def _calibrated(model: FittedModel, calibrator: Calibrator) -> FittedModel:
    """Return the model with a calibrator in its graph, and what that makes of its own scores."""
    assert model.raw, model.trainer  # checked when the job was applied
    return replace(
        model,
        onnx=add_calibrator(model.onnx, calibrator),
        scores=calibrator(model.scores),
        link=calibrator.link,
    )


def certify(fitted: Fitted) -> dict[str, Any]:
    """Return the certificate; raises ValidationError where a row's score tells of its batch."""
    rows = np.ascontiguousarray(fitted.model.rows)
    check_batches(fitted.session.run, rows)
    raw = fitted.session.run(rows)
    return certify_scores(fitted.model, raw if fitted.model.raw else fitted.session.score(raw))


def evaluate(
    job: JobSpec, data: TrainingSet, vectorizer: Vectorizer, scores: Floats, rows: slice
) -> Evaluation:
    """Judge the scores [n, K] of one part, by slice of the first categorical features."""
    slices = {
        vectorizer.names[i]: data.frame.columns[vectorizer.names[i]].values[rows].astype(str)
        for i in vectorizer.categorical[:SLICES_MAX]
    }
    return judge(job, data, scores[rows], rows, slices)


def judge(
    job: JobSpec,
    data: TrainingSet,
    scores: Floats,
    rows: slice,
    slices: Mapping[str, NDArray[Any]] | None = None,
) -> Evaluation:
    """Judge scores [m, K] of the m `rows` as the job's objective asks; a ranking has no slices."""
    labels = data.labels[rows]
    if job.objective == "multiclass":
        return evaluate_classes(labels, scores, slices=slices)
    if data.groups is not None:
        return evaluate_ranking(labels, scores[:, 0], data.groups[rows])
    of_numbers = evaluate_binary if job.objective == "binary" else evaluate_regression
    return of_numbers(labels, scores[:, 0], slices=slices)


def headline(evaluation: Evaluation) -> dict[str, float]:
    """Return the metrics' values alone, for lineage, gates and tables."""
    return {name: m.value for name, m in evaluation.metrics.items() if m is not None}


def _score(session: Session, vectors: Floats, threads: int) -> Scores:
    """Return the scores of all rows, in parts side by side: a row's score knows no other row."""
    parts = np.array_split(vectors, min(threads, len(vectors)))
    with ThreadPoolExecutor(threads) as pool:
        found = list(pool.map(lambda part: session.run(np.ascontiguousarray(part)), parts))
    raw = np.concatenate(found)
    return Scores(raw, session.score(raw))
