"""What a trainer is: the order it gets, what it gives back, and the Protocol in between.

A plugin implements `Trainer`; docs/paths/plugins.md tells how to write one, and
`tests/plugins/contract.py` is what each of them has to pass.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mlpd.core.specs import Objective

Floats = NDArray[np.float64]

Tell = Callable[..., None]
"""`tell(round=3, rounds=10, metrics={"auc": 0.7})`: JSON values; each call is a sign of life."""


@dataclass(frozen=True, slots=True)
class Bound:
    """How far a served score may be from the trainer's: `absolute + relative * |trainer's|`.

    Both 0: every bit must be equal.
    """

    absolute: float = 0.0
    relative: float = 0.0


@dataclass(frozen=True, slots=True, eq=False)
class Examples:
    """Rows to learn from or to judge by: vectors float64 [n, F] in either order, labels [n].

    `groups`: for a ranking, how many of the rows belong to each group, one after the other.
    """

    vectors: Floats
    labels: Floats
    groups: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True, slots=True, eq=False)
class TrainingOrder:
    """What a trainer is asked for; it may read all of it and change nothing.

    `features`: names in vector order.  `categorical`: positions of categories, each with their
    number n: such a value is a code 0 to n - 1, or NaN for null and unseen.  Every other value is
    any float64, NaN for null.  `params`: the job's, JSON values; `seed` among them decides all that
    is random.  `rounds` and `patience` are the job's num_boost_round and early_stopping_rounds,
    where a trainer has such.  `sample`: rows [n, F] for the certificate, odd values among them.
    `folder`: empty, the run's own.  `commands`: what the operator lets jobs start, by name.
    """

    objective: Objective
    train: Examples
    valid: Examples
    features: tuple[str, ...]
    categorical: Mapping[int, int]
    params: Mapping[str, Any]
    rounds: int
    patience: int
    threads: int
    sample: Floats
    folder: Path
    commands: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def seed(self) -> int:
        """The job's seed, 0 where it names none."""
        return int(self.params.get("seed", 0))


@dataclass(frozen=True, slots=True, eq=False)
class FittedModel:
    """What a trainer made.

    `onnx`: a whole ModelProto with one input `features` float64 [-1, F] and one output `raw_score`
    float64 [-1, `outputs`]; the bits of a row's score don't depend on the other rows
    (`training.adapt.adapt_onnx` brings other graphs into this form).  `link`: from raw score to
    score, as `training.links` writes it.  `rows` [n, F] and `scores` [n, outputs]: the order's
    sample, with rows of the trainer's own if it likes, and its own scores for them, link applied
    (not, where `raw`); the served ones must lie within `bound`.  `trainer`: name and version.
    `params`: all, with defaults, `seed` and `num_threads`.  `digest`: equal for two models that
    score alike.  `rounds`: trees or steps, 0 where that means nothing.  `importance`: by feature,
    summing to 1 or 0.  `metrics`: what the trainer itself measured.  `files`: further files of the
    version, by name.  `packages`: distributions whose versions belong into the lineage.
    """

    onnx: bytes
    rows: Floats
    scores: Floats
    trainer: str
    params: Mapping[str, Any]
    digest: str
    outputs: int = 1
    link: Mapping[str, Any] = field(default_factory=lambda: {"kind": "identity"})
    bound: Bound = Bound()
    raw: bool = False
    rounds: int = 0
    importance: Mapping[str, float] = field(default_factory=dict)
    history: Mapping[str, list[float]] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    files: Mapping[str, bytes] = field(default_factory=dict)
    packages: tuple[str, ...] = ()


class Trainer(Protocol):
    """Trains models; runs in the child process of a run, under its limits.

    `objectives`: which of a job's it can do.
    """

    @property
    def objectives(self) -> tuple[str, ...]:
        """Objectives of jobs that `fit` takes."""
        ...

    def fit(self, order: TrainingOrder, tell: Tell) -> FittedModel:
        """Return a model fitted to `order.train`.

        The same order gives the same `onnx`, byte for byte.  Raises DefinitionError for params, and
        ValidationError for data, that it can't take.
        """
        ...
