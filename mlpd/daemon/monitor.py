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
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from functools import partial
from typing import Any

import msgpack

from mlpd.core.errors import NotFoundError
from mlpd.core.specs import ViewSpec
from mlpd.core.time import Clock, format_time
from mlpd.core.trace import get_span
from mlpd.daemon.drift_windows import windows_of
from mlpd.daemon.packages import read_version
from mlpd.daemon.parts import Parts
from mlpd.daemon.served_request import Run
from mlpd.daemon.state import CatalogState
from mlpd.daemon.traces import Traces
from mlpd.daemon.versions import Versions
from mlpd.monitoring.buckets import BucketId, Changes
from mlpd.monitoring.counting import CountLayout
from mlpd.monitoring.drift import DriftReport, report
from mlpd.monitoring.exposition import CONTENT_TYPE, choose_format, encode
from mlpd.monitoring.freshness import (
    AGE_BUCKETS_S,
    Freshness,
    SourceMark,
    ViewFreshness,
    ViewReport,
    not_served,
)
from mlpd.monitoring.live import LiveCounts, ServedKey
from mlpd.monitoring.metrics import Registry
from mlpd.monitoring.performance import CohortKey, CohortReport, PerformanceTable, is_mature
from mlpd.monitoring.reference import ReferenceProfile
from mlpd.registry.models import Registry as ModelRegistry
from mlpd.registry.records import ModelVersion
from mlpd.serving.paired import PairedDifference
from mlpd.serving.shadow import ShadowPair, ShadowRunner
from mlpd.storage.environment import Environment
from mlpd.storage.tables import Table
from mlpd.storage.transactions import WriteTransaction
from mlpd.storage.writer import Writer

DRAIN_S = 5.0

