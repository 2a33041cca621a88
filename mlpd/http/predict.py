"""Handlers of prediction: scores for rows of a route, and the labels that follow."""

from collections.abc import Mapping, Sequence
from typing import Any

from aiohttp import web

from mlpd.core.media import ARROW
from mlpd.core.trace import end_step
from mlpd.daemon.app import Daemon
from mlpd.daemon.predict import INCLUDES
from mlpd.daemon.prediction_files import ARROW_ROWS, PAGE_ROWS
from mlpd.daemon.read_pool import OFF_LOOP_ROWS
from mlpd.daemon.served_pages import ServedSelection
from mlpd.http.admission import step_aside
from mlpd.http.cluster import read_sender
from mlpd.http.features import CELLS, read_cells
from mlpd.http.shapes import Field, Shape
from mlpd.http.wire import read_deadline, read_fields, respond

PREDICT = Shape(
    {
        "rows": Field("table", "Entity keys and request fields of each row.", required=True),
        "at": Field("time", "Moment to predict at, for replays; not before what is known."),
        "min_sequence": Field(
            "integer", "Answer from a state that holds this sequence; waits for it, up to 1 s."
        ),
        "include": Field("texts", f"What to add to each row: {', '.join(INCLUDES)}."),
        "explain": Field("flag", "Add what each feature contributed to the raw score (SHAP)."),
        "arm": Field("text", "Force an arm (testers); such rows take no part in experiments."),
        "cells": CELLS,
    }
)
PREDICTIONS = Shape(
    {
        "route": Field("text", "The route."),
        "route_version": Field("integer", "Its version."),
        "predictions": Field(
            "rows",
            "Per row prediction_id (null if it is not logged), score, label (cut at 0.5), arm, "
            "model, version; of several classes label is the chosen one, score its probability, "
            "and scores holds all; and, if the arm's model could not answer, as `fallback` why.",
        ),
        "t_us": Field("integer", "The moment of the features, microseconds UTC."),
        "sequence": Field("integer", "The last event that the features saw."),
    }
)
LOG_OPTIONS = Shape(
    {
        "after": Field("text", "The `position` of the page before; none for the first."),
        "limit": Field("integer", "Rows: 1 to 10,000, as Arrow to 100,000; the default."),
        "route": Field("text", "Only what this route served."),
        "start": Field("time", "Only what was served from this time on."),
        "end": Field("time", "Only what was served before this time."),
    }
)
LOG_PAGE = Shape(
    {
        "columns": Field(
            "columns",
            "Served rows in the order in which they were logged, with their vectors and labels; "
            "times in microseconds UTC, `request` as JSON text.",
        ),
        "position": Field("text", "`after` of the next page; a page without rows is the last."),
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
        "late": Field("integer", "Labels known longer after their prediction than label_window."),
        "conflicts": Field("integer", "Labels that contradict the one known at the same time."),
        "rejected": Field("rows", "Refused labels: index, code, message, hint."),
    }
)


class PredictHandlers:
    """Predicts, and takes labels."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon

    async def predict(self, request: web.Request) -> web.Response:
        """Return scores for rows of entity keys and request fields, features looked up by key.

        The header `x-deadline-ms` says how long the caller will wait; work that is late by then is
        dropped unexecuted (504).  Every row is logged with the vector served.

        With `explain` each row gets `raw_score`, `base` and `contributions` by feature, which sum
        to the raw score up to rounding; this takes a second or so, and at most 1,000 rows.
        """
        deadline_s = read_deadline(request)
        read_sender(request, self._daemon.ownership, changes=True)
        fields = await read_fields(request, PREDICT)
        end_step("body")
        if fields["explain"]:
            answer = await self._explain(request, fields, deadline_s)
        else:
            answer = await self._predict(request, fields, fields["include"] or (), deadline_s)
        response = await respond(request, answer, large=len(fields["rows"]) > OFF_LOOP_ROWS)
        end_step("answer")
        return response

    async def _predict(
        self,
        request: web.Request,
        fields: Mapping[str, Any],
        include: Sequence[str],
        deadline_s: float | None,
    ) -> dict[str, Any]:
        if min_sequence := fields["min_sequence"] or 0:
            await self._daemon.writer.reach(min_sequence, deadline_s=deadline_s)
            end_step("sequence")
        return await self._daemon.predict.predict(
            request.match_info["route"],
            fields["rows"],
            at_us=fields["at"],
            min_sequence=min_sequence,
            deadline_s=deadline_s,
            include=include,
            arm=fields["arm"],
            cells=read_cells(fields),
        )

    async def _explain(
        self, request: web.Request, fields: Mapping[str, Any], deadline_s: float | None
    ) -> dict[str, Any]:
        """Predict, and explain the vectors that were served; they show if they were asked for."""
        include = fields["include"] or []
        with self._daemon.explain.place(len(fields["rows"])):
            answer = await self._predict(request, fields, [*include, "vector"], deadline_s)
            step_aside(request)
            await self._daemon.explain.add_to(answer["predictions"], deadline_s)
        if "vector" not in include:
            for row in answer["predictions"]:
                del row["vector"]
        end_step("explain")
        return answer

    async def log(self, request: web.Request) -> web.Response:
        """Return served rows from the prediction log, page by page, with the vectors served.

        A page may have up to 31 rows more than its limit.  As an Arrow IPC stream the last row's
        `position` is the `after` of the next page.
        """
        options = LOG_OPTIONS.read_query(request.query)
        arrow = ARROW in request.headers.get("Accept", "")
        limit = options["limit"]
        selection = ServedSelection(
            (ARROW_ROWS if arrow else PAGE_ROWS) if limit is None else limit,
            *(options["after"] or "", options["route"], options["start"], options["end"]),
        )
        page = await self._daemon.prediction_files.page(selection, arrow=arrow)
        if arrow:
            return web.Response(body=page["data"], content_type=ARROW)
        return await respond(request, page, large=True)

    async def feedback(self, request: web.Request) -> web.Response:
        """Store labels of earlier predictions; durable when answered.

        The label with the last `label_time` wins; sending one again changes nothing.
        """
        read_sender(request, self._daemon.ownership, changes=True)
        fields = await read_fields(request, FEEDBACK)
        end_step("body")
        done = await self._daemon.feedback.record(fields["labels"])
        end_step("commit")
        return await respond(request, done.to_dict())
