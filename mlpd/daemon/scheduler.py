"""The clock of jobs: APScheduler as a timer, our own arithmetic for what is due.

Every tick looks at each job's schedule, queues what is due and stores that in one transaction with
the schedule's new position: a crash between the two can't lose or double a run.
"""

import asyncio
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import msgpack

from mlpd.core.errors import DefinitionError, MlpdError
from mlpd.core.hashing import definition_hash
from mlpd.core.specs import Definitions, JobSpec
from mlpd.core.time import Clock, format_time
from mlpd.daemon.runs import Runs
from mlpd.daemon.state import CatalogState
from mlpd.storage.environment import Environment
from mlpd.storage.log import rows_of
from mlpd.storage.tables import Table
from mlpd.storage.transactions import Snapshot, WriteTransaction
from mlpd.storage.writer import Writer
from mlpd.training.runs import Run, RunState
from mlpd.training.schedule import (
    GRACE_US,
    After,
    DataInterval,
    Manual,
    NewRows,
    Schedule,
    Watermark,
    check_catch_up,
    due,
    next_dues,
    parse_schedule,
)

TICK_S = 15
"""A due time is noticed this late at most."""

NEXT_RUNS = 5
"""Due times shown of a job."""

Watermarks = Callable[[], Mapping[str, int]]
"""Returns the newest event time of every source that has had events, in microseconds."""

_log = logging.getLogger("mlpd.scheduler")


class _Position(NamedTuple):
    """What a schedule has come to: a time, and what it counts, by what is counted.

    The time is the clock's, for a `Watermark` the newest event time.  `counts` has an entry where
    more than the clock decides, so another kind of schedule is told by its keys.
    """

    t_us: int
    counts: Mapping[str, int]

    @classmethod
    def decode(cls, stored: bytes | None) -> "_Position | None":
        """Return a stored position; counts were no mapping in what was stored long ago."""
        if stored is None:
            return None
        t_us, counts = msgpack.unpackb(stored)
        return cls(t_us, counts if isinstance(counts, dict) else {"?": 0})

    def encode(self) -> bytes:
        """Return the stored form."""
        packed: bytes = msgpack.packb([self.t_us, dict(self.counts)])
        return packed


