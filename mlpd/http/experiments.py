"""Handlers of experiments: definitions, phases, results at any look."""

from aiohttp import web

from mlpd.daemon.app import Daemon
from mlpd.daemon.experiment_picture import draw_timeline
from mlpd.http.shapes import Field, Shape
from mlpd.http.wire import read_by, read_fields, respond

SVG = "image/svg+xml"
EXPERIMENT = Shape(
    {
        "unit": Field("text", "The request field that identifies a unit.", required=True),
        "arms": Field("object", "Weight by arm.", required=True),
        "metrics": Field(
            "rows", "Each a name, kind, better, covariate, low, high, prior_sd.", required=True
        ),
        "planned_units": Field("integer", "Units at which intervals are tightest.", required=True),
        "control": Field("text", "The arm to compare with; the first by default."),
        "alpha": Field("number", "Chance of a false positive over all looks; 0.05."),
        "method": Field("text", "sequence (valid at every look) or welch (at the horizon)."),
        "correction": Field("text", "Over metrics and arms: holm, bonferroni, bh or none."),
        "holdout": Field("number", "Share of units that never see any arm."),
        "namespace": Field("object", "Buckets shared with other experiments."),
        "rules": Field("rows", "Which requests take part: field, op, value."),
        "forced": Field("object", "Arm by unit, for testers."),
        "guardrails": Field("rows", "What stops an arm: on, metric, limit_ms, tolerance, margin."),
        "cool_down_s": Field("number", "How long a stopped arm stays at 0; a day."),
        "promotion": Field("object", "What gives an arm all traffic: metric, margin."),
        "bandit": Field(
            "object", "Moves weights by itself: metric, every_s, delay_s, floor, units_min, seed."
        ),
        "interleaving": Field("flag", "Each unit is shown one list of both arms' picks."),
        "force": Field("flag", "Give traffic to an arm that cools down all the same."),
    }
)
RESULT = Shape(
    {
        "spec": Field("object", "The definition."),
        "state": Field("text", "running or ended."),
        "chosen": Field("text", "Of an ended one: the arm that everybody gets."),
        "phases": Field("rows", "When which weights began; numbered from 1."),
        "bandit": Field("object", "What its last look found: units, chances, why."),
        "cooling": Field("object", "Arms that guardrails stopped, and until when."),
        "result": Field("object", "Sample-ratio check, estimates and intervals at this look."),
        "preference": Field("object", "Of interleaved lists instead: whose picks are clicked."),
    }
)
END = Shape(
    {
        "arm": Field("text", "The arm that everybody gets from now on.", required=True),
        "why": Field("text", "For the history."),
        "force": Field("flag", "Also an arm that a guardrail stopped and that cools down."),
    }
)
HISTORY = Shape({"events": Field("rows", "Newest first: at, by, action, why, arm, weights.")})
OUTCOMES = Shape(
    {
        "outcomes": Field(
            "rows", "Each a unit, an id, and values by metric (a ratio's: two).", required=True
        )
    }
)
OUTCOMES_STORED = Shape(
    {
        "accepted": Field("integer", "Outcomes stored."),
        "replaced": Field("integer", "Stored ones whose id was there before."),
        "rejected": Field("rows", "Refused outcomes: index, code, message, hint."),
    }
)
PICTURE = Shape(
    {
        "metric": Field("text", "Whose comparison; the first by default."),
        "arm": Field("text", "Which arm against the control; the first by default."),
    }
)
TIMELINE = Shape({"points": Field("rows", "Oldest first: at, and comparisons as they stood.")})
EXPERIMENTS = Shape({"experiments": Field("texts", "Names of all experiments.")})


class ExperimentHandlers:
    """Shows and changes experiments."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon

    async def list(self, request: web.Request) -> web.Response:
        """Return the names of all experiments."""
        return await respond(request, {"experiments": self._daemon.experiments.names()})

    async def show(self, request: web.Request) -> web.Response:
        """Return an experiment with its result at this look; looking often costs no validity."""
        name = request.match_info["name"]
        return await respond(request, await self._daemon.experiments.get(name))

    async def history(self, request: web.Request) -> web.Response:
        """Return what happened to an experiment: weights, stopped arms, by whom and why."""
        events = self._daemon.experiments.history(request.match_info["name"])
        return await respond(request, {"events": events})

    async def timeline(self, request: web.Request) -> web.Response:
        """Return how the comparisons stood over time, one point per 3 % more units."""
        points = await self._daemon.watch.timeline(request.match_info["name"])
        return await respond(request, {"points": points})

    async def end(self, request: web.Request) -> web.Response:
        """Stop an experiment, with the arm that its routes serve from now on.

        Results stay readable; its part of the namespace is free again.
        """
        fields = await read_fields(request, END)
        answer = await self._daemon.experiments.end(
            request.match_info["name"],
            fields["arm"],
            by=read_by(request),
            why=fields["why"] or "",
            force=bool(fields["force"]),
        )
        return await respond(request, answer)

    async def outcomes(self, request: web.Request) -> web.Response:
        """Store what became of units; the same id again replaces what it said before.

        For metrics that no label of a prediction speaks for: revenue, clicks, a ratio's pair.
        """
        fields = await read_fields(request, OUTCOMES)
        name = request.match_info["name"]
        answer = await self._daemon.unit_outcomes.record(name, fields["outcomes"])
        return await respond(request, answer)

    async def picture(self, request: web.Request) -> web.Response:
        """Return a comparison over time as SVG: its lift within its sequence."""
        query = PICTURE.read_query(request.query)
        name = request.match_info["name"]
        points = await self._daemon.watch.timeline(name)
        drawn = draw_timeline(name, points, query["metric"], query["arm"])
        return web.Response(text=drawn, content_type=SVG)

    async def put(self, request: web.Request) -> web.Response:
        """Create an experiment, or change its weights, which opens a phase; the rest is fixed.

        An arm that a guardrail stopped gets traffic again once it has cooled down, or by `force`.
        """
        fields = await read_fields(request, EXPERIMENT)
        document = {name: value for name, value in fields.items() if value is not None}
        force = document.pop("force", False)
        answer = await self._daemon.experiments.put(
            request.match_info["name"], document, by=read_by(request), force=force
        )
        return await respond(request, answer)
