"""When and where a prediction runs: at once on the loop, in the next tick's batch, or in a thread.

- Alone and cheap (rows x us/row <= INLINE_US): at once, on the loop.
- Cheap, but others came in the same turn of the loop: all of them as one batch in the next turn.
  No timer: a tick waits for nobody, a 1 ms timer lost at every concurrency.
- Dear, or more than BATCH_ROWS rows: in chunks on a small thread pool, so the loop stays free.
"""

import asyncio
import math
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlpd.core.deadlines import check_deadline, too_late
from mlpd.core.errors import (
    MlpdError,
    OverloadedError,
    TooLargeError,
    UnavailableError,
    ValidationError,
)
from mlpd.serving.jobs import (
    BATCH_ROWS,
    USUAL_PRIORITY,
    Job,
    Lane,
    Outcome,
    Payload,
    attempt,
    execute,
)
from mlpd.serving.sessions import Scores, Session
from mlpd.serving.statistics import Execution

INLINE_US = 1000.0
"""What may block the loop: a run or a tick estimated above it goes elsewhere or is cut."""
PENDING_ROWS_MAX = 65_536
"""Most rows that wait at any time, over all models; also the most that one request may bring."""
RETRY_AFTER_S = 0.1
"""What an overloaded answer advises: a full queue of 7 us rows is gone after half a second."""


