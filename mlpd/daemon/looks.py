"""Looks: what can be wrong is measured, each kind in its own windows, for the alerts.

A look returns measurements of a window that has closed, or None while none has.  Whatever compares
counters does so with those of its last look; times between looks are monotonic.
"""

import asyncio
import math
import os
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from mlpd.core.config import AlertsConfig
from mlpd.core.specs import ViewSpec
from mlpd.daemon.audit import Audit
from mlpd.daemon.ingest import Ingest
from mlpd.daemon.state import CatalogState
from mlpd.monitoring.alerts import ALERTNAME, Measurement
from mlpd.monitoring.freshness import Freshness, ViewReport
from mlpd.storage.environment import Environment
from mlpd.storage.writer import Writer

DAEMON = "daemon"
"""The group of what concerns the daemon as a whole."""

STALLED_SHARE = 0.8
"""Of a freshness period: a source that stands still is told before a feature is too old."""

ROWS_MIN = 20
"""Rows in a window from which on shares of them mean something."""

BASELINE_WINDOWS = 12


@dataclass(frozen=True, slots=True)
class Window:
    """What was measured in one window; `number` tells it from the one before."""

    number: int
    measured: Sequence[Measurement]


class Look(Protocol):
    """Measures alerts of some names."""

    names: frozenset[str]

    async def look(self, now_us: int) -> Window | None:
        """Return the window that closed since the last look, if one has."""


class Every:
    """A look that takes `measure` every `every_s`, by the monotonic clock."""

    def __init__(
        self,
        every_s: float,
        names: Sequence[str],
        measure: Callable[[], Sequence[Measurement]],
    ) -> None:
        self.names = frozenset(names)
        self._every_s = every_s
        self._measure = measure
        self._last_s = time.monotonic()

    async def look(self, now_us: int) -> Window | None:  # noqa: ARG002 - by another clock
        """Return a window where it is time, measured in a thread."""
        now_s = time.monotonic()
        if now_s - self._last_s < self._every_s:
            return None
        self._last_s = now_s
        return Window(time.monotonic_ns(), await asyncio.to_thread(self._measure))


class SourceLook:
    """Rows refused at ingest, and lag, of each source.  One thread at a time."""

    names = ("SourceQuality", "SourceLag")

    def __init__(
        self, ingest: Ingest, freshness: Freshness, state: CatalogState, config: AlertsConfig
    ) -> None:
        self._ingest = ingest
        self._freshness = freshness
        self._state = state
        self._config = config
        self._before: Mapping[str, tuple[int, int]] = self._counts()
        self._shares: dict[str, deque[tuple[int, int]]] = {}

    def measure(self) -> list[Measurement]:
        """Return what the sources that sent something since the last call were like."""
        counts, before = self._counts(), self._before
        self._before = counts
        found = []
        periods = freshness_periods(self._state)
        marks = self._freshness.sources()
        for source, (accepted, rejected) in counts.items():
            accepted_before, rejected_before = before.get(source, (0, 0))
            bad = rejected - rejected_before
            rows = accepted - accepted_before + bad
            if rows >= ROWS_MIN:
                found.append(self._quality(source, bad, rows))
            if rows and source in periods and source in marks:
                found.append(_lag(source, marks[source].lag_us / 1e6, periods[source]))
        return found

    def _quality(self, source: str, bad: int, rows: int) -> Measurement:
        config = self._config
        past = self._shares.setdefault(source, deque(maxlen=BASELINE_WINDOWS))
        usual = sum(b for b, _ in past) / max(1, sum(r for _, r in past))
        share = bad / rows
        threshold = max(config.quality_share, min(1.0, config.quality_factor * usual))
        if share < threshold:  # what is bad now must not become what is usual
            past.append((bad, rows))
        return Measurement(
            {ALERTNAME: "SourceQuality", "source": source, "problem": "rejected"},
            f"source {source}",
            share,
            threshold,
            f"{share:.1%} of {rows} rows were refused; before it were {usual:.1%}",
        )

    def _counts(self) -> dict[str, tuple[int, int]]:
        rejected = dict(self._ingest.rejected_by_source)
        return {
            source: (accepted, rejected.get(source, 0))
            for source, accepted in list(self._ingest.rows_by_source.items())
        }


def _lag(source: str, lag_s: float, period_s: float) -> Measurement:
    return Measurement(
        {ALERTNAME: "SourceLag", "source": source},
        f"source {source}",
        max(0.0, lag_s) / period_s,
        1.0,
        f"events arrive {lag_s:.0f} s after they happened; views promise {period_s:.0f} s",
    )