_MARK, _MARK_END = b"f", b"g"
"""Before a source in the keys of the MONITORING table: how far it has come."""

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
        traces: Traces,
        parts: Parts,
        clock: Clock,
    ) -> None:
        self._parts = parts
        parts.offer("performance", self._pack_performance, model=str)
        parts.offer("shadows", self._pack_shadows)
        parts.offer("drift", self._pack_counts, model=str, version=int, route=str | None)
        self._traces = traces
        self._clock = clock
        self._marks: dict[str, SourceMark] = {}
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
        """Take up how far sources had come, and begin to drain."""
        with self._environment.snapshot() as snapshot:
            for key, value in snapshot.scan(Table.MONITORING, _MARK, _MARK_END):
                self._marks[key[1:].decode()] = mark = SourceMark(*msgpack.unpackb(value))
                self.freshness.restore(key[1:].decode(), mark)
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
        span = get_span()
        if span is not None and span.is_sampled:
            self._seconds.labels(path).observe_traced(seconds, span.trace_id, time.time())
            self._traces.note(span, path, status)
        else:
            self._seconds.labels(path).observe(seconds)

    def tap(self, run: Run, route: str) -> None:
        """Note a run of served rows: references and ages, 5 us and 0.2 us per row and view."""
        read = run.read
        package = run.model.package
        key = ServedKey(package.name, package.version, route, run.arm)
        live = self._live.get(key)
        if live is None:
            try:
                profile = self._versions.get(package.reference).profile
            except KeyError:  # swapped out before its first rows were counted
                return
            live = self._open(key, profile)
        live.append_block(run.vectors, run.scores.served, read.t_us)
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
            marks = self.freshness.sources()
            moved = {name: mark for name, mark in marks.items() if self._marks.get(name) != mark}
            if moved:
                await self._writer.write(partial(_store_marks, marks=moved))
                self._marks |= moved

    async def expose_metrics(self, accept: str) -> tuple[bytes, str]:
        """Return (body, content type) for a scrape; encoded off the loop."""
        form = choose_format(accept)
        body = await asyncio.to_thread(encode, self.metrics, form)
        return body, CONTENT_TYPE[form]

    async def profile_of(self, found: ModelVersion) -> ReferenceProfile:
        """Return the reference profile of a version, loaded or not; raises as `read_version`."""
        try:
            return self._versions.get(found.reference).profile
        except KeyError:
            loaded = await self._registry.load(found.name, found.number)
            return (await asyncio.to_thread(read_version, loaded)).profile

    def versions_served(self) -> list[tuple[str, int]]:
        """Return (model, version) of whatever was served since the start."""
        return sorted({(key.model, key.version) for key in self._live})

    async def counts_of(
        self, found: ModelVersion, route: str | None, profile: ReferenceProfile
    ) -> list[LiveCounts]:
        """Return what a version served, up to now, by route, arm and member."""
        asked = {"model": found.name, "version": found.number, "route": route}
        others = await self._parts.others("drift", asked)
        await self.drain()
        layout = CountLayout(profile)
        own = await asyncio.to_thread(self._matching, found.name, found.number, route, layout)
        return own + await asyncio.to_thread(self._restored, others, layout)

    def _restored(self, parts: Iterable[Any], layout: CountLayout) -> list[LiveCounts]:
        """Return counts of other members from what `_pack_counts` gave them."""
        found = []
        for served in (served for part in parts for served in part):
            live = LiveCounts(layout, self._kernels)
            for width_us, start_us, data in served:
                live.restore((width_us, start_us), data)
            found.append(live)
        return found

    async def _pack_counts(self, asked: Mapping[str, Any]) -> list[Any]:
        """Return by route and arm the buckets of a version: width and start in us, and bytes."""
        await self.drain()
        model, version, route = asked["model"], asked["version"], asked["route"]

        def read() -> list[Any]:
            return [
                [[*bucket, data] for bucket, data in self._stored(key)]
                for key in _stored_keys(self._environment)
                if (key.model, key.version) == (model, version) and route in (None, key.route)
            ]

        return await asyncio.to_thread(read)

    async def _pack_performance(self, asked: Mapping[str, Any]) -> list[Any]:
        return self._performance.pack(asked["model"])

    async def drift_between(
        self, start_us: int, end_us: int
    ) -> list[tuple[tuple[str, int], DriftReport]]:
        """Return (model, version) and drift of each version served since the start.

        Over [start, end), routes and arms together; for alerts.
        """
        await self.drain()
        served: dict[tuple[str, int], list[LiveCounts]] = {}
        for key, live in list(self._live.items()):
            served.setdefault((key.model, key.version), []).append(live)

        width_us = end_us - start_us

        def measure() -> list[tuple[tuple[str, int], DriftReport]]:
            return [
                (version, report(live[0].layout.profile, counts, width_us=width_us))
                for version, live in served.items()
                for _, counts in windows_of(live, start_us, end_us, width_us)
            ]

        return await asyncio.to_thread(measure)

    async def newest_days(
        self, oldest_us: int, *, labelled_min: int
    ) -> list[tuple[tuple[str, int], CohortReport]]:
        """Return (model, version) and its newest mature day after `oldest_us` with labels enough.

        Mature is a day older than 95 % of the version's label delays.  A turn of the loop for each
        version: 1 ms with 16,384 distinct scores.
        """
        days: dict[tuple[str, int], dict[int, list[CohortKey]]] = {}
        for key in self._performance.keys_since(oldest_us):
            version = key.served.model, key.served.version
            days.setdefault(version, {}).setdefault(key.day_us, []).append(key)
        found = []
        for version, by_day in days.items():
            await asyncio.sleep(0)
            maturity_s = self._performance.maturity_s(k for day in by_day.values() for k in day)
            for day_us, day in sorted(by_day.items(), reverse=True):
                labelled = self._performance.labelled(day)
                if labelled >= labelled_min and is_mature(day_us, maturity_s, self._clock()):
                    found.append((version, self._performance.report(day)))
                    break
        return found

    async def performance(self, model: str) -> dict[str, Any]:
        """Return the labelled performance of a model: in all, by month and by day, per arm.

        Over all members.  `mature`: the period's last day is older than 95 % of its version's label
        delays.  Raises NotFoundError(code="unknown_model"), and as `Parts.others`.
        """
        others = await self._parts.others("performance", {"model": model})
        if not others:
            return self._performance_of(self._performance, model)
        parts = [self._performance.pack(model), *others]
        return await asyncio.to_thread(
            lambda: self._performance_of(PerformanceTable.merge_packed(model, parts), model)
        )

    def _performance_of(self, table: PerformanceTable, model: str) -> dict[str, Any]:
        known = table.keys()
        keys = [key for key in known if key.served.model == model]
        if not keys and model not in {m.name for m in self._registry.models()}:
            raise NotFoundError(f"unknown model {model!r}", code="unknown_model")
        maturity_s = _maturities(table, keys)
        groups: dict[tuple[ServedKey, str], list[CohortKey]] = {}
        for key in keys:
            day = format_time(key.day_us)[:10]
            for period in ("all", day[:7], day):
                groups.setdefault((key.served, period), []).append(key)
        now_us = self._clock()
        return {
            "model": model,
            "cohorts": [
                {
                    "version": served.version,
                    "route": served.route,
                    "arm": served.arm,
                    "period": period,
                    "mature": is_mature(cohorts[-1].day_us, maturity_s[served.version], now_us),
                    **table.report(cohorts).to_dict(),
                }
                for (served, period), cohorts in groups.items()
            ],
        }

    async def shadow_report(self) -> list[dict[str, Any]]:
        """Return every shadow's paired difference to its primary, over all members."""
        found = self._shadows.statistics()
        for part in await self._parts.others("shadows", {}):
            for pair, fields in part:
                theirs, mine = PairedDifference.from_dict(fields), found.get(ShadowPair(*pair))
                if mine is None:
                    found[ShadowPair(*pair)] = theirs
                else:
                    mine.merge(theirs)
        return [
            {
                **pair._asdict(),
                **difference.summary(),
                "m2": difference.m2,
                "disagreements": difference.disagreements,
            }
            for pair, difference in found.items()
        ]

    async def _pack_shadows(self, _: Mapping[str, Any]) -> list[Any]:
        found = self._shadows.statistics()
        return [[[*pair], difference.to_dict()] for pair, difference in found.items()]

    def freshness_report(self) -> dict[str, Any]:
        """Return per view the ages served, its SLO and its source's mark; per source the mark.

        Views that were not served since the start have a mark alone.
        """
        now_us, specs = self._clock(), self._state.catalog.definitions.views
        marks, served = self.freshness.sources(), self.freshness.report()
        return {
            "views": {
                name: _view_report(specs.get(name), served.get(name), marks, now_us)
                for name in (*specs, *(name for name in served if name not in specs))
            },
            "sources": {name: _mark_report(mark, now_us) for name, mark in marks.items()},
            "age_bounds_s": list(AGE_BUCKETS_S),
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

    def _view(self, name: str) -> ViewFreshness:
        spec = self._state.catalog.definitions.views.get(name)
        if spec is None:
            return self.freshness.view(name)
        ttl_s = None if spec.ttl_us is None else spec.ttl_us / 1e6
        slo_s = None if spec.freshness_us is None else spec.freshness_us / 1e6
        view = self.freshness.view(name, ttl_s=ttl_s, slo_s=slo_s)
        if view.goals != (ttl_s, slo_s):  # an apply changed them: what was counted is of no use
            self.freshness.forget_view(name)
            view = self.freshness.view(name, ttl_s=ttl_s, slo_s=slo_s)
        return view

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


def _maturities(table: PerformanceTable, keys: Iterable[CohortKey]) -> dict[int, float | None]:
    """Return by version, of one model, the seconds within which 95 % of its labels came."""
    by_version: dict[int, list[CohortKey]] = {}
    for key in keys:
        by_version.setdefault(key.served.version, []).append(key)
    return {version: table.maturity_s(part) for version, part in by_version.items()}


def _view_report(
    spec: ViewSpec | None,
    served: ViewReport | None,
    marks: Mapping[str, SourceMark],
    now_us: int,
) -> dict[str, Any]:
    """Return what is known of a view; `spec` is None for one that only pinned versions have."""
    mark = None if spec is None else marks.get(spec.source)
    slo_s = None if spec is None or spec.freshness_us is None else spec.freshness_us / 1e6
    return {
        "kind": None if spec is None else spec.kind,
        "source": None if spec is None else spec.source,
        **_mark_report(mark, now_us),
        **asdict(served or not_served(slo_s)),
    }


def _mark_report(mark: SourceMark | None, now_us: int) -> dict[str, Any]:
    if mark is None:
        return {"watermark": None, "behind_s": None, "lag_s": None}
    return {
        "watermark": format_time(mark.watermark_us),
        "behind_s": (now_us - mark.watermark_us) / 1e6,
        "lag_s": mark.lag_us / 1e6,
    }


def _store_marks(txn: WriteTransaction, *, marks: Mapping[str, SourceMark]) -> None:
    for source, mark in marks.items():
        txn.put(Table.MONITORING, _MARK + source.encode(), msgpack.packb(list(mark)))


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
