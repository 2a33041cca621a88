"""The daemon: builds every part, starts them in order, stops them in reverse."""

import asyncio
import logging
from pathlib import Path
from typing import Any

from mlpd import __version__
from mlpd.core.config import Config
from mlpd.core.kernels import load_kernels, precompile
from mlpd.core.time import MIN_TIME_US, Clock, format_time, system_clock
from mlpd.daemon.audit import Audit
from mlpd.daemon.backup import Backup
from mlpd.daemon.collectors import (
    ingest_collector,
    outcome_collector,
    removal_collector,
    storage_collector,
)
from mlpd.daemon.definitions import DefinitionsVerb
from mlpd.daemon.dropped import DroppedViews
from mlpd.daemon.experiments import Experiments
from mlpd.daemon.feedback import Feedback
from mlpd.daemon.fsck import Fsck
from mlpd.daemon.history import History
from mlpd.daemon.ingest import Ingest
from mlpd.daemon.monitor import Monitor
from mlpd.daemon.outcomes import Outcomes
from mlpd.daemon.predict import Predict
from mlpd.daemon.predictions import PredictionIds, PredictionLog
from mlpd.daemon.publish import Publisher
from mlpd.daemon.read import Read
from mlpd.daemon.read_pool import ReadPool
from mlpd.daemon.retention import Retention
from mlpd.daemon.routes import Routes, Versions
from mlpd.daemon.runs import Runs
from mlpd.daemon.scheduler import JobScheduler
from mlpd.daemon.state import CatalogState
from mlpd.daemon.train import Train
from mlpd.features.windows import KERNELS as WINDOW_KERNELS
from mlpd.features.windows import load_window_kernels
from mlpd.monitoring.performance import PerformanceTable
from mlpd.registry.models import Registry
from mlpd.serving.batcher import Batcher
from mlpd.serving.pool import SessionPool
from mlpd.serving.shadow import ShadowRunner
from mlpd.serving.table import ModelTable
from mlpd.storage.compactor import CompactionPolicy, Compactor
from mlpd.storage.environment import Environment
from mlpd.storage.files import DataDirectory, make_dirs
from mlpd.storage.lock import DaemonLock
from mlpd.storage.writer import Writer

_COUNT_KERNELS = "mlpd.monitoring.count_kernel"
KERNEL_MODULES = (
    *WINDOW_KERNELS,
    _COUNT_KERNELS,
    "mlpd.serving.link_kernel",
    "mlpd.features.latest_kernel",
)
FLUSH_S = 0.05
"""How long a served row waits at most before the writer has it."""

RETAIN_S = 600.0
"""How often what is too old is looked for."""

_BUSY_ROWS = 256
"""Waiting rows from which on shadows pause."""

_log = logging.getLogger("mlpd.daemon")


