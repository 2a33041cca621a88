"""LightGBM through the Protocol that plugins implement."""

from typing import Any

import numpy as np

from mlpd.core.specs import LIGHTGBM_OBJECTIVES
from mlpd.core.trainers import Examples, FittedModel, Floats, Tell, TrainingOrder
from mlpd.training.backend import import_lightgbm
from mlpd.training.exporter import export_model
from mlpd.training.parity import parity_rows
from mlpd.training.shape import gain_importance
from mlpd.training.trainer import Dataset, Progress, train


class LightGBMTrainer:
    """The built-in trainer: trees whose raw scores are served bit for bit."""

    objectives = tuple(LIGHTGBM_OBJECTIVES)

    def fit(self, order: TrainingOrder, tell: Tell) -> FittedModel:
        """Return the trees up to the best round; raises as `training.trainer.train` does."""
        model = train(
            _dataset(order.train, order),
            _dataset(order.valid, order),
            params={**_defaults(order), **order.params},
            num_boost_round=order.rounds,
            early_stopping_rounds=order.patience,
            categorical=sorted(order.categorical),
            on_progress=lambda progress: _tell(tell, progress),
            should_stop=lambda: False,
        )
        exported = export_model(model.model_text)
        rows = parity_rows(model.model_text, order.sample)
        return FittedModel(
            onnx=exported.onnx,
            rows=rows,
            scores=_scores(model.model_text, rows),
            trainer=f"lightgbm {model.lightgbm_version}",
            params=model.params,
            digest=exported.tree_digest,
            outputs=exported.outputs,
            link=exported.link,
            raw=True,
            rounds=model.best_iteration,
            importance=gain_importance(model.model_text),
            history=model.history,
            files={"model.txt": model.model_text.encode()},
            packages=("lightgbm",),
        )


TRAINER = LightGBMTrainer()


def _defaults(order: TrainingOrder) -> dict[str, Any]:
    objective = LIGHTGBM_OBJECTIVES[order.objective][0]
    classes = {"num_class": int(order.train.labels.max()) + 1}
    return {
        "objective": objective,
        "num_threads": order.threads,
        **(classes if order.objective == "multiclass" else {}),
    }


def _dataset(rows: Examples, order: TrainingOrder) -> Dataset:
    return Dataset(rows.vectors, rows.labels, order.features, rows.groups)


def _tell(tell: Tell, progress: Progress) -> None:
    tell(round=progress.round, rounds=progress.rounds, metrics=dict(progress.metrics))


def _scores(model_text: str, rows: Floats) -> Floats:
    booster = import_lightgbm().Booster(model_str=model_text)
    scores: Floats = np.asarray(booster.predict(rows, raw_score=True, num_threads=1), np.float64)
    return scores.reshape(len(rows), -1)
