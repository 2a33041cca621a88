"""Alerts over shards: each has its own, shown together; a silence is one everywhere."""

import secrets
from typing import Any

from aiohttp import web

from mlpd.client import requests as r
from mlpd.cluster.router.everywhere import LIST_S, Everywhere, listed, missing, whole, with_missing
from mlpd.core.errors import MlpdError, NotFoundError
from mlpd.http.alerts import ALERTS, SILENCE, TEST, TESTED
from mlpd.http.shapes import Field, Shape
from mlpd.http.wire import read_fields, respond

CHANGE_S = 60.0
_SEND_AGAIN = "The others have it; send it again with the id that 'silence' in the details tells."
_END_AGAIN = "It has ended on the others; end it again when mlpd shard status shows that shard."
ALERTS_OVER = with_missing(
    Shape(
        {
            **ALERTS.fields,
            "alerts": Field("rows", "Alerts of all shards that are not ok, each with its shard."),
            "silences": Field("rows", "Silences, each with the shards that hold it."),
            "sinks": Field("rows", "How each sink of each shard is doing."),
        }
    )
)
TESTED_OVER = with_missing(TESTED)


class AlertingHandlers:
    """Shows the alerts of all shards, and silences them on all."""

    def __init__(self, everywhere: Everywhere) -> None:
        self._everywhere = everywhere

    async def list(self, request: web.Request) -> web.Response:
        """Return alerts that are not ok, silences and sinks of all shards that answer."""
        found = await self._everywhere.each(request, r.get("v1", "alerts"), LIST_S)
        gone = missing(found)
        answered = [value for value in found.values() if not isinstance(value, MlpdError)]
        silences: dict[str, Any] = {}
        for silence in listed(found, "silences"):
            shard = silence.pop("shard")
            silences.setdefault(silence["id"], {**silence, "shards": []})["shards"].append(shard)
        answer = {
            "alerts": sorted(listed(found, "alerts"), key=lambda alert: _STATES[alert["state"]]),
            "silences": sorted(silences.values(), key=lambda silence: silence["ends"]),
            "sinks": listed(found, "sinks"),
            "refused": sum(value["refused"] for value in answered),
            "missing": gone,
        }
        return await respond(request, answer)

    async def silence(self, request: web.Request) -> web.Response:
        """Create a silence on all shards, under one id.

        If one doesn't take it the others have it, and the error tells its id: sent again with that
        it is taken by who lacks it.
        """
        fields = await read_fields(request, SILENCE)
        fields["id"] = fields["id"] or secrets.token_hex(8)
        asked = r.call("POST", "v1", "alerts", "silences", fields=fields)
        found = await self._everywhere.each(request, asked, CHANGE_S)
        made = whole(found, "the silence", hint=_SEND_AGAIN, silence=fields["id"])
        return await respond(request, next(iter(made.values())))

    async def unsilence(self, request: web.Request) -> web.Response:
        """Remove a silence from all shards that have it; what fires is told now."""
        asked = r.call("DELETE", "v1", "alerts", "silences", request.match_info["id"])
        found = await self._everywhere.each(request, asked, CHANGE_S)
        known = {n: v for n, v in found.items() if not isinstance(v, NotFoundError)}
        if not known:
            raise next(iter(found.values()))
        ended = whole(known, "the end of the silence", hint=_END_AGAIN)
        return await respond(request, next(iter(ended.values())))

    async def test(self, request: web.Request) -> web.Response:
        """Return what each sink of each shard made of a message that was sent at once."""
        fields = await read_fields(request, TEST)
        asked = r.call("POST", "v1", "alerts", "test", fields=fields, repeatable=False)
        found = await self._everywhere.each(request, asked, CHANGE_S)
        return await respond(request, {"sinks": listed(found, "sinks"), "missing": missing(found)})


_STATES = {"firing": 0, "pending": 1, "resolved": 2}
