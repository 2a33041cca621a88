"""Cross-validation by time, in a child: models on the past, each judged on what came next."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from mlpd.core.specs import CrossValidationSpec, JobSpec
from mlpd.core.time import format_time
from mlpd.core.trainers import Tell
from mlpd.daemon.fit import Recipe, Workshop, fit, headline, judge, serve
from mlpd.daemon.training_set import TrainingSet, Vectors
from mlpd.training.split import split_folds, split_last


@dataclass(frozen=True, slots=True)
class Fold:
    """One fold: what it was trained and judged on, after how many rounds, and the metrics."""

    trained: slice
    judged: slice
    rounds: int
    metrics: Mapping[str, float]


def cross_validate(
    job: JobSpec,
    data: TrainingSet,
    vectors: Vectors,
    recipe: Recipe,
    workshop: Workshop,
    spec: CrossValidationSpec,
    tell: Callable[..., None],
) -> list[Fold]:
    """Return the folds over all rows before the test part; costs about as many trainings.

    Early stopping watches the last rows of what a fold trains on, never what it is judged on.
    The categories are those that the model itself has.  `tell` hears of each round, after the
    fold's number, as a trainer tells it.
    """
    end = vectors.parts["test"].start
    folds = []
    for number, rows in enumerate(split_folds(data.timeline, end, spec, job.gap_us), 1):
        folds.append(_fold(job, data, vectors, recipe, workshop, rows, partial(tell, number)))
    return folds


def _fold(
    job: JobSpec,
    data: TrainingSet,
    vectors: Vectors,
    recipe: Recipe,
    workshop: Workshop,
    rows: tuple[slice, slice],
    tell: Tell,
) -> Fold:
    past, later = rows
    share = job.valid_share / (1 - job.test_share)
    parts = split_last(data.timeline, past, share=share, gap_us=job.gap_us)
    names = vectors.vectorizer.names
    sets = [data.dataset(vectors.rows, part, names) for part in parts]
    known = replace(vectors, sets=dict(zip(("train", "valid"), sets, strict=True)))
    model = fit(known, recipe, workshop, tell)
    judged = replace(vectors, rows=vectors.rows[later])
    fitted = serve(job.model, model, judged, workshop.threads, recipe.calibration)
    found = judge(job, data, fitted.scores.score, later)
    return Fold(past, later, model.rounds, headline(found))


def summarize(folds: list[Fold], spec: CrossValidationSpec, data: TrainingSet) -> dict[str, Any]:
    """Return the JSON form: every fold, and of each metric mean, deviation, least and largest.

    The deviation (ddof 1) is that of the folds and no standard error: folds share training rows,
    and no unbiased estimate of their mean's variance exists (Bengio, Grandvalet 2004).
    """
    names = sorted({name for fold in folds for name in fold.metrics})
    return {
        "window": spec.window,
        "folds": [_form(fold, data) for fold in folds],
        "metrics": {
            name: _spread([f.metrics[name] for f in folds if name in f.metrics]) for name in names
        },
    }


def _spread(values: list[float]) -> dict[str, float | None]:
    return {
        "mean": float(np.mean(values)),
        "deviation": float(np.std(values, ddof=1)) if len(values) > 1 else None,
        "least": min(values),
        "largest": max(values),
    }


def _form(fold: Fold, data: TrainingSet) -> dict[str, Any]:
    def form(rows: slice) -> dict[str, Any]:
        times = data.t_us[rows]
        ends = format_time(int(times.min())), format_time(int(times.max()))
        return {"rows": rows.stop - rows.start, "from": ends[0], "to": ends[1]}

    return {
        "trained": form(fold.trained),
        "judged": form(fold.judged),
        "rounds": fold.rounds,
        "metrics": dict(fold.metrics),
    }
