"""The queue of runs: stored, taken up by workers, cancelled, and taken up again after a crash.

A run is stored as queued before anything happens.  One task per slot takes the oldest queued run;
whatever ends the child is written down; at start, runs that were under way go back to the queue.

Every change of state is decided inside the write transaction that stores it, on the state that is
stored then.  So a cancel, the end of a run and a worker that takes it can meet in any order, and
one of them wins, visibly to the others.
"""

import asyncio
import dataclasses
import logging
import os
import random
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from itertools import islice
from typing import Any

from mlpd.core.deploys import check_deploy
from mlpd.core.errors import (
    ConflictError,
    MlpdError,
    NotFoundError,
    OverloadedError,
    StorageFullError,
    UnavailableError,
)
from mlpd.core.time import Clock, format_time
from mlpd.daemon.state import CatalogState
from mlpd.daemon.train import Train
from mlpd.storage.environment import Environment
from mlpd.storage.tables import Table
from mlpd.storage.transactions import Snapshot, WriteTransaction
from mlpd.storage.writer import Writer
from mlpd.training.runs import Run, RunState

QUEUE_MAX = 100
LISTED_MAX = 1000
ENDED_MAX = 4 * LISTED_MAX
"""Runs that have ended, kept decoded."""
LOG_BYTES_MAX = 1024 * 1024

STORAGE_RETRY_S = 1.0
"""How long a worker waits before it tries again to write down what a full disk refused."""

_STORAGE_ERRORS = (OverloadedError, StorageFullError, UnavailableError)

_Change = Callable[[Run], Run]
"""From the stored run to the one to store; pure, since it may be called twice."""

_log = logging.getLogger("mlpd.runs")


class _Work:
    """A run in the hands of a worker: its task, and whether somebody wants it to stop."""

    def __init__(self) -> None:
        self.settled = asyncio.Event()
        """Set once its end is written down."""
        self.stopped = False
        self._task: asyncio.Task[dict[str, Any]] | None = None

    def begin(self, execution: Coroutine[Any, Any, dict[str, Any]]) -> "asyncio.Task[Any]":
        """Run `execution` as the task, which ends at once if it is to stop already."""
        self._task = asyncio.create_task(execution)
        if self.stopped:
            self._task.cancel()
        return self._task

    def stop(self) -> None:
        """Cancel the task, once: a second time would cut short how it cleans up."""
        if not self.stopped and self._task is not None:
            self._task.cancel()
        self.stopped = True


