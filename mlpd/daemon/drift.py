"""Verb drift: what a version served against one of four references, feature by feature and at once.

Counts answer most questions in a thread; what needs vectors is read from the prediction log in a
child process: rows of another version, and the multivariate checks.
"""

import asyncio
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mlpd.core.errors import ConflictError, MlpdError, NotFoundError, ValidationError
from mlpd.core.time import DAY_US, MIN_TIME_US, Clock, format_time
from mlpd.daemon.drift_windows import before, newest_us, same_hour, windows_of
from mlpd.daemon.monitor import Monitor
from mlpd.daemon.parts import Parts
from mlpd.daemon.predictions import PredictionLog
from mlpd.daemon.process import Child
from mlpd.monitoring.buckets import BUCKET_US
from mlpd.monitoring.counting import CountLayout, Counts
from mlpd.monitoring.drift import DriftReport, rebased, report
from mlpd.monitoring.live import LiveCounts
from mlpd.monitoring.reference import ReferenceProfile
from mlpd.monitoring.svg import draw_feature
from mlpd.registry.models import Registry
from mlpd.registry.records import ModelVersion
from mlpd.storage.files import DataDirectory
from mlpd.storage.writer import Writer

REFERENCES = {"training": 0, "rolling": 7, "same_hour": 4, "previous": 0}
"""What may be compared with, and over how many windows or weeks unless asked otherwise."""
COUNT_MAX = 1_000
TREND_PARTS = 24
NAMED_MAX = 100
"""Drifted features that a gate's report names: it travels with the alias's history."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DriftQuery:
    """What to compare: of a version, on one route or all, over [start, end) in steps.

    `reference` is one of REFERENCES; `count` its windows or weeks; None everywhere: the default.
    """

    version: int | str = "champion"
    route: str | None = None
    start_us: int | None = None
    end_us: int | None = None
    step_us: int | None = None
    reference: str = "training"
    count: int | None = None


_Compare = Callable[[int, int], ReferenceProfile]
"""Returns the reference of a window [start, end); in a thread."""


@dataclass(frozen=True, slots=True)
class _Served:
    """A version with its profile, and what it served in [start, end) in steps."""

    found: ModelVersion
    profile: ReferenceProfile
    live: Sequence[LiveCounts]
    start_us: int
    end_us: int
    step_us: int


class Drift:
    """Answers what drifted; on the loop."""

    def __init__(
        self,
        monitor: Monitor,
        registry: Registry,
        writer: Writer,
        log: PredictionLog,
        paths: DataDirectory,
        parts: Parts,
        clock: Clock,
    ) -> None:
        self._parts = parts
        self._monitor = monitor
        self._registry = registry
        self._writer = writer
        self._log = log
        self._paths = paths
        self._clock = clock
        self._lock = asyncio.Lock()
        self.checked: dict[tuple[str, int], dict[str, Any]] = {}
        """By (model, version) what the last multivariate checks found."""

    async def drift(self, model: str, query: DriftQuery) -> dict[str, Any]:
        """Return drift in each window in which something was served; by default the last day.

        Raises NotFoundError for an unknown model, version, or one without a version before it.
        """
        served = await self._served(model, query)
        compare, absent = await self._reference(served, query)

        def measure() -> list[dict[str, Any]]:
            windows = windows_of(served.live, served.start_us, served.end_us, served.step_us)
            return [_window(served, at, counts, compare, absent) for at, counts in windows]

        return {
            "model": model,
            "version": served.found.number,
            "route": query.route,
            "reference": query.reference,
            "not_compared": sorted(absent),
            "windows": await asyncio.to_thread(measure),
            "multivariate": self.checked.get((model, served.found.number)),
        }

    async def picture(self, model: str, feature: str, query: DriftQuery) -> str:
        """Return an SVG of a feature's (or the score's) histograms over the whole of a window.

        Raises NotFoundError(code="unknown_feature").
        """
        served = await self._served(model, replace(query, step_us=None))
        compare, _ = await self._reference(served, query)
        names = [column.name for column in served.profile.columns]
        if feature not in names:
            raise NotFoundError(
                f"{served.found.reference} has no feature {feature!r}",
                code="unknown_feature",
                hint=f"It has: {', '.join(names)}.",
            )
        index = names.index(feature)

        def draw() -> str:
            windows = windows_of(
                served.live, served.start_us, served.end_us, served.end_us - served.start_us
            )
            counts = windows[0][1] if windows else Counts(CountLayout(served.profile))
            reference = compare(served.start_us, served.end_us)
            trend = _trends(served, reference)[index]
            return draw_feature(reference.columns[index], counts.column(index), trend)

        return await asyncio.to_thread(draw)

    async def check(self, model: str, query: DriftQuery) -> dict[str, Any]:
        """Run the multivariate checks of one window, by default the last day, in a child.

        Components are those of training, the classifier's other sample is what was served in the
        `count` windows before.
        """
        served = await self._served(model, query)
        width_us = served.end_us - served.start_us
        count = _count(replace(query, reference="rolling"))
        request = {
            "what": "multivariate",
            "start_us": served.start_us,
            "end_us": served.end_us,
            "reference": {
                "start_us": max(MIN_TIME_US, served.start_us - count * width_us),
                "end_us": served.start_us,
            },
            "components": await self._file(served.found, "components.json"),
        }
        found = await self._child(served, request)
        answer = {
            "model": model,
            "version": served.found.number,
            "start": format_time(served.start_us),
            "end": format_time(served.end_us),
            "at": format_time(self._clock()),
            **found,
        }
        self.checked[model, served.found.number] = answer
        return answer

    async def gate(self, found: ModelVersion, other: ModelVersion) -> dict[str, Any]:
        """Return how far the last day that `other` served is from what `found` was trained on.

        `share`: of the features that both have, how many drifted; `drifted`: which; `rows`: how
        many were served.  `why` instead of the share where there are fewer than 100.  Reads the
        prediction log in a child.  Raises NotFoundError for a version that was not trained here.
        """
        query = DriftQuery(version=other.number)
        last = await self._served(other.name, query)
        profile = await self._monitor.profile_of(found)
        counts, absent = await self._recount_of(replace(last, found=found, profile=profile), other)
        judged = _without(report(profile, counts), frozenset(absent))
        told = {"rows": judged.rows, "drifted": judged.drifted[:NAMED_MAX]}
        if judged.state == "insufficient" or not judged.features:
            return told | {"why": f"{other.reference} served {judged.rows} rows in its last day"}
        return told | {"share": len(judged.drifted) / len(judged.features)}

    async def _served(self, model: str, query: DriftQuery) -> _Served:
        found = self._registry.get(model, query.version)
        profile = await self._monitor.profile_of(found)
        live = await self._monitor.counts_of(found, query.route, profile)
        end_us = query.end_us
        if end_us is None:
            end_us = await asyncio.to_thread(newest_us, live)
        start_us = end_us - DAY_US if query.start_us is None else query.start_us
        step_us = query.step_us or max(1, end_us - start_us)
        return _Served(found, profile, live, start_us, end_us, step_us)

    async def _reference(
        self, served: _Served, query: DriftQuery
    ) -> tuple[_Compare, frozenset[str]]:
        """Return what gives the reference of a window, and the features that it can't compare."""
        profile, live, count = served.profile, served.live, _count(query)
        if query.reference == "training":
            return (lambda _start, _end: profile), frozenset()
        if query.reference == "previous":
            counts, absent = await self._recount(served)
            other = rebased(profile, counts)
            return (lambda _start, _end: other), frozenset(absent)
        collect = before if query.reference == "rolling" else same_hour

        def compare(start_us: int, end_us: int) -> ReferenceProfile:
            empty = Counts(CountLayout(profile))
            found = collect(live, start_us, end_us, count) if live else empty
            return rebased(profile, found)

        return compare, frozenset()

    async def _recount(self, served: _Served) -> tuple[Counts, list[str]]:
        """Count what the version before served in this version's bins."""
        number = served.found.number
        others = [v for v in self._registry.versions(served.found.name) if v.number < number]
        others = [v for v in others if not v.is_deleted]
        if not others:
            raise NotFoundError(
                f"{served.found.reference} has no version before it", code="no_previous_version"
            )
        other = max(others, key=lambda version: version.number)
        return await self._recount_of(replace(served, start_us=MIN_TIME_US), other)

    async def _recount_of(self, served: _Served, other: ModelVersion) -> tuple[Counts, list[str]]:
        """Count what `other` served in this version's bins, and what it hasn't for them."""
        request = {
            "what": "recount",
            "start_us": served.start_us,
            "end_us": served.end_us,
            "encoder": await self._file(served.found, "encoder.json"),
            "other": {"number": other.number, "encoder": await self._file(other, "encoder.json")},
        }
        if request["other"]["encoder"] is None:
            raise NotFoundError(f"{other.reference} was not trained here", code="not_trained_here")
        found = await self._child(served, request)
        counts = Counts.from_bytes(found["counts"], CountLayout(served.profile))
        return counts, found["not_compared"]

    async def _child(self, served: _Served, request: dict[str, Any]) -> Any:
        if not self._parts.is_alone:
            raise ConflictError(
                "this reads vectors of the prediction log, of which each shard has its own",
                code="several_shards",
                hint="Counts answer over all shards: references training, rolling, same_hour.",
            )
        async with self._lock:
            self._log.flush()
            await self._writer.write(lambda _: None)  # what was flushed is stored now
            whole = {
                **request,
                "directory": str(self._paths.root),
                "model": served.found.name,
                "number": served.found.number,
                "profile": served.profile.to_dict(),
            }
            async with Child("drift", whole) as child:
                return await child.result()

    async def _file(self, version: ModelVersion, name: str) -> Any:
        try:
            return json.loads(await self._registry.load_file(version.name, version.number, name))
        except MlpdError:
            return None


