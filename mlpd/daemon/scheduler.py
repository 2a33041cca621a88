"""The clock of jobs: APScheduler as a timer, our own arithmetic for what is due.

Every tick looks at each job's schedule, queues what is due and stores that in one transaction with
the schedule's new position: a crash between the two can't lose or double a run.
"""

import logging
from collections.abc import Iterable
from typing import Any

import msgpack

from mlpd.core.errors import DefinitionError, MlpdError
from mlpd.core.specs import JobSpec
from mlpd.core.time import Clock, format_time
from mlpd.daemon.runs import Runs, store_run
from mlpd.daemon.state import CatalogState
from mlpd.storage.environment import Environment
from mlpd.storage.log import rows_of
from mlpd.storage.tables import Table
from mlpd.storage.transactions import Snapshot, WriteTransaction
from mlpd.storage.writer import Writer
from mlpd.training.runs import Run
from mlpd.training.schedule import Manual, NewRows, Schedule, due, next_due, parse_schedule

TICK_S = 15
"""A due time is noticed this late at most."""

_log = logging.getLogger("mlpd.scheduler")


class JobScheduler:
    """Queues runs of jobs when they are due; `start` and `stop` once each."""

    def __init__(
        self,
        environment: Environment,
        writer: Writer,
        state: CatalogState,
        runs: Runs,
        clock: Clock,
    ) -> None:
        self._environment = environment
        self._writer = writer
        self._state = state
        self._runs = runs
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
        for job in self._state.catalog.definitions.jobs.values():
            if job.schedule is not None:
                try:
                    queued += await self._tick_job(job, parse_schedule(job.schedule))
                except MlpdError as error:
                    _log.warning("job %s could not be queued: %s", job.name, error)
        if queued:
            self._runs.notify()
        return queued

    def jobs(self) -> list[dict[str, Any]]:
        """Return every job with its schedule and next due time."""
        now_us = self._clock()
        jobs = self._state.catalog.definitions.jobs.values()
        return [self._describe(job, now_us) for job in jobs]

    def _describe(self, job: JobSpec, now_us: int) -> dict[str, Any]:
        schedule = parse_schedule(job.schedule) if job.schedule else Manual()
        next_us = next_due(schedule, now_us)
        return {
            "name": job.name,
            "model": job.model,
            "service": job.service,
            "label": job.label,
            "schedule": job.schedule,
            "next_run": None if next_us is None else format_time(next_us),
            "deploy": job.deploy,
            "gate": dict(job.gate),
        }

    async def _tick_job(self, job: JobSpec, schedule: Schedule) -> list[Run]:
        now_us = self._clock()
        with self._environment.snapshot() as snapshot:
            stored = snapshot.get(Table.JOBS, job.name.encode())
            rows = _count_rows(snapshot, schedule)
        last_us, last_rows = _decode(stored)
        if last_us is None or not rows.keys() <= last_rows.keys():  # first seen: it counts from now
            await self._store(job.name, now_us, rows, [])
            return []
        new_rows = sum(count - last_rows[source] for source, count in rows.items())
        intervals = due(schedule, last_us, now_us, new_rows=new_rows)
        if not intervals:
            return []
        runs = [
            self._runs.build(
                job.name, trigger="schedule", interval=(interval.start_us, interval.end_us)
            )
            for interval in intervals
        ]
        await self._store(job.name, now_us, rows, runs)
        return runs

    async def _store(self, job: str, now_us: int, rows: dict[str, int], runs: list[Run]) -> None:
        position = msgpack.packb([now_us, rows])

        def write(txn: WriteTransaction) -> None:
            for run in runs:
                store_run(txn, run)
            txn.put(Table.JOBS, job.encode(), position)

        await self._writer.write(write)


def _count_rows(snapshot: Snapshot, schedule: Schedule) -> dict[str, int]:
    """Return how many rows the source of a `NewRows` has had; nothing for another schedule."""
    if not isinstance(schedule, NewRows):
        return {}
    return {schedule.source: rows_of(snapshot, schedule.source)}


def _decode(stored: bytes | None) -> tuple[int | None, dict[str, int]]:
    """Return time and counts of a stored position.

    Counts are missing while the job had another schedule, and in what was stored before they were
    kept by source.
    """
    if stored is None:
        return None, {}
    last_us, rows = msgpack.unpackb(stored)
    return last_us, rows if isinstance(rows, dict) else {}


def check_schedules(jobs: Iterable[JobSpec]) -> None:
    """Raise DefinitionError, naming the job, for the first schedule that can't be read."""
    for job in jobs:
        try:
            parse_schedule(job.schedule or "manual")
        except DefinitionError as error:
            raise DefinitionError(
                f"job {job.name!r}: {error.message}", code=error.code, hint=error.hint
            ) from None
