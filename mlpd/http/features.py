"""Handlers of features: online reads of this moment, point-in-time joins of any past one."""

import asyncio
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import msgpack
import numpy as np
from aiohttp import web

from mlpd.core.columns import Columns, DType
from mlpd.core.deadlines import check_deadline
from mlpd.core.errors import ConflictError, ValidationError
from mlpd.core.media import FRAME_FORMATS, MSGPACK, SPINE_FILES
from mlpd.core.specs import Closure
from mlpd.core.trace import end_step
from mlpd.daemon.app import Daemon
from mlpd.daemon.history import CLOSED, MODES, SPINE_BYTES_MAX, Question, SpineFile
from mlpd.daemon.read import given_columns
from mlpd.daemon.read_pool import OFF_LOOP_ROWS, rows_worth
from mlpd.daemon.read_tick import ReadPart
from mlpd.features.cells import Asked, Cells, decode_asked, decode_cells
from mlpd.features.on_stale import ON_STALE
from mlpd.http.cluster import read_sender
from mlpd.http.frames import choose_frame_format, read_spine
from mlpd.http.roles import check_staleness
from mlpd.http.shapes import Field, Shape
from mlpd.http.uploads import receive_body
from mlpd.http.wire import (
    accepted,
    decode,
    read_body,
    read_deadline,
    read_fields,
    respond,
    send_file,
)

STALE = Field(
    "text",
    "What a value older than its ttl becomes: null or its default, itself, or a 409.",
    choices=ON_STALE,
)
CELLS = Field(
    "object",
    "What other shards hold of keys that this one doesn't own: t_us and groups, as POST "
    "/v1/cluster/cells answers them, and `sequences`, that of each answer by its shard's name.",
)
SERVICE = {
    "service": Field("text", "Feature service to read."),
    "features": Field("texts", "Or single features: view.feature, transform or key column."),
    "request": Field("object", "With `features`: the request fields' types by name."),
}
READ = Shape(
    {
        **SERVICE,
        "entities": Field(
            "table", "Entity keys and request fields, as rows or columns.", required=True
        ),
        "at": Field("time", "Moment to read at, for replays; not before what is known."),
        "min_sequence": Field(
            "integer", "Answer from a state that holds this sequence; waits for it, up to 1 s."
        ),
        "on_stale": STALE,
        "cells": CELLS,
    }
)
FEATURES = Shape(
    {
        "columns": Field("columns", "Values by feature, in the order of the service's vector."),
        "statuses": Field("columns", "Per value 0 present, 1 null, 2 missing, 3 stale."),
        "event_times": Field("columns", "Per latest-value view the event time (us), or null."),
        "t_us": Field("integer", "The moment of the read, microseconds UTC."),
        "sequence": Field("integer", "The last event that the read saw."),
    }
)
ASKED = Shape(
    {
        **SERVICE,
        "route": Field("text", "Or the route whose models read them, in all versions it serves."),
        "keys": Field(
            "rows", "Per entity its key `columns` and the `values` of each key.", required=True
        ),
        "at": READ.fields["at"],
        "min_sequence": READ.fields["min_sequence"],
    }
)
CELLS_READ = Shape(
    {
        "t_us": Field("integer", "The moment of the read, later than all that is in the cells."),
        "sequence": Field("integer", "The last event that the read saw."),
        "groups": Field("rows", "Per entity columns, keys and, by view, stored values."),
    }
)
JOIN = {
    "service": SERVICE["service"],
    "features": SERVICE["features"],
    "mode": Field(
        "text",
        "What a row sees: what was known at its time (the default), all that is known now, or the "
        "events up to its `sequence`.",
        choices=MODES,
    ),
    "closed": Field(
        "text",
        "Whether latest values show events of a row's own time (right, the default) or only "
        "earlier ones (left), where the row's own event is one of them.",
        choices=CLOSED,
    ),
    "statuses": Field("flag", "Whether to add a column NAME__status per feature."),
    "on_stale": STALE,
    "format": Field("text", "Of the answer, in place of Accept.", choices=tuple(FRAME_FORMATS)),
}
HISTORY = Shape(
    {
        **JOIN,
        "request": SERVICE["request"],
        "entities": Field(
            "table",
            "The spine: `event_time`, entity keys, request fields, and with `as_of_sequence` "
            "`sequence`; as rows or columns.",
            required=True,
        ),
    }
)
HISTORY_OPTIONS = Shape(JOIN)
"""Query parameters of a spine that is a file, which has no body fields."""

