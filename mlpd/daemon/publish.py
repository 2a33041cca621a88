"""Publishing what a run trained: register, gate, deploy, each once, however often it is tried."""

import asyncio
import json
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import msgpack

from mlpd.core.errors import MlpdError, NotFoundError
from mlpd.core.specs import JobSpec
from mlpd.registry.lineage import Lineage
from mlpd.registry.models import Registry
from mlpd.registry.records import CHALLENGER, CHAMPION, Alias, Cause, ModelVersion
from mlpd.training.gates import (
    Evidence,
    Report,
    asks_for_champion,
    asks_for_drift,
    close_report,
    gate_report,
)
from mlpd.training.runs import Run

PARITY_FILE, REPORT_FILE = "parity.json", "report.json"

AliasMoved = Callable[[], Awaitable[None]]
"""Called after an alias moved, so that routes follow."""

MeasureDrift = Callable[[ModelVersion, ModelVersion], Awaitable[dict[str, Any]]]
"""Returns how far what the second version serves is from what the first was trained on."""

_DEPLOYED = {CHAMPION: "champion", CHALLENGER: "shadow", None: "none"}
"""What a result says, by the alias that moved."""


class Publisher:
    """Turns the files of a trained run into a version; every method belongs to the loop."""

    def __init__(
        self, registry: Registry, on_alias: AliasMoved, measure_drift: MeasureDrift
    ) -> None:
        self._registry = registry
        self._on_alias = on_alias
        self._measure_drift = measure_drift

    async def find(self, run: Run, job: JobSpec) -> ModelVersion | None:
        """Return what an earlier attempt of `run` registered; None when none of them did."""
        return await asyncio.to_thread(self._find, run, job.model)

    async def finish(self, run: Run, job: JobSpec, version: ModelVersion) -> dict[str, Any]:
        """Do what an earlier attempt of `run` left undone after it registered `version`."""
        lineage = await self._registry.load_lineage(job.model, version.number)
        assert isinstance(lineage, Lineage)  # a run registered it
        load = partial(self._registry.load_file, job.model, version.number)
        parity, report = json.loads(await load(PARITY_FILE)), json.loads(await load(REPORT_FILE))
        trained = {**report, "metrics": lineage.metrics, "parity": parity}
        return await self._deploy(run, job, version, trained)

    async def champion(self, job: JobSpec) -> dict[str, Any] | None:
        """Return what a child needs to compare with the model's champion; None without one.

        Only if the job's gate asks for it; of one that can't be compared, `why`.
        """
        number = self.alias(job.model, CHAMPION) if asks_for_champion(job.gate) else None
        if number is None:
            return None
        try:
            loaded = await self._registry.load(job.model, number)
        except MlpdError as error:
            return {"version": number, "why": error.message}
        lineage = loaded.lineage
        if not isinstance(lineage, Lineage) or not lineage.definitions:
            return {"version": number, "why": "the champion was not trained here"}
        golden = msgpack.unpackb(loaded.files["golden.msgpack"])
        return {
            "name": job.model,
            "version": number,
            "onnx": loaded.files["model.onnx"],
            "encoder": loaded.files["encoder.json"],
            "outputs": golden["score"][0][1],
            "golden": loaded.files["golden.msgpack"],
            "service": lineage.service,
            "service_hash": lineage.service_hash,
            "definitions": lineage.definitions,
        }

    async def publish(
        self, run: Run, job: JobSpec, trained: Mapping[str, Any], out: Path
    ) -> dict[str, Any]:
        """Register the files below `out`, gate and deploy; returns the run's result.

        Raises MlpdError(code="parity_failed") when a score differs from the trainer's.
        """
        parity = trained["parity"]
        if parity["different"]:
            raise MlpdError(
                f"{parity['different']} of {parity['rows']} served scores are not the trainer's, "
                f"{parity['trainer']}; the worst is off by {parity['worst_difference']}",
                code="parity_failed",
                hint="No certificate, no version; please report the model.",
            )
        files = {name: out / name for name in trained["files"]}
        cause = Cause(_author(run), f"job {run.job}, {run.trigger}")
        version = await self._registry.register(job.model, files, trained["lineage"], cause)
        return await self._deploy(run, job, version, trained)

    async def promote(
        self, run: Run, model: str, number: int, report: Report, *, over: int
    ) -> None:
        """Make the version that a run registered the champion, in place of version `over`.

        Raises ConflictError, also where the champion is another one by now.
        """
        why = Cause(_author(run), "gate passed", report)
        await self._registry.move_alias(model, CHAMPION, number, why, expected=over)
        await self._on_alias()

    def alias(self, model: str, alias: str) -> int | None:
        """Return the version that an alias of a model points to, if any."""
        found = self.find_alias(model, alias)
        return None if found is None else found.version

    def find_alias(self, model: str, alias: str) -> Alias | None:
        """Return an alias of a model that points somewhere; equal to itself until it moves."""
        try:
            aliases = self._registry.aliases(model)
        except NotFoundError:
            return None
        return next((found for found in aliases if found.alias == alias), None)

    def moved(self, run: Run, model: str, alias: str) -> Report | None:
        """Return the report with which a run moved an alias, whatever came of it since."""
        moves = self._registry.history(model, alias=alias)
        mine = (event.cause.report for event in moves if event.cause.by == _author(run))
        found = next(mine, None)
        return None if found is None else dict(found)

    async def _deploy(
        self, run: Run, job: JobSpec, version: ModelVersion, trained: Mapping[str, Any]
    ) -> dict[str, Any]:
        alias, report = await self._gate(run, job, version, trained)
        parity = trained["parity"]
        return {
            "model": job.model,
            "version": version.number,
            "digest": version.digest,
            "metrics": dict(trained["metrics"]),
            "parity": {
                key: parity[key] for key in ("rows", "bit_equal", "verdict", "trainer", "bound")
            },
            "gate": report,
            "deployed": _DEPLOYED[alias],
        }

    async def _gate(
        self, run: Run, job: JobSpec, version: ModelVersion, trained: Mapping[str, Any]
    ) -> tuple[str | None, Report]:
        """Judge a version and move the alias that it opens; return that, and the report.

        What an earlier attempt has moved stays as it is.
        """
        for alias in (CHAMPION, CHALLENGER):
            if report := self.moved(run, job.model, alias):
                return alias, report
        report = gate_report(job.gate, await self._evidence(job, version, trained))
        opened = self._opened(run, version, report)
        if opened is None:
            return None, close_report(report, "it was not let run as a shadow")
        why = Cause(
            _author(run), "waits for its shadow" if report["waiting"] else "gate passed", report
        )
        before = self.alias(job.model, opened)
        await self._registry.move_alias(job.model, opened, version.number, why, expected=before)
        await self._on_alias()
        return opened, report

    def _opened(self, run: Run, version: ModelVersion, report: Report) -> str | None:
        """Return which alias a version gets.

        Who wants signatures wants somebody to look: then a run registers and goes no further.
        """
        if run.deploy == "none" or not self._registry.is_trusted(version):
            return None
        if report["waiting"]:
            return CHALLENGER
        return (CHAMPION if run.deploy == "champion" else CHALLENGER) if report["passed"] else None

    async def _evidence(
        self, job: JobSpec, version: ModelVersion, trained: Mapping[str, Any]
    ) -> Evidence:
        now = self.alias(job.model, CHAMPION)
        drift = None
        if now is not None and asks_for_drift(job.gate):
            drift = await self._drift(version, now)
        return Evidence(
            metrics=trained["metrics"],
            champion=now is not None,
            comparison=_recent(trained["champion"], now),
            latency=trained.get("latency"),
            drift=drift,
        )

    async def _drift(self, version: ModelVersion, champion: int) -> dict[str, Any]:
        try:
            other = self._registry.get(version.name, champion)
            return await self._measure_drift(version, other)
        except MlpdError as error:
            return {"why": error.message}

    def _find(self, run: Run, model: str) -> ModelVersion | None:
        try:
            versions = self._registry.versions(model)
        except NotFoundError:
            return None
        mine = (v for v in versions if v.created_by == _author(run) and not v.is_deleted)
        return next(mine, None)


def _recent(compared: Mapping[str, Any] | None, now: int | None) -> Mapping[str, Any] | None:
    """Return the comparison, if it was with the version that is the champion `now`."""
    known = None if compared is None else compared["version"]
    if now in (None, known):
        return compared
    return {"version": now, "why": f"the champion moved from {known} to {now} meanwhile"}


def _author(run: Run) -> str:
    """Return the name under which a run registers: it tells a later attempt what it has done."""
    return f"run {run.run_id}"
