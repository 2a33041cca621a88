"""Handlers of definitions: what runs, what a document would change, and making it so."""

from aiohttp import web

from mlpd.daemon.app import Daemon
from mlpd.http.shapes import Field, Shape
from mlpd.http.wire import read_fields, respond

_DOCUMENT = Field("object", "The definitions document, as `mlpd plan --json` shows it.", True)

DOCUMENT = Shape({"document": _DOCUMENT})
APPLY = Shape(
    {
        "document": _DOCUMENT,
        "expected_version": Field("integer", "The version planned against; another one is 409."),
    }
)
DEFINITIONS = Shape(
    {
        "version": Field("integer", "Counts applies; 0 before the first."),
        "document": Field("object", "Every definition by kind and name."),
    }
)
PLAN = Shape(
    {
        "version": Field("integer", "The version that runs (plan) or runs now (apply)."),
        "changes": Field("object", "Per kind the names added, changed and removed."),
        "backfill": Field("object", "Views to build from the log: name to events."),
        "pinned": Field(
            "rows",
            "Versions of services that models pin and that go on running: service, hash, their "
            "own views, and by whom.",
        ),
        "cost": Field(
            "object",
            "Of a plan, per view to build: events, entities, about how many seconds and bytes.",
        ),
    }
)


class DefinitionHandlers:
    """Shows, plans and applies definitions."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon

    async def show(self, request: web.Request) -> web.Response:
        """Return the definitions that run."""
        catalog = self._daemon.state.catalog
        version = self._daemon.shared.definitions_version(catalog.version)
        return await respond(request, {"version": version, "document": dict(catalog.document)})

    async def plan(self, request: web.Request) -> web.Response:
        """Return what a document would change; changes nothing."""
        fields = await read_fields(request, DOCUMENT)
        plan = await self._daemon.definitions.plan(fields["document"])
        version = self._daemon.shared.definitions_version(plan.version)
        return await respond(request, {**plan.to_dict(), "version": version})

    async def apply(self, request: web.Request) -> web.Response:
        """Make a document what runs, all of it or nothing; new views are built from the log."""
        fields = await read_fields(request, APPLY)
        plan = await self._daemon.definitions.apply(
            fields["document"], expected_version=fields["expected_version"]
        )
        await self._daemon.routes.refresh()
        return await respond(request, plan.to_dict())
