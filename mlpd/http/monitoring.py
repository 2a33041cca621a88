"""Handlers of monitoring: metrics, drift, performance, freshness, the consistency audit."""

from typing import Any

from aiohttp import web

from mlpd.core.errors import ValidationError
from mlpd.core.time import parse_duration
from mlpd.daemon.app import Daemon
from mlpd.http.shapes import Field, Shape
from mlpd.http.wire import read_fields, respond
from mlpd.registry.records import CHAMPION, parse_selector

DRIFT = Shape(
    {
        "version": Field("text", "Number or alias; champion by default."),
        "route": Field("text", "Only what this route served."),
        "start": Field("time", "From here (inclusive); by default the last day of its counts."),
        "end": Field("time", "Up to here (exclusive)."),
        "step": Field("text", "One report per step of this duration, such as 1d or 7d."),
    }
)
DRIFT_REPORT = Shape(
    {
        "model": Field("text", "The model."),
        "version": Field("integer", "The version whose training profile is the reference."),
        "route": Field("text", "The route asked for, or null."),
        "reference": Field("text", "What was compared with."),
        "windows": Field("rows", "Per window its start, features, prediction, drifted share."),
    }
)
PERFORMANCE = Shape(
    {
        "model": Field("text", "The model."),
        "cohorts": Field("rows", "Per version, route, arm and period: AUC, log loss, Brier ..."),
    }
)
FRESHNESS = Shape(
    {
        "views": Field("object", "Per view the ages served and its share within the SLO."),
        "sources": Field("object", "Per source its watermark."),
    }
)
SHADOWS = Shape({"shadows": Field("rows", "Paired differences of shadows to their primaries.")})
CONSISTENCY = Shape({"last": Field("object", "What the last audit since the start found.")})
AUDIT = Shape({"limit": Field("integer", "Predictions to recompute at most; all by default.")})
AUDITED = Shape(
    {
        "rows_compared": Field("integer", "Logged predictions recomputed from the log."),
        "values_compared": Field("integer", "Their vectors' elements, compared bit for bit."),
        "mismatched_rows": Field("integer", "Rows with a difference; 0 is what is promised."),
        "mismatches": Field("integer", "Values that differ."),
        "unavailable": Field("integer", "Rows whose model or definitions are gone."),
        "by_feature": Field("object", "Differences by feature."),
        "examples": Field("rows", "The first differences: which, served, recomputed."),
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
        """Return the drift of what a version served against its training profile."""
        options = DRIFT.read_query(request.query)
        start_us, end_us, step = options["start"], options["end"], options["step"]
        if None not in (start_us, end_us) and start_us >= end_us:
            raise ValidationError("'start' must lie before 'end'", code="empty_window")
        report = await self._daemon.monitor.drift(
            request.match_info["model"],
            version=parse_selector(options["version"] or CHAMPION),
            route=options["route"],
            start_us=start_us,
            end_us=end_us,
            step_us=None if step is None else parse_duration(step, "step"),
        )
        return await respond(request, report)

    async def performance(self, request: web.Request) -> web.Response:
        """Return how well a model's labelled predictions did: in all, by month and by day."""
        return await respond(request, self._daemon.monitor.performance(request.match_info["model"]))

    async def freshness(self, request: web.Request) -> web.Response:
        """Return per view the ages at which it was served, per source how far it has come."""
        return await respond(request, self._daemon.monitor.freshness_report())

    async def shadows(self, request: web.Request) -> web.Response:
        """Return every shadow's paired difference to the model that it shadows."""
        return await respond(request, {"shadows": self._daemon.monitor.shadow_report()})

    async def consistency(self, request: web.Request) -> web.Response:
        """Return what the last audit found, null before the first since the start."""
        return await respond(request, {"last": self._daemon.audit.last()})

    async def run_audit(self, request: web.Request) -> web.Response:
        """Recompute logged predictions from the log, in a child process; compare bit for bit."""
        limit = (await read_fields(request, AUDIT))["limit"]
        if limit is not None and limit < 1:
            raise ValidationError("'limit' must be at least 1", code="wrong_limit")
        found: dict[str, Any] = await self._daemon.audit.run(limit=limit)
        return await respond(request, found)
