"""Verb predict: assign, read, vectorize, score, answer; then log, count and shadow.

One request: one snapshot of features for all rows, one run per arm.  What follows the answer
(prediction log, live counts, shadows, exposures) never fails or delays it.  Few rows are served on
the loop; with many, all that grows with them happens in a thread, or on the loop in slices.
"""

import asyncio
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from mlpd.core.columns import Column
from mlpd.core.errors import ConflictError, InternalError, TooLargeError, ValidationError
from mlpd.core.names import TimeUs
from mlpd.core.vector import PlacedVectorizer, Vectorizer
from mlpd.daemon.experiments import Experiments
from mlpd.daemon.predictions import Prediction, PredictionIds, PredictionLog
from mlpd.daemon.read import Read, ReadResult, given_columns
from mlpd.daemon.read_pool import ReadPool
from mlpd.daemon.routes import Routes, ServedRoute
from mlpd.experiments.assignment import Assignment
from mlpd.features.assemble import FeatureFrame, FrameLayout
from mlpd.serving.predictor import ServedModel
from mlpd.serving.sessions import Scores
from mlpd.serving.shadow import ShadowJob, ShadowRunner

INCLUDES = ("vector", "features", "statuses", "ages")
"""What an answer may carry besides scores."""

LABEL_THRESHOLD = 0.5
RECORD_ROWS = 64
"""Rows that are recorded in one turn of the loop: 7 to 15 us each."""

Floats = NDArray[np.float64]
Tap = Callable[["Run", str, ReadResult], None]
"""Called with every run, its route and the read behind it."""


@dataclass(frozen=True, slots=True)
class _Draw:
    """How a row got its arm."""

    arm: str
    propensity: float
    unit: str | None
    experiment: str | None
    phase: int


@dataclass(frozen=True, slots=True)
class Run:
    """Rows of a request that one arm served: `rows` are their indexes in the request."""

    arm: str
    model: ServedModel
    rows: NDArray[np.int64]
    vectors: Floats
    scores: Scores


@dataclass(frozen=True, slots=True)
class _Part:
    """Rows of a request that one arm is to serve, encoded for its model and for each shadow."""

    arm: str
    model: ServedModel
    rows: NDArray[np.int64]
    vectors: Floats
    for_shadows: Sequence[Floats]


@dataclass(frozen=True, slots=True)
class _Prepared:
    """A request's rows as they were checked, their features, arms and vectors.

    `failure`: why there are no vectors.
    """

    rows: Sequence[Mapping[str, Any]]
    read: ReadResult
    draws: Sequence[_Draw]
    parts: Sequence[_Part]
    failure: InternalError | None = None


