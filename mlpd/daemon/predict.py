"""Verb predict: assign, read, vectorize, score, answer; then log, count and shadow.

One request: one snapshot of features for all rows, one run per arm.  What follows the answer
(prediction log, live counts, shadows, exposures) never fails or delays it.  Few rows are served on
the loop; with many, all that grows with them happens in a thread, or on the loop in slices.
"""

import asyncio
import json
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from mlpd.core.columns import Column
from mlpd.core.deadlines import check_deadline
from mlpd.core.errors import (
    DeadlineExceededError,
    InternalError,
    TooLargeError,
    ValidationError,
)
from mlpd.core.names import TimeUs
from mlpd.core.trace import end_step
from mlpd.core.vector import PlacedVectorizer, Vectorizer
from mlpd.daemon.experiment_watch import WATCHED_ROWS, Served
from mlpd.daemon.experiments import Experiments
from mlpd.daemon.ownership import Ownership
from mlpd.daemon.predictions import Prediction, PredictionIds, PredictionLog, lot_of
from mlpd.daemon.read import Read, ReadResult, given_columns
from mlpd.daemon.read_pool import ReadPool
from mlpd.daemon.routes import Routes, ServedRoute, service_mismatch
from mlpd.daemon.served_request import (
    Draw,
    Part,
    Prepared,
    Run,
    group_rows,
    interleave,
    unanswered,
)
from mlpd.experiments.assignment import Assignment
from mlpd.features.assemble import FeatureFrame, FrameLayout
from mlpd.features.cells import Cells
from mlpd.serving.predictor import ServedModel
from mlpd.serving.sessions import Scores
from mlpd.serving.shadow import ShadowJob, ShadowRunner

INCLUDES = ("vector", "features", "statuses", "ages")
"""What an answer may carry besides scores."""

LABEL_THRESHOLD = 0.5
RECORD_ROWS = 64
"""Rows that are recorded in one turn of the loop: 7 to 15 us each."""