class JobScheduler:
    """Queues runs of jobs when they are due, where `decides` says so; `start`, `stop` once each."""

    def __init__(
        self,
        environment: Environment,
        writer: Writer,
        state: CatalogState,
        runs: Runs,
        watermarks: Watermarks,
        decides: Callable[[], bool],
        fence: Callable[[WriteTransaction], None],
        clock: Clock,
    ) -> None:
        self._environment = environment
        self._writer = writer
        self._state = state
        self._runs = runs
        self._watermarks = watermarks
        self._decides = decides
        self._fence = fence
        self._clock = clock
        self._timer: Any = None

    def start(self) -> None:
        """Begin to tick; imports APScheduler, so call it once the daemon is ready."""
        from apscheduler.schedulers.asyncio import AsyncIOScheduler  # noqa: PLC0415 - 0.15 s

        self._timer = AsyncIOScheduler(timezone="UTC")
        self._timer.add_job(
            self.tick, "interval", seconds=TICK_S, coalesce=True, misfire_grace_time=None
        )
        self._timer.start()

    def stop(self) -> None:
        """Stop ticking; idempotent."""
        if self._timer is not None:
            self._timer.shutdown(wait=False)
            self._timer = None

    async def tick(self) -> list[Run]:
        """Queue what is due now and return it; a job that can't be queued is logged and retried."""
        queued: list[Run] = []
        for job in self._state.catalog.definitions.jobs.values() if self._decides() else ():
            if job.schedule is not None:
                try:
                    queued += await self._tick_job(job, parse_schedule(job.schedule, job.timezone))
                except MlpdError as error:
                    _log.warning("job %s could not be queued: %s", job.name, error)
        if queued:
            self._runs.notify()
        return queued

    def jobs(self) -> list[dict[str, Any]]:
        """Return every job with its schedule, next due times, and how much it waits for."""
        now_us = self._clock()
        jobs = self._state.catalog.definitions.jobs.values()
        return [self._describe(job, now_us) for job in jobs]

    def _describe(self, job: JobSpec, now_us: int) -> dict[str, Any]:
        schedule = _schedule_of(job)
        dues = [format_time(due_us) for due_us in next_dues(schedule, now_us, NEXT_RUNS)]
        return {
            "name": job.name,
            "model": job.model,
            "service": job.service,
            "label": job.label,
            "trainer": job.trainer,
            "schedule": job.schedule,
            "timezone": job.timezone,
            "catch_up": job.catch_up,
            "next_run": dues[0] if dues else None,
            "next_runs": dues,
            "waits_for": self._waits_for(job, schedule),
            "deploy": job.deploy,
            "gate": dict(job.gate),
        }

    def _waits_for(self, job: JobSpec, schedule: Schedule) -> str | None:
        """Return in words what a schedule waits for that time alone doesn't decide."""
        if isinstance(schedule, After):
            return f"a run of {schedule.job} to succeed"
        if isinstance(schedule, Watermark):
            mark_us = self._watermarks().get(schedule.source)
            if mark_us is None:
                return f"events of {schedule.source}"
            due_us = schedule.every.next_after(mark_us)
            return f"events of {schedule.source} from {format_time(due_us)} on"
        if not isinstance(schedule, NewRows):
            return None
        with self._environment.snapshot() as snapshot:
            last = _Position.decode(snapshot.get(Table.JOBS, job.name.encode()))
            rows = rows_of(snapshot, schedule.source)
        before = last.counts.get(schedule.source, rows) if last else rows
        return f"{rows - before:,} of {schedule.rows:,} rows of {schedule.source} came"

    async def _tick_job(self, job: JobSpec, schedule: Schedule) -> list[Run]:
        succeeded_us = 0
        if isinstance(schedule, After):
            succeeded_us = await asyncio.to_thread(self._succeeded_us, schedule.job)
        with self._environment.snapshot() as snapshot:
            stored = snapshot.get(Table.JOBS, job.name.encode())
            here = self._position(snapshot, schedule, succeeded_us)
        if here is None:
            return []
        last = _Position.decode(stored)
        move = partial(self._move, job=job.name, before=stored)
        if last is None or last.counts.keys() != here.counts.keys():  # first seen: from now on
            return await self._writer.write(partial(move, position=here))
        if here.t_us < last.t_us - GRACE_US and not here.counts:
            _log.warning("job %s: the clock was put back; its schedule goes on from now", job.name)
            return await self._writer.write(partial(move, position=here))
        new = sum(count - last.counts[what] for what, count in here.counts.items())
        intervals = due(schedule, last.t_us, here.t_us, job.catch_up, new=new)
        if not intervals:
            return []
        known = {run.key for run in await asyncio.to_thread(self._runs.list) if run.key}
        runs = self._build(job, schedule, intervals, known)
        return await self._writer.write(partial(move, position=here, runs=runs))

    def _position(
        self, snapshot: Snapshot, schedule: Schedule, succeeded_us: int
    ) -> _Position | None:
        """Return what a schedule has come to by now; None while it can't be told."""
        now_us = self._clock()
        if isinstance(schedule, NewRows):
            rows = rows_of(snapshot, schedule.source)
            return _Position(now_us, {schedule.source: rows})
        if isinstance(schedule, After):
            return _Position(now_us, {f"after {schedule.job}": succeeded_us})
        if isinstance(schedule, Watermark):
            mark_us = self._watermarks().get(schedule.source)
            what = f"event time of {schedule.source}"
            return None if mark_us is None else _Position(mark_us, {what: mark_us})
        return _Position(now_us, {})

    def _succeeded_us(self, job: str) -> int:
        """Return when a run of `job` last succeeded, 0 for never; in a thread."""
        ends = (
            run.finished_us or 0
            for run in self._runs.list()
            if run.job == job and run.state is RunState.SUCCEEDED
        )
        return max(ends, default=0)

    def _build(
        self,
        job: JobSpec,
        schedule: Schedule,
        intervals: list[DataInterval],
        known: Collection[str],
    ) -> list[Run]:
        """Return runs of the intervals whose key isn't `known`: by this definition, not queued."""
        document = self._state.catalog.document["jobs"][job.name]
        runs = []
        for interval in intervals:
            key = definition_hash([job.name, document, list(interval)])
            if key in known and not isinstance(schedule, NewRows | After):
                _log.info("job %s: a run of %s was queued before", job.name, interval)
                continue
            ends = (interval.start_us, interval.end_us)
            runs.append(self._runs.build(job.name, trigger="schedule", interval=ends, key=key))
        return runs

    def _move(
        self,
        txn: WriteTransaction,
        *,
        job: str,
        before: bytes | None,
        position: _Position,
        runs: Sequence[Run] = (),
    ) -> list[Run]:
        """Queue `runs` and store the schedule's `position`; return those that had room.

        Where not all have, the position is that of the last one that has, and the others come at a
        later tick.  Nothing is done where the position is no longer `before`.
        """
        self._fence(txn)
        key = job.encode()
        if txn.get(Table.JOBS, key) != before:
            return []
        admitted = [*self._runs.admit(txn, runs)] if runs else []
        if len(admitted) < len(runs):
            _log.warning("job %s: %d runs due, room for %d", job, len(runs), len(admitted))
            if not admitted:
                return []
            position = _up_to(admitted[-1], before)
        txn.put(Table.JOBS, key, position.encode())
        return admitted


def _up_to(run: Run, before: bytes | None) -> _Position:
    """Return the position of a schedule whose runs up to `run` are queued."""
    last = _Position.decode(before)
    assert last is not None, run  # nothing is due at first sight
    assert run.interval is not None, run
    return _Position(run.interval[1], last.counts)


def check_schedules(definitions: Definitions) -> None:
    """Raise DefinitionError, naming the job, for the first schedule that can't be kept.

    Codes: `invalid_schedule`, `invalid_timezone`, `unknown_source`, `unknown_job`.
    """
    for job in definitions.jobs.values():
        try:
            check_catch_up(job.catch_up)
            schedule = _schedule_of(job)
            if isinstance(schedule, NewRows | Watermark):
                definitions.source(schedule.source)
            if isinstance(schedule, After):
                _check_chain(definitions, job)
        except MlpdError as error:
            raise DefinitionError(
                f"job {job.name!r}: {error.message}", code=error.code, hint=error.hint
            ) from None


def _check_chain(definitions: Definitions, job: JobSpec) -> None:
    """Raise where a chain of `after` names an unknown job, or comes back to `job`."""
    seen, schedule = [job.name], _schedule_of(job)
    while isinstance(schedule, After):
        if schedule.job in seen:
            raise DefinitionError(
                f"its schedule waits for itself: {' after '.join([*seen, schedule.job])}",
                code="invalid_schedule",
                hint="Give one of these jobs a time.",
            )
        seen.append(schedule.job)
        schedule = _schedule_of(definitions.job(schedule.job))


def _schedule_of(job: JobSpec) -> Schedule:
    return parse_schedule(job.schedule, job.timezone) if job.schedule else Manual()