class Predict:
    """Serves routes; one instance per daemon, on the loop."""

    def __init__(
        self,
        routes: Routes,
        read: Read,
        pool: ReadPool,
        experiments: Experiments,
        log: PredictionLog,
        shadows: ShadowRunner,
        tap: Tap,
        served: Callable[[Sequence[Prediction]], None],
        ids: PredictionIds,
        rows_max: int,
    ) -> None:
        self._routes = routes
        self._read = read
        self._pool = pool
        self._experiments = experiments
        self._log = log
        self._shadows = shadows
        self._tap = tap
        self._rows_max = rows_max
        self._served = served
        self._ids = ids
        self._placed: WeakKeyDictionary[ServedModel, tuple[FrameLayout, PlacedVectorizer]] = (
            WeakKeyDictionary()
        )

    async def predict(
        self,
        route: str,
        rows: Sequence[Mapping[str, Any]],
        *,
        at_us: TimeUs | None = None,
        min_sequence: int = 0,
        deadline_s: float | None = None,
        include: Sequence[str] = (),
        arm: str | None = None,
    ) -> dict[str, Any]:
        """Return the answer for rows of entity keys and request fields.

        `arm` forces one (testers): such rows take no part in the experiment.  `deadline_s`: on
        `time.monotonic()`.  Raises NotFoundError, ValidationError, DeadlineExceededError,
        OverloadedError; an arm that fails answers with the route's fallback if it has one.
        """
        live = self._routes.served(route)
        self._check(rows, include)
        self._refuse_other_features(live)
        if not rows:
            return _answer(live, [], 0, 0)
        n = len(rows)
        prepared = await self._pool.call(n, self._prepare, live, rows, at_us, min_sequence, arm)
        read = prepared.read
        try:
            if prepared.failure is not None:
                raise prepared.failure
            runs = [await self._run(live, part, deadline_s) for part in prepared.parts]
        except InternalError as error:
            if live.spec.fallback is None:
                raise
            return _fallback(live, n, read, error)
        predictions, answers = await self._record(live, prepared, runs)
        if include:
            await self._pool.call(n, _include, answers, predictions, read, include)
        return _answer(live, answers, read.t_us, read.sequence)

    def _prepare(
        self,
        live: ServedRoute,
        rows: Sequence[Mapping[str, Any]],
        at_us: TimeUs | None,
        min_sequence: int,
        arm: str | None,
    ) -> _Prepared:
        """Check, read, assign and encode rows; on the loop or in a thread.

        The read takes its snapshot and its moment together, wherever it runs, so that its rows are
        those known at that moment.
        """
        given = given_columns(live.closure, rows)
        typed = _typed_rows(given)
        read = self._read.read(live.closure, given, at_us=at_us, min_sequence=min_sequence)
        draws = [self._draw(live, row, arm) for row in typed]
        try:
            parts = [self._encode(live, *group, read.frame) for group in _group(draws).items()]
        except InternalError as error:
            return _Prepared(typed, read, draws, [], error)
        return _Prepared(typed, read, draws, parts)

    def _check(self, rows: Sequence[Mapping[str, Any]], include: Sequence[str]) -> None:
        if len(rows) > self._rows_max:
            raise TooLargeError(
                f"{len(rows)} rows in one request; the limit is {self._rows_max}",
                code="too_many_rows",
                hint="Send them in parts.",
            )
        for name in include:
            if name not in INCLUDES:
                raise ValidationError(
                    f"include {name!r} is unknown",
                    code="unknown_include",
                    hint=f"Known: {', '.join(INCLUDES)}.",
                )

    def _refuse_other_features(self, live: ServedRoute) -> None:
        """A model reads the features that it was trained on, or none: an apply may have come."""
        if self._read.closure(live.spec.service).hash != live.closure.hash:
            raise ConflictError(
                f"the definitions of service {live.spec.service!r} have changed since the models "
                f"of route {live.spec.name!r} were trained",
                code="service_mismatch",
                hint="Train them again on the present definitions, or apply the former ones.",
            )

    def _draw(self, live: ServedRoute, row: Mapping[str, Any], forced: str | None) -> _Draw:
        spec = live.spec
        if forced is not None:
            return _Draw(spec.arm(forced).name, 1.0, None, None, 0)
        if spec.experiment is not None:
            assignment, unit, phase = self._experiments.assign(spec.experiment, row)
            return _experiment_draw(live, assignment, unit, phase)
        if len(spec.arms) == 1:
            return _Draw(spec.arms[0].name, 1.0, None, None, 0)
        unit = json.dumps([row[name] for name in live.closure.key_columns], default=str)
        name = live.draw.choose(unit)
        return _Draw(name, live.draw.propensities[name], unit, None, 0)

    def _encode(
        self, live: ServedRoute, arm: str, rows: NDArray[np.int64], frame: FeatureFrame
    ) -> _Part:
        """Return an arm's rows; shadows get the same features with their own categories."""
        model = live.live.arms[arm]
        part = frame if len(rows) == len(frame) else frame.take(rows)
        shadows = [self._vectors(shadow, part) for shadow in live.live.shadows]
        return _Part(arm, model, rows, self._vectors(model, part), shadows)

    async def _run(self, live: ServedRoute, part: _Part, deadline_s: float | None) -> Run:
        model = part.model
        scores = await model.predict(part.vectors, deadline_s=deadline_s)
        for shadow, vectors in zip(live.live.shadows, part.for_shadows, strict=True):
            self._shadows.submit(
                ShadowJob(
                    live.spec.name,
                    model.package.reference,
                    shadow.session,
                    vectors,
                    scores.score,
                )
            )
        return Run(part.arm, model, part.rows, part.vectors, scores)

    def _vectors(self, model: ServedModel, frame: FeatureFrame) -> Floats:
        """Return a model's vectors, float64 [n, F]; where they are in a frame is found once."""
        known = self._placed.get(model)
        if known is None or known[0] is not frame.layout:
            layout = frame.layout
            known = layout, vectorizer_of(model).place(layout.vector, layout.dtypes)
            self._placed[model] = known
        return known[1].vectorize(frame.block.words, frame.block.valid, frame.block.texts)

    async def _record(
        self, live: ServedRoute, prepared: _Prepared, runs: Sequence[Run]
    ) -> tuple[list[Prediction], list[dict[str, Any]]]:
        """Log and count what was served, a slice in each turn of the loop.

        Returns predictions and answers in the order of the request's rows.
        """
        found: dict[int, tuple[Prediction, dict[str, Any]]] = {}
        for i, part in enumerate(_slices(runs)):
            if i:
                await asyncio.sleep(0)
            predictions = self._predictions(live, prepared, part)
            for row, prediction in zip(part.rows.tolist(), predictions, strict=True):
                found[row] = prediction, _row_of(prediction)
                self._log.append(prediction)
            self._tap(part, live.spec.name, prepared.read)
            self._served(predictions)
        ordered = [found[row] for row in range(len(prepared.rows))]
        return [p for p, _ in ordered], [answer for _, answer in ordered]

    def _predictions(self, live: ServedRoute, prepared: _Prepared, run: Run) -> list[Prediction]:
        package, read = run.model.package, prepared.read
        predictions = []
        for place, row in enumerate(run.rows.tolist()):
            draw = prepared.draws[row]
            predictions.append(
                Prediction(
                    prediction_id=self._ids.make(read.t_us, draw.unit),
                    t_us=read.t_us,
                    sequence=read.sequence,
                    route=live.spec.name,
                    arm=draw.arm,
                    model=package.name,
                    version=package.version,
                    score=float(run.scores.score[place, 0]),
                    vector=run.vectors[place],
                    given=prepared.rows[row],
                    unit=draw.unit,
                    propensity=draw.propensity,
                    experiment=draw.experiment,
                    phase=draw.phase,
                )
            )
        return predictions


