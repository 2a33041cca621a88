"""A request as it is served: its rows' arms, what each arm is to serve, and what it has served.

Of an interleaved list both arms serve all rows; then each row goes to the team that picked it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlpd.core.errors import InternalError
from mlpd.daemon.read import ReadResult
from mlpd.experiments.interleaving import draft_list
from mlpd.serving.predictor import ServedModel
from mlpd.serving.sessions import Scores

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Draw:
    """How a row got its arm."""

    arm: str
    propensity: float
    unit: str | None
    experiment: str | None
    phase: int


@dataclass(frozen=True, slots=True)
class Run:
    """Rows of a request that one arm served: `rows` are their indexes in the request's `read`.

    `fallback`: why another model than the arm's did, None if it didn't.
    """

    arm: str
    model: ServedModel
    read: ReadResult
    rows: NDArray[np.int64]
    vectors: Floats
    scores: Scores
    fallback: str | None = None


@dataclass(frozen=True, slots=True)
class Part:
    """Rows of a request that one arm is to serve, encoded for its model and for each shadow.

    `read`: the whole request as the model's version of the service sees it.
    """

    arm: str
    model: ServedModel
    read: ReadResult
    rows: NDArray[np.int64]
    vectors: Floats
    for_shadows: Sequence[Floats]


@dataclass(frozen=True, slots=True)
class Prepared:
    """A request's rows as they were checked, their features, arms and vectors.

    `reads`: the request as each version of the service sees it, by hash; they differ in the frame
    alone, and `read` is the first.  `failures`: per arm its rows and why there are no vectors.
    `slots`: on one of several shards, where each row's prediction lives.  `both`: the
    arms of an interleaved experiment, each of which ranks the rows that take part.  `others`: of
    other shards whose cells were read, the last event that each had seen.
    """

    rows: Sequence[Mapping[str, Any]]
    read: ReadResult
    reads: Mapping[str, ReadResult]
    draws: Sequence[Draw]
    parts: Sequence[Part]
    failures: Mapping[str, tuple[NDArray[np.int64], InternalError]]
    slots: Sequence[int] | None = None
    both: tuple[str, ...] = ()
    others: Mapping[str, int] = field(default_factory=dict)


def group_rows(draws: Sequence[Draw], both: Sequence[str]) -> dict[str, NDArray[np.int64]]:
    """Return each arm's rows; a row of an interleaved experiment is of both."""
    rows: dict[str, list[int]] = {}
    for i, draw in enumerate(draws):
        for arm in both if both and draw.experiment is not None else (draw.arm,):
            rows.setdefault(arm, []).append(i)
    return {arm: np.array(index, np.int64) for arm, index in rows.items()}


def unanswered(rows: NDArray[np.int64], runs: Sequence[Run]) -> NDArray[np.int64]:
    """Return the rows that no run has served."""
    done = [run.rows for run in runs]
    return rows[~np.isin(rows, np.concatenate(done))] if done else rows


def interleave(
    experiment: str, prepared: Prepared, runs: Sequence[Run]
) -> tuple[Prepared, list[Run], dict[int, int]]:
    """Return rows drawn anew, the runs of the rows that each arm's team picked, and ranks from 1.

    A list that one arm alone could rank takes no part, and has no ranks.
    """
    draws, ranks = list(prepared.draws), dict[int, int]()
    clean = {run.arm: run for run in runs if run.fallback is None}
    lists: dict[str, list[int]] = {}
    for row, draw in enumerate(draws):
        if draw.experiment is not None and draw.unit is not None:
            lists.setdefault(draw.unit, []).append(row)
    if all(arm in clean for arm in prepared.both):
        orders = [_ranked(clean[arm]) for arm in prepared.both]
        for unit, rows in lists.items():
            first, second = (sorted(rows, key=order.__getitem__) for order in orders)
            for rank, (row, team) in enumerate(draft_list(experiment, unit, first, second), 1):
                draws[row] = replace(draws[row], arm=prepared.both[team], propensity=0.5)
                ranks[row] = rank
    else:
        arm_of = {row: run.arm for run in runs for row in run.rows.tolist()}
        for row in (row for rows in lists.values() for row in rows):
            arm = arm_of.get(row, draws[row].arm)
            draws[row] = replace(draws[row], arm=arm, experiment=None)
    kept = (_take(run, [draws[row].arm == run.arm for row in run.rows.tolist()]) for run in runs)
    return replace(prepared, draws=draws), [run for run in kept if len(run.rows)], ranks


def _ranked(run: Run) -> dict[int, int]:
    """Return the place of each row by falling score, NaN last; equal ones stay in their order."""
    order = np.argsort(-run.scores.served, kind="stable")
    return {row: place for place, row in enumerate(run.rows[order].tolist())}


def _take(run: Run, mask: Sequence[bool]) -> Run:
    kept = np.array(mask, bool)
    scores = Scores(run.scores.raw[kept], run.scores.score[kept])
    return replace(run, rows=run.rows[kept], vectors=run.vectors[kept], scores=scores)
