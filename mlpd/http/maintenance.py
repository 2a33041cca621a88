"""Handlers of maintenance: backups, and the check of the data directory."""

from aiohttp import web

from mlpd.daemon.app import Daemon
from mlpd.http.shapes import Field, Shape
from mlpd.http.wire import read_fields, respond

BACKUP = Shape(
    {
        "destination": Field(
            "text",
            "Absolute path on the daemon's host: nothing there yet, or an empty folder.",
            required=True,
        ),
        "copy": Field("flag", "Copy segments and blobs even where hard links would do."),
    }
)
BACKED_UP = Shape(
    {
        "destination": Field("text", "Where it is."),
        "time": Field("time", "When LMDB was copied."),
        "sequence": Field("integer", "The newest event in it."),
        "files": Field("integer", "Files in it."),
        "segments": Field("integer", "Segments among them."),
        "blobs": Field("integer", "Blobs of the registry among them."),
        "size_bytes": Field("integer", "Bytes of all files."),
        "linked_bytes": Field("integer", "Of those, bytes shared with the data directory."),
        "lmdb_growth_bytes": Field("integer", "What LMDB's file grew by meanwhile."),
        "took_s": Field("number", "Seconds."),
    }
)
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

    async def backup(self, request: web.Request) -> web.Response:
        """Make a backup of everything acknowledged before, while the daemon goes on working.

        Whole or none: an error leaves nothing at the destination.
        """
        fields = await read_fields(request, BACKUP)
        done = await self._daemon.backup.run(fields["destination"], copy=bool(fields["copy"]))
        return await respond(request, done)

    async def fsck(self, request: web.Request) -> web.Response:
        """Return what is wrong with the data directory, read in a child process; changes nothing.

        All but LMDB's pages and the replay of the log, which need a stopped daemon.
        """
        return await respond(request, await self._daemon.fsck.run())
