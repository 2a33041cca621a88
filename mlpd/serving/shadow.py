"""Shadows: other versions score what the primary has scored, later, in one thread, if there's time.

The queue is bounded and drops; every 50 ms it is run in batches; while `busy()` says so, nothing
runs: shadows are the first thing to stop under load.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mlpd.core.errors import ValidationError
from mlpd.serving.jobs import BATCH_ROWS
from mlpd.serving.paired import PairedDifference
from mlpd.serving.sessions import Scores, Session

PERIOD_S = 0.05
"""Time between two batches."""
QUEUE_ROWS_MAX = 20_000
"""Most rows that wait; with 30 features they take 5 MB."""
PAIRS_MAX = 256
"""Most pairs of route, primary and shadow whose statistics are kept; the oldest are dropped."""

Floats = NDArray[np.float64]
_log = logging.getLogger(__name__)


class ShadowPair(NamedTuple):
    """Whose scores are compared: a route's primary and shadow, both as `model@version`."""

    route: str
    primary: str
    shadow: str


@dataclass(frozen=True, slots=True, eq=False)
class ShadowJob:
    """What a shadow shall score, and the primary's score of the same rows.

    `features` float64 [n, F]: the shadow's vectors of the feature values that the primary read
    (each version has its own categories).  `score` float64 [n, K].  Neither may be written to
    afterwards.  `tag` comes back with the result, for example the prediction ids.
    """

    route: str
    primary: str
    session: Session
    features: Floats
    score: Floats
    tag: Any = None

    @property
    def pair(self) -> ShadowPair:
        """Whose scores are compared."""
        return ShadowPair(self.route, self.primary, self.session.package.reference)


@dataclass(frozen=True, slots=True, eq=False)
class ShadowResult:
    """A job with the shadow's scores; `us_per_row` is the run's cost in its batch."""

    job: ShadowJob
    scores: Scores
    us_per_row: float


@dataclass(slots=True)
class ShadowCounters:
    """Rows by fate: submitted = executed + dropped + failed + waiting."""

    submitted: int = 0
    executed: int = 0
    dropped: int = 0
    failed: int = 0
    execution_us: float = 0.0


