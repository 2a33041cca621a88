"""Handlers of monitoring: metrics, drift, performance, freshness, the consistency audit."""

from typing import Any

from aiohttp import web

from mlpd.core.errors import ValidationError
from mlpd.core.time import parse_duration
from mlpd.daemon.app import Daemon
from mlpd.daemon.drift import REFERENCES, DriftQuery
from mlpd.http.shapes import Field, Shape
from mlpd.http.wire import read_fields, respond
from mlpd.registry.records import CHAMPION, parse_selector

_DRIFT = {
    "version": Field("text", "Number or alias; champion by default."),
    "route": Field("text", "Only what this route served."),
    "start": Field("time", "From here (inclusive); by default the last day of its counts."),
    "end": Field("time", "Up to here (exclusive)."),
    "reference": Field(
        "text",
        "What to compare with: the training rows (the default), the windows right before "
        "(rolling), the same hour of the weeks before (same_hour), or what the version before "
        "this one served (previous).",
        choices=tuple(REFERENCES),
    ),
    "count": Field("integer", "Windows of rolling, 7 by default, or weeks of same_hour, 4."),
}
DRIFT = Shape(
    {**_DRIFT, "step": Field("text", "One report per step of this duration, such as 1d or 7d.")}
)
PICTURE = Shape(_DRIFT)
CHECK = Shape({name: _DRIFT[name] for name in ("version", "start", "end", "count")})
CHECKED = Shape(
    {
        "model": Field("text", "The model."),
        "version": Field("integer", "Its version."),
        "start": Field("time", "Start of the window that was checked."),
        "end": Field("time", "Its end."),
        "at": Field("time", "When it was checked."),
        "rows": Field("integer", "Rows in the window, a sample by lot of many."),
        "reference_rows": Field("integer", "Rows of the windows before."),
        "reconstruction": Field("object", "What training's principal components leave of rows."),
        "classifier": Field("object", "How well trees tell the window from those before."),
    }
)
DRIFT_REPORT = Shape(
    {
        "model": Field("text", "The model."),
        "version": Field("integer", "The version whose training profile is the reference."),
        "route": Field("text", "The route asked for, or null."),
        "reference": Field("text", "What was compared with."),
        "not_compared": Field("texts", "Features that the reference doesn't have."),
        "windows": Field("rows", "Per window its start, features, prediction, drifted share."),
        "multivariate": Field("object", "What the last check of features together found, or null."),
    }
)
PERFORMANCE = Shape(
    {
        "model": Field("text", "The model."),
        "cohorts": Field("rows", "Per version, route, arm and period: AUC, log loss, Brier ..."),
    }
)
ANALYSIS_OPTIONS = Shape(
    {
        "by": Field("text", "A key, request field or feature to slice by."),
        "start": Field("time", "Predictions made from here on (inclusive); all by default."),
        "end": Field("time", "Up to here (exclusive)."),
    }
)
ANALYSIS = Shape(
    {
        "model": Field("text", "The model."),
        "at": Field("time", "When the join ended."),
        "took_s": Field("number", "Seconds that it took."),
        "by": Field("text", "What slices go by, or null."),
        "versions": Field(
            "rows",
            "Per version its label delays, days and slices with realized and estimated metrics, "
            "and whether its concept drifts.",
        ),
    }
)
FRESHNESS = Shape(
    {
        "views": Field(
            "object",
            "Per view: its source's watermark and lag, rows served by status since the start, "
            "stale share, ages (mean, greatest, counts per bucket), SLO and share within it.",
        ),
        "sources": Field(
            "object", "Per source: watermark, seconds behind now, greatest lag of its last batch."
        ),
        "age_bounds_s": Field("any", "Upper bounds of the buckets of ages; the last has none."),
    }
)
QUALITY = Shape(
    {
        "sources": Field(
            "rows", "Per source rows, refused ones by code, masked samples of these; since start."
        ),
        "window": Field("texts", "Start and end of the window of the features below; or null."),
        "features": Field(
            "rows", "Per version and feature the share of each problem, training's, the threshold."
        ),
    }
)
SHADOWS = Shape({"shadows": Field("rows", "Paired differences of shadows to their primaries.")})
CONSISTENCY = Shape({"last": Field("object", "What the last audit since the start found.")})
AUDIT = Shape({"limit": Field("integer", "Predictions to recompute at most; all by default.")})
AUDITED = Shape(
    {
        "window": Field("texts", "Start and end of what was served; null for all that is logged."),
        "served": Field("integer", "Rows that were logged in the window, of which a sample."),
        "rows_compared": Field("integer", "Logged predictions recomputed from the log."),
        "values_compared": Field("integer", "Their vectors' elements, compared bit for bit."),
        "mismatched_rows": Field("integer", "Rows with a difference; 0 is what is promised."),
        "mismatches": Field("integer", "Values that differ."),
        "unavailable": Field("integer", "Rows whose model or definitions are gone."),
        "by_feature": Field("object", "Differences by feature."),
        "examples": Field("rows", "The first differences: which, served, recomputed, the events."),
        "cpu_s": Field("number", "Processor time of the child."),
        "at": Field("time", "When the audit ended."),
    }
)