Floats = NDArray[np.float64]
Tap = Callable[["Run", str], None]
"""Called with every run and its route."""


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
        watch: Callable[[Served], None],
        ids: PredictionIds,
        ownership: Ownership,
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
        self._watch = watch
        self._ids = ids
        self._ownership = ownership
        self.fell_back: Counter[str] = Counter()
        self.defaulted: Counter[str] = Counter()
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
        cells: Cells | None = None,
    ) -> dict[str, Any]:
        """Return the answer for rows of entity keys and request fields.

        `arm` forces one (testers): such rows take no part in the experiment.  `deadline_s`: on
        `time.monotonic()`.  `cells`: what other shards hold of the rows' keys.  Raises
        NotFoundError, ValidationError, DeadlineExceededError, OverloadedError.  For an arm that
        fails the route's fallbacks answer, and say why.
        """
        live = self._routes.served(route)
        self._check(rows, include)
        self._refuse_other_features(live)
        if not rows:
            return _answer(live, [], 0, 0)
        n = len(rows)
        asked = live, rows, at_us, min_sequence, arm, deadline_s, cells
        prepared = await self._pool.call(n, self._prepare, *asked)
        end_step("features")
        read = prepared.read
        runs, defaults = await self._run_all(live, prepared, deadline_s)
        end_step("model")
        ranks: Mapping[int, int] = {}
        if prepared.both:
            merged = await self._pool.call(
                n, interleave, live.spec.experiment or "", prepared, runs
            )
            prepared, runs, ranks = merged
        predictions, answers = await self._record(live, prepared, runs, defaults)
        for row, rank in ranks.items():
            answers[row]["rank"] = rank
        end_step("record")
        if include:
            served = [(run.read, run.rows.tolist()) for run in runs]
            reads = [*served, (read, list(defaults))]
            await self._pool.call(n, _include, answers, predictions, reads, include)
        return _answer(live, answers, read.t_us, read.sequence)

    def _prepare(
        self,
        live: ServedRoute,
        rows: Sequence[Mapping[str, Any]],
        at_us: TimeUs | None,
        min_sequence: int,
        arm: str | None,
        deadline_s: float | None,
        cells: Cells | None,
    ) -> Prepared:
        """Check, read, assign and encode rows, unless it is too late; on the loop or in a thread.

        The read takes its snapshot and its moment together, wherever it runs, so that its rows are
        those known at that moment.
        """
        check_deadline(deadline_s, "its turn to be read came")
        given = given_columns(live.asks, rows)
        typed = _typed_rows(given)
        found = self._read.read_each(
            live.versions.values(), given, at_us=at_us, min_sequence=min_sequence, cells=cells
        )
        read, reads = found[0], dict(zip(live.versions, found, strict=True))
        # Before rows are drawn: an end that comes between the two leaves no list to one arm.
        both = () if arm is not None else self._experiments.interleaved(live.spec.experiment)
        draws = [self._draw(live, row, arm) for row in typed]
        parts, failures = [], {}
        for name, index in group_rows(draws, both).items():
            try:
                parts.append(self._encode(live, name, index, reads))
            except InternalError as error:
                failures[name] = index, error
        homes = self._ownership.homes
        slots = None if homes is None else homes.home_slots(live.asks.entities, given, len(rows))
        is_part = self._ownership.part is not None
        others = cells.sequences if cells is not None and is_part else {}
        return Prepared(typed, read, reads, draws, parts, failures, slots, both, others)

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
        for service_hash in live.versions:
            if not self._read.serves(live.spec.service, service_hash):
                references = (r for r, found in live.hashes.items() if found == service_hash)
                raise service_mismatch(next(references), live.spec.service, service_hash)

    def _draw(self, live: ServedRoute, row: Mapping[str, Any], forced: str | None) -> Draw:
        spec = live.spec
        if forced is not None:
            return Draw(spec.arm(forced).name, 1.0, None, None, 0)
        if spec.experiment is not None:
            assignment, unit, phase = self._experiments.assign(spec.experiment, row)
            return _experiment_draw(live, assignment, unit, phase)
        if len(spec.arms) == 1:
            return Draw(spec.arms[0].name, 1.0, None, None, 0)
        unit = json.dumps([row[name] for name in live.asks.key_columns], default=str)
        name = live.draw.choose(unit)
        return Draw(name, live.draw.propensities[name], unit, None, 0)

    def _encode(
        self,
        live: ServedRoute,
        arm: str,
        rows: NDArray[np.int64],
        reads: Mapping[str, ReadResult],
    ) -> Part:
        """Return an arm's rows; shadows get their own features and categories."""
        frames: dict[str, FeatureFrame] = {}

        def vectors(model: ServedModel) -> Floats:
            found = live.hashes[model.package.reference]
            if found not in frames:
                whole = reads[found].frame
                frames[found] = whole if len(rows) == len(whole) else whole.take(rows)
            return self._vectors(model, frames[found])

        model = live.live.arms[arm]
        read = reads[live.hashes[model.package.reference]]
        shadows = [vectors(shadow) for shadow in live.live.shadows]
        return Part(arm, model, read, rows, vectors(model), shadows)

    async def _run_all(
        self, live: ServedRoute, prepared: Prepared, deadline_s: float | None
    ) -> tuple[list[Run], dict[int, str]]:
        """Return the runs of all arms, and why for each row that is left to the default score.

        Raises the InternalError of an arm for which nothing else answers.
        """
        runs, failures = [], dict(prepared.failures)
        for arm, (rows, _) in failures.items():
            self._report(live, prepared, arm, rows)
        for part in prepared.parts:
            started_s = time.perf_counter()
            try:
                run = await self._run(live, part, deadline_s)
            except InternalError as error:
                failures[part.arm] = part.rows, error
                self._report(live, prepared, part.arm, part.rows)
            except DeadlineExceededError:
                late_s = time.perf_counter() - started_s
                self._report(live, prepared, part.arm, part.rows, late_s, is_late=True)
                raise
            else:
                runs.append(run)
                taken_s = time.perf_counter() - started_s
                self._report(live, prepared, part.arm, part.rows, taken_s, run.scores.served)
        defaults: dict[int, str] = {}
        for arm, (asked, why) in failures.items():
            rows = unanswered(asked, runs)
            if not len(rows):  # of an interleaved list, which the other arm ranks
                continue
            other = await self._fall_back(live, arm, rows, prepared.reads, deadline_s, why)
            if other is not None:
                runs.append(other)
            elif live.spec.fallback is None:
                raise why
            else:
                defaults |= dict.fromkeys(rows.tolist(), why.message)
        return runs, defaults

    def _report(
        self,
        live: ServedRoute,
        prepared: Prepared,
        arm: str,
        rows: NDArray[np.int64],
        seconds: float = 0.0,
        scores: Floats | None = None,
        *,
        is_late: bool = False,
    ) -> None:
        """Tell the canary and the experiment's guardrails how an arm answered: the one place.

        Without `scores` its model failed, or its answer was late.
        """
        if scores is None:
            self._routes.trials.failed(live.spec.name, arm, len(rows))
        else:
            self._routes.trials.answered(live.spec.name, arm, 1e6 * seconds, scores)
        if live.spec.experiment is not None:
            draws = [prepared.draws[row] for row in rows[:WATCHED_ROWS].tolist()]
            experiments, units = [d.experiment for d in draws], [d.unit for d in draws]
            self._watch(Served(arm, experiments, units, seconds, scores, is_late))

    async def _run(self, live: ServedRoute, part: Part, deadline_s: float | None) -> Run:
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
        return Run(part.arm, model, part.read, part.rows, part.vectors, scores)

    async def _fall_back(
        self,
        live: ServedRoute,
        arm: str,
        rows: NDArray[np.int64],
        reads: Mapping[str, ReadResult],
        deadline_s: float | None,
        why: InternalError,
    ) -> Run | None:
        """Return rows of a failed arm as the first fallback model that can serves them."""
        for model in live.fallbacks:
            if model is live.live.arms[arm]:
                continue
            read = reads[live.hashes[model.package.reference]]
            frame = read.frame if len(rows) == len(read.frame) else read.frame.take(rows)
            try:
                vectors = await self._pool.call(len(rows), self._vectors, model, frame)
                scores = await model.predict(vectors, deadline_s=deadline_s)
            except InternalError:
                continue
            return Run(arm, model, read, rows, vectors, scores, why.message)
        return None

    def _vectors(self, model: ServedModel, frame: FeatureFrame) -> Floats:
        """Return a model's vectors, float64 [n, F]; where they are in a frame is found once."""
        known = self._placed.get(model)
        if known is None or known[0] is not frame.layout:
            layout = frame.layout
            known = layout, vectorizer_of(model).place(layout.vector, layout.dtypes)
            self._placed[model] = known
        return known[1].vectorize(frame.block.words, frame.block.valid, frame.block.texts)

    async def _record(
        self,
        live: ServedRoute,
        prepared: Prepared,
        runs: Sequence[Run],
        defaults: Mapping[int, str],
    ) -> tuple[list[Prediction | None], list[dict[str, Any]]]:
        """Log and count what was served, a slice in each turn of the loop.

        Returns predictions and answers in the order of the request's rows.  `defaults` are rows
        that get the route's default score, and why: they are not logged, as no model saw them.
        Raises UnavailableError(code="slots_moving") where a row's slot takes none any more.
        """
        self._ownership.check_open(prepared.slots)
        with self._log.recording():
            return await self._record_all(live, prepared, runs, defaults)

    async def _record_all(
        self,
        live: ServedRoute,
        prepared: Prepared,
        runs: Sequence[Run],
        defaults: Mapping[int, str],
    ) -> tuple[list[Prediction | None], list[dict[str, Any]]]:
        found: dict[int, tuple[Prediction | None, dict[str, Any]]] = {
            row: (None, {"prediction_id": None, "score": live.spec.fallback, "fallback": why})
            for row, why in defaults.items()
        }
        self.defaulted[live.spec.name] += len(defaults)
        for i, part in enumerate(_slices(runs)):
            if i:
                await asyncio.sleep(0)
            predictions = self._predictions(live, prepared, part)
            logged = [p for p in predictions if p.share == 1.0 or lot_of(p.prediction_id) < p.share]
            left_out = {p.prediction_id for p in predictions} - {p.prediction_id for p in logged}
            several = part.scores.score.shape[1] > 1
            lists = part.scores.score.tolist() if several else [None] * len(predictions)
            for row, prediction, scores in zip(part.rows.tolist(), predictions, lists, strict=True):
                found[row] = prediction, _row_of(prediction, scores, part.fallback, left_out)
            for prediction in logged:
                self._log.append(prediction)
            self._log.left_out += len(left_out)
            self._tap(part, live.spec.name)
            self._served(logged)
            if part.fallback is not None:
                self.fell_back[live.spec.name] += len(predictions)
        ordered = [found[row] for row in range(len(prepared.rows))]
        return [p for p, _ in ordered], [answer for _, answer in ordered]

    def _predictions(self, live: ServedRoute, prepared: Prepared, run: Run) -> list[Prediction]:
        package, read, slots = run.model.package, prepared.read, prepared.slots
        takes_part = run.fallback is None  # of another model an experiment learns nothing
        predictions = []
        served, chosen = run.scores.served.tolist(), run.scores.chosen
        for place, row in enumerate(run.rows.tolist()):
            draw = prepared.draws[row]
            is_plain = takes_part and draw.experiment is None
            predictions.append(
                Prediction(
                    prediction_id=self._ids.make(
                        read.t_us, draw.unit, None if slots is None else slots[row]
                    ),
                    t_us=read.t_us,
                    sequence=read.sequence,
                    route=live.spec.name,
                    arm=draw.arm,
                    model=package.name,
                    version=package.version,
                    score=served[place],
                    vector=run.vectors[place],
                    given=prepared.rows[row],
                    unit=draw.unit,
                    propensity=draw.propensity,
                    experiment=draw.experiment if takes_part else None,
                    phase=draw.phase if takes_part else 0,
                    chosen=None if chosen is None else int(chosen[place]),
                    share=live.spec.log_share if is_plain else 1.0,
                    others=prepared.others,
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
                run.read,
                run.rows[part],
                run.vectors[part],
                Scores(scores.raw[part], scores.score[part]),
                run.fallback,
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
) -> Draw:
    arm = assignment.arm or live.spec.arms[0].name
    experiment = live.spec.experiment if assignment.reason == "assigned" else None
    return Draw(arm, assignment.propensity, unit, experiment, phase)


def _row_of(
    prediction: Prediction,
    scores: list[float] | None,
    fallback: str | None,
    left_out: Collection[str],
) -> dict[str, Any]:
    name, cut = prediction.prediction_id, int(prediction.score >= LABEL_THRESHOLD)
    return {
        "prediction_id": None if name in left_out else name,
        "score": prediction.score,
        "label": cut if prediction.chosen is None else prediction.chosen,
        **({} if scores is None else {"scores": scores}),
        "arm": prediction.arm,
        "model": prediction.model,
        "version": prediction.version,
        **({} if fallback is None else {"fallback": fallback}),
    }


def _include(
    answers: Sequence[dict[str, Any]],
    predictions: Sequence[Prediction | None],
    parts: Iterable[tuple[ReadResult, Sequence[int]]],
    include: Sequence[str],
) -> None:
    """Add what is asked for to the answers; `parts`: rows of the request, and what they read."""
    for read, rows in parts:
        frame = read.frame
        lists = frame.value_lists() if "features" in include else {}
        statuses = frame.status_lists() if "statuses" in include else {}
        for i in rows:
            answer, prediction = answers[i], predictions[i]
            if "vector" in include:
                answer["vector"] = None if prediction is None else prediction.vector.tolist()
            if "features" in include:
                answer["features"] = {name: values[i] for name, values in lists.items()}
            if "statuses" in include:
                answer["statuses"] = {name: values[i] for name, values in statuses.items()}
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
