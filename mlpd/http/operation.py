"""Handlers of operation: health, status, the API's description, the shipped documentation."""

import asyncio
from pathlib import Path
from typing import Any

from aiohttp import web

import mlpd
from mlpd.core.errors import NotFoundError, UnavailableError
from mlpd.daemon.app import Daemon
from mlpd.daemon.roles import elsewhere
from mlpd.http.shapes import Field, Shape
from mlpd.http.wire import respond

ALIVE = Shape({"alive": Field("flag", "True.")})
READY = Shape({"ready": Field("flag", "True.")})
STATUS = Shape(
    {
        "version": Field("text", "mlpd's version."),
        "ready": Field("flag", "As /readyz."),
        "started": Field("time", "When the daemon was started."),
        "uptime_s": Field("number", "Seconds since."),
        "data_directory": Field("text", "Where everything is."),
        "sequence": Field("integer", "The newest event."),
        "newest_known": Field("time", "When it became known."),
        "log_tail_rows": Field("integer", "Rows of the log that are not in segments yet."),
        "segments": Field("object", "Per source files, rows and size_bytes of its segments."),
        "history": Field(
            "object", "Per source that lets old history go its retention, and when it begins."
        ),
        "lmdb_bytes": Field("integer", "Bytes of LMDB in use."),
        "lmdb_map_bytes": Field("integer", "Bytes that LMDB may use."),
        "definitions_version": Field("integer", "Counts applies."),
        "shared": Field(
            "object",
            "What members of a cluster have in common: the arbiter, its revision or the one that "
            "this member has come to; who follows, or what hinders it.",
        ),
        "sources": Field("texts", "Names of what is defined, here and below."),
        "views": Field("texts", "Feature views."),
        "services": Field("texts", "Feature services."),
        "jobs": Field("texts", "Training jobs."),
        "models": Field("texts", "Models in the registry."),
        "routes": Field("texts", "Serving routes."),
        "canaries": Field("object", "By route, how far its canary has come."),
        "experiments": Field("texts", "Experiments."),
        "predictions": Field(
            "object",
            "Served rows since the start: logged, left_out, dropped; files that hold their "
            "vectors: files, rows, size_bytes.",
        ),
        "events": Field("object", "Rows stored since the start, by source."),
    }
)

_DOCS = Path(mlpd.__file__).parent / "docs"


class OperationHandlers:
    """Answers for the daemon itself."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon

    async def ready(self, request: web.Request) -> web.Response:
        """Return 200 when requests are welcome, 503 while starting and stopping.

        421 where another daemon took this one's place.
        """
        if not self._daemon.ready:
            raise UnavailableError(
                "the daemon is starting or stopping", code="not_ready", hint="Ask again shortly."
            )
        if self._daemon.roles.role.name == "fenced":
            raise elsewhere(self._daemon.roles.role, self._daemon.ownership.member)
        return await respond(request, {"ready": True})

    async def status(self, request: web.Request) -> web.Response:
        """Return what runs, how much there is and how long it has been up."""
        return await respond(request, await asyncio.to_thread(self._daemon.status))


class PageHandlers:
    """Answers for the process and what it ships: the API's `document` and the documentation."""

    def __init__(self, document: dict[str, Any]) -> None:
        self._document = document

    async def alive(self, request: web.Request) -> web.Response:
        """Return 200 while the process lives."""
        return await respond(request, {"alive": True})

    async def openapi(self, request: web.Request) -> web.Response:
        """Return the description of this API."""
        return await respond(request, self._document)

    async def docs(self, _: web.Request) -> web.Response:
        """Return the list of the documentation's pages, as Markdown."""
        pages = await asyncio.to_thread(_pages)
        lines = [f"- [{name}](/docs/{name})" for name in sorted(pages)]
        return _markdown("\n".join(["# mlpd", "", *lines, ""]))

    async def page(self, request: web.Request) -> web.Response:
        """Return one page of the documentation, as Markdown."""
        name = request.match_info["page"]
        page = (await asyncio.to_thread(_pages)).get(name)
        if page is None:
            raise NotFoundError(
                f"there is no page {name!r}", code="unknown_page", hint="/docs lists all."
            )
        return _markdown(await asyncio.to_thread(page.read_text, "utf-8"))


def _pages() -> dict[str, Path]:
    """Return the pages by name: what isn't listed can't be asked for."""
    return {path.relative_to(_DOCS).as_posix(): path for path in _DOCS.rglob("*.md")}


def _markdown(text: str) -> web.Response:
    return web.Response(text=text, content_type="text/markdown", charset="utf-8")