class ShadowRunner:
    """Runs shadows; `submit` is called by the loop, everything else happens in one thread.

    `on_results` gets each batch's results, in that thread; what it raises is logged.
    """

    def __init__(
        self,
        *,
        busy: Callable[[], bool] = lambda: False,
        on_results: Callable[[list[ShadowResult]], None] = lambda _: None,
        threshold: float = 0.5,
        queue_rows_max: int = QUEUE_ROWS_MAX,
    ) -> None:
        self._busy, self._on_results = busy, on_results
        self._threshold, self._queue_rows_max = threshold, queue_rows_max
        self._queue: deque[ShadowJob] = deque()
        self._waiting_rows = 0
        self._lock = threading.Lock()
        self._counters = ShadowCounters()
        self._pairs: dict[ShadowPair, PairedDifference] = {}
        self._stopping, self._wake = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._loop, name="mlpd-shadow", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def close(self) -> None:
        """Stop after the batch under way; what still waits is dropped.  Blocks for that batch."""
        self._stopping.set()
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join()
        with self._lock:
            self._counters.dropped += self._waiting_rows
            self._queue.clear()
            self._waiting_rows = 0

    def submit(self, job: ShadowJob) -> bool:
        """Queue a job; False if it was dropped because the queue is full.  Never blocks, 1 us.

        Raises ValidationError(code="wrong_shape") if the shadow doesn't take these vectors, or
        gives another number of outputs than the primary.
        """
        _check_shapes(job)
        rows = len(job.features)
        with self._lock:
            self._counters.submitted += rows
            if self._stopping.is_set() or self._waiting_rows + rows > self._queue_rows_max:
                self._counters.dropped += rows
                return False
            self._waiting_rows += rows
            self._queue.append(job)
        self._wake.set()
        return True

    def counters(self) -> dict[str, float]:
        """Return rows submitted, executed, dropped, failed and waiting, and execution_us in all."""
        with self._lock:
            counters = self._counters
            return {
                "submitted": counters.submitted,
                "executed": counters.executed,
                "dropped": counters.dropped,
                "failed": counters.failed,
                "waiting": self._waiting_rows,
                "execution_us": counters.execution_us,
            }

    def statistics(self) -> dict[ShadowPair, PairedDifference]:
        """Return copies of the statistics of every pair, since the start or since `forget`."""
        with self._lock:
            return {pair: replace(found) for pair, found in self._pairs.items()}

    def forget(self, primary: str, shadow: str) -> None:
        """Let the statistics of the two, on every route, begin anew."""
        with self._lock:
            for pair in [p for p in self._pairs if (p.primary, p.shadow) == (primary, shadow)]:
                del self._pairs[pair]

    def _loop(self) -> None:
        while not self._stopping.is_set():
            self._wake.wait()
            self._wake.clear()
            self._stopping.wait(PERIOD_S)
            while self._queue and not self._stopping.is_set() and not self._busy():
                self._run(self._take())
            if self._queue:  # busy: look again after another period
                self._wake.set()

    def _take(self) -> list[ShadowJob]:
        """Return jobs from the front that one session can run together."""
        with self._lock:
            jobs = [self._queue.popleft()]
            rows = len(jobs[0].features)
            while (
                self._queue
                and self._queue[0].session is jobs[0].session
                and rows + len(self._queue[0].features) <= BATCH_ROWS
            ):
                rows += len(self._queue[0].features)
                jobs.append(self._queue.popleft())
            self._waiting_rows -= rows
            return jobs

    def _run(self, jobs: list[ShadowJob]) -> None:
        session = jobs[0].session
        features = np.concatenate([job.features for job in jobs])
        started_ns = time.perf_counter_ns()
        try:
            raw = np.concatenate([session.run(chunk) for chunk in _chunks(features)])
            score = session.score(raw)
        except Exception:  # noqa: BLE001 - a shadow must not stop the others, or the server
            _log.exception("shadow %s failed", session.package.reference)
            with self._lock:
                self._counters.failed += len(features)
            return
        elapsed_us = (time.perf_counter_ns() - started_ns) / 1000
        results = list(_results(jobs, raw, score, elapsed_us / len(features)))
        self._count(results, len(features), elapsed_us)
        try:
            self._on_results(results)
        except Exception:  # noqa: BLE001 - the thread must go on
            _log.exception("taking shadow results failed")

    def _count(self, results: list[ShadowResult], rows: int, elapsed_us: float) -> None:
        with self._lock:
            self._counters.executed += rows
            self._counters.execution_us += elapsed_us
            for result in results:
                self._pair(result.job.pair).add(result.job.score, result.scores.score)

    def _pair(self, key: ShadowPair) -> PairedDifference:
        found = self._pairs.get(key)
        if found is None:
            if len(self._pairs) == PAIRS_MAX:
                del self._pairs[next(iter(self._pairs))]
            found = self._pairs[key] = PairedDifference(self._threshold)
        return found


def _check_shapes(job: ShadowJob) -> None:
    wanted = job.session.width, job.session.outputs
    found = job.features.shape[1], job.score.shape[1]
    if found != wanted:
        raise ValidationError(
            f"shadow {job.session.package.reference} of route {job.route!r} makes {wanted[1]} "
            f"scores of {wanted[0]} features, but got {found[0]} features and {found[1]} scores",
            code="wrong_shape",
            hint="A shadow serves the same feature service and outputs as its primary.",
        )


def _chunks(features: Floats) -> Iterable[Floats]:
    return (features[start : start + BATCH_ROWS] for start in range(0, len(features), BATCH_ROWS))


def _results(
    jobs: list[ShadowJob], raw: Floats, score: Floats, us_per_row: float
) -> Iterable[ShadowResult]:
    start = 0
    for job in jobs:
        end = start + len(job.features)
        yield ShadowResult(job, Scores(raw[start:end], score[start:end]), us_per_row)
        start = end