STATS = Shape(
    {
        "kind": Field(
            "text",
            "What the name is of: what a service takes from views, or all of a view.  By default "
            "the service of that name, else the view.",
            choices=("service", "view"),
        ),
        "entities": Field("integer", "Entities to read of each view at most; 20,000 by default."),
    }
)
SUMMARY = Shape(
    {
        "name": Field("text", "The service or view."),
        "at": Field("time", "The moment as of which entities were read."),
        "views": Field("rows", "Per view its entities, their ages, and a summary per feature."),
        "not_covered": Field("texts", "What a service takes from elsewhere."),
    }
)

_COLUMNS, _STATUSES = msgpack.packb("columns"), msgpack.packb("statuses")
Answer = bytes | dict[str, Any]
"""A read's answer: packed, or to be encoded."""


class FeatureHandlers:
    """Reads features."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon

    async def read(self, request: web.Request) -> web.Response:
        """Return the features of entities as of now, all from one snapshot of the store.

        The header `x-deadline-ms` says how long the caller will wait; a read that is late by then
        is dropped (504).
        """
        deadline_s = read_deadline(request)
        read_sender(request, self._daemon.ownership, changes=False)
        fields = await read_fields(request, READ)
        closure = self._closure(fields)
        end_step("body")
        if fields["min_sequence"]:
            await self._daemon.writer.reach(fields["min_sequence"], deadline_s=deadline_s)
            end_step("sequence")
        staleness = check_staleness(request, self._daemon, fields)
        worth = rows_worth(closure, len(fields["entities"]))
        answer = _pack if accepted(request) == MSGPACK else _answer
        found: Answer
        if _may_share(fields, worth):
            found = answer(await self._read_shared(closure, fields, worth, deadline_s))
        else:
            read, pool = self._read, self._daemon.read_pool
            found = await pool.call(worth, read, closure, fields, deadline_s, answer)
        end_step("features")
        if isinstance(found, bytes):
            response = web.Response(body=found, content_type=MSGPACK)
        else:
            response = await respond(request, found, large=worth > OFF_LOOP_ROWS)
        response.headers.update(staleness)
        end_step("answer")
        return response

    async def cells(self, request: web.Request) -> web.Response:
        """Return stored values of this shard's keys, for one that reads rows which need them too.

        What comes back is handed to POST /v1/features/read or /v1/predict/{route} as `cells`.
        """
        deadline_s = read_deadline(request)
        read_sender(request, self._daemon.ownership, changes=False)
        fields = await read_fields(request, ASKED)
        asked = decode_asked(fields["keys"])
        if fields["min_sequence"]:
            await self._daemon.writer.reach(fields["min_sequence"], deadline_s=deadline_s)
        staleness = check_staleness(request, self._daemon, fields)
        keys = sum(map(len, asked.values()))
        answer = await self._daemon.read_pool.call(keys, self._collect, fields, asked, deadline_s)
        end_step("features")
        response = await respond(request, answer, large=keys > OFF_LOOP_ROWS)
        response.headers.update(staleness)
        return response

    async def history(self, request: web.Request) -> web.StreamResponse:
        """Return the features of a spine, each row as of its own `event_time`.

        A point-in-time join over all acknowledged events, in a child process.  The spine comes as
        rows or columns, or as an Arrow IPC stream, an Arrow IPC file or Parquet of up to 1 GiB
        (options then in the query).  The answer has its columns, rows and order, then the
        features, as accepted or as `format` says; `x-mlpd-rows` counts them.
        """
        fields: Mapping[str, Any] = HISTORY_OPTIONS.read_query(request.query)
        async with self._daemon.history.open() as join:
            if request.content_type in SPINE_FILES:
                self._closure(fields)  # refused before the body is taken
                await receive_body(
                    request, join.spine, SPINE_BYTES_MAX, hint="Send the spine in parts."
                )
                spine: Columns | SpineFile = SpineFile(join.spine, request.content_type)
            else:
                body = await read_body(request)
                fields, spine = await asyncio.to_thread(self._read_join, body, request.content_type)
            kind = choose_frame_format(request.headers.get("Accept", ""), fields["format"])
            answer = await join.run(spine, _question(fields), kind)
            return await send_file(request, answer.file, kind, {"x-mlpd-rows": str(answer.rows)})

    async def stats(self, request: web.Request) -> web.Response:
        """Return a summary of features over the entities that online serving holds; in a child."""
        options = STATS.read_query(request.query)
        asked = {option: value for option, value in options.items() if value is not None}
        name = request.match_info["name"]
        return await respond(request, await self._daemon.stats.summarize(name, **asked))

    def _read_join(self, body: bytes, content_type: str) -> tuple[Mapping[str, Any], Columns]:
        fields = HISTORY.read(decode(body, content_type))
        return fields, read_spine(self._closure(fields), fields["entities"])

    async def _read_shared(
        self, closure: Closure, fields: Mapping[str, Any], worth: int, deadline_s: float | None
    ) -> ReadPart:
        """Return what `_read` does, read together with what others ask for."""
        read, sequence = self._daemon.read_tick.read, fields["min_sequence"] or 0
        asked = fields["entities"], worth, sequence, deadline_s
        try:
            return await read(closure, *asked)
        except ConflictError as error:
            _check_changed(error)
            return await read(self._closure(fields), *asked)

    def _read(
        self,
        closure: Closure,
        fields: Mapping[str, Any],
        deadline_s: float | None,
        answer: Callable[[ReadPart], Answer],
    ) -> Answer:
        """Return the answer by the definitions that run; once more if an apply came in between."""
        check_deadline(deadline_s, "its turn came")
        try:
            return answer(self._read_once(closure, fields))
        except ConflictError as error:
            _check_changed(error)
            return answer(self._read_once(self._closure(fields), fields))

    def _read_once(self, closure: Closure, fields: Mapping[str, Any]) -> ReadPart:
        result = self._daemon.read.read(
            closure,
            given_columns(closure, fields["entities"]),
            at_us=fields["at"],
            min_sequence=fields["min_sequence"] or 0,
            on_stale=fields["on_stale"] or "null",
            cells=read_cells(fields),
        )
        return ReadPart(result, 0, len(result.frame))

    def _collect(
        self, fields: Mapping[str, Any], asked: Asked, deadline_s: float | None
    ) -> dict[str, Any]:
        check_deadline(deadline_s, "its turn came")
        route = fields["route"]
        if route is None:
            closures: Iterable[Closure] = [self._closure(fields)]
        elif fields["service"] is None and fields["features"] is None:
            closures = self._daemon.routes.served(route).versions.values()
        else:
            raise ValidationError(
                "cells are of a route, a service or features, one of them", code="invalid_request"
            )
        at_us, min_sequence = fields["at"], fields["min_sequence"] or 0
        return self._daemon.read.collect(closures, asked, at_us=at_us, min_sequence=min_sequence)

    def _closure(self, fields: Mapping[str, Any]) -> Closure:
        service, features = fields["service"], fields["features"]
        if (service is None) == (features is None):
            raise ValidationError(
                "a read names a service or features, one of the two", code="invalid_request"
            )
        if service is not None:
            return self._daemon.read.closure(service)
        return self._daemon.read.ad_hoc_closure(features, fields.get("request") or {})


def read_cells(fields: Mapping[str, Any]) -> Cells | None:
    """Return the cells in a body, None if it brings none."""
    return None if fields["cells"] is None else decode_cells(fields["cells"])


def _question(fields: Mapping[str, Any]) -> Question:
    return Question(
        service=fields["service"],
        features=fields["features"] or (),
        request=_types(fields),
        mode=fields["mode"] or "as_known",
        closed=fields["closed"] or "right",
        statuses=bool(fields["statuses"]),
        on_stale=fields["on_stale"] or "null",
    )


def _types(fields: Mapping[str, Any]) -> dict[str, DType]:
    given = fields.get("request") or {}
    return {name: DType.parse(kind, f"request field {name!r}") for name, kind in given.items()}


def _may_share(fields: Mapping[str, Any], worth: int) -> bool:
    """Tell whether a read is one of many that are alike: few rows as of now, and no more said."""
    plain = fields["at"] is None and fields["cells"] is None
    return plain and fields["on_stale"] in (None, "null") and worth <= OFF_LOOP_ROWS


def _check_changed(error: ConflictError) -> None:
    """Raise any conflict but that of definitions which an apply has changed meanwhile."""
    if error.code != "definitions_changed":
        raise error


def _answer(part: ReadPart) -> dict[str, Any]:
    result, start, stop = part
    whole = stop - start == len(result.frame)
    frame = result.frame if whole else result.frame.take(np.arange(start, stop))
    return {"columns": frame.value_lists(), "statuses": frame.status_lists(), **_more(part)}


def _pack(part: ReadPart) -> bytes:
    """Return the msgpack of `_answer`, whose first two fields are packed natively."""
    packed, more = part.result.frame.pack(part.start, part.stop), msgpack.packb(_more(part))
    # The head of a map of less than 16 fields is one byte, which counts them.
    head = bytes([more[0] + len(packed)])
    return b"".join((head, _COLUMNS, packed.values, _STATUSES, packed.statuses, more[1:]))


def _more(part: ReadPart) -> dict[str, Any]:
    times = part.result.frame.event_us.items()
    return {
        "event_times": {
            view: [time or None for time in found[part.start : part.stop].tolist()]
            for view, found in times
        },
        "t_us": part.result.t_us,
        "sequence": part.result.sequence,
    }
