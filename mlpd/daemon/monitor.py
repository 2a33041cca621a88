"""Verb monitor: metrics, live counts and drift, performance and freshness of what is served.

The request path appends references (`tap`); a task drains them in a thread every few seconds and
stores the changed five-minute buckets, so that a restart loses seconds of counts at most.
"""

import asyncio
import hashlib
import json
import logging
import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import msgpack

from mlpd.core.errors import NotFoundError
from mlpd.core.time import DAY_US, MAX_TIME_US, format_time
from mlpd.daemon.packages import read_version
from mlpd.daemon.predict import Run
from mlpd.daemon.read import ReadResult
from mlpd.daemon.routes import Versions
from mlpd.daemon.state import CatalogState
from mlpd.monitoring.buckets import BUCKET_US, BucketId, Changes
from mlpd.monitoring.counting import CountLayout, Counts
from mlpd.monitoring.drift import report
from mlpd.monitoring.exposition import CONTENT_TYPE, choose_format, encode
from mlpd.monitoring.freshness import Freshness
from mlpd.monitoring.live import LiveCounts, ServedKey
from mlpd.monitoring.metrics import Registry
from mlpd.monitoring.performance import PerformanceTable
from mlpd.monitoring.reference import ReferenceProfile
from mlpd.registry.models import Registry as ModelRegistry
from mlpd.serving.shadow import ShadowRunner
from mlpd.storage.environment import Environment
from mlpd.storage.tables import Table
from mlpd.storage.transactions import WriteTransaction
from mlpd.storage.writer import Writer

DRAIN_S = 5.0

_log = logging.getLogger("mlpd.monitor")


