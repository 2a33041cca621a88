"""The daemon: builds every part, starts them in order, stops them in reverse."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from mlpd import __version__
from mlpd.core.config import Config
from mlpd.core.errors import UnavailableError
from mlpd.core.kernels import load_kernels, precompile
from mlpd.core.limits import AdaptiveLimit
from mlpd.core.time import MIN_TIME_US, Clock, format_time, system_clock
from mlpd.daemon.alerts import Alerts
from mlpd.daemon.arm_stops import ArmStops
from mlpd.daemon.arriving import Arrivals
from mlpd.daemon.audit import Audit
from mlpd.daemon.backup import Backup
from mlpd.daemon.bandits import Bandits
from mlpd.daemon.canaries import Canaries
from mlpd.daemon.collectors import (
    alert_collector,
    canary_collector,
    drift_collector,
    fallback_collector,
    ingest_collector,
    limit_collector,
    model_collector,
    outcome_collector,
    removal_collector,
    storage_collector,
    trace_collector,
    triton_collector,
)
from mlpd.daemon.definitions import DefinitionsVerb
from mlpd.daemon.disk import disk_collector
from mlpd.daemon.drift import Drift
from mlpd.daemon.dropped import DroppedViews
from mlpd.daemon.erase import Erase
from mlpd.daemon.experiment_watch import ExperimentWatch
from mlpd.daemon.experiments import Experiments
from mlpd.daemon.expire import Expire
from mlpd.daemon.explain import Explain
from mlpd.daemon.feature_places import FeaturePlaces
from mlpd.daemon.feedback import Feedback
from mlpd.daemon.feeding import Feeding
from mlpd.daemon.following import Following
from mlpd.daemon.fsck import Fsck
from mlpd.daemon.gathering import Gathering
from mlpd.daemon.history import History
from mlpd.daemon.ingest import Ingest
from mlpd.daemon.leaving import Departures
from mlpd.daemon.looks import AuditLook, DiskLook, Every, Look, SloLook, SourceLook, StandstillLook
from mlpd.daemon.models import ModelsVerb
from mlpd.daemon.monitor import Monitor
from mlpd.daemon.outcomes import Outcomes
from mlpd.daemon.ownership import Ownership
from mlpd.daemon.pages import EventPages
from mlpd.daemon.parts import Parts
from mlpd.daemon.peers import NoPeers, Peers
from mlpd.daemon.performance import Analysis
from mlpd.daemon.pins import Pins
from mlpd.daemon.plugins import check_paths
from mlpd.daemon.predict import Predict
from mlpd.daemon.prediction_files import PredictionFiles
from mlpd.daemon.predictions import PredictionIds, PredictionLog
from mlpd.daemon.promotions import Promotions
from mlpd.daemon.publish import Publisher
from mlpd.daemon.quality import Quality
from mlpd.daemon.read import Read
from mlpd.daemon.read_pool import ReadPool
from mlpd.daemon.read_tick import ReadTick
from mlpd.daemon.recount import Recount
from mlpd.daemon.replica_watch import ReplicaLook, replica_collector
from mlpd.daemon.reproduce import Reproduce
from mlpd.daemon.retention import Retention
from mlpd.daemon.roles import Roles
from mlpd.daemon.route_store import RouteStore
from mlpd.daemon.routes import Routes
from mlpd.daemon.runs import Runs
from mlpd.daemon.scheduled_checks import ScheduledChecks
from mlpd.daemon.scheduler import JobScheduler
from mlpd.daemon.served_looks import ServedLook
from mlpd.daemon.shared import Shared
from mlpd.daemon.sinks import build_sinks
from mlpd.daemon.state import CatalogState
from mlpd.daemon.stats import Stats
from mlpd.daemon.tailing import Tailing
from mlpd.daemon.traces import Traces
from mlpd.daemon.train import Train
from mlpd.daemon.unit_outcomes import UnitOutcomes
from mlpd.daemon.uploads import Uploads
from mlpd.daemon.versions import Versions
from mlpd.features.kernels import MODULES as FEATURE_KERNELS
from mlpd.features.kernels import load_feature_kernels
from mlpd.monitoring.performance import PerformanceTable
from mlpd.monitoring.violations import Violations
from mlpd.registry.models import Registry
from mlpd.registry.signing import TrustPolicy
from mlpd.serving.batcher import Batcher
from mlpd.serving.pool import SessionPool
from mlpd.serving.shadow import ShadowRunner
from mlpd.serving.table import ModelTable
from mlpd.storage.compactor import CompactionPolicy, Compactor
from mlpd.storage.environment import Environment
from mlpd.storage.feed import Feed
from mlpd.storage.files import DataDirectory, make_dirs
from mlpd.storage.lock import DaemonLock
from mlpd.storage.map_store import FileMapStore
from mlpd.storage.moved_keys import PREDICTION
from mlpd.storage.roles import RoleStore
from mlpd.storage.segments import load_manifests, sizes_by_source
from mlpd.storage.whole import refuse_incomplete
from mlpd.storage.writer import Writer

_COUNT_KERNELS = "mlpd.monitoring.count_kernel"
KERNEL_MODULES = (
    *FEATURE_KERNELS,
    (_COUNT_KERNELS, "mlpd.serving.link_kernel", "mlpd.features.winner_kernel"),
)
FLUSH_S = 0.05
"""How long a served row waits at most before the writer has it."""

DRAIN_S = 1.0
"""How long a pause waits for requests under way."""

RETAIN_S = 600.0
"""How often what is too old is looked for."""

RETAIN_MOVING_S = 10.0
"""How often, while slots move, whether they still do."""

_BUSY_ROWS = 256
"""Waiting rows from which on shadows pause."""

_log = logging.getLogger("mlpd.daemon")


class Daemon:
    """Everything that one data directory needs; `start` and `stop` once each.

    Constructing takes the directory's lock, opens the store and loads kernels (compiling them the
    first time, which takes seconds).  `peers`: asks other members of its cluster; it is closed with
    the daemon.  Raises UnavailableError(code="data_directory_in_use"),
    ConflictError(code="log_missing") where segments lie without their LMDB.
    """

    def __init__(
        self,
        directory: Path,
        config: Config,
        clock: Clock = system_clock,
        peers: Peers | None = None,
    ) -> None:
        self.config = config
        self.peers = peers or NoPeers()
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
        self.traces = Traces(config.monitoring)  # may refuse its settings, as these:
        self._sinks = build_sinks(
            config.alerts, lambda: self.runs, clock
        )  # may refuse its settings
        refuse_incomplete(paths)
        check_paths(config.plugins)
        precompile(KERNEL_MODULES)
        self.environment = Environment.open(
            paths.lmdb, clock=clock, map_bytes=config.storage.map_bytes
        )
        with self.environment.snapshot() as snapshot:
            self.feed = Feed(paths.feed, config.replica.feed_bytes, snapshot.head)
        self.roles = Roles(RoleStore(paths.root), config.replica.lease_us)
        self.writer = Writer(self.environment, feed=self.feed, gate=self.roles)
        self.state = CatalogState(load_feature_kernels(), paths.cache / "kernels")
        with self.environment.snapshot() as snapshot:
            self.state.load(snapshot)
        self.ownership = Ownership(FileMapStore(paths.root), self.writer, self.state)
        with self.environment.snapshot() as snapshot:
            self.ownership.load(snapshot)
        self.roles.member = lambda: self.ownership.member
        self.roles.drain, self.roles.barrier = self._drain, self._pass
        if self.roles.is_owner and self.roles.replicas():
            self.feed.start()  # so that it begins with what this daemon does first
        self.shared = Shared(self.environment, self.writer, self.ownership)
        self.parts = Parts(self.ownership.others, self.peers)
        trust = TrustPolicy(config.registry.trusted_keys)
        self.registry = Registry.open(self.environment, self.writer, paths.registry, trust)
        self.registry.fence = self.shared.fence
        self._build_serving()
        self._build_watching()
        self._build_training()
        moving = self.environment, self.writer, self.state, self.ownership, paths
        along = self.experiments, self.recount
        self.departures = Departures(*moving, *along, self.predictions, self.compactor)
        self.arrivals = Arrivals(*moving, *along)
        self.tailing = Tailing(*moving)
        self.feeding = Feeding(
            *(self.environment, self.writer, self.feed, self.roles, self.ownership),
            *(self.backup, paths),
        )
        violations = Violations(config.monitoring.redact)
        self.ingest = Ingest(
            self.writer, self.state, self.monitor.freshness, violations, self.ownership
        )
        targets = config.limits
        self.limits = {
            "predict": AdaptiveLimit(targets.predict_us / 1e6),
            "features": AdaptiveLimit(targets.features_us / 1e6),
            "ingest": AdaptiveLimit(targets.ingest_us / 1e6),
        }
        self._build_alerts()
        self._collect_metrics()

    def _build_serving(self) -> None:
        serving = self.config.serving
        self.pool = SessionPool()
        self.batcher = Batcher(threads=serving.threads, pending_rows_max=serving.queue_rows_max)
        self.versions = Versions(self.registry)
        self.models = ModelTable(
            self.pool,
            self.batcher,
            aliases=self.versions.aliases,
            fetch=self.versions.fetch,
            loaded=self.versions.keep_only,
            bytes_max=serving.model_bytes_max,
        )
        self.shadows = ShadowRunner(busy=self._is_busy)
        features = FeaturePlaces(self.registry, lambda ref: self.versions.get(ref).vectorizer)
        self.experiments = Experiments(
            *(self.environment, self.writer, features, self.parts, self.shared.fence), self.clock
        )
        store = RouteStore(self.environment, self.writer, self.shared.fence)
        self.routes = Routes(
            *(store, self.state, self.models, self.versions, self.experiments), self.clock
        )
        self.canaries = Canaries(self.routes, store, lambda: self.shared.decides)

    def _is_busy(self) -> bool:
        """Tell shadows whether to wait: rows do, or the requests that are let in fill up."""
        return self.batcher.pending_rows > _BUSY_ROWS or self.limits["predict"].is_crowded

    def _build_watching(self) -> None:
        ids = PredictionIds()
        performance = PerformanceTable()
        self.bandits = Bandits(self.experiments, lambda: self.shared.decides, self.clock)
        self.arm_stops = ArmStops(self.experiments, self.shared, self.peers)
        self.outcomes = Outcomes(performance, self.experiments)
        self.predictions = PredictionLog(
            self.writer,
            self.config.serving.prediction_log_rows_max,
            self.outcomes.joined,
            lambda txn, keys: self.ownership.note_changed(txn, PREDICTION, keys),
        )
        self.unit_outcomes = UnitOutcomes(
            self.experiments, self.environment, self.writer, self.ownership, self.parts
        )
        self.recount = Recount(
            *(self.environment, self.ownership, self.predictions),
            *(self.outcomes, self.unit_outcomes),
        )
        self.watch = ExperimentWatch(
            self.experiments,
            self.arm_stops,
            lambda: self.shared.decides,
            self.parts,
            self.environment,
            self.writer,
            self.clock,
        )
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
            self.traces,
            self.parts,
            self.clock,
        )
        self.read = Read(self.environment, self.state, self.ownership)
        self.read_pool, self.read_tick = ReadPool(), ReadTick(self.read)
        self.predict = Predict(
            self.routes,
            self.read,
            self.read_pool,
            self.experiments,
            self.predictions,
            self.shadows,
            self.monitor.tap,
            self.outcomes.served,
            self.watch.served,
            ids,
            self.ownership,
            self.config.serving.rows_max,
        )
        self.explain = Explain(self.registry)
        self.feedback = Feedback(
            self.writer,
            self.predictions,
            self.clock,
            self.outcomes.labelled,
            self.ownership,
            self.config.predictions,
        )
        self.retention = Retention(
            self.environment, self.writer, self.config.predictions, self.state, self.clock
        )
        self.gathering = Gathering(
            *(self.environment, self.state, self.ownership, self.parts, self.peers), self.paths
        )
        self.audit = Audit(
            self.environment,
            self.writer,
            self.state,
            self.registry,
            self.predictions,
            self.paths,
            self.config.monitoring,
            self.parts,
            self.gathering,
            self.clock,
        )
        self.drift = Drift(
            self.monitor,
            self.registry,
            self.writer,
            self.predictions,
            self.paths,
            self.parts,
            self.clock,
        )
        self.analysis = Analysis(
            self.writer, self.registry, self.predictions, self.paths, self.clock
        )
        self.checks = ScheduledChecks(
            *(self.drift, self.analysis, self.monitor, self.config.alerts),
            self.config.monitoring.multivariate_us,
            self.clock,
        )
        self.pages = EventPages(self.environment, self.state, self.ownership, self.paths)
        self.stats = Stats(
            *(self.environment, self.state, self.ownership, self.parts, self.paths), self.clock
        )
        self.fsck = Fsck(self.paths)

    def _build_training(self) -> None:
        storage = self.config.storage
        self.compactor = Compactor(
            self.environment,
            self.writer,
            self.paths,
            policy=CompactionPolicy(tail_rows=storage.compact_rows),
        )
        self.prediction_files = PredictionFiles(
            *(self.environment, self.writer, self.predictions, self.compactor, self.paths),
            self.config.predictions.file_rows,
            self.clock,
            lambda: self.ownership.is_moving,
        )
        self.backup = Backup(
            self.environment,
            self.writer,
            self.predictions,
            self.compactor,
            self.paths,
            self.config,
        )
        self.uploads = Uploads(
            self.registry, self.paths.registry / ".mlpd" / "tmp", self.config.registry
        )
        self.models_verb = ModelsVerb(
            self.environment,
            self.writer,
            self.registry,
            self.routes,
            self.models,
            self.backup,
            self.clock,
        )
        self.dropped = DroppedViews(self.environment, self.writer, self.state)
        publisher = Publisher(self.registry, self.routes.refresh, self.drift.gate)
        self.history = History(
            self.environment, self.state, self.ownership, self.gathering, self.paths
        )
        train = Train(
            self.environment,
            self.state,
            publisher,
            self.gathering,
            self.shared.settle,
            self.paths,
            self.config.training,
            self.config.plugins,
            self.clock,
        )
        self.definitions = DefinitionsVerb(
            self.environment,
            self.writer,
            self.state,
            self.compactor,
            self.dropped,
            Pins(self.environment, self.registry, (self.routes.pins, train.pins)),
            self.config.plugins,
            self.ownership,
            self.paths,
        )
        self.following = Following(
            self.environment,
            self.writer,
            self.ownership,
            self.shared,
            self.registry,
            self.routes,
            self.models_verb,
            self.experiments,
            self.definitions,
            self.peers,
        )
        self.erase = Erase(
            self.environment,
            self.writer,
            self.state,
            self.definitions,
            self.compactor,
            self.dropped,
            self.predictions,
            self.prediction_files,
            self.paths,
            self.clock,
        )
        self.expire = Expire(
            self.environment,
            self.writer,
            self.state,
            self.definitions,
            self.compactor,
            self.predictions,
            self.paths,
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
        self.promotions = Promotions(self.runs, publisher, self.routes, self.shadows)
        self.reproduce = Reproduce(
            self.environment,
            self.state,
            self.registry,
            self.ownership,
            self.paths,
            self.config.training,
            self.config.plugins,
            self.clock,
        )
        sources = self.monitor.freshness.sources
        self.scheduler = JobScheduler(
            self.environment,
            self.writer,
            self.state,
            self.runs,
            lambda: {name: mark.watermark_us for name, mark in sources().items()},
            lambda: self.shared.decides,
            self.shared.fence,
            self.clock,
        )

    def _build_alerts(self) -> None:
        config, freshness = self.config.alerts, self.monitor.freshness
        self.alerts = Alerts(self.environment, self.writer, self._sinks, config, self.clock)
        self._standstill = StandstillLook(freshness, self.state, self.alerts.watermarks)
        sources = SourceLook(self.ingest, freshness, self.state, config)
        burn = SloLook(freshness, config)
        disk = DiskLook(self.paths.root, self.environment, self.writer, config)
        lag_alert_s = self.config.replica.lag_alert_us / 1e6
        replicas = ReplicaLook(self.roles, self.feeding, lag_alert_s)
        every_s = config.window_us / 1e6
        self._served_look = ServedLook(self.monitor, self.registry, config, self.clock())
        self.quality = Quality(self.ingest, self._served_look, self.state)
        self._looks: list[Look] = [
            self._standstill,
            *(Every(every_s, look.names, look.measure) for look in (sources, burn, disk)),
            AuditLook(self.audit),
            Every(min(every_s, lag_alert_s), replicas.names, replicas.measure),
            self.watch,
            self._served_look,
            self.checks,
        ]

    def _collect_metrics(self) -> None:
        metrics = self.monitor.metrics
        metrics.add_collector("ingest", ingest_collector(self.ingest))
        metrics.add_collector("limits", limit_collector(self.limits))
        metrics.add_collector("fallbacks", fallback_collector(self.predict))
        metrics.add_collector("canaries", canary_collector(self.canaries))
        metrics.add_collector("models", model_collector(self.models))
        metrics.add_collector("storage", storage_collector(self.environment, self.writer))
        metrics.add_collector("disk", disk_collector(self.environment, self.paths))
        metrics.add_collector(
            "outcomes",
            outcome_collector(self.feedback, self.predictions, self.shadows, self.audit),
        )
        metrics.add_collector(
            "replica", replica_collector(self.roles, self.feeding, self.tailing, self.feed)
        )
        metrics.add_collector("traces", trace_collector(self.traces))
        metrics.add_collector("alerts", alert_collector(self.alerts))
        metrics.add_collector("drift", drift_collector(self._served_look))
        if self.config.monitoring.triton_names:
            metrics.add_collector("triton", triton_collector(self.models))
        metrics.add_collector(
            "retention",
            removal_collector(self.retention, self.feedback, self.dropped, self.expire),
        )

    async def start(self) -> None:
        """Load routes and begin to work; afterwards the daemon is ready.

        One that is no owner does nothing but read.
        """
        await asyncio.to_thread(self.history.sweep)
        await self.feeding.start()
        if self.roles.is_resting:
            self.ready = True
            return
        await self.shared.adopt()
        await self.pool.start()
        self.shadows.start()
        await self.compactor.start()
        await self.prediction_files.start()
        await self.routes.start()
        await self.models_verb.start()
        await self.runs.start()
        self.traces.start()
        self.monitor.start()
        self.checks.start()
        self.audit.start()
        self.alerts.start(self._looks, self._standstill)
        rebuilding = asyncio.create_task(self._rebuild())
        self._tasks = [
            rebuilding,
            asyncio.create_task(self.following.run_forever()),
            asyncio.create_task(self._retain_forever(rebuilding)),
            asyncio.create_task(self.recount.run_forever()),
            asyncio.create_task(self.dropped.run_forever()),
            asyncio.create_task(self.erase.resume_forever()),
            asyncio.create_task(self.expire.run_forever()),
            asyncio.create_task(self.definitions.release_forever()),
            asyncio.create_task(self.canaries.run_forever()),
            asyncio.create_task(self.promotions.run_forever()),
            asyncio.create_task(self._watch_forever(rebuilding)),
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
        if self.roles.is_resting:
            await self.peers.close()
            await self._close_reading()
            await self._close()
            return
        self.scheduler.stop()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.peers.close()
        for end in (
            *(self.canaries.keep, self.watch.close, self.alerts.stop, self.erase.stop),
            *(self.runs.stop, self._close_reading, self.audit.stop, self.checks.stop),
            *(self.monitor.stop, self.traces.stop),
        ):
            await _ended(end)
        self.predictions.flush()
        await asyncio.to_thread(self.shadows.close)
        await self.models.close()
        await self.pool.close()
        await self._close()

    async def _close_reading(self) -> None:
        await asyncio.to_thread(self.read_pool.close)
        await self.batcher.close()

    async def _close(self) -> None:
        await asyncio.to_thread(self.writer.close)
        self.feed.close()
        self.environment.close()
        self.lock.close()

    async def _drain(self) -> None:
        """Wait for requests that are let in already, a second at most, and log what was served."""
        until_s = time.monotonic() + DRAIN_S
        while time.monotonic() < until_s:
            if not any(self.limits[kind].in_flight for kind in ("ingest", "predict")):
                break
            await asyncio.sleep(DRAIN_S / 100)
        self.predictions.flush()
        await self.writer.write(lambda _: None)

    async def _pass(self) -> None:
        """Wait for the group of writes that is under way; leaves the head as it is."""
        await self.writer.write(lambda txn: txn.replay(()), passes=True)

    def status(self) -> dict[str, Any]:
        """Return what runs, how much there is, how long it has been up."""
        usage, tail = self.environment.usage(), self.compactor.get_tail()
        catalog, now_us = self.state.catalog, self.clock()
        with self.environment.snapshot() as snapshot:
            newest_us, sequence = snapshot.newest_known_us, snapshot.sequence
            manifests = load_manifests(snapshot)
        return {
            "version": __version__,
            "ready": self.ready,
            "started": format_time(self._started_us),
            "uptime_s": (now_us - self._started_us) / 1e6,
            "data_directory": str(self.paths.root),
            "sequence": sequence,
            "newest_known": format_time(newest_us) if newest_us > MIN_TIME_US else None,
            "log_tail_rows": tail.rows,
            "segments": sizes_by_source(manifests),
            "history": self.expire.describe(),
            "lmdb_bytes": usage.used_bytes,
            "lmdb_map_bytes": usage.map_bytes,
            "definitions_version": self.shared.definitions_version(catalog.version),
            "shared": self.shared.describe(),
            "sources": sorted(catalog.definitions.sources),
            "views": sorted(catalog.definitions.views),
            "services": sorted(catalog.definitions.services),
            "jobs": sorted(catalog.definitions.jobs),
            "models": [model.name for model in self.registry.models()],
            "routes": [route["name"] for route in self.routes.all()],
            "canaries": self.canaries.describe(),
            "experiments": self.experiments.names(),
            "predictions": {
                "logged": self.predictions.logged,
                "left_out": self.predictions.left_out,
                "dropped": self.predictions.dropped,
                **self.prediction_files.sizes(),
            },
            "events": dict(self.ingest.rows_by_source),
        }

    async def _rebuild(self) -> None:
        rows = await self.recount.start()
        if rows:
            _log.info("rebuilt performance and experiments from %d predictions", rows)

    async def _watch_forever(self, rebuilding: "asyncio.Task[None]") -> None:
        await asyncio.wait([rebuilding])  # half of the units decide nothing
        await asyncio.gather(self.watch.run_forever(), self.bandits.run_forever())

    async def _flush_forever(self) -> None:
        while True:
            await asyncio.sleep(FLUSH_S)
            self.predictions.flush()

    async def _retain_forever(self, rebuilding: "asyncio.Task[None]") -> None:
        await asyncio.wait([rebuilding])  # what it reads must not go away under it
        while True:
            try:
                if self.ownership.is_moving:  # what goes meanwhile would come back there
                    await asyncio.sleep(RETAIN_MOVING_S)
                    continue
                await self.retention.run()
                kept_us = self.config.predictions.retention_us
                await self.prediction_files.remove_old(self.clock() - kept_us)
                await self.feeding.rest()
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
                await self.compactor.merge_if_due()
                await self.prediction_files.run_if_due()
            except Exception:  # noqa: BLE001 - all stays as it was; the next turn tries again
                _log.exception("compaction failed")

    async def _schedule(self) -> None:
        """Start the timer off the start's critical path: importing APScheduler takes 0.15 s."""
        await asyncio.to_thread(__import__, "apscheduler.schedulers.asyncio")
        self.scheduler.start()
        await self.scheduler.tick()


async def _ended(end: Callable[[], Awaitable[object]]) -> None:
    """Let a part end; what it would still keep, a daemon that may write no more can't."""
    try:
        await end()
    except UnavailableError as error:
        _log.warning("a part ended without keeping its state: %s", error.message)
