"""Publishing what a run trained: register, gate, deploy, each once, however often it is tried."""

import asyncio
import json
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

from mlpd.core.errors import MlpdError, NotFoundError
from mlpd.core.specs import JobSpec
from mlpd.registry.lineage import Lineage
from mlpd.registry.models import Registry
from mlpd.registry.records import CHAMPION, Cause, ModelVersion
from mlpd.training.runs import Run, gate_report

PARITY_FILE = "parity.json"

AliasMoved = Callable[[], Awaitable[None]]
"""Called after an alias moved, so that routes follow."""


class Publisher:
    """Turns the files of a trained run into a version; every method belongs to the loop."""

    def __init__(self, registry: Registry, on_alias: AliasMoved) -> None:
        self._registry = registry
        self._on_alias = on_alias

    async def find(self, run: Run, job: JobSpec) -> ModelVersion | None:
        """Return what an earlier attempt of `run` registered; None when none of them did."""
        return await asyncio.to_thread(self._find, run, job.model)

    async def finish(self, run: Run, job: JobSpec, version: ModelVersion) -> dict[str, Any]:
        """Do what an earlier attempt of `run` left undone after it registered `version`."""
        lineage = await self._registry.load_lineage(job.model, version.number)
        assert isinstance(lineage, Lineage)  # a run registered it
        parity = await self._registry.load_file(job.model, version.number, PARITY_FILE)
        return await self._deploy(run, job, version, lineage.metrics, json.loads(parity))

    async def publish(
        self, run: Run, job: JobSpec, trained: Mapping[str, Any], out: Path
    ) -> dict[str, Any]:
        """Register the files below `out`, gate and deploy; returns the run's result.

        Raises MlpdError(code="parity_failed") when a score differs from LightGBM's.
        """
        parity = trained["parity"]
        if parity["different"]:
            raise MlpdError(
                f"the exported model differs from LightGBM: {parity}",
                code="parity_failed",
                hint="No certificate, no version; please report the model.",
            )
        files = {name: out / name for name in trained["files"]}
        cause = Cause(_author(run), f"job {run.job}, {run.trigger}")
        version = await self._registry.register(job.model, files, trained["lineage"], cause)
        return await self._deploy(run, job, version, trained["metrics"], parity)

    async def _deploy(
        self,
        run: Run,
        job: JobSpec,
        version: ModelVersion,
        metrics: Mapping[str, Any],
        parity: Mapping[str, Any],
    ) -> dict[str, Any]:
        report = gate_report(job.gate, metrics)
        if run.deploy == CHAMPION and report["passed"] and not self._has_deployed(run, job.model):
            aliases = {alias.alias: alias.version for alias in self._registry.aliases(job.model)}
            why = Cause(_author(run), "gate passed", report)
            await self._registry.move_alias(
                job.model, CHAMPION, version.number, why, expected=aliases.get(CHAMPION)
            )
            await self._on_alias()
        return {
            "model": job.model,
            "version": version.number,
            "digest": version.digest,
            "metrics": dict(metrics),
            "parity": {
                "rows": parity["rows"],
                "bit_equal": parity["rows"] - parity["different"],
            },
            "gate": report,
            "deployed": run.deploy if report["passed"] else "none",
        }

    def _find(self, run: Run, model: str) -> ModelVersion | None:
        try:
            versions = self._registry.versions(model)
        except NotFoundError:
            return None
        mine = (v for v in versions if v.created_by == _author(run) and not v.is_deleted)
        return next(mine, None)

    def _has_deployed(self, run: Run, model: str) -> bool:
        """Tell whether an earlier attempt moved the alias: it may have been rolled back since."""
        moves = self._registry.history(model, alias=CHAMPION)
        return any(event.cause.by == _author(run) for event in moves)


def _author(run: Run) -> str:
    """Return the name under which a run registers: it tells a later attempt what it has done."""
    return f"run {run.run_id}"