class Daemon:
    """Everything that one data directory needs; `start` and `stop` once each.

    Constructing takes the directory's lock, opens the store and loads kernels (compiling them the
    first time, which takes seconds).  Raises UnavailableError(code="data_directory_in_use").
    """

    def __init__(self, directory: Path, config: Config, clock: Clock = system_clock) -> None:
        self.config = config
        self.clock = clock
        self.paths = DataDirectory(directory.resolve())
        make_dirs(self.paths.root)
        self.lock = DaemonLock(self.paths.lock_file, clock)
        try:
            self._build()
        except BaseException:
            self.lock.close()
            raise
        self.ready = False
        self._tasks: list[asyncio.Task[None]] = []
        self._compact_rows_urgent = 4 * config.storage.compact_rows
        self._started_us = clock()

    def _build(self) -> None:
        config, clock, paths = self.config, self.clock, self.paths
        precompile(KERNEL_MODULES)
        self.environment = Environment.open(
            paths.lmdb, clock=clock, map_bytes=config.storage.map_bytes
        )
        self.writer = Writer(self.environment)
        self.state = CatalogState(load_window_kernels(), paths.cache / "kernels")
        with self.environment.snapshot() as snapshot:
            self.state.load(snapshot)
        self.registry = Registry.open(self.environment, self.writer, paths.registry)
        self._build_serving()
        self._build_watching()
        self._build_training()
        self.ingest = Ingest(self.writer, self.state, self.monitor.freshness)
        self._collect_metrics()

    def _build_serving(self) -> None:
        serving = self.config.serving
        self.pool = SessionPool()
        self.batcher = Batcher(threads=serving.threads, pending_rows_max=serving.queue_rows_max)
        self.versions = Versions(self.registry)
        self.models = ModelTable(
            self.pool, self.batcher, aliases=self.versions.aliases, fetch=self.versions.fetch
        )
        self.shadows = ShadowRunner(busy=lambda: self.batcher.pending_rows > _BUSY_ROWS)
        self.experiments = Experiments(self.environment, self.writer, self.clock)
        self.routes = Routes(
            self.environment,
            self.writer,
            self.state,
            self.models,
            self.versions,
            self.experiments,
        )

    def _build_watching(self) -> None:
        ids = PredictionIds()
        performance = PerformanceTable()
        self.predictions = PredictionLog(self.writer, self.config.serving.prediction_log_rows_max)
        self.outcomes = Outcomes(performance, self.experiments, ids)
        self.monitor = Monitor(
            self.environment,
            self.writer,
            self.state,
            self.registry,
            self.versions,
            self.shadows,
            performance,
            load_kernels(_COUNT_KERNELS),
            self.config.monitoring.series_max,
        )
        self.read = Read(self.environment, self.state)
        self.read_pool = ReadPool()
        self.predict = Predict(
            self.routes,
            self.read,
            self.read_pool,
            self.experiments,
            self.predictions,
            self.shadows,
            self.monitor.tap,
            self.outcomes.served,
            ids,
            self.config.serving.rows_max,
        )
        self.feedback = Feedback(
            self.writer,
            self.predictions,
            self.clock,
            self.outcomes.labelled,
            self.config.predictions.orphans_max,
        )
        self.retention = Retention(
            self.environment, self.writer, self.config.predictions, self.clock
        )
        self.audit = Audit(
            self.environment,
            self.writer,
            self.state,
            self.registry,
            self.predictions,
            self.paths,
            self.clock,
        )
        self.history = History(self.environment, self.state, self.paths)
        self.fsck = Fsck(self.paths)

    def _build_training(self) -> None:
        storage = self.config.storage
        self.compactor = Compactor(
            self.environment,
            self.writer,
            self.paths,
            policy=CompactionPolicy(tail_rows=storage.compact_rows),
        )
        self.backup = Backup(
            self.environment,
            self.writer,
            self.predictions,
            self.compactor,
            self.paths,
            self.config,
        )
        self.dropped = DroppedViews(self.environment, self.writer, self.state)
        self.definitions = DefinitionsVerb(
            self.environment, self.writer, self.state, self.compactor, self.dropped, self.paths
        )
        train = Train(
            self.environment,
            self.state,
            Publisher(self.registry, self.routes.refresh),
            self.paths,
            self.config.training,
            self.clock,
        )
        self.runs = Runs(
            self.environment,
            self.writer,
            self.state,
            train,
            self.config.training.concurrency,
            self.clock,
        )
        self.scheduler = JobScheduler(
            self.environment, self.writer, self.state, self.runs, self.clock
        )

    def _collect_metrics(self) -> None:
        metrics = self.monitor.metrics
        metrics.add_collector("ingest", ingest_collector(self.ingest))
        metrics.add_collector("storage", storage_collector(self.environment, self.writer))
        metrics.add_collector(
            "outcomes",
            outcome_collector(self.feedback, self.predictions, self.shadows, self.audit),
        )
        metrics.add_collector(
            "retention", removal_collector(self.retention, self.feedback, self.dropped)
        )

    async def start(self) -> None:
        """Load routes and begin to work; afterwards the daemon is ready."""
        await self.pool.start()
        self.shadows.start()
        await self.compactor.start()
        await self.routes.start()
        await self.runs.start()
        self.monitor.start()
        rebuilding = asyncio.create_task(self._rebuild())
        self._tasks = [
            rebuilding,
            asyncio.create_task(self._retain_forever(rebuilding)),
            asyncio.create_task(self.dropped.run_forever()),
            asyncio.create_task(self._flush_forever()),
            asyncio.create_task(self._compact_forever()),
            asyncio.create_task(self._schedule()),
        ]
        self.ready = True

    def refuse(self) -> None:
        """Stop being ready: /readyz says so, and a balancer looks elsewhere."""
        self.ready = False

    async def stop(self) -> None:
        """Stop in reverse order; everything acknowledged, and every served row, is on disk."""
        self.ready = False
        self.scheduler.stop()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.runs.stop()
        await asyncio.to_thread(self.read_pool.close)
        await self.batcher.close()
        await self.monitor.stop()
        self.predictions.flush()
        await asyncio.to_thread(self.shadows.close)
        await self.pool.close()
        await asyncio.to_thread(self.writer.close)
        self.environment.close()
        self.lock.close()

    def status(self) -> dict[str, Any]:
        """Return what runs, how much there is, how long it has been up."""
        usage, tail = self.environment.usage(), self.compactor.get_tail()
        catalog, now_us = self.state.catalog, self.clock()
        with self.environment.snapshot() as snapshot:
            newest_us, sequence = snapshot.newest_known_us, snapshot.sequence
        return {
            "version": __version__,
            "ready": self.ready,
            "started": format_time(self._started_us),
            "uptime_s": (now_us - self._started_us) / 1e6,
            "data_directory": str(self.paths.root),
            "sequence": sequence,
            "newest_known": format_time(newest_us) if newest_us > MIN_TIME_US else None,
            "log_tail_rows": tail.rows,
            "lmdb_bytes": usage.used_bytes,
            "lmdb_map_bytes": usage.map_bytes,
            "definitions_version": catalog.version,
            "sources": sorted(catalog.definitions.sources),
            "views": sorted(catalog.definitions.views),
            "services": sorted(catalog.definitions.services),
            "jobs": sorted(catalog.definitions.jobs),
            "models": [model.name for model in self.registry.models()],
            "routes": [route["name"] for route in self.routes.all()],
            "experiments": self.experiments.names(),
            "predictions": {"logged": self.predictions.logged, "dropped": self.predictions.dropped},
            "events": dict(self.ingest.rows_by_source),
        }

    async def _rebuild(self) -> None:
        rows = await self.outcomes.rebuild(self.environment)
        if rows:
            _log.info("rebuilt performance and experiments from %d predictions", rows)

    async def _flush_forever(self) -> None:
        while True:
            await asyncio.sleep(FLUSH_S)
            self.predictions.flush()

    async def _retain_forever(self, rebuilding: "asyncio.Task[None]") -> None:
        await asyncio.wait([rebuilding])  # what it reads must not go away under it
        while True:
            try:
                await self.retention.run()
            except Exception:  # noqa: BLE001 - nothing is lost by keeping rows; the next turn tries
                _log.exception("old predictions could not be removed")
            await asyncio.sleep(RETAIN_S)

    async def _compact_forever(self) -> None:
        while True:
            await asyncio.sleep(self.config.storage.compact_interval_us / 1e6)
            if self.runs.busy and self.compactor.get_tail().rows < self._compact_rows_urgent:
                continue  # a training child and a compaction child together take a gigabyte
            try:
                await self.compactor.run_if_due()
            except Exception:  # noqa: BLE001 - the log stays as it was; the next turn tries again
                _log.exception("compaction failed")

    async def _schedule(self) -> None:
        """Start the timer off the start's critical path: importing APScheduler takes 0.15 s."""
        await asyncio.to_thread(__import__, "apscheduler.schedulers.asyncio")
        self.scheduler.start()
        await self.scheduler.tick()
