"""Rows over shards: events, features, predictions by key and labels, split and merged."""

import asyncio
from collections.abc import Collection, Mapping
from typing import Any

from aiohttp import web

from mlpd.client import requests as r
from mlpd.client.scatter import Labels, Scatter
from mlpd.client.scatter_events import EventRows
from mlpd.client.scatter_rows import Rows, owners_of
from mlpd.cluster.router.cache import HotKeys
from mlpd.cluster.router.cached_reads import is_cached, read_cached
from mlpd.cluster.router.members import Members
from mlpd.cluster.router.upstream import Until
from mlpd.core.errors import ValidationError
from mlpd.core.media import ARROW
from mlpd.core.trace import end_step
from mlpd.daemon.arrow import read_arrow
from mlpd.http.batches import BATCH, PART, check_form, check_parts
from mlpd.http.events import ARROW_OPTIONS, BATCHES, off_loop
from mlpd.http.features import READ
from mlpd.http.predict import FEEDBACK, PREDICT
from mlpd.http.shapes import Field, Shape
from mlpd.http.wire import decode, read_body, read_deadline, read_fields, respond

WRITE_S = 60.0
"""What storing events and labels may take without a deadline."""
LARGE_ROWS = 100
"""From so many rows on what grows with them is done in a thread: 2 to 10 us each."""

_SEQUENCE = Field(
    "any", "Answer from a state that holds this `sequence`, one by shard; waits up to 1 s for it."
)
READ_OVER = Shape({**READ.fields, "min_sequence": _SEQUENCE})
PREDICT_OVER = Shape({**PREDICT.fields, "min_sequence": _SEQUENCE})


class RowHandlers:
    """Splits requests by key; `read_s`: what reads and predictions may take without a deadline."""

    def __init__(self, members: Members, cache: HotKeys, read_s: float) -> None:
        self._members = members
        self._cache = cache
        self._read_s = read_s

    async def read(self, request: web.Request) -> web.Response:
        """Return the features of entities as of now, each row from the shards that have it."""
        deadline_s = read_deadline(request)
        fields = _given(await read_fields(request, READ_OVER))
        service, features = fields.get("service"), fields.get("features")
        if (service is None) == (features is None):
            raise ValidationError(
                "a read names a service or features, one of the two", code="invalid_request"
            )
        kind = "services" if features is None else "features"
        names = [str(service)] if features is None else owners_of(features)
        until = Until.after(self._read_s, deadline_s)
        end_step("body")

        async def ask(rows: Any) -> dict[str, Any]:
            sent = r.Request("POST", "/v1/features/read")
            split = Rows(kind, names, sent, {**fields, "entities": rows}, "entities")
            return await self._ask(split, until, len(rows))

        if is_cached(self._cache, fields):
            topology = self._members.guide.topology
            answer = await read_cached(self._cache, topology, kind, names, fields, ask)
        else:
            answer = await ask(fields["entities"])
        return await self._respond(request, answer, len(fields["entities"]))

    async def predict(self, request: web.Request) -> web.Response:
        """Return scores for rows of entity keys and request fields, each from its home shard."""
        deadline_s = read_deadline(request)
        fields = _given(await read_fields(request, PREDICT_OVER))
        route = request.match_info["route"]
        sent = r.Request("POST", r.build_path(("v1", "predict", route)), repeatable=False)
        rows = Rows("routes", [route], sent, fields, "rows")
        end_step("body")
        return await self._send(request, rows, Until.after(self._read_s, deadline_s), len(rows))

    async def feedback(self, request: web.Request) -> web.Response:
        """Store labels of earlier predictions, each on the shard that served it."""
        deadline_s = read_deadline(request)
        labels = (await read_fields(request, FEEDBACK))["labels"]
        end_step("body")
        until = Until.after(WRITE_S, deadline_s)
        return await self._send(request, Labels(labels), until, len(labels))

    async def send(self, request: web.Request) -> web.Response:
        """Store events of one source on all shards that they concern; durable when answered."""
        deadline_s = read_deadline(request)
        options = ARROW_OPTIONS.read_query(request.query)
        source, kind = request.match_info["source"], request.content_type
        body = await read_body(request)

        def parse() -> EventRows:
            whole = options["all_or_nothing"]
            if kind == ARROW:
                return _events(request, {source: read_arrow(body)}, single=True, whole=whole)
            fields = BATCH.read(decode(body, kind))
            whole = fields["all_or_nothing"] or whole
            return _events(request, {source: _table(source, fields)}, single=True, whole=whole)

        return await self._send_events(request, await off_loop(body, request, parse), deadline_s)

    async def send_many(self, request: web.Request) -> web.Response:
        """Store events of several sources on all shards that they concern."""
        deadline_s = read_deadline(request)
        body = await read_body(request)

        def parse() -> EventRows:
            fields = BATCHES.read(decode(body, request.content_type))
            parts = check_parts(fields["sources"]).items()
            tables = {name: _table(name, PART.read(part)) for name, part in parts}
            return _events(request, tables, single=False, whole=fields["all_or_nothing"])

        return await self._send_events(request, await off_loop(body, request, parse), deadline_s)

    async def _send_events(
        self, request: web.Request, events: EventRows, deadline_s: float | None
    ) -> web.Response:
        """Send events; what is kept of their slots is gone before, and what was read meanwhile."""
        end_step("body")
        slots = await self._slots_of(events)
        self._cache.forget(slots)
        try:
            return await self._send(request, events, Until.after(WRITE_S, deadline_s), len(events))
        finally:
            self._cache.forget(slots)

    async def _slots_of(self, events: EventRows) -> Collection[int] | None:
        """Return the slots that events concern: none without a cache, None if it isn't known."""
        topology = self._members.guide.topology
        if not self._cache.max_age_s:
            return ()
        if topology is None or not events.known(topology.routing):
            return None
        if len(events) > LARGE_ROWS:
            return await asyncio.to_thread(events.slots, topology.routing)
        return events.slots(topology.routing)

    async def _send(
        self, request: web.Request, scatter: Scatter, until: Until, rows: int
    ) -> web.Response:
        return await self._respond(request, await self._ask(scatter, until, rows), rows)

    async def _ask(self, scatter: Scatter, until: Until, rows: int) -> dict[str, Any]:
        calls = self._members.guide.calls(scatter)
        answer: dict[str, Any] = await self._members.run(calls, until, large=rows > LARGE_ROWS)
        end_step("shards")
        return answer

    async def _respond(self, request: web.Request, answer: Any, rows: int) -> web.Response:
        return await respond(request, answer, large=rows > LARGE_ROWS or None)


def _given(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}


def _events(
    request: web.Request, tables: Mapping[str, Any], *, single: bool, whole: bool | None
) -> EventRows:
    key = request.headers.get("Idempotency-Key")
    return EventRows(tables, single=single, all_or_nothing=whole or None, idempotency_key=key)


def _table(source: str, fields: Mapping[str, Any]) -> Any:
    """Return the rows or columns of a batch; ValidationError for what can't be split."""
    check_form(source, fields)
    columns = fields["columns"]
    if columns is None:
        return fields["rows"]
    lengths = {name: len(values) for name, values in columns.items()}
    if len(set(lengths.values())) > 1:
        raise ValidationError(f"columns of unequal length: {lengths}", code="unequal_columns")
    return columns
