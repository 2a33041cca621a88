"""Handlers of training: jobs and their schedules, runs with progress, cancel and log."""

import asyncio
from typing import Any

from aiohttp import web

from mlpd.core.errors import NotFoundError
from mlpd.core.time import format_time
from mlpd.daemon.app import Daemon
from mlpd.http.shapes import Field, Shape
from mlpd.http.versions import picture_of
from mlpd.http.wire import read_by, read_fields, respond
from mlpd.training.runs import Run

LIMIT_DEFAULT = 50
LIMIT_MAX = 1000

JOBS = Shape({"jobs": Field("rows", "Every job with its schedule and next due time.")})
START = Shape(
    {
        "job": Field("text", "The job to run.", required=True),
        "deploy": Field(
            "text", "none, shadow, canary 5% or champion, instead of what the job says."
        ),
    }
)
RUN = Shape(
    {
        "run_id": Field("text", "The run."),
        "job": Field("text", "Its job."),
        "state": Field("text", "queued, running, succeeded, failed or cancelled."),
        "attempt": Field("integer", "Counts from 1; a run lost with the daemon is tried again."),
        "trigger": Field("text", "Who or what asked."),
        "deploy": Field(
            "text", "none, or what the gate opens: shadow (alias challenger) or champion."
        ),
        "interval": Field("texts", "Start and end of the schedule's data interval, or null."),
        "created": Field("time", "When it was queued."),
        "started": Field("time", "When it began, or null."),
        "finished": Field("time", "When it ended, or null."),
        "not_before": Field("time", "When it may be tried again, or null."),
        "progress": Field("object", "The last step told: step, round, rounds, metrics ..."),
        "result": Field("object", "Model, version, metrics, parity, gate; null before success."),
        "error": Field("object", "Code, message and hint of a failure, or null."),
    }
)
RUNS = Shape({"runs": Field("rows", "The newest runs, newest first.")})
LIST = Shape({"limit": Field("integer", f"At most so many; {LIMIT_DEFAULT}, up to {LIMIT_MAX}.")})


class TrainingHandlers:
    """Shows jobs; starts, shows and stops runs."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon

    async def jobs(self, request: web.Request) -> web.Response:
        """Return every job with its schedule and next due time."""
        return await respond(request, {"jobs": self._daemon.scheduler.jobs()})

    async def list(self, request: web.Request) -> web.Response:
        """Return the newest runs, newest first."""
        limit = LIST.read_query(request.query)["limit"] or LIMIT_DEFAULT
        limit = max(1, min(limit, LIMIT_MAX))
        runs = await asyncio.to_thread(self._daemon.runs.list, limit)
        return await respond(request, {"runs": [_run(run) for run in runs]})

    async def start(self, request: web.Request) -> web.Response:
        """Queue a run of a job; it is stored before it is answered (202)."""
        fields = await read_fields(request, START)
        run = await self._daemon.runs.enqueue(
            fields["job"], trigger=read_by(request), deploy=fields["deploy"]
        )
        return await respond(request, _run(run), status=202)

    async def show(self, request: web.Request) -> web.Response:
        """Return a run, with its progress while it is under way."""
        return await respond(request, _run(self._daemon.runs.get(request.match_info["id"])))

    async def cancel(self, request: web.Request) -> web.Response:
        """Stop a queued or running run; its processes are gone when answered."""
        run = await self._daemon.runs.cancel(request.match_info["id"])
        return await respond(request, _run(run))

    async def retry(self, request: web.Request) -> web.Response:
        """Queue a new run like one that failed or was cancelled (202)."""
        run_id = request.match_info["id"]
        run = await self._daemon.runs.retry(run_id, trigger=read_by(request))
        return await respond(request, _run(run), status=202)

    async def picture(self, request: web.Request) -> web.Response:
        """Return a picture of the version that the run made, as SVG."""
        run = self._daemon.runs.get(request.match_info["id"])
        if run.result is None:
            raise NotFoundError(
                f"run {run.run_id} is {run.state} and has made no version to look at",
                code="unknown_picture",
                hint="Its pictures come with its version.",
            )
        registry = self._daemon.registry
        version = registry.get(run.result["model"], run.result["version"])
        return await picture_of(registry, version, request)

    async def log(self, request: web.Request) -> web.Response:
        """Return the end of a run's log, at most 1 MiB of text."""
        text = await asyncio.to_thread(self._daemon.runs.read_log, request.match_info["id"])
        return web.Response(body=text, content_type="text/plain", charset="utf-8")


def _run(run: Run) -> dict[str, Any]:
    """Return a run with its times as texts."""
    form = run.to_dict()
    form["not_before_us"] = form["not_before_us"] or None
    for name in ("created", "started", "finished", "not_before"):
        form[name] = _time(form.pop(f"{name}_us"))
    del form["key"]  # the scheduler's own
    if run.interval is not None:
        form["interval"] = [_time(end) for end in run.interval]
    return form


def _time(time_us: int | None) -> str | None:
    return None if time_us is None else format_time(time_us)
