"""Freshness: how old features are when they are served, and how far each source's data has come.

Freshness means event time at serving, not the time of the last job.  A view that misses its SLO
while its source's watermark moves on has a broken key; one whose watermark stands still has a
broken feed.
"""

import threading
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mlpd.monitoring.instruments import Descriptor, Histogram
from mlpd.monitoring.metrics import Collected, Registry

AGE_BUCKETS_S: Final = (
    0.01, 0.1, 1.0, 10.0, 60.0, 300.0, 900.0, 3600.0, 10_800.0, 21_600.0, 86_400.0, 604_800.0,
    2_592_000.0,
)  # fmt: skip
PENDING_AGES: Final = 4096

_STATUS: Final = Descriptor(
    "mlpd_feature_reads_total", "counter", "Rows of a view served, by status.", ("view", "status")
)
_SLO: Final = Descriptor(
    "mlpd_feature_slo_ratio",
    "gauge",
    "Share of served rows no older than the view's freshness SLO; missing rows miss it.",
    ("view",),
    "ratio",
)
_WATERMARK: Final = Descriptor(
    "mlpd_source_watermark_timestamp_seconds",
    "gauge",
    "Greatest event time of a source, in Unix time.",
    ("source",),
    "seconds",
)
_LAG: Final = Descriptor(
    "mlpd_source_lag_seconds",
    "gauge",
    "Event time to ingest time, of the source's last batch: its greatest lag.",
    ("source",),
    "seconds",
)


@dataclass(frozen=True, slots=True)
class ViewReport:
    """How a view was served: rows by status, and the ages in seconds of those that had one.

    `slo_share` is the share of all rows that were present and no older than the SLO; None without
    an SLO or without rows.  `stale_share` is None without rows, `age_max_s` without an age.
    `ages`: how many rows had an age up to each of AGE_BUCKETS_S, and more than the last, not
    cumulated.
    """

    present: int
    stale: int
    missing: int
    stale_share: float | None
    ages: tuple[int, ...]
    slo_s: float | None
    slo_share: float | None
    age_mean_s: float | None
    age_max_s: float | None


def not_served(slo_s: float | None) -> ViewReport:
    """Return the report of a view of which nothing was served."""
    return ViewReport(
        present=0,
        stale=0,
        missing=0,
        stale_share=None,
        ages=(0,) * (len(AGE_BUCKETS_S) + 1),
        slo_s=slo_s,
        slo_share=None,
        age_mean_s=None,
        age_max_s=None,
    )


class ViewFreshness:
    """Ages of one view; `goals`: its ttl and SLO.  Any thread observes, any thread reads."""

    def __init__(self, ages: Histogram, *, ttl_s: float | None, slo_s: float | None) -> None:
        self.goals = ttl_s, slo_s
        self._ages = ages
        self._ttl_s = np.inf if ttl_s is None else ttl_s
        self._slo_s = slo_s
        self._pending: list[float] = []
        self._lock = threading.Lock()
        self._present = self._stale = self._missing = self._within_slo = 0
        self._age_sum_s = 0.0
        self._age_max_s = -np.inf

    def observe(self, age_s: float) -> None:
        """Note one served row: its age (serving time - event time), NaN if missing.  0.12 us."""
        pending = self._pending
        pending.append(age_s)
        if len(pending) >= PENDING_AGES:
            self._fold()

    def observe_many(self, ages_s: NDArray[np.float64]) -> None:
        """Note a float64 array of ages, NaN for missing rows."""
        with self._lock:
            self._add(ages_s.ravel())

    def report(self) -> ViewReport:
        """Return everything observed so far."""
        self._fold()
        with self._lock:
            aged = self._present + self._stale
            rows = aged + self._missing
            return ViewReport(
                present=self._present,
                stale=self._stale,
                missing=self._missing,
                stale_share=self._stale / rows if rows else None,
                ages=self._ages.snapshot().counts,
                slo_s=self._slo_s,
                slo_share=None if self._slo_s is None or not rows else self._within_slo / rows,
                age_mean_s=self._age_sum_s / aged if aged else None,
                age_max_s=float(self._age_max_s) if aged else None,
            )

    def _fold(self) -> None:
        with self._lock:
            batch = self._pending[:]
            del self._pending[: len(batch)]
            if batch:
                self._add(np.array(batch, np.float64))

    def _add(self, ages_s: NDArray[np.float64]) -> None:
        aged = ages_s[~np.isnan(ages_s)]
        stale = int((aged > self._ttl_s).sum())
        self._missing += len(ages_s) - len(aged)
        self._stale += stale
        self._present += len(aged) - stale
        if len(aged):
            # An event may be ahead of the serving clock: that is age 0 to everybody.
            aged = np.maximum(aged, 0.0)
            self._ages.observe_many(aged)
            self._age_sum_s += float(aged.sum())
            self._age_max_s = max(self._age_max_s, float(aged.max()))
            if self._slo_s is not None:
                self._within_slo += int((aged <= min(self._slo_s, self._ttl_s)).sum())