class Monitor:
    """Watches what is served; `start` and `stop` once each, everything on the loop unless said."""

    def __init__(
        self,
        environment: Environment,
        writer: Writer,
        state: CatalogState,
        registry: ModelRegistry,
        versions: Versions,
        shadows: ShadowRunner,
        performance: PerformanceTable,
        kernels: Any,
        series_max: int,
    ) -> None:
        self._environment = environment
        self._writer = writer
        self._state = state
        self._registry = registry
        self._versions = versions
        self._shadows = shadows
        self._performance = performance
        self._kernels = kernels
        self.metrics = Registry(max_series=series_max)
        self.freshness = Freshness(self.metrics)
        self._live: dict[ServedKey, LiveCounts] = {}
        self._task: asyncio.Task[None] | None = None
        self._draining = asyncio.Lock()
        self._requests = self.metrics.counter(
            "mlpd_http_requests_total", "HTTP requests answered.", labels=("route", "code")
        )
        self._seconds = self.metrics.histogram(
            "mlpd_http_request_duration_seconds",
            "Time to an answer.",
            labels=("route",),
            unit="seconds",
        )
        self._served = self.metrics.counter(
            "mlpd_predictions_total", "Rows scored.", labels=("route", "arm", "model", "version")
        )

    def start(self) -> None:
        """Begin to drain."""
        self._task = asyncio.create_task(self._drain_forever())

    async def stop(self) -> None:
        """Count and store what still waits."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        await self.drain()

    def observe_request(self, path: str, status: int, seconds: float) -> None:
        """Count an answered HTTP request; about 1 us."""
        self._requests.labels(path, str(status)).inc()
        self._seconds.labels(path).observe(seconds)

    def tap(self, run: Run, route: str, read: ReadResult) -> None:
        """Note a run of served rows: references and ages, 5 us and 0.2 us per row and view."""
        package = run.model.package
        key = ServedKey(package.name, package.version, route, run.arm)
        live = self._live.get(key)
        if live is None:
            live = self._open(key, self._versions.get(package.reference).profile)
        live.append_block(run.vectors, run.scores.score[:, 0], read.t_us)
        self._served.labels(route, run.arm, package.name, str(package.version)).inc(len(run.rows))
        for view, event_us in read.frame.event_us.items():
            freshness = self._view(view)
            for seen_us in event_us[run.rows].tolist():
                freshness.observe((read.t_us - seen_us) / 1e6 if seen_us else math.nan)

    async def drain(self) -> None:
        """Count everything that waits and store the buckets that changed."""
        async with self._draining:
            for key, live in list(self._live.items()):
                counted = await asyncio.to_thread(live.drain)
                if counted:
                    await self._writer.write(partial(_store, key=key, changes=live.take_changes()))

    async def expose_metrics(self, accept: str) -> tuple[bytes, str]:
        """Return (body, content type) for a scrape; encoded off the loop."""
        form = choose_format(accept)
        body = await asyncio.to_thread(encode, self.metrics, form)
        return body, CONTENT_TYPE[form]

    async def drift(
        self,
        model: str,
        *,
        version: int | str = "champion",
        route: str | None = None,
        start_us: int | None = None,
        end_us: int | None = None,
        step_us: int | None = None,
    ) -> dict[str, Any]:
        """Return drift of what a version served against its training profile.

        Over [start, end) (default: the last day of its buckets), whole or in steps of `step_us`.
        Raises NotFoundError for an unknown model or version.
        """
        found = self._registry.get(model, version)
        profile = await self._profile(found.reference, model, found.number)
        await self.drain()
        layout = CountLayout(profile)
        live = await asyncio.to_thread(self._matching, found.name, found.number, route, layout)
        end = _newest_us(live) if end_us is None else end_us
        start = end - DAY_US if start_us is None else start_us
        windows = await asyncio.to_thread(_windows, live, start, end, step_us or end - start)
        return {
            "model": model,
            "version": found.number,
            "route": route,
            "reference": "training",
            "windows": [
                {"start": format_time(at), **report(profile, counts).to_dict()}
                for at, counts in windows
            ],
        }

    def performance(self, model: str) -> dict[str, Any]:
        """Return the labelled performance of a model: in all, by month and by day, per arm."""
        known = self._performance.keys()
        keys = [key for key in known if key.served.model == model]
        if not keys and model not in {m.name for m in self._registry.models()}:
            raise NotFoundError(f"unknown model {model!r}", code="unknown_model")
        groups: dict[tuple[ServedKey, str], list[Any]] = {}
        for key in keys:
            day = format_time(key.day_us)[:10]
            for period in ("all", day[:7], day):
                groups.setdefault((key.served, period), []).append(key)
        return {
            "model": model,
            "cohorts": [
                {
                    "version": served.version,
                    "route": served.route,
                    "arm": served.arm,
                    "period": period,
                    **self._performance.report(cohorts).to_dict(),
                }
                for (served, period), cohorts in groups.items()
            ],
        }

    def shadow_report(self) -> list[dict[str, Any]]:
        """Return every shadow's paired difference to its primary."""
        return [
            {**pair._asdict(), **difference.to_dict(), **difference.summary()}
            for pair, difference in self._shadows.statistics().items()
        ]

    def freshness_report(self) -> dict[str, Any]:
        """Return per view the ages served and its SLO, per source the watermark."""
        views = {name: asdict(found) for name, found in self.freshness.report().items()}
        marks = self.freshness.watermarks_us()
        return {
            "views": views,
            "sources": {name: {"watermark": format_time(us)} for name, us in marks.items()},
        }

    async def _drain_forever(self) -> None:
        while True:
            await asyncio.sleep(DRAIN_S)
            started = time.monotonic()
            try:
                await self.drain()
            except Exception:  # noqa: BLE001 - counting must never stop serving; it is retried
                _log.exception("live counts could not be stored")
            _log.debug("drained in %.3f s", time.monotonic() - started)

    def _open(self, key: ServedKey, profile: ReferenceProfile) -> LiveCounts:
        live = LiveCounts(CountLayout(profile), self._kernels)
        for bucket, data in self._stored(key):
            live.restore(bucket, data)
        self._live[key] = live
        return live

    def _stored(self, key: ServedKey) -> list[tuple[BucketId, bytes]]:
        prefix = _prefix(key)
        with self._environment.snapshot() as snapshot:
            return [
                (_bucket_of(stored), value)
                for stored, value in snapshot.scan(Table.MONITORING, prefix, prefix + b"\xff" * 17)
            ]

    def _view(self, name: str) -> Any:
        spec = self._state.catalog.definitions.views.get(name)
        if spec is None:
            return self.freshness.view(name)
        ttl_s = None if spec.ttl_us is None else spec.ttl_us / 1e6
        slo_s = None if spec.freshness_us is None else spec.freshness_us / 1e6
        return self.freshness.view(name, ttl_s=ttl_s, slo_s=slo_s)

    async def _profile(self, reference: str, model: str, number: int) -> ReferenceProfile:
        try:
            return self._versions.get(reference).profile
        except KeyError:
            loaded = await self._registry.load(model, number)
            return (await asyncio.to_thread(read_version, loaded)).profile

    def _matching(
        self, model: str, version: int, route: str | None, layout: CountLayout
    ) -> list[LiveCounts]:
        """Return counts of a version: from memory, or from disk if not served since the start."""
        found = dict(self._live)
        for key in _stored_keys(self._environment):
            if key not in found and (key.model, key.version) == (model, version):
                live = LiveCounts(layout, self._kernels)
                for bucket, data in self._stored(key):
                    live.restore(bucket, data)
                found[key] = live
        return [
            live
            for key, live in found.items()
            if (key.model, key.version) == (model, version) and route in (None, key.route)
        ]


