"""Handlers of features: online reads of this moment, point-in-time joins of any past one."""

import asyncio
from collections.abc import Mapping
from typing import Any

from aiohttp import web

from mlpd.core.columns import Columns, DType
from mlpd.core.errors import ConflictError, ValidationError
from mlpd.core.specs import Closure
from mlpd.daemon.app import Daemon
from mlpd.daemon.history import MODES
from mlpd.daemon.read import ReadResult, given_columns
from mlpd.daemon.read_pool import OFF_LOOP_ROWS
from mlpd.features.on_stale import ON_STALE
from mlpd.http.frames import choose_frame_format, encode_frame, read_arrow_spine, read_spine
from mlpd.http.shapes import Field, Shape
from mlpd.http.wire import ARROW, decode, read_body, read_fields, respond

STALE = Field(
    "text",
    "What a value older than its ttl becomes: null or its default, itself, or a 409.",
    choices=ON_STALE,
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
        "min_sequence": Field("integer", "Answer only from a state that holds this sequence."),
        "on_stale": STALE,
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
JOIN = {
    "service": SERVICE["service"],
    "features": SERVICE["features"],
    "mode": Field(
        "text",
        "What a row sees: what was known at its time (the default), all that is known now, or the "
        "events up to its `sequence`.",
        choices=MODES,
    ),
    "statuses": Field("flag", "Whether to add a column NAME__status per feature."),
    "on_stale": STALE,
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
"""Query parameters of an Arrow spine, which has no body fields."""


class FeatureHandlers:
    """Reads features."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon

    async def read(self, request: web.Request) -> web.Response:
        """Return the features of entities as of now, all from one snapshot of the store."""
        fields = await read_fields(request, READ)
        rows = len(fields["entities"])
        answer = await self._daemon.read_pool.call(rows, self._read, fields)
        return await respond(request, answer, large=rows > OFF_LOOP_ROWS)

    async def history(self, request: web.Request) -> web.Response:
        """Return the features of a spine, each row as of its own `event_time`.

        A point-in-time join over all acknowledged events, in a child process.  The spine comes as
        rows, columns or an Arrow IPC stream (its options then in the query); the answer has its
        columns and order, then the features: Arrow, Parquet, JSON or msgpack, as accepted.
        """
        kind = choose_frame_format(request.headers.get("Accept", ""))
        options = HISTORY_OPTIONS.read_query(request.query)
        body = await read_body(request)
        fields, spine = await asyncio.to_thread(
            self._read_join, body, request.content_type, options
        )
        joined = await self._daemon.history.join(
            spine,
            service=fields["service"],
            features=fields["features"] or (),
            request=_types(fields),
            mode=fields["mode"] or "as_known",
            statuses=bool(fields["statuses"]),
            on_stale=fields["on_stale"] or "null",
        )
        answer = await asyncio.to_thread(encode_frame, joined, kind)
        return web.Response(body=answer, content_type=kind)

    def _read_join(
        self, body: bytes, content_type: str, options: Mapping[str, Any]
    ) -> tuple[Mapping[str, Any], Columns]:
        if content_type == ARROW:
            return options, read_arrow_spine(self._closure(options), body)
        fields = HISTORY.read(decode(body, content_type))
        return fields, read_spine(self._closure(fields), fields["entities"])

    def _read(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        """Return the answer by the definitions that run; once more if an apply came in between."""
        try:
            return _answer(self._read_once(fields))
        except ConflictError as error:
            if error.code != "definitions_changed":
                raise
            return _answer(self._read_once(fields))

    def _read_once(self, fields: Mapping[str, Any]) -> ReadResult:
        closure = self._closure(fields)
        return self._daemon.read.read(
            closure,
            given_columns(closure, fields["entities"]),
            at_us=fields["at"],
            min_sequence=fields["min_sequence"] or 0,
            on_stale=fields["on_stale"] or "null",
        )

    def _closure(self, fields: Mapping[str, Any]) -> Closure:
        service, features = fields["service"], fields["features"]
        if (service is None) == (features is None):
            raise ValidationError(
                "a read names a service or features, one of the two", code="invalid_request"
            )
        if service is not None:
            return self._daemon.read.closure(service)
        return self._daemon.read.ad_hoc_closure(features, fields.get("request") or {})


def _types(fields: Mapping[str, Any]) -> dict[str, DType]:
    given = fields.get("request") or {}
    return {name: DType.parse(kind, f"request field {name!r}") for name, kind in given.items()}


def _answer(result: ReadResult) -> dict[str, Any]:
    frame = result.frame
    return {
        "columns": {name: column.to_list() for name, column in frame.columns.items()},
        "statuses": {name: status.tolist() for name, status in frame.statuses.items()},
        "event_times": {
            view: [time or None for time in times.tolist()]
            for view, times in frame.event_us.items()
        },
        "t_us": result.t_us,
        "sequence": result.sequence,
    }