class MonitoringHandlers:
    """Shows what is watched."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon

    async def metrics(self, request: web.Request) -> web.Response:
        """Return all metrics as Prometheus text, or OpenMetrics if the Accept header asks."""
        body, content_type = await self._daemon.monitor.expose_metrics(
            request.headers.get("Accept", "")
        )
        return web.Response(body=body, headers={"Content-Type": content_type})

    async def drift(self, request: web.Request) -> web.Response:
        """Return the drift of what a version served against its training profile, or another."""
        options = DRIFT.read_query(request.query)
        step = options.pop("step")
        query = _drift_query(options, None if step is None else parse_duration(step, "step"))
        return await respond(
            request, await self._daemon.drift.drift(request.match_info["model"], query)
        )

    async def drift_picture(self, request: web.Request) -> web.Response:
        """Return a feature's histograms, reference and live over each other, as SVG."""
        query = _drift_query(PICTURE.read_query(request.query))
        where = request.match_info
        picture = await self._daemon.drift.picture(where["model"], where["feature"], query)
        return web.Response(text=picture, content_type="image/svg+xml")

    async def check_drift(self, request: web.Request) -> web.Response:
        """Recompute the multivariate checks of a window, in a child process."""
        options = {"reference": None, "route": None, **await read_fields(request, CHECK)}
        query = _drift_query(options)
        return await respond(
            request, await self._daemon.drift.check(request.match_info["model"], query)
        )

    async def performance(self, request: web.Request) -> web.Response:
        """Return how well a model's labelled predictions did: in all, by month and by day."""
        model = request.match_info["model"]
        return await respond(request, await self._daemon.monitor.performance(model))

    async def analysis(self, request: web.Request) -> web.Response:
        """Return labelled predictions judged by day and slice, with estimates before labels come.

        Joined in a child process; some seconds for a million predictions.
        """
        options = ANALYSIS_OPTIONS.read_query(request.query)
        found = await self._daemon.analysis.run(
            request.match_info["model"],
            by=options["by"],
            start_us=options["start"],
            end_us=options["end"],
        )
        return await respond(request, found)

    async def freshness(self, request: web.Request) -> web.Response:
        """Return per view the ages at which it was served, per source how far it has come."""
        return await respond(request, self._daemon.monitor.freshness_report())

    async def quality(self, request: web.Request) -> web.Response:
        """Return what is wrong with data: by source at ingest, by feature where it is served."""
        return await respond(request, self._daemon.quality.describe())

    async def shadows(self, request: web.Request) -> web.Response:
        """Return every shadow's paired difference to the model that it shadows."""
        return await respond(request, {"shadows": await self._daemon.monitor.shadow_report()})

    async def consistency(self, request: web.Request) -> web.Response:
        """Return what the last audit found, null before the first since the start."""
        return await respond(request, {"last": await self._daemon.audit.last_of_all()})

    async def run_audit(self, request: web.Request) -> web.Response:
        """Recompute logged predictions from the log, in a child process; compare bit for bit."""
        limit = (await read_fields(request, AUDIT))["limit"]
        if limit is not None and limit < 1:
            raise ValidationError("'limit' must be at least 1", code="wrong_limit")
        found: dict[str, Any] = await self._daemon.audit.run_on_all(limit=limit)
        return await respond(request, found)


def _drift_query(options: dict[str, Any], step_us: int | None = None) -> DriftQuery:
    start_us, end_us = options["start"], options["end"]
    if None not in (start_us, end_us) and start_us >= end_us:
        raise ValidationError("'start' must lie before 'end'", code="empty_window")
    return DriftQuery(
        version=parse_selector(options["version"] or CHAMPION),
        route=options["route"],
        start_us=start_us,
        end_us=end_us,
        step_us=step_us,
        reference=options["reference"] or "training",
        count=options["count"],
    )
