"""Jobs that wait for a session, the order in which they are taken, and how a batch of them runs."""

import asyncio
import itertools
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlpd.serving.sessions import Scores, Session
from mlpd.serving.statistics import Execution

BATCH_ROWS = 256
"""Most rows in one run of a graph."""

PRIORITIES = (1, 2, 3)
"""Jobs of a smaller number go first."""

USUAL_PRIORITY = 2

Payload = NDArray[np.float64] | Mapping[str, NDArray[Any]]
Outcome = Scores | dict[str, NDArray[Any]] | Exception


@dataclass(slots=True, eq=False)
class Job:
    """One request, or one chunk of it, that waits for its run."""

    payload: Payload
    rows: int
    deadline_s: float | None
    arrived_ns: int
    future: "asyncio.Future[Any]"
    priority: int = USUAL_PRIORITY


class Lane:
    """Waiting jobs by priority and session; sessions take turns, jobs of one keep their order."""

    def __init__(self) -> None:
        self._queues: dict[int, dict[Session, deque[Job]]] = {}

    def __bool__(self) -> bool:
        return bool(self._queues)

    def push(self, session: Session, job: Job) -> None:
        """Add a job behind its session's others of the same priority."""
        queues = self._queues.setdefault(job.priority, {})
        queue = queues.get(session)
        if queue is None:
            queue = queues[session] = deque()
        queue.append(job)

    def take(self, budget_us: float) -> tuple[Session, list[Job]]:
        """Return the next session and its first jobs: one, and more while they fit.

        They have the same priority, the first that waits, and fit up to BATCH_ROWS rows and an
        estimate of `budget_us`.  A job on named tensors comes alone: a foreign graph may mix the
        rows of a batch.
        """
        priority = min(self._queues)
        queues = self._queues[priority]
        session, queue = next(iter(queues.items()))
        del queues[session]
        jobs = [queue.popleft()]
        rows = jobs[0].rows
        while queue and _mergeable(jobs[0], queue[0]):
            rows += queue[0].rows
            if rows > BATCH_ROWS or session.cost.estimate_us(rows) > budget_us:
                break
            jobs.append(queue.popleft())
        if queue:
            queues[session] = queue  # at the end of the order
        if not queues:
            del self._queues[priority]
        return session, jobs

    def drain(self) -> Iterator[Job]:
        """Take all jobs out, in any order."""
        while self._queues:
            _, queues = self._queues.popitem()
            for queue in queues.values():
                yield from queue


def _mergeable(first: Job, second: Job) -> bool:
    return isinstance(first.payload, np.ndarray) and isinstance(second.payload, np.ndarray)


def execute(session: Session, jobs: list[Job]) -> tuple[list[Outcome], list[Execution]]:
    """Run jobs of one session as one batch; if that fails, each on its own.

    Any thread may call it.  The outcomes stand in the order of the jobs; an execution counts if
    it succeeded.
    """
    if len(jobs) > 1:
        outcome, execution = attempt(session, [job.payload for job in jobs], _rows(jobs))
        if isinstance(outcome, Scores):
            return _split(outcome, jobs), [execution]
    attempts = [attempt(session, [job.payload], job.rows) for job in jobs]
    succeeded = [run for outcome, run in attempts if not isinstance(outcome, Exception)]
    return [outcome for outcome, _ in attempts], succeeded


def attempt(session: Session, payloads: Sequence[Payload], rows: int) -> tuple[Outcome, Execution]:
    """Run payloads, `rows` rows in all, at once: several feature arrays or one mapping.

    An exception is an outcome too.
    """
    started_ns = merged_ns = ran_ns = time.perf_counter_ns()
    outcome: Outcome
    try:
        payload = payloads[0] if len(payloads) == 1 else _merge(payloads)
        merged_ns = ran_ns = time.perf_counter_ns()
        if isinstance(payload, np.ndarray):
            raw = session.run(payload)
            ran_ns = time.perf_counter_ns()
            outcome = Scores(raw, session.score(raw))
        else:
            outcome = session.run_named(payload)
            ran_ns = time.perf_counter_ns()
    except Exception as error:  # noqa: BLE001 - whatever it is, it belongs to whoever asked
        outcome = error
    ended_ns = time.perf_counter_ns()
    return outcome, Execution(rows, merged_ns - started_ns, ran_ns - merged_ns, ended_ns - ran_ns)


def _merge(payloads: Sequence[Payload]) -> NDArray[np.float64]:
    return np.concatenate([payload for payload in payloads if isinstance(payload, np.ndarray)])


def _rows(jobs: Sequence[Job]) -> int:
    return sum(job.rows for job in jobs)


def _split(scores: Scores, jobs: list[Job]) -> list[Outcome]:
    ends = itertools.accumulate(job.rows for job in jobs)
    return [
        Scores(scores.raw[end - job.rows : end], scores.score[end - job.rows : end])
        for job, end in zip(jobs, ends, strict=True)
    ]
