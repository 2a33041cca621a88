"""Handlers of alerts: what is wrong, silences, and a message to try the sinks."""

import asyncio

from aiohttp import web

from mlpd.core.time import parse_duration
from mlpd.daemon.app import Daemon
from mlpd.http.shapes import Field, Shape
from mlpd.http.wire import read_by, read_fields, respond

ALERTS = Shape(
    {
        "alerts": Field(
            "rows", "Alerts that are not ok: labels, state, value, threshold, text, silenced ..."
        ),
        "silences": Field("rows", "Silences: id, matchers, starts, ends, by, why."),
        "sinks": Field("rows", "How each sink is doing: state, waiting, sent, failed, error."),
        "refused": Field("integer", "Alerts beyond the limit, counted at each look."),
    }
)
SILENCE = Shape(
    {
        "matchers": Field("object", "Label to pattern (a shell's); all must match.", required=True),
        "lasts": Field("text", "For how long, such as 2h; at most 90d.", required=True),
        "why": Field("text", "A reason, at most 500 characters."),
        "id": Field("text", "16 hex digits, to send it again safely; drawn by default."),
    }
)
SILENCED = Shape(
    {
        "id": Field("text", "To end it with."),
        "matchers": Field("object", "Label to pattern."),
        "starts": Field("time", "From here."),
        "ends": Field("time", "Up to here."),
        "by": Field("text", "Who asked for it."),
        "why": Field("text", "Why."),
    }
)
TEST = Shape({"sink": Field("text", "One sink; all but training by default.")})
TESTED = Shape({"sinks": Field("rows", "Per sink whether it took the message, else the error.")})


class AlertHandlers:
    """Shows alerts and silences them."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon

    async def list(self, request: web.Request) -> web.Response:
        """Return alerts that are not ok, silences, and how each sink is doing."""
        return await respond(request, await asyncio.to_thread(self._daemon.alerts.describe))

    async def silence(self, request: web.Request) -> web.Response:
        """Create a silence: alerts with such labels are told to nobody while it lasts."""
        fields = await read_fields(request, SILENCE)
        made = await self._daemon.alerts.silence(
            fields["matchers"],
            lasts_us=parse_duration(fields["lasts"], "lasts"),
            by=read_by(request),
            why=fields["why"] or "",
            silence_id=fields["id"],
        )
        return await respond(request, made)

    async def unsilence(self, request: web.Request) -> web.Response:
        """Remove a silence; what fires is told now."""
        return await respond(request, await self._daemon.alerts.unsilence(request.match_info["id"]))

    async def test(self, request: web.Request) -> web.Response:
        """Return what each sink made of a message that was sent at once, past all silences."""
        fields = await read_fields(request, TEST)
        return await respond(request, {"sinks": await self._daemon.alerts.test(fields["sink"])})
