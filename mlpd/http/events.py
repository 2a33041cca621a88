"""Handlers of events: batches in, durable when answered; see docs/paths/ingest.md."""

import asyncio
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from aiohttp import web

from mlpd.core.errors import ValidationError
from mlpd.core.specs import SourceSpec
from mlpd.daemon.app import Daemon
from mlpd.features.ingest import Batch
from mlpd.http.batches import ALL_OR_NOTHING, BATCH, PART, parse_arrow, parse_fields
from mlpd.http.shapes import Field, Shape
from mlpd.http.wire import ARROW, decode, read_body, respond

T = TypeVar("T")

OFF_LOOP_BYTES = 16 * 1024
"""A body of this size holds about 100 rows: 0.6 ms to decode and check."""

BATCHES = Shape(
    {
        "sources": Field("object", "Per source an object with `rows` or `columns`.", required=True),
        "all_or_nothing": ALL_OR_NOTHING,
    }
)
ARROW_OPTIONS = Shape({"all_or_nothing": Field("flag", "As in a body; for Arrow, which has none.")})
INGESTED = Shape(
    {
        "accepted": Field("integer", "Rows stored."),
        "sequence": Field("integer", "Of the last row stored; give it as min_sequence to reads."),
        "rejected": Field("rows", "Refused rows: source, index, code, message, hint."),
        "clamped": Field(
            "integer", "Rows whose event time lay ahead and was set to arrival or known_at."
        ),
        "known_us": Field("time", "Arrival: when the rows became known, microseconds UTC."),
        "replayed": Field("flag", "Whether an earlier request with this Idempotency-Key did it."),
    }
)


class EventHandlers:
    """Takes in events."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon

    async def send(self, request: web.Request) -> web.Response:
        """Store events of one source, in one transaction; durable when answered.

        Rows, columns or an Arrow IPC stream.  Wrong rows are refused one by one and named in the
        answer.  A repeated `Idempotency-Key` stores nothing and gives the first answer again.
        """
        source = self._source(request.match_info["source"])
        options = ARROW_OPTIONS.read_query(request.query)
        body = await read_body(request)

        def parse() -> Batch:
            return self._parse_one(source, body, request.content_type, options["all_or_nothing"])

        return await self._store(request, await off_loop(body, request, parse))

    async def send_many(self, request: web.Request) -> web.Response:
        """Store events of several sources, all in one transaction; durable when answered."""
        body = await read_body(request)

        def parse() -> list[Batch]:
            return self._parse_many(decode(body, request.content_type))

        return await self._store(request, *await off_loop(body, request, parse))

    async def _store(self, request: web.Request, *batches: Batch) -> web.Response:
        done = await self._daemon.ingest.ingest(batches, request.headers.get("Idempotency-Key"))
        return await respond(request, done.to_dict())

    def _parse_one(
        self, source: SourceSpec, body: bytes, content_type: str, whole: bool | None
    ) -> Batch:
        now_us = self._daemon.clock()
        if content_type == ARROW:
            return parse_arrow(source, body, now_us=now_us, all_or_nothing=bool(whole))
        fields = BATCH.read(decode(body, content_type))
        whole = bool(fields["all_or_nothing"] or whole)
        return parse_fields(source, fields, now_us=now_us, all_or_nothing=whole)

    def _parse_many(self, value: Any) -> list[Batch]:
        fields = BATCHES.read(value)
        now_us, whole = self._daemon.clock(), bool(fields["all_or_nothing"])
        return [
            parse_fields(self._source(name), PART.read(part), now_us=now_us, all_or_nothing=whole)
            for name, part in _parts(fields["sources"]).items()
        ]

    def _source(self, name: str) -> SourceSpec:
        return self._daemon.state.catalog.definitions.source(name)


async def off_loop(body: bytes, request: web.Request, parse: Callable[[], T]) -> T:
    """Return what `parse` makes of the body: at once if that is quick, else in a thread."""
    if len(body) > OFF_LOOP_BYTES or request.content_type == ARROW:
        return await asyncio.to_thread(parse)
    return parse()


def _parts(sources: Mapping[Any, Any]) -> Mapping[str, Any]:
    if sources and all(isinstance(name, str) for name in sources):
        return sources
    raise ValidationError(
        "'sources' names no source", code="invalid_request", hint='{"sources": {"NAME": {...}}}'
    )
