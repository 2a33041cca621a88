"""Trains one LightGBM model: pinned for reproduction, watched, stoppable, cut at its best round."""

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlpd.core.errors import DefinitionError, ValidationError
from mlpd.training.backend import canonical_params, import_lightgbm
from mlpd.training.exporter import export_model

_DEFAULTS: Mapping[str, Any] = {"objective": "binary", "seed": 0}
_PINNED: Mapping[str, Any] = {
    "deterministic": True,
    # Left alone, LightGBM times both layouts and takes the quicker: another tree on a busy day.
    "force_row_wise": True,
    "force_col_wise": False,
    "verbosity": -1,
}
_ARGUMENTS = ("num_iterations", "early_stopping_round", "categorical_feature")


@dataclass(frozen=True, slots=True)
class Dataset:
    """Rows to learn from or to judge by: `vectors` float64 [n, F], `labels` float64 [n].

    `vectors` in either order; LightGBM bins both without a copy (1 M x 20 in 2.5 s on one thread,
    73 MB beside the 160 MB of the vectors).  Labels are float32 inside LightGBM.  `groups`: for
    rankings, how many of the rows belong to each group, one after the other.
    """

    vectors: NDArray[np.float64]
    labels: NDArray[np.float64]
    feature_names: tuple[str, ...]
    groups: NDArray[np.int64] | None = None

    def __post_init__(self) -> None:
        expected = (len(self.labels), len(self.feature_names))
        if self.vectors.shape != expected or self.vectors.dtype != np.float64:
            raise ValidationError(
                f"vectors are {self.vectors.dtype} {list(self.vectors.shape)}, "
                f"expected float64 {list(expected)}",
                code="wrong_shape",
                hint="pass what Vectorizer.vectorize returns, and one label per row",
            )

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True, slots=True)
class Progress:
    """State after one round: `metrics` are those of the validation rows, empty without such rows.

    `round` counts from 1; `best_round` is the best so far.  `merit`: the best of the first metric
    so far, negated where smaller is better; -inf without validation rows.
    """

    round: int
    rounds: int
    best_round: int
    metrics: Mapping[str, float]
    elapsed_s: float
    merit: float


@dataclass(frozen=True, slots=True)
class TrainedModel:
    """What a training gave.  `model_text` holds the first `best_iteration` rounds.

    `history`: every validation metric after each round run.  `params`: what LightGBM was told, with
    the number of rounds and threads; with the same data it gives the same trees, except under GOSS
    or quantized gradients.  `stopped`: `should_stop` ended it early.  `merit`: as in Progress.
    """

    model_text: str
    best_iteration: int
    history: Mapping[str, list[float]]
    params: Mapping[str, Any]
    lightgbm_version: str
    stopped: bool
    merit: float


def train(
    train: Dataset,
    valid: Dataset,
    *,
    params: Mapping[str, Any],
    num_boost_round: int,
    early_stopping_rounds: int,
    categorical: list[int],
    on_progress: Callable[[Progress], None],
    should_stop: Callable[[], bool],
) -> TrainedModel:
    """Train on `train` until the first metric on `valid` hasn't improved for a while.

    `params`: LightGBM's, under any of their names; `num_threads` defaults to the processors this
    process may use, `seed` to 0.  `early_stopping_rounds` 0, or no validation rows: all rounds run.
    `categorical`: positions in the vector.  `on_progress` is called after every round, on the
    calling thread, then `should_stop`; where that is true, the rounds up to the best one are kept.

    Raises DefinitionError: `unknown_parameter`, `duplicate_parameter`, `fixed_parameter`, `rounds`,
    `training_failed` for what LightGBM itself refuses; ValidationError `export_unsupported`, after
    the first round, for a model that could not be served.
    """
    if num_boost_round < 1 or early_stopping_rounds < 0:
        raise DefinitionError(
            f"a training can't have {num_boost_round} rounds and stop after "
            f"{early_stopping_rounds} without improvement",
            code="rounds",
            hint="num_boost_round is at least 1, early_stopping_rounds at least 0 (never)",
        )
    settings = resolve_params(params)
    lightgbm = import_lightgbm()
    watch = _Watch(num_boost_round, early_stopping_rounds, on_progress, should_stop)
    try:
        booster = _build_booster(lightgbm, train, valid, settings, categorical)
        stopped = _boost(booster, watch)
        best = watch.best_round or watch.round
        text = booster.model_to_string(num_iteration=best)
    except lightgbm.basic.LightGBMError as error:
        raise DefinitionError(
            f"LightGBM refuses to train: {error}",
            code="training_failed",
            hint="mend the job's params or its data",
        ) from error
    return TrainedModel(
        model_text=text,
        best_iteration=best,
        history=watch.history,
        params=settings
        | {"num_iterations": num_boost_round, "early_stopping_round": early_stopping_rounds},
        lightgbm_version=lightgbm.__version__,
        stopped=stopped,
        merit=watch.best,
    )