def _windows(
    live: Sequence[LiveCounts], start_us: int, end_us: int, step_us: int
) -> list[tuple[int, Counts]]:
    """Return (start, counts) of each step in which anything was served, arms and routes added."""
    steps: dict[int, Counts] = {}
    for counts in live:
        for at, part in counts.series(start_us, end_us, max(1, step_us)):
            if at in steps:
                steps[at].add(part)
            else:
                steps[at] = part
    return sorted(steps.items())


def _newest_us(live: Iterable[LiveCounts]) -> int:
    """Return the end of the newest bucket; 0 without any."""
    starts = [at for counts in live for at, _ in counts.series(0, MAX_TIME_US, BUCKET_US)]
    return max(starts, default=-BUCKET_US) + BUCKET_US


def _store(txn: WriteTransaction, *, key: ServedKey, changes: Changes) -> None:
    prefix = _prefix(key)
    named = msgpack.packb([key.model, key.version, key.route, key.arm])
    txn.put(Table.MONITORING, b"k" + prefix[1:], named)
    for bucket, data in changes.put.items():
        txn.put(Table.MONITORING, prefix + _bucket_key(bucket), data)
    for bucket in changes.delete:
        txn.delete(Table.MONITORING, prefix + _bucket_key(bucket))


def _stored_keys(environment: Environment) -> list[ServedKey]:
    with environment.snapshot() as snapshot:
        values = [value for _, value in snapshot.scan(Table.MONITORING, b"k", b"l")]
    return [ServedKey(*msgpack.unpackb(value)) for value in values]


def _prefix(key: ServedKey) -> bytes:
    """Return `b` and a 16-byte hash: where a key's buckets are in the MONITORING table."""
    text = json.dumps([key.model, key.version, key.route, key.arm])
    return b"b" + hashlib.blake2b(text.encode(), digest_size=16).digest()


def _bucket_key(bucket: BucketId) -> bytes:
    width_us, start_us = bucket
    return width_us.to_bytes(8, "big") + start_us.to_bytes(8, "big")


def _bucket_of(key: bytes) -> BucketId:
    width_us = int.from_bytes(key[17:25], "big")
    start_us = int.from_bytes(key[25:33], "big")
    return width_us, start_us
