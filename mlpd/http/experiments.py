"""Handlers of experiments: definitions, phases, results at any look."""

from aiohttp import web

from mlpd.daemon.app import Daemon
from mlpd.http.shapes import Field, Shape
from mlpd.http.wire import read_fields, respond

EXPERIMENT = Shape(
    {
        "unit": Field("text", "The request field that identifies a unit.", required=True),
        "arms": Field("object", "Weight by arm.", required=True),
        "metrics": Field("rows", "Each a name, kind and better.", required=True),
        "planned_units": Field("integer", "Units at which intervals are tightest.", required=True),
        "control": Field("text", "The arm to compare with; the first by default."),
        "alpha": Field("number", "Chance of a false positive over all looks; 0.05."),
        "method": Field("text", "sequence (valid at every look) or welch (at the horizon)."),
        "correction": Field("text", "Over metrics and arms: holm, bonferroni, bh or none."),
        "holdout": Field("number", "Share of units that never see any arm."),
        "namespace": Field("object", "Buckets shared with other experiments."),
        "rules": Field("rows", "Which requests take part: field, op, value."),
        "forced": Field("object", "Arm by unit, for testers."),
    }
)
RESULT = Shape(
    {
        "spec": Field("object", "The definition."),
        "phases": Field("rows", "When which weights began; numbered from 1."),
        "result": Field("object", "Sample-ratio check, estimates and intervals at this look."),
    }
)
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
        return await respond(request, self._daemon.experiments.get(request.match_info["name"]))

    async def put(self, request: web.Request) -> web.Response:
        """Create an experiment, or change its weights, which opens a phase; the rest is fixed."""
        fields = await read_fields(request, EXPERIMENT)
        document = {name: value for name, value in fields.items() if value is not None}
        answer = await self._daemon.experiments.put(request.match_info["name"], document)
        return await respond(request, answer)