def resolve_params(params: Mapping[str, Any]) -> dict[str, Any]:
    """Return every parameter that LightGBM will be told; raises as `train` does."""
    given = canonical_params(params)
    for name in given:
        if name in _ARGUMENTS or given[name] != _PINNED.get(name, given[name]):
            raise DefinitionError(
                f"parameter {name!r} can't be set among a job's params",
                code="fixed_parameter",
                hint="rounds and categorical features are settings of the job; "
                f"{', '.join(_PINNED)} are fixed, so that a run can be reproduced",
            )
    threads = {"num_threads": len(os.sched_getaffinity(0))}
    return {**_DEFAULTS, **threads, **given, **_PINNED}


def _build_booster(
    lightgbm: ModuleType,
    train: Dataset,
    valid: Dataset,
    settings: Mapping[str, Any],
    categorical: list[int],
) -> Any:
    data = lightgbm.Dataset(
        train.vectors,
        train.labels,
        group=train.groups,
        feature_name=list(train.feature_names),
        categorical_feature=categorical,
        params=dict(settings),
    )
    booster = lightgbm.Booster(params=dict(settings), train_set=data)
    if len(valid):
        judged = data.create_valid(
            valid.vectors, valid.labels, group=valid.groups, params=dict(settings)
        )
        booster.add_valid(judged, "valid")
    return booster


def _boost(booster: Any, watch: "_Watch") -> bool:
    """Run rounds until one of the reasons to end; returns whether the caller asked to stop."""
    while watch.round < watch.rounds and not watch.is_stale:
        exhausted = booster.update()
        if exhausted and watch.round:
            break  # no leaf can be split any more: LightGBM dropped this round's trees
        if watch.round == 0:
            export_model(booster.model_to_string())  # what can't be served isn't trained for hours
        watch.observe(booster.eval_valid())
        if watch.should_stop():
            return True
    return False


@dataclass(slots=True)
class _Watch:
    """Counts rounds, keeps the history and knows the best round by the first metric."""

    rounds: int
    patience: int
    on_progress: Callable[[Progress], None]
    should_stop: Callable[[], bool]
    round: int = 0
    best_round: int = 0
    best: float = -np.inf
    history: dict[str, list[float]] = field(default_factory=dict)
    started_s: float = field(default_factory=time.monotonic)

    @property
    def is_stale(self) -> bool:
        """Whether `patience` rounds have gone by without a better one."""
        return 0 < self.patience <= self.round - self.best_round and self.best_round > 0

    def observe(self, results: list[tuple[str, str, float, bool]]) -> None:
        """Take LightGBM's results of one round: (data, metric, value, higher is better)."""
        self.round += 1
        for _, metric, value, _ in results:
            self.history.setdefault(metric, []).append(float(value))
        if results:
            _, _, value, higher_is_better = results[0]
            merit = value if higher_is_better else -value
            if merit > self.best:
                self.best, self.best_round = merit, self.round
        self.on_progress(
            Progress(
                round=self.round,
                rounds=self.rounds,
                best_round=self.best_round or self.round,
                metrics={metric: values[-1] for metric, values in self.history.items()},
                elapsed_s=time.monotonic() - self.started_s,
                merit=self.best,
            )
        )