class Runs:
    """The queue of runs; `start` and `stop` once each, on the loop."""

    def __init__(
        self,
        environment: Environment,
        writer: Writer,
        state: CatalogState,
        train: Train,
        concurrency: int,
        clock: Clock,
    ) -> None:
        self._environment = environment
        self._writer = writer
        self._state = state
        self._train = train
        self._concurrency = concurrency
        self._clock = clock
        self._wake = asyncio.Event()
        self._workers: list[asyncio.Task[None]] = []
        self._work: dict[str, _Work] = {}
        self._progress: dict[str, dict[str, Any]] = {}
        self._ended: dict[bytes, Run] = {}
        self._open: set[str] = set()

    async def start(self) -> None:
        """Put lost runs back into the queue and begin to work."""
        await asyncio.to_thread(self._train.sweep)
        await asyncio.to_thread(self._find_open)
        unsettled = await asyncio.to_thread(self.unsettled)
        lost = [run for run in unsettled if run.state is RunState.RUNNING]
        for run in lost:
            _log.warning("run %s was lost with the daemon; attempt %d", run.run_id, run.attempt)
            await self._change(run.run_id, self._recovery())
        for _ in range(self._concurrency):
            self._workers.append(asyncio.create_task(self._work_forever()))
        self._wake.set()

    async def stop(self) -> None:
        """Stop working; runs under way stay `running` on disk and are retried at the next start."""
        for worker in self._workers:
            worker.cancel()
        await asyncio.gather(*self._workers, return_exceptions=True)

    @property
    def busy(self) -> bool:
        """Whether a child trains now."""
        return bool(self._work)

    async def enqueue(self, job: str, *, trigger: str, deploy: str | None = None) -> Run:
        """Queue a run of `job`; durable on return.

        Raises NotFoundError(code="unknown_job"), ValidationError for another `deploy`, and
        ConflictError(code="queue_full").
        """
        return await self._queue(self.build(job, trigger=trigger, deploy=deploy))

    async def retry(self, run_id: str, *, trigger: str) -> Run:
        """Queue a new run with job, deploy and interval of one that failed or was cancelled.

        Raises ConflictError(code="run_not_failed") for another one, and what `enqueue` raises.
        """
        old = self.get(run_id)
        if old.state not in (RunState.FAILED, RunState.CANCELLED):
            raise ConflictError(
                f"run {run_id} is {old.state}: only failed and cancelled runs are retried",
                code="run_not_failed",
                hint=f"mlpd jobs run {old.job} starts another one.",
            )
        run = self.build(
            old.job,
            trigger=f"{trigger}, retry of {run_id}",
            deploy=old.deploy,
            interval=old.interval,
        )
        return await self._queue(run)

    def admit(self, txn: WriteTransaction, runs: Sequence[Run]) -> Sequence[Run]:
        """Store as many of `runs` as the queue has room for, the first ones, and return those.

        On the writer thread: nobody fills the queue between the look and the entry.  1 ms where a
        hundred wait.
        """
        queued = sum(run.state is RunState.QUEUED for run in self._read_open(txn))
        admitted = runs[: max(0, QUEUE_MAX - queued)]
        for run in admitted:
            self.store(txn, run)
        return admitted

    def store(self, txn: WriteTransaction, run: Run) -> None:
        """Store a run's record: every one passes here, so that what is open is known."""
        txn.put(Table.RUNS, run.run_id.encode(), run.encode())
        if run.is_open:
            self._open.add(run.run_id)  # before the commit: too many do no harm

    async def _queue(self, run: Run) -> Run:
        if not await self._writer.write(partial(self.admit, runs=[run])):
            raise ConflictError(
                f"{QUEUE_MAX} runs wait already",
                code="queue_full",
                hint="Cancel some: mlpd runs cancel RUN.",
            )
        self.notify()
        return run

    def build(
        self,
        job: str,
        *,
        trigger: str,
        deploy: str | None = None,
        interval: tuple[int, int] | None = None,
        key: str = "",
    ) -> Run:
        """Return a new queued run, not stored yet; raises as `enqueue` but for a full queue."""
        spec = self._state.catalog.definitions.job(job)
        if deploy is not None:
            check_deploy(deploy)
        now_us = self._clock()
        stamp = format_time(now_us)[:19].replace("-", "").replace(":", "").replace("T", "-")
        run_id = f"{stamp}-{os.urandom(3).hex()}"
        return Run(run_id, job, deploy or spec.deploy, trigger, now_us, interval, key=key)

    def unsettled(self) -> Sequence[Run]:
        """Return the runs of which something is left to do, however old they are; in a thread."""
        with self._environment.snapshot() as snapshot:
            return [*self._read_open(snapshot)]

    def _find_open(self) -> None:
        """Read which runs are open; 20 us for each that there ever was, once, in a thread."""
        with self._environment.snapshot() as snapshot:
            for _, value in snapshot.scan(Table.RUNS):
                if (run := Run.decode(value)).is_open:
                    self._open.add(run.run_id)

    def _read_open(self, reader: Snapshot | WriteTransaction) -> Iterator[Run]:
        """Yield the open runs as they are stored, and forget those that are open no more.

        What a snapshot shows as settled stays so; in a transaction it may be undone yet.  One that
        isn't there is forgotten by the writer alone: to others it may be yet to come.
        """
        for run_id in list(self._open):
            value = reader.get(Table.RUNS, run_id.encode())
            run = None if value is None else Run.decode(value)
            if run is not None and run.is_open:
                yield run
            elif (run is None) is isinstance(reader, WriteTransaction):
                self._open.discard(run_id)

    def _queued(self) -> Sequence[Run]:
        return [run for run in self.unsettled() if run.state is RunState.QUEUED]

    def notify(self) -> None:
        """Let a worker look at the queue."""
        self._wake.set()

    def list(self, limit: int = LISTED_MAX) -> list[Run]:
        """Return the newest runs, newest first, with the progress of those under way.

        In a thread: 1,000 of them take some ms, and 20 and more when they are read for the first
        time.
        """
        with self._environment.snapshot() as snapshot:
            found = [self._with_progress(run) for run in self._newest(snapshot, limit)]
        # Ids begin with the second; what follows is random.
        return sorted(found, key=lambda run: run.created_us, reverse=True)

    def _newest(
        self, reader: Snapshot | WriteTransaction, limit: int = LISTED_MAX
    ) -> Iterator[Run]:
        """Yield the newest runs as they are stored, by id downwards."""
        for _, value in islice(reader.scan(Table.RUNS, reverse=True), limit):
            yield self._decode(value)

    def _decode(self, value: bytes) -> Run:
        """Return the run of these bytes; what has ended is decoded once."""
        run = self._ended.get(value)
        if run is None:
            run = Run.decode(value)
            if run.state.finished:
                if len(self._ended) >= ENDED_MAX:
                    self._ended.clear()
                self._ended[value] = run
        return run

    def get(self, run_id: str) -> Run:
        """Return a run; raises NotFoundError(code="unknown_run")."""
        with self._environment.snapshot() as snapshot:
            value = snapshot.get(Table.RUNS, run_id.encode()[:500] or b"?")
        if value is None:
            raise NotFoundError(
                f"unknown run {run_id!r}", code="unknown_run", hint="mlpd runs list shows them."
            )
        return self._with_progress(Run.decode(value))

    def undecided(self) -> Sequence[Run]:
        """Return the runs whose version waits for its shadow, or for its canary; in a thread."""
        return [run for run in self.unsettled() if run.is_undecided]

    async def conclude(self, run_id: str, result: Mapping[str, Any]) -> None:
        """Store what became of a succeeded run's version in the end."""
        await self._change(run_id, partial(dataclasses.replace, result=result))

    async def cancel(self, run_id: str) -> Run:
        """Stop a queued or running run; returns once it is cancelled, its processes gone.

        Raises ConflictError(code="run_finished"), also for one that ended meanwhile or whose
        version is being published: that is never cut in half.
        """
        self.get(run_id)
        run = await self._change(run_id, partial(_cancel, now_us=self._clock(), asked=False))
        while run.state is RunState.RUNNING:
            work = self._work.get(run_id)
            if work is None:
                raise UnavailableError("the daemon is stopping", code="shutting_down")
            work.stop()
            await work.settled.wait()
            # Its child may have died just then, and the run be back in the queue.
            run = await self._change(run_id, partial(_cancel, now_us=self._clock(), asked=True))
        return run

    def read_log(self, run_id: str) -> bytes:
        """Return the end of a run's log, at most 1 MiB; blocks."""
        path = self._train.log_path(self.get(run_id).run_id)
        if not path.exists():
            return b""
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - LOG_BYTES_MAX))
            return file.read()

    async def _work_forever(self) -> None:
        while True:
            self._wake.clear()  # before looking: what is queued meanwhile is looked for again
            run, wait_s = self._next(await asyncio.to_thread(self._queued))
            if run is None:
                with suppress(TimeoutError):
                    async with asyncio.timeout(wait_s):
                        await self._wake.wait()
                continue
            try:
                await self._run(run)
            except _STORAGE_ERRORS as error:
                _log.warning("run %s can't begin: %s", run.run_id, error.message)
                await asyncio.sleep(STORAGE_RETRY_S)

    def _next(self, queued: Sequence[Run]) -> tuple[Run | None, float | None]:
        """Return the oldest run that may begin, else None and the seconds until one may."""
        now_us = self._clock()
        free = [(run.wait_us(now_us), run) for run in queued if run.run_id not in self._work]
        ready = [run for wait_us, run in free if not wait_us]
        if len(ready) > 1:
            self._wake.set()  # another worker may have looked before the second one was there
        waits = (wait_us / 1e6 for wait_us, _ in free)
        return min(ready, key=lambda run: run.created_us, default=None), min(waits, default=None)

    def _recovery(self, cause: str = "the daemon ended") -> _Change:
        chance = random.random()  # noqa: S311
        return partial(Run.recover, now_us=self._clock(), chance=chance, cause=cause)

    async def _run(self, run: Run) -> None:
        work = self._work[run.run_id] = _Work()
        try:
            try:
                started = partial(Run.move, state=RunState.RUNNING, started_us=self._clock())
                run = await self._change(run.run_id, started)
            except ConflictError:
                return  # cancelled while it was on its way here
            await self._carry_out(run, work)
        finally:
            self._work.pop(run.run_id, None)
            self._progress.pop(run.run_id, None)
            work.settled.set()

    async def _carry_out(self, run: Run, work: _Work) -> None:
        """Execute a run that is stored as running, and write down how it ended."""
        told = partial(self._progress.__setitem__, run.run_id)
        task = work.begin(self._train.run(run, told))
        try:
            await asyncio.wait([task])
        except asyncio.CancelledError:  # the daemon stops
            asked = work.stopped
            work.stop()
            await asyncio.wait([task])
            if asked or not task.cancelled():
                await self._settle_once(run.run_id, self._end(run, task))
            raise
        await self._settle(run.run_id, self._end(run, task))

    async def _settle(self, run_id: str, end: _Change) -> None:
        """Write down the end of a run, for as long as it takes the disk to have room."""
        while True:
            if await self._settle_once(run_id, end):
                return
            await asyncio.sleep(STORAGE_RETRY_S)

    async def _settle_once(self, run_id: str, end: _Change) -> bool:
        try:
            await self._change(run_id, end)
        except _STORAGE_ERRORS as error:
            _log.warning("the end of run %s can't be stored: %s", run_id, error.message)
            return False
        return True

    def _end(self, run: Run, task: "asyncio.Task[dict[str, Any]]") -> _Change:
        """Return the change of state that the end of the task means; logs a failure."""
        now_us, progress = self._clock(), self._progress.get(run.run_id, {})
        move: _Change
        if task.cancelled():
            move = partial(Run.move, state=RunState.CANCELLED, finished_us=now_us)
        elif (error := task.exception()) is None:
            result = task.result()
            move = partial(Run.move, state=RunState.SUCCEEDED, finished_us=now_us, result=result)
        else:
            move = self._failure(run, error, now_us)
        return lambda stored: move(dataclasses.replace(stored, progress=progress))

    def _failure(self, run: Run, error: BaseException, now_us: int) -> _Change:
        """Return what becomes of a run that ended with `error`."""
        if isinstance(error, TimeoutError):
            error = MlpdError(
                "the run took too long, or was silent for too long, and was stopped",
                code="run_timeout",
                hint="See [training] timeout and silence_timeout; beside others that keep all "
                "processors busy, idle = false.",
            )
        if not isinstance(error, MlpdError):
            _log.error("run %s failed", run.run_id, exc_info=error)
            error = MlpdError(repr(error), code="internal")
        _log.warning("run %s failed: %s", run.run_id, error.message)
        if error.code == "child_died":  # killed, not refused: worth another attempt
            return self._recovery(error.message)
        return partial(Run.move, state=RunState.FAILED, finished_us=now_us, error=error.to_dict())

    async def _change(self, run_id: str, change: _Change) -> Run:
        """Store what `change` makes of the stored run, in one transaction; raises what it does."""

        def write(txn: WriteTransaction) -> Run:
            stored = txn.get(Table.RUNS, run_id.encode())
            assert stored is not None, run_id  # runs are never deleted
            before = Run.decode(stored)
            run = change(before)
            if run != before:
                self.store(txn, run)
            return run

        return await self._writer.write(write)

    def _with_progress(self, run: Run) -> Run:
        progress = self._progress.get(run.run_id)
        return run if progress is None else dataclasses.replace(run, progress=progress)


def _cancel(run: Run, *, now_us: int, asked: bool) -> Run:
    """Cancel a queued run; a running one must be stopped first, so it stays as it is.

    `asked`: the caller has stopped it, so finding it cancelled is what it wanted.
    """
    if run.state is RunState.RUNNING or (asked and run.state is RunState.CANCELLED):
        return run
    return run.move(RunState.CANCELLED, finished_us=now_us)
