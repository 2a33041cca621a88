"""Handlers of serving routes: named endpoints, changed as one versioned, audited write."""

from aiohttp import web

from mlpd.daemon.app import Daemon
from mlpd.http.shapes import Field, Shape
from mlpd.http.wire import read_by, read_fields, respond

ROUTE = Shape(
    {
        "service": Field("text", "The feature service that makes the vector.", required=True),
        "arms": Field(
            "rows", "Each a model (name@alias or name@version), name and weight.", required=True
        ),
        "shadows": Field("texts", "Models that score the same features, unseen by callers."),
        "experiment": Field("text", "The experiment whose assignment chooses the arm."),
        "fallback_models": Field(
            "texts",
            "Models that answer for an arm that can't, as name@alias~1; the first that can.",
        ),
        "fallback": Field("number", "The score answered when none of them can either."),
        "log_share": Field(
            "number",
            "Share of rows that are logged, by lot; those of experiments and fallbacks always are.",
        ),
        "canary": Field(
            "object",
            "A timetable for one arm: arm, steps (share, for, rows), guard (rows, failed_share, "
            "slower, score_shift), on_failure (rollback or stop).",
        ),
        "expected": Field("integer", "The version seen, 0 for a new route; another one is 409."),
    }
)
ROLLBACK = Shape({"version": Field("integer", "Which version to return to.", required=True)})
SERVED_ROUTE = Shape(
    {
        **{name: field for name, field in ROUTE.fields.items() if name != "expected"},
        "name": Field("text", "The route."),
        "version": Field("integer", "Counts its changes."),
        "serving": Field("object", "Per arm the version that serves now; null when none can."),
        "serving_fallbacks": Field(
            "texts", "The fallback models that can be served now, in order."
        ),
        "trial": Field(
            "object",
            "How far the canary has come, or how the last one ended: state, step, share, "
            "rows, what it waits for, why it ended; null when there was none.",
        ),
        "error": Field("text", "Why it can't follow its definition, or null."),
    }
)
ROUTES = Shape({"routes": Field("rows", "Every route, as GET /v1/routes/{name} shows it.")})
HISTORY = Shape({"versions": Field("rows", "Newest first: version, at, by, changes, route.")})
DELETED = Shape({"deleted": Field("text", "The name.")})


class RouteHandlers:
    """Shows and changes routes."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon

    async def list(self, request: web.Request) -> web.Response:
        """Return every route."""
        return await respond(request, {"routes": self._daemon.routes.all()})

    async def show(self, request: web.Request) -> web.Response:
        """Return a route with the versions that serve it now."""
        return await respond(request, self._daemon.routes.get(request.match_info["name"]))

    async def put(self, request: web.Request) -> web.Response:
        """Make this the route's next version; its models are loaded and swapped in when answered.

        Requests under way finish on the version that they began with.
        """
        document = await read_fields(request, ROUTE)
        expected = document.pop("expected")
        route = await self._daemon.routes.put(
            request.match_info["name"], document, by=read_by(request), expected=expected
        )
        return await respond(request, route)

    async def delete(self, request: web.Request) -> web.Response:
        """Remove a route; its history stays."""
        name = request.match_info["name"]
        await self._daemon.routes.delete(name, by=read_by(request))
        return await respond(request, {"deleted": name})

    async def history(self, request: web.Request) -> web.Response:
        """Return a route's versions, newest first, each with what it changed and who did it."""
        versions = self._daemon.routes.history(request.match_info["name"])
        return await respond(request, {"versions": versions})

    async def roll_back(self, request: web.Request) -> web.Response:
        """Make an earlier version's content the next version."""
        fields = await read_fields(request, ROLLBACK)
        route = await self._daemon.routes.rollback(
            request.match_info["name"], fields["version"], by=read_by(request)
        )
        return await respond(request, route)