class Batcher:
    """Runs the predictions of all sessions; every method belongs to one loop.

    `threads` is the number of chunks that run beside the loop at a time.  Deadlines are
    `time.monotonic()` seconds (the loop's own clock); they are checked on arrival and whenever work
    is taken for its run.  What is expired or cancelled by then is dropped unexecuted.
    """

    def __init__(self, *, threads: int = 1, pending_rows_max: int = PENDING_ROWS_MAX) -> None:
        self._executor = ThreadPoolExecutor(threads, thread_name_prefix="mlpd-predict")
        self._threads = threads
        self._pending_rows_max = pending_rows_max
        self._pending_rows = 0
        self._quick, self._bulk = Lane(), Lane()
        self._running = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._tick_scheduled = False
        self._crowded = False
        self._closed = False

    @property
    def pending_rows(self) -> int:
        """Rows that wait or run in a thread now."""
        return self._pending_rows

    async def predict(
        self,
        session: Session,
        features: NDArray[np.float64],
        *,
        deadline_s: float | None = None,
        priority: int = USUAL_PRIORITY,
    ) -> Scores:
        """Return raw scores and scores of float64 [n, F]: the bits that a lone run gives.

        `priority`: one of PRIORITIES; what waits with a smaller number is taken first.
        Raises ValidationError (`wrong_shape`), DeadlineExceededError, OverloadedError (details
        `retry_after_s`), TooLargeError, UnavailableError after `close`, or what the run raised.
        """
        features = _checked(session, features)
        rows = len(features)
        self._admit(rows, deadline_s)
        if rows == 0:
            nothing = np.empty((0, session.outputs))
            return Scores(nothing, nothing.copy())
        if self._may_run_inline(session, rows):
            outcome: Scores = self._run_inline(session, features, rows)
            return outcome
        if rows <= BATCH_ROWS:
            waiting: Scores = await self._enqueue(session, features, rows, deadline_s, priority)
            return waiting
        return await self._predict_in_chunks(session, features, deadline_s, priority)

    async def predict_named(
        self,
        session: Session,
        inputs: Mapping[str, NDArray[Any]],
        rows: int,
        *,
        deadline_s: float | None = None,
        priority: int = USUAL_PRIORITY,
    ) -> dict[str, NDArray[Any]]:
        """Return the outputs of a user's graph, never merged with another request.

        `rows`: the size of the first dimension, at least 1, for cost and counters.  Raises as
        `predict` does.
        """
        self._admit(rows, deadline_s)
        outputs: dict[str, NDArray[Any]]
        if self._may_run_inline(session, rows):
            outputs = self._run_inline(session, inputs, rows)
        else:
            outputs = await self._enqueue(session, inputs, rows, deadline_s, priority)
        return outputs

    async def close(self) -> None:
        """Refuse new work, fail what still waits with UnavailableError, wait for running chunks."""
        self._closed = True
        for lane in (self._quick, self._bulk):
            for job in lane.drain():
                self._settle(job, _stopping())
        await self._idle.wait()
        self._executor.shutdown()

    def _admit(self, rows: int, deadline_s: float | None) -> None:
        if self._closed:
            raise _stopping()
        check_deadline(deadline_s, "it came to the model")
        if rows > self._pending_rows_max:
            raise TooLargeError(
                f"a request of {rows} rows is over the limit of {self._pending_rows_max}",
                code="too_many_rows",
                hint="Send it in parts.",
            )
        if self._pending_rows + rows > self._pending_rows_max:
            raise OverloadedError(
                f"{self._pending_rows} rows wait for prediction already",
                code="prediction_queue_full",
                hint="Try again later, or send less at a time.",
                details={"retry_after_s": RETRY_AFTER_S},
            )

    def _may_run_inline(self, session: Session, rows: int) -> bool:
        return not self._crowded and not self._quick and _is_quick(session, rows)

    def _run_inline(self, session: Session, payload: Payload, rows: int) -> Any:
        # Whoever else comes in this turn of the loop waits for the tick that ends it.
        self._crowded = True
        self._schedule_tick()
        outcome, execution = attempt(session, [payload], rows)
        if isinstance(outcome, Exception):
            raise outcome
        _learn(session, execution, requests=1, queue_ns=0)
        return outcome

    async def _predict_in_chunks(
        self,
        session: Session,
        features: NDArray[np.float64],
        deadline_s: float | None,
        priority: int,
    ) -> Scores:
        chunks = []
        for start in range(0, len(features), BATCH_ROWS):
            chunk = features[start : start + BATCH_ROWS]
            job = _new_job(chunk, len(chunk), deadline_s, priority)
            self._push_bulk(session, job)
            chunks.append(job.future)
        try:
            parts = await asyncio.gather(*chunks)
        finally:
            for future in chunks:  # of no use once one has failed or the caller is gone
                future.cancel()
        raws, scores = zip(*parts, strict=True)
        return Scores(np.concatenate(raws), np.concatenate(scores))

    def _enqueue(
        self,
        session: Session,
        payload: Payload,
        rows: int,
        deadline_s: float | None,
        priority: int,
    ) -> "asyncio.Future[Any]":
        job = _new_job(payload, rows, deadline_s, priority)
        if _is_quick(session, rows):
            self._pending_rows += rows
            self._quick.push(session, job)
            self._schedule_tick()
        else:
            self._push_bulk(session, job)
        return job.future

    def _push_bulk(self, session: Session, job: Job) -> None:
        self._pending_rows += job.rows
        self._bulk.push(session, job)
        self._fill_threads()

    def _schedule_tick(self) -> None:
        if not self._tick_scheduled:
            self._tick_scheduled = True
            asyncio.get_running_loop().call_soon(self._tick)

    def _tick(self) -> None:
        """Run what came during the last turn of the loop, about INLINE_US of it."""
        self._tick_scheduled = False
        ran, started_ns, left_us = 0, time.perf_counter_ns(), INLINE_US
        while self._quick and left_us > 0:
            session, jobs = self._quick.take(left_us)
            if live := self._live(jobs):
                ran += len(live)
                self._finish(session, live, *execute(session, live))
            left_us = INLINE_US - (time.perf_counter_ns() - started_ns) / 1000
        # A batch of one means that the crowd has gone: the next request needn't wait for a tick.
        self._crowded = ran > 1 or bool(self._quick)
        if self._quick:
            self._schedule_tick()

    def _fill_threads(self) -> None:
        while self._bulk and self._running < self._threads:
            session, jobs = self._bulk.take(math.inf)
            if live := self._live(jobs):
                self._running += 1
                self._idle.clear()
                self._executor.submit(self._work, asyncio.get_running_loop(), session, live)

    def _work(self, loop: asyncio.AbstractEventLoop, session: Session, jobs: list[Job]) -> None:
        """Run jobs in a thread and hand what came of them to the loop."""
        outcomes, executions = execute(session, jobs)
        loop.call_soon_threadsafe(self._finish_work, session, jobs, outcomes, executions)

    def _finish_work(
        self,
        session: Session,
        jobs: list[Job],
        outcomes: list[Outcome],
        executions: list[Execution],
    ) -> None:
        self._running -= 1
        self._finish(session, jobs, outcomes, executions)
        self._fill_threads()
        if not self._running:
            self._idle.set()

    def _live(self, jobs: Sequence[Job]) -> list[Job]:
        """Return the jobs that somebody still waits for, in time; settle the others."""
        now_s, live = time.monotonic(), []
        for job in jobs:
            if job.deadline_s is not None and now_s >= job.deadline_s:
                self._settle(job, too_late("its turn came"))
            elif job.future.done():
                self._settle(job, None)
            else:
                live.append(job)
        return live

    def _finish(
        self,
        session: Session,
        jobs: list[Job],
        outcomes: list[Outcome],
        executions: list[Execution],
    ) -> None:
        now_ns, ran_ns = time.perf_counter_ns(), sum(map(Execution.total_ns, executions))
        queue_ns = sum(max(0, now_ns - ran_ns - job.arrived_ns) for job in jobs)
        for execution in executions:
            _learn(
                session,
                execution,
                requests=len(jobs) // len(executions),
                queue_ns=queue_ns // len(executions),
            )
        for job, outcome in zip(jobs, outcomes, strict=True):
            self._settle(job, outcome)

    def _settle(self, job: Job, outcome: Outcome | None) -> None:
        self._pending_rows -= job.rows
        if job.future.done():
            return
        if isinstance(outcome, Exception):
            job.future.set_exception(outcome)
        else:
            job.future.set_result(outcome)


def _new_job(payload: Payload, rows: int, deadline_s: float | None, priority: int) -> Job:
    future = asyncio.get_running_loop().create_future()
    return Job(payload, rows, deadline_s, time.perf_counter_ns(), future, priority)


def _is_quick(session: Session, rows: int) -> bool:
    return rows <= BATCH_ROWS and session.cost.estimate_us(rows) <= INLINE_US


def _learn(session: Session, execution: Execution, *, requests: int, queue_ns: int) -> None:
    session.cost.add(execution.rows, execution.total_ns() / 1000)
    session.statistics.record_execution(execution, requests=requests, queue_ns=queue_ns)


def _checked(session: Session, features: NDArray[np.float64]) -> NDArray[np.float64]:
    if (
        features.ndim != 2  # noqa: PLR2004 - rows and columns
        or features.shape[1] != session.width
        or features.dtype != np.float64
    ):
        raise ValidationError(
            f"model {session.package.reference} takes float64 [n, {session.width}], "
            f"got {features.dtype} {list(features.shape)}",
            code="wrong_shape",
            hint="Send one value for each feature of the model's signature, in its order.",
        )
    return np.ascontiguousarray(features)


def _stopping() -> MlpdError:
    return UnavailableError("the server is stopping", code="stopping", hint="Ask another one.")
