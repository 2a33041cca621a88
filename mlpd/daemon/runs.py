"""Verb train: durable runs in child processes; the daemon publishes, gates and deploys.

A run is stored as queued before anything happens.  One task per slot takes the oldest queued run;
whatever ends the child is written down; at start, runs that were under way go back to the queue.
"""

import asyncio
import dataclasses
import logging
import os
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from mlpd.core.config import TrainingConfig
from mlpd.core.errors import ConflictError, MlpdError, NotFoundError, ValidationError
from mlpd.core.time import Clock, format_time
from mlpd.daemon.offline import offline_request
from mlpd.daemon.process import Child
from mlpd.daemon.state import CatalogState
from mlpd.registry.models import Registry
from mlpd.registry.records import Cause
from mlpd.storage.environment import Environment
from mlpd.storage.files import DataDirectory
from mlpd.storage.tables import Table
from mlpd.storage.transactions import WriteTransaction
from mlpd.storage.writer import Writer
from mlpd.training.runs import Run, RunState, gate_report

QUEUE_MAX = 100
LISTED_MAX = 1000
LOG_BYTES_MAX = 1024 * 1024
DEPLOYS = ("none", "champion")

Published = Callable[[], Awaitable[None]]
"""Called after an alias moved, so that routes follow."""

_log = logging.getLogger("mlpd.runs")