class StandstillLook:
    """For how long the watermark of each source stands still, at every look; on the loop.

    Sources that never had an event are passed over: nothing has stopped.
    """

    names = frozenset({"SourceStalled"})

    def __init__(
        self,
        freshness: Freshness,
        state: CatalogState,
        known: Mapping[str, tuple[int, float]],
        clock_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._freshness = freshness
        self._state = state
        self._clock_s = clock_s
        now_s = clock_s()
        self._since = {source: (mark, now_s - stood_s) for source, (mark, stood_s) in known.items()}

    def standing(self) -> dict[str, tuple[int, float]]:
        """Return by source its watermark in us and the seconds that it stands still."""
        now_s = self._clock_s()
        for source, (mark_us, _) in self._freshness.sources().items():
            if mark_us > self._since.get(source, (mark_us - 1, 0.0))[0]:
                self._since[source] = mark_us, now_s
        return {source: (mark, now_s - since_s) for source, (mark, since_s) in self._since.items()}

    def least_period_s(self) -> float:
        """Return the shortest freshness that is promised of any source, infinity without one."""
        return min(freshness_periods(self._state).values(), default=math.inf)

    async def look(self, now_us: int) -> Window | None:  # noqa: ARG002 - by another clock
        """Return how the sources stand that views promise freshness of."""
        standing = self.standing()
        measured = [
            Measurement(
                {ALERTNAME: "SourceStalled", "source": source},
                f"source {source}",
                standing[source][1] / period_s,
                STALLED_SHARE,
                f"no newer event for {standing[source][1]:.0f} s; views promise {period_s:.0f} s",
            )
            for source, period_s in freshness_periods(self._state).items()
            if source in standing
        ]
        return Window(time.monotonic_ns(), measured)


class SloLook:
    """How fast each view's freshness budget burns.  One thread at a time."""

    names = ("FreshnessSlo",)

    def __init__(self, freshness: Freshness, config: AlertsConfig) -> None:
        self._freshness = freshness
        self._objective = config.slo_objective
        self._before = self._counts()

    def measure(self) -> list[Measurement]:
        """Return the burn rate of each view that was served often enough since the last call."""
        counts, before = self._counts(), self._before
        self._before = counts
        found = []
        for view, (rows, good) in counts.items():
            rows_before, good_before = before.get(view, (0, 0))
            if (served := rows - rows_before) >= ROWS_MIN:
                missed = 1.0 - (good - good_before) / served
                found.append(self._burn(view, missed, served))
        return found

    def _burn(self, view: str, missed: float, served: int) -> Measurement:
        return Measurement(
            {ALERTNAME: "FreshnessSlo", "view": view},
            f"view {view}",
            missed / (1.0 - self._objective),
            1.0,
            f"{missed:.1%} of {served} rows served were older than promised, or missing",
        )

    def _counts(self) -> dict[str, tuple[int, int]]:
        return {
            view: (_rows(report), round(report.slo_share * _rows(report)))
            for view, report in self._freshness.report().items()
            if report.slo_share is not None
        }


def _rows(report: ViewReport) -> int:
    return report.present + report.stale + report.missing


class DiskLook:
    """The file system, LMDB's map, and writes that the disk refused.  One thread at a time."""

    names = ("DiskFull", "StoreMapFull", "WritesFail")

    def __init__(
        self, root: Path, environment: Environment, writer: Writer, config: AlertsConfig
    ) -> None:
        self._root = root
        self._environment = environment
        self._writer = writer
        self._config = config
        self._failures = writer.stats.storage_failures

    def measure(self) -> list[Measurement]:
        """Return the shares in use, and what failed since the last call."""
        disk, usage = os.statvfs(self._root), self._environment.usage()
        used = 1.0 - disk.f_bavail / max(1, disk.f_blocks)
        mapped = usage.used_bytes / usage.map_bytes
        failures = self._writer.stats.storage_failures
        failed, self._failures = failures - self._failures, failures
        free = f"{disk.f_bavail * disk.f_frsize / 2**30:.1f} GiB are free"
        config = self._config
        return [
            _of_daemon("DiskFull", used, config.disk_share, f"the disk is {used:.1%} full; {free}"),
            _of_daemon(
                *("StoreMapFull", mapped, config.map_share),
                f"LMDB takes {mapped:.1%} of its map: raise [storage] map_bytes",
            ),
            _of_daemon(
                *("WritesFail", float(failed), 1.0),
                f"the disk refused {failed} groups of writes",
            ),
        ]


class AuditLook:
    """What the last consistency audit found."""

    names = frozenset({"Inconsistent"})

    def __init__(self, audit: Audit) -> None:
        self._audit = audit
        self._seen: object = None

    async def look(self, now_us: int) -> Window | None:  # noqa: ARG002 - audits end when they do
        """Return the audit that ended since the last look."""
        last = self._audit.last()
        if last is None or last is self._seen:
            return None
        self._seen = last
        wrong = last["mismatched_rows"]
        text = f"{wrong} of {last['rows_compared']} served rows differ from the log"
        return Window(time.monotonic_ns(), [_of_daemon("Inconsistent", float(wrong), 1.0, text)])


def freshness_periods(state: CatalogState) -> dict[str, float]:
    """Return by source the least freshness in seconds that a view of it promises."""
    found: dict[str, float] = {}
    views: Sequence[ViewSpec] = list(state.catalog.definitions.views.values())
    for view in views:
        if view.freshness_us is not None:
            period_s = view.freshness_us / 1e6
            found[view.source] = min(period_s, found.get(view.source, period_s))
    return found


def _of_daemon(name: str, value: float, threshold: float, text: str) -> Measurement:
    return Measurement({ALERTNAME: name}, DAEMON, value, threshold, text)