class SourceMark(NamedTuple):
    """How far a source has come: its greatest event time, and the greatest lag of its last batch.

    A lag is known_time - event_time.
    """

    watermark_us: int
    lag_us: int


@dataclass(slots=True)
class _Source:
    watermark_us: int
    lag_us_max: int


class Freshness:
    """Freshness of a daemon's views and sources, shown through a metrics registry."""

    def __init__(self, registry: Registry) -> None:
        self._family = registry.histogram(
            "mlpd_feature_age_seconds",
            "Event-time age of a view's rows when served.",
            labels=("view",),
            unit="seconds",
            bounds=AGE_BUCKETS_S,
        )
        self._views: dict[str, ViewFreshness] = {}
        self._sources: dict[str, _Source] = {}
        registry.add_collector("freshness", self._collect)

    def view(
        self, name: str, *, ttl_s: float | None = None, slo_s: float | None = None
    ) -> ViewFreshness:
        """Return a view's ages, made on first use; keep it.  `ttl_s` and `slo_s` are inclusive."""
        view = self._views.get(name)
        if view is None:
            ages = self._family.labels(name)
            view = self._views[name] = ViewFreshness(ages, ttl_s=ttl_s, slo_s=slo_s)
        return view

    def forget_view(self, name: str) -> None:
        """Drop a view that is no longer defined; unknown is fine."""
        self._views.pop(name, None)
        self._family.remove(name)

    def note_ingest(self, source: str, *, event_time_us_max: int, lag_us_max: int) -> None:
        """Note one ingested batch: its greatest event time, and greatest known - event time."""
        known = self._sources.get(source)
        if known is None:
            self._sources[source] = _Source(event_time_us_max, lag_us_max)
            return
        known.watermark_us = max(known.watermark_us, event_time_us_max)
        known.lag_us_max = lag_us_max

    def sources(self) -> dict[str, SourceMark]:
        """Return how far each source has come that had any events."""
        return {
            name: SourceMark(source.watermark_us, source.lag_us_max)
            for name, source in list(self._sources.items())
        }

    def restore(self, source: str, mark: SourceMark) -> None:
        """Take over what was known before a restart."""
        self.note_ingest(source, event_time_us_max=mark.watermark_us, lag_us_max=mark.lag_us)

    def report(self) -> dict[str, ViewReport]:
        """Return what each view was served like, by name."""
        return {name: view.report() for name, view in list(self._views.items())}

    def _collect(self) -> list[Collected]:
        reports = self.report()
        statuses = [
            ((name, status), float(count))
            for name, report in reports.items()
            for status, count in (
                ("present", report.present),
                ("stale", report.stale),
                ("missing", report.missing),
            )
        ]
        shares = [
            ((name,), report.slo_share)
            for name, report in reports.items()
            if report.slo_share is not None
        ]
        sources = list(self._sources.items())
        return [
            Collected(_STATUS, statuses),
            Collected(_SLO, shares),
            Collected(_WATERMARK, [((name,), s.watermark_us / 1e6) for name, s in sources]),
            Collected(_LAG, [((name,), s.lag_us_max / 1e6) for name, s in sources]),
        ]