class Runs:
    """The queue of runs; `start` and `stop` once each, on the loop."""

    def __init__(
        self,
        environment: Environment,
        writer: Writer,
        state: CatalogState,
        registry: Registry,
        paths: DataDirectory,
        config: TrainingConfig,
        clock: Clock,
        on_alias: Published,
    ) -> None:
        self._environment = environment
        self._writer = writer
        self._state = state
        self._registry = registry
        self._paths = paths
        self._config = config
        self._clock = clock
        self._on_alias = on_alias
        self._wake = asyncio.Event()
        self._workers: list[asyncio.Task[None]] = []
        self._running: dict[str, asyncio.Task[dict[str, Any]]] = {}
        self._settled: dict[str, asyncio.Event] = {}
        """Per run under way what is set once its end is written down."""
        self._progress: dict[str, dict[str, Any]] = {}

    async def start(self) -> None:
        """Put lost runs back into the queue and begin to work."""
        lost = [run for run in self.list() if run.state is RunState.RUNNING]
        for run in lost:
            _log.warning("run %s was lost with the daemon; attempt %d", run.run_id, run.attempt)
            await self._store(run.recover(self._clock()))
        for _ in range(self._config.concurrency):
            self._workers.append(asyncio.create_task(self._work()))
        self._wake.set()

    async def stop(self) -> None:
        """Stop working; runs under way stay `running` on disk and are retried at the next start."""
        for task in [*self._workers, *self._running.values()]:
            task.cancel()
        await asyncio.gather(*self._workers, *self._running.values(), return_exceptions=True)

    @property
    def busy(self) -> bool:
        """Whether a child trains now."""
        return bool(self._running)

    async def enqueue(self, job: str, *, trigger: str, deploy: str | None = None) -> Run:
        """Queue a run of `job`; durable on return.

        Raises NotFoundError(code="unknown_job"), ValidationError for another `deploy`, and
        ConflictError(code="queue_full").
        """
        run = self.build(job, trigger=trigger, deploy=deploy)
        await self._store(run)
        self.notify()
        return run

    def build(
        self,
        job: str,
        *,
        trigger: str,
        deploy: str | None = None,
        interval: tuple[int, int] | None = None,
    ) -> Run:
        """Return a new queued run that is not stored yet; raises as `enqueue`."""
        spec = self._state.catalog.definitions.job(job)
        if deploy is not None and deploy not in DEPLOYS:
            raise ValidationError(
                f"deploy must be one of {', '.join(DEPLOYS)}; got {deploy!r}", code="invalid_deploy"
            )
        queued = sum(run.state is RunState.QUEUED for run in self.list())
        if queued >= QUEUE_MAX:
            raise ConflictError(
                f"{queued} runs wait already",
                code="queue_full",
                hint="Cancel some: mlpd runs cancel RUN.",
            )
        now_us = self._clock()
        stamp = format_time(now_us)[:19].replace("-", "").replace(":", "").replace("T", "-")
        run_id = f"{stamp}-{os.urandom(3).hex()}"
        return Run(run_id, job, deploy or spec.deploy, trigger, now_us, interval)

    def notify(self) -> None:
        """Let a worker look at the queue."""
        self._wake.set()

    def list(self, limit: int = LISTED_MAX) -> list[Run]:
        """Return the newest runs, newest first, with the progress of those under way."""
        found = []
        with self._environment.snapshot() as snapshot:
            for _, value in snapshot.scan(Table.RUNS, reverse=True):
                found.append(self._with_progress(Run.decode(value)))
                if len(found) == limit:
                    break
        return found

    def get(self, run_id: str) -> Run:
        """Return a run; raises NotFoundError(code="unknown_run")."""
        with self._environment.snapshot() as snapshot:
            value = snapshot.get(Table.RUNS, run_id.encode()[:500] or b"?")
        if value is None:
            raise NotFoundError(
                f"unknown run {run_id!r}", code="unknown_run", hint="mlpd runs list shows them."
            )
        return self._with_progress(Run.decode(value))

    async def cancel(self, run_id: str) -> Run:
        """Stop a queued or running run; raises ConflictError(code="run_finished")."""
        run = self.get(run_id)
        cancelled = run.move(RunState.CANCELLED, finished_us=self._clock())
        task = self._running.get(run_id)
        if task is None:
            await self._store(cancelled)
            return cancelled
        task.cancel()
        await self._settled[run_id].wait()
        return self.get(run_id)

    def read_log(self, run_id: str) -> bytes:
        """Return the end of a run's log, at most 1 MiB; blocks."""
        path = self._folder(self.get(run_id).run_id) / "log.txt"
        if not path.exists():
            return b""
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - LOG_BYTES_MAX))
            return file.read()

    async def _work(self) -> None:
        while True:
            run = self._next()
            if run is None:
                self._wake.clear()
                await self._wake.wait()
                continue
            await self._run(run)

    def _next(self) -> Run | None:
        queued = (run for run in self.list() if run.state is RunState.QUEUED)
        return min(queued, key=lambda run: run.created_us, default=None)

    async def _run(self, run: Run) -> None:
        run = run.move(RunState.RUNNING, started_us=self._clock())
        await self._store(run)
        task = asyncio.create_task(self._execute(run))
        self._running[run.run_id] = task
        settled = self._settled[run.run_id] = asyncio.Event()
        try:
            await asyncio.wait([task])
        finally:
            if not task.done():
                task.cancel()
                await asyncio.wait([task])
        await self._store(self._ended(run, task))
        for known in (self._running, self._settled, self._progress):
            known.pop(run.run_id, None)
        settled.set()

    def _ended(self, run: Run, task: "asyncio.Task[dict[str, Any]]") -> Run:
        now_us = self._clock()
        run = dataclasses.replace(run, progress=self._progress.get(run.run_id, {}))
        if task.cancelled():
            return run.move(RunState.CANCELLED, finished_us=now_us)
        error = task.exception()
        if error is None:
            return run.move(RunState.SUCCEEDED, finished_us=now_us, result=task.result())
        if isinstance(error, TimeoutError):
            error = MlpdError(
                "the run took too long, or was silent for too long, and was stopped",
                code="run_timeout",
                hint="See [training] timeout and silence_timeout.",
            )
        if not isinstance(error, MlpdError):
            _log.error("run %s failed", run.run_id, exc_info=error)
            error = MlpdError(repr(error), code="internal")
        _log.warning("run %s failed: %s", run.run_id, error.message)
        if error.code == "child_died":  # killed, not refused: worth another attempt
            return run.recover(now_us)
        return run.move(RunState.FAILED, finished_us=now_us, error=error.to_dict())

    async def _execute(self, run: Run) -> dict[str, Any]:
        folder = self._folder(run.run_id)
        out = folder / "out"
        await asyncio.to_thread(partial(out.mkdir, parents=True, exist_ok=True))
        with self._environment.snapshot() as snapshot:
            through = snapshot.sequence
            catalog = self._state.read_catalog(snapshot)
        request = {
            **offline_request(self._paths, catalog, through),
            "job": run.job,
            "run_id": run.run_id,
            "as_of_us": int(self._clock()),
            "out": str(out),
            "threads": self._config.threads,
        }
        async with asyncio.timeout(self._config.timeout_us / 1e6):
            trained = await self._train(run, request, folder / "log.txt")
        return await self._publish(run, trained, out)

    async def _train(self, run: Run, request: Mapping[str, Any], log: Path) -> dict[str, Any]:
        config = self._config
        async with Child(
            "train",
            request,
            nice=config.nice,
            memory_bytes_max=config.memory_bytes_max,
            log=log,
            threads=config.threads,
        ) as child:
            messages = child.messages()
            while True:
                async with asyncio.timeout(config.silence_timeout_us / 1e6):
                    message = await anext(messages)
                if message["kind"] == "done":
                    result: dict[str, Any] = message["result"]
                    return result
                self._progress[run.run_id] = {k: v for k, v in message.items() if k != "kind"}

    async def _publish(self, run: Run, trained: dict[str, Any], out: Path) -> dict[str, Any]:
        """Register what the child made, then gate, then deploy; never half of it."""
        job = self._state.catalog.definitions.job(run.job)
        parity = trained["parity"]
        if parity["different"]:
            raise MlpdError(
                f"the exported model differs from LightGBM: {parity}",
                code="parity_failed",
                hint="No certificate, no version; please report the model.",
            )
        files = {name: out / name for name in trained["files"]}
        cause = Cause(f"run {run.run_id}", f"job {run.job}, {run.trigger}")
        version = await self._registry.register(job.model, files, trained["lineage"], cause)
        report = gate_report(job.gate, trained["metrics"])
        if run.deploy == "champion" and report["passed"]:
            aliases = {alias.alias: alias.version for alias in self._registry.aliases(job.model)}
            why = Cause(f"run {run.run_id}", "gate passed", report)
            await self._registry.move_alias(
                job.model, "champion", version.number, why, expected=aliases.get("champion")
            )
            await self._on_alias()
        return {
            "model": job.model,
            "version": version.number,
            "digest": version.digest,
            "metrics": trained["metrics"],
            "parity": {
                "rows": parity["rows"],
                "bit_equal": parity["rows"] - parity["different"],
            },
            "gate": report,
            "deployed": run.deploy if report["passed"] else "none",
        }

    async def _store(self, run: Run) -> None:
        await self._writer.write(partial(store_run, run=run))

    def _with_progress(self, run: Run) -> Run:
        progress = self._progress.get(run.run_id)
        return run if progress is None else dataclasses.replace(run, progress=progress)

    def _folder(self, run_id: str) -> Path:
        return self._paths.runs / run_id


def store_run(txn: WriteTransaction, run: Run) -> None:
    """Store a run's record."""
    txn.put(Table.RUNS, run.run_id.encode(), run.encode())
