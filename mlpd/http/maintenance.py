"""Handlers of maintenance: the check of the data directory."""

from aiohttp import web

from mlpd.daemon.app import Daemon
from mlpd.http.shapes import Field, Shape
from mlpd.http.wire import respond

REPORT = Shape(
    {
        "clean": Field("flag", "Whether nothing is wrong."),
        "problems": Field("rows", "Per problem section, code, subject, message, hint."),
        "more": Field("integer", "Problems beyond those listed."),
        "checked": Field("object", "Per section what was looked at, in numbers."),
        "skipped": Field("object", "Per section that was not checked, why."),
        "repaired": Field("texts", "What was mended; nothing while a daemon runs."),
    }
)


class MaintenanceHandlers:
    """Checks what the daemon keeps on disk."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon

    async def fsck(self, request: web.Request) -> web.Response:
        """Return what is wrong with the data directory, read in a child process; changes nothing.

        All but LMDB's pages and the replay of the log, which need a stopped daemon.
        """
        return await respond(request, await self._daemon.fsck.run())
