"""The pictures of a trained version, drawn in the child that trained it."""

from collections.abc import Iterator, Mapping

import numpy as np

from mlpd.core.specs import JobSpec
from mlpd.daemon.fit import Fitted
from mlpd.daemon.training_set import TrainingSet, Vectors
from mlpd.training.contributions import contributions
from mlpd.training.evaluate import Evaluation
from mlpd.training.pictures import (
    draw_calibration,
    draw_contributions,
    draw_importance,
    draw_learning,
    draw_roc,
)

SAMPLE_ROWS = 400
"""Test rows whose contributions are drawn, evenly spaced: 200 trees of 63 leaves take 0.4 s."""

TEXT_FILE = "model.txt"
_OUTCOMES = {"binary": "observed rate", "multiclass": "how often the chosen class came"}


def draw(
    job: JobSpec,
    data: TrainingSet,
    vectors: Vectors,
    fitted: Fitted,
    test: Evaluation,
    uncalibrated: Evaluation | None = None,
) -> Mapping[str, bytes]:
    """Return the pictures by file name; `test` is the evaluation of the test rows."""
    pictures = dict(_pictures(job, data, vectors, fitted, test, uncalibrated))
    return {f"{name}.svg": picture.encode() for name, picture in pictures.items()}


def _pictures(
    job: JobSpec,
    data: TrainingSet,
    vectors: Vectors,
    fitted: Fitted,
    test: Evaluation,
    uncalibrated: Evaluation | None,
) -> Iterator[tuple[str, str]]:
    model, rows = fitted.model, vectors.parts["test"]
    if any(model.importance.values()):
        yield "importance", draw_importance(model.importance)
    if model.history:
        yield "learning", draw_learning(model.history, model.rounds)
    if test.calibration:
        outcome = _OUTCOMES.get(job.objective, "observed mean")
        before = () if uncalibrated is None else uncalibrated.calibration
        yield "calibration", draw_calibration(test.calibration, outcome, before)
    area = test.metrics.get("auc")
    if job.objective == "binary" and area is not None:
        yield "roc", draw_roc(data.labels[rows], fitted.scores.served[rows], area)
    if TEXT_FILE not in model.files:  # contributions are LightGBM's
        return
    picked = np.unique(np.linspace(rows.start, rows.stop - 1, SAMPLE_ROWS).astype(int))
    sample = np.ascontiguousarray(vectors.rows[picked])
    threads = int(model.params["num_threads"])
    added = contributions(model.files[TEXT_FILE].decode(), sample, threads=threads).features
    names, categorical = vectors.vectorizer.names, vectors.vectorizer.categorical
    yield "contributions", draw_contributions(names, added, sample, categorical)