def _slices(runs: Sequence[Run]) -> Iterator[Run]:
    """Yield the runs in parts of at most RECORD_ROWS rows, sharing memory."""
    for run in runs:
        for start in range(0, len(run.rows), RECORD_ROWS):
            part, scores = slice(start, start + RECORD_ROWS), run.scores
            yield Run(
                run.arm,
                run.model,
                run.rows[part],
                run.vectors[part],
                Scores(scores.raw[part], scores.score[part]),
            )


def vectorizer_of(model: ServedModel) -> Vectorizer:
    """Return the vectorizer frozen into a trained version."""
    vectorizer = model.package.signature.vectorizer
    if vectorizer is None:
        raise InternalError(f"model {model.package.reference} takes no features")
    return vectorizer


def _typed_rows(given: Mapping[str, Column]) -> list[dict[str, Any]]:
    """Return rows of checked values: what is logged must be what the features were read with."""
    lists = {name: column.to_list() for name, column in given.items()}
    return [dict(zip(lists, values, strict=True)) for values in zip(*lists.values(), strict=True)]


def _experiment_draw(
    live: ServedRoute, assignment: Assignment, unit: str | None, phase: int
) -> _Draw:
    arm = assignment.arm or live.spec.arms[0].name
    experiment = live.spec.experiment if assignment.reason == "assigned" else None
    return _Draw(arm, assignment.propensity, unit, experiment, phase)


def _group(draws: Sequence[_Draw]) -> dict[str, NDArray[np.int64]]:
    rows: dict[str, list[int]] = {}
    for i, draw in enumerate(draws):
        rows.setdefault(draw.arm, []).append(i)
    return {arm: np.array(index, np.int64) for arm, index in rows.items()}


def _row_of(prediction: Prediction) -> dict[str, Any]:
    return {
        "prediction_id": prediction.prediction_id,
        "score": prediction.score,
        "label": int(prediction.score >= LABEL_THRESHOLD),
        "arm": prediction.arm,
        "model": prediction.model,
        "version": prediction.version,
    }


def _include(
    answers: Sequence[dict[str, Any]],
    predictions: Sequence[Prediction],
    read: ReadResult,
    include: Sequence[str],
) -> None:
    frame = read.frame
    lists = {name: column.to_list() for name, column in frame.columns.items()}
    for i, answer in enumerate(answers):
        if "vector" in include:
            answer["vector"] = predictions[i].vector.tolist()
        if "features" in include:
            answer["features"] = {name: values[i] for name, values in lists.items()}
        if "statuses" in include:
            answer["statuses"] = {name: int(s[i]) for name, s in frame.statuses.items()}
        if "ages" in include:
            answer["ages_s"] = {
                view: None if times[i] == 0 else (read.t_us - int(times[i])) / 1e6
                for view, times in frame.event_us.items()
            }


def _answer(
    live: ServedRoute, rows: list[dict[str, Any]], t_us: int, sequence: int
) -> dict[str, Any]:
    return {
        "route": live.spec.name,
        "route_version": live.spec.version,
        "predictions": rows,
        "t_us": t_us,
        "sequence": sequence,
    }


def _fallback(live: ServedRoute, n: int, read: ReadResult, error: InternalError) -> dict[str, Any]:
    """Answer with the route's default score; such rows are not logged, they have no vector."""
    row = {"prediction_id": None, "score": live.spec.fallback, "fallback": error.message}
    return _answer(live, [dict(row) for _ in range(n)], read.t_us, read.sequence)
