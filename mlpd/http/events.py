"""Handlers of events: batches in, durable when answered; see docs/paths/ingest.md."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from aiohttp import web

from mlpd.core.errors import MisdirectedError, MlpdError, ValidationError
from mlpd.core.media import ARROW
from mlpd.core.specs import SourceSpec
from mlpd.core.trace import end_step
from mlpd.daemon.app import Daemon
from mlpd.daemon.ownership import Checked, Sender
from mlpd.daemon.pages import MAX_SEQUENCE, Selection
from mlpd.features.ingest import Batch
from mlpd.http.batches import (
    ALL_OR_NOTHING,
    BATCH,
    PART,
    check_parts,
    parse_arrow,
    parse_fields,
)
from mlpd.http.cluster import read_sender
from mlpd.http.shapes import Field, Shape
from mlpd.http.wire import decode, read_body, respond

T = TypeVar("T")
_Parsed = tuple[list[Batch], Checked | None]

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
        "duplicates": Field("integer", "Rows left out: their event id came before."),
        "known_us": Field("time", "Arrival: when the rows became known, microseconds UTC."),
        "replayed": Field("flag", "Whether an earlier request with this Idempotency-Key did it."),
    }
)


PAGE_OPTIONS = Shape(
    {
        "after": Field("integer", "The last sequence that was read; 0, the default, is none."),
        "through": Field("integer", "The last sequence to be read; by default the newest now."),
        "limit": Field("integer", "Rows at most: 1 to 10,000, as Arrow to 200,000; the default."),
        "start": Field("time", "Only events from this time on."),
        "end": Field("time", "Only events before this time."),
        "epoch": Field(
            "integer", "Of a router, by the map of this epoch: only events at home on this shard."
        ),
        "numbered_from": Field("integer", "Of a router: what it counts sequences here from."),
    }
)
PAGE = Shape(
    {
        "columns": Field(
            "columns",
            "Event time, known_at, __sequence, the source's columns, __deleted: in the order of "
            "the log, times in microseconds UTC.",
        ),
        "sequence": Field("integer", "The last one that was looked at: `after` of the next page."),
        "through": Field("integer", "Where it ends: no page follows one that has come so far."),
    }
)


class EventHandlers:
    """Takes in events, and gives them out again."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon

    async def send(self, request: web.Request) -> web.Response:
        """Store events of one source, in one transaction; durable when answered.

        Rows, columns or an Arrow IPC stream.  Wrong rows are refused one by one and named in the
        answer.  A repeated `Idempotency-Key` stores nothing and gives the first answer again.
        """
        source = self._source(request.match_info["source"])
        return await self._or_replay(request, self._send(request, source))

    async def _send(self, request: web.Request, source: SourceSpec) -> web.Response:
        options = ARROW_OPTIONS.read_query(request.query)
        sender = read_sender(request, self._daemon.ownership, changes=True)
        body = await read_body(request)

        def parse() -> _Parsed:
            whole = options["all_or_nothing"]
            batch = self._parse_one(source, body, request.content_type, whole)
            return self._check([batch], sender)

        try:
            parsed = await off_loop(body, request, parse)
        except MlpdError as error:
            self._daemon.ingest.violations.note_request(source.name, error.code)
            raise
        return await self._store(request, parsed)

    async def send_many(self, request: web.Request) -> web.Response:
        """Store events of several sources, all in one transaction; durable when answered."""
        return await self._or_replay(request, self._send_many(request))

    async def _send_many(self, request: web.Request) -> web.Response:
        sender = read_sender(request, self._daemon.ownership, changes=True)
        body = await read_body(request)

        def parse() -> _Parsed:
            return self._check(self._parse_many(decode(body, request.content_type)), sender)

        return await self._store(request, await off_loop(body, request, parse))

    async def page(self, request: web.Request) -> web.Response:
        """Return stored events of a source, page by page in the order of the log.

        A page may have fewer rows than its limit, or none, before the last one.  As an Arrow IPC
        stream, with times as timestamps, only the last one has fewer; its rows tell the sequence.
        """
        options = PAGE_OPTIONS.read_query(request.query)
        through = MAX_SEQUENCE if options["through"] is None else options["through"]
        selection = Selection(
            *(options["after"] or 0, through),
            *(options["limit"], options["start"], options["end"], options["numbered_from"]),
        )
        if selection.numbered_from is not None:
            check_numbers(selection.numbered_from)
            self._daemon.gathering.check_still(options["epoch"] or 0)
        source = request.match_info["source"]
        if ARROW in request.headers.get("Accept", ""):
            stream = await self._daemon.pages.read_arrow(source, selection)
            return web.Response(body=stream, content_type=ARROW)
        page = await self._daemon.pages.read(source, selection)

        def answer() -> dict[str, Any]:
            columns = {name: column.to_list() for name, column in page.columns.items()}
            return {"columns": columns, "sequence": page.sequence, "through": page.through}

        return await respond(request, await asyncio.to_thread(answer), large=True)

    async def _store(self, request: web.Request, parsed: _Parsed) -> web.Response:
        end_step("body")
        batches, checked = parsed
        key = request.headers.get("Idempotency-Key")
        done = await self._daemon.ingest.ingest(batches, key, checked)
        end_step("commit")
        return await respond(request, done.to_dict())

    async def _or_replay(
        self, request: web.Request, answer: Coroutine[Any, Any, web.Response]
    ) -> web.Response:
        """Answer; what was stored here under its key before it moved is answered as then.

        So a sender whose connection broke learns that nothing is to be sent anew.
        """
        try:
            return await answer
        except MisdirectedError:
            key = request.headers.get("Idempotency-Key")
            with self._daemon.environment.snapshot() as snapshot:
                known = self._daemon.ingest.known_answer(snapshot, key)
            if known is None:
                raise
            return await respond(request, known.to_dict())

    def _check(self, batches: list[Batch], sender: Sender) -> _Parsed:
        return batches, self._daemon.ownership.check_events(batches, sender)

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
            for name, part in check_parts(fields["sources"]).items()
        ]

    def _source(self, name: str) -> SourceSpec:
        return self._daemon.state.catalog.definitions.source(name)


def check_numbers(numbered_from: int) -> None:
    """Raise ValidationError for what no router counts from."""
    if not 0 <= numbered_from < 1 << 62:
        raise ValidationError(
            f"'numbered_from' is {numbered_from}",
            code="invalid_page",
            hint="Routers alone send it; leave it out.",
        )


async def off_loop(body: bytes, request: web.Request, parse: Callable[[], T]) -> T:
    """Return what `parse` makes of the body: at once if that is quick, else in a thread."""
    if len(body) > OFF_LOOP_BYTES or request.content_type == ARROW:
        return await asyncio.to_thread(parse)
    return parse()