def _count(query: DriftQuery) -> int:
    count = REFERENCES[query.reference] if query.count is None else query.count
    if not 0 <= count <= COUNT_MAX or (query.count is not None and count < 1):
        raise ValidationError(f"'count' must be 1 to {COUNT_MAX}", code="wrong_limit")
    return count


def _window(
    served: _Served, at_us: int, counts: Counts, compare: _Compare, absent: frozenset[str]
) -> dict[str, Any]:
    end_us = min(at_us + served.step_us, served.end_us)
    reference = compare(at_us, end_us)
    found = report(reference, counts, width_us=end_us - at_us)
    found = _without(found, absent) if absent else found
    document = {"start": format_time(at_us), "end": format_time(end_us), **found.to_dict()}
    if served.step_us >= served.end_us - served.start_us:  # one window: its parts are shown, too
        trends = dict(zip(_names(served.profile), _trends(served, reference), strict=True))
        columns = [*document["features"], *filter(None, [document["prediction"]])]
        for column in columns:
            column["trend"] = trends[column["name"]]
    return document


def _without(found: DriftReport, absent: frozenset[str]) -> DriftReport:
    """Return the report without features that the reference doesn't have."""
    kept = tuple(column for column in found.features if column.name not in absent)
    return replace(found, features=kept)


def _names(profile: ReferenceProfile) -> list[str]:
    return [column.name for column in profile.columns]


def _trends(served: _Served, reference: ReferenceProfile) -> list[list[float | None]]:
    """Return by column psi_adj in each of up to 24 parts of the window; None below 100 rows."""
    width_us = served.end_us - served.start_us
    step_us = max(BUCKET_US, -(-width_us // TREND_PARTS // BUCKET_US) * BUCKET_US)
    parts: list[list[float | None]] = [[] for _ in reference.columns]
    found = dict(windows_of(served.live, served.start_us, served.end_us, step_us))
    for at_us in range(served.start_us, served.end_us, step_us):
        judged = report(reference, found[at_us]) if at_us in found else None
        enough = judged is not None and judged.state != "insufficient"
        columns = [] if judged is None else [*judged.features, *filter(None, [judged.prediction])]
        for index, part in enumerate(parts):
            part.append(columns[index].psi_adjusted if enough else None)
    return parts
