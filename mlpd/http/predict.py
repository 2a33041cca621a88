"""Handlers of prediction: scores for rows of a route, and the labels that follow."""

import time

from aiohttp import web

from mlpd.core.errors import InvalidRequestError
from mlpd.daemon.app import Daemon
from mlpd.daemon.predict import INCLUDES
from mlpd.daemon.read_pool import OFF_LOOP_ROWS
from mlpd.http.shapes import Field, Shape
from mlpd.http.wire import read_fields, respond

PREDICT = Shape(
    {
        "rows": Field("table", "Entity keys and request fields of each row.", required=True),
        "at": Field("time", "Moment to predict at, for replays; not before what is known."),
        "min_sequence": Field("integer", "Answer only from a state that holds this sequence."),
        "include": Field("texts", f"What to add to each row: {', '.join(INCLUDES)}."),
        "arm": Field("text", "Force an arm (testers); such rows take no part in experiments."),
    }
)
PREDICTIONS = Shape(
    {
        "route": Field("text", "The route."),
        "route_version": Field("integer", "Its version."),
        "predictions": Field(
            "rows", "Per row prediction_id, score, label (cut at 0.5), arm, model, version."
        ),
        "t_us": Field("integer", "The moment of the features, microseconds UTC."),
        "sequence": Field("integer", "The last event that the features saw."),
    }
)
FEEDBACK = Shape(
    {
        "labels": Field(
            "rows", "Each a prediction_id, a label and, optionally, a label_time.", required=True
        )
    }
)
RECORDED = Shape(
    {
        "accepted": Field("integer", "Labels stored."),
        "joined": Field("integer", "Labels that took effect on their prediction."),
        "orphans": Field("integer", "Labels whose prediction isn't there (yet)."),
        "revised": Field("integer", "Joined labels that replaced another one."),
        "stale": Field("integer", "Labels older than, or equal to, the one that is there."),
        "rejected": Field("rows", "Refused labels: index, code, message, hint."),
    }
)
DEADLINE = "x-deadline-ms"


class PredictHandlers:
    """Predicts, and takes labels."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon

    async def predict(self, request: web.Request) -> web.Response:
        """Return scores for rows of entity keys and request fields, features looked up by key.

        The header `x-deadline-ms` says how long the caller will wait; work that is late by then is
        dropped unexecuted (504).  Every row is logged with the vector served.
        """
        deadline_s = read_deadline(request)
        fields = await read_fields(request, PREDICT)
        answer = await self._daemon.predict.predict(
            request.match_info["route"],
            fields["rows"],
            at_us=fields["at"],
            min_sequence=fields["min_sequence"] or 0,
            deadline_s=deadline_s,
            include=fields["include"] or (),
            arm=fields["arm"],
        )
        return await respond(request, answer, large=len(fields["rows"]) > OFF_LOOP_ROWS)

    async def feedback(self, request: web.Request) -> web.Response:
        """Store labels of earlier predictions; durable when answered.

        The label with the last `label_time` wins; sending one again changes nothing.
        """
        fields = await read_fields(request, FEEDBACK)
        done = await self._daemon.feedback.record(fields["labels"])
        return await respond(request, done.to_dict())


def read_deadline(request: web.Request) -> float | None:
    """Return the `time.monotonic()` second by which the caller wants its answer, or None."""
    text = request.headers.get(DEADLINE)
    if text is None:
        return None
    try:
        wait_ms = float(text)
    except ValueError:
        wait_ms = -1.0
    if not 0.0 <= wait_ms < float("inf"):
        raise InvalidRequestError(
            f"{DEADLINE} is {text[:40]!r}, not a number of milliseconds",
            code="invalid_deadline",
            hint="Send how long you will wait, for example 50.",
        )
    return time.monotonic() + wait_ms / 1000.0
