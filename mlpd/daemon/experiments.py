"""Verb experiments: keep them, assign units, and learn from predictions and labels.

Specs and phases are stored; the units' records live in memory and are rebuilt at start from the
prediction log and its labels, which are the truth.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import msgpack

from mlpd.core.errors import ConflictError, NotFoundError, ValidationError
from mlpd.core.time import Clock, format_time
from mlpd.daemon.predictions import Prediction
from mlpd.experiments.analysis import ExperimentState, Phase, advance
from mlpd.experiments.assignment import Assignment, assign
from mlpd.experiments.documents import spec_from_dict
from mlpd.experiments.records import UnitRecord, expose, observe, retract
from mlpd.experiments.spec import ExperimentSpec
from mlpd.storage.environment import Environment
from mlpd.storage.tables import Table
from mlpd.storage.transactions import WriteTransaction
from mlpd.storage.writer import Writer

EXPERIMENTS_MAX = 1_000


@dataclass(slots=True)
class _Live:
    """An experiment at work: `records` by unit, `state` the sums over them."""

    spec: ExperimentSpec
    phases: tuple[Phase, ...]
    state: ExperimentState
    records: dict[str, UnitRecord] = field(default_factory=dict)

    def change(self, unit: str, new: UnitRecord) -> None:
        old = self.records.get(unit)
        if new is not old:
            self.state.apply(unit, old, new)
            self.records[unit] = new


class Experiments:
    """All experiments of a daemon; every method belongs to the loop."""

    def __init__(self, environment: Environment, writer: Writer, clock: Clock) -> None:
        self._writer = writer
        self._clock = clock
        self._live: dict[str, _Live] = {}
        with environment.snapshot() as snapshot:
            for _, value in snapshot.scan(Table.EXPERIMENTS):
                spec, phases = _decode(value)
                self._live[spec.name] = _Live(spec, phases, ExperimentState(spec, phases))

    def names(self) -> list[str]:
        """Return the names of all experiments, sorted."""
        return sorted(self._live)

    def get(self, name: str) -> dict[str, Any]:
        """Return spec, phases and the result at this look; raises NotFoundError."""
        live = self._find(name)
        return {
            "spec": live.spec.to_dict(),
            "phases": [
                {"phase": i, "started": format_time(p.started_us), "weights": dict(p.weights)}
                for i, p in enumerate(live.phases, start=1)
            ],
            "result": live.state.result().to_dict(),
        }

    async def put(self, name: str, document: Mapping[str, Any]) -> dict[str, Any]:
        """Create an experiment, or change its weights (which opens a new phase).

        Anything but the weights is fixed once it has begun: raises ConflictError.
        """
        spec = spec_from_dict({**document, "name": name})
        known = self._live.get(name)
        if known is not None:
            _check_fixed(known.spec, spec)
        elif len(self._live) >= EXPERIMENTS_MAX:
            raise ConflictError(f"there are {EXPERIMENTS_MAX} experiments already")
        before = () if known is None else known.phases
        phases = advance(before, spec.weights, self._clock())
        stored = _encode(spec, phases)

        def write(txn: WriteTransaction) -> None:
            txn.put(Table.EXPERIMENTS, name.encode(), stored)

        await self._writer.write(write)
        records = {} if known is None else known.records
        state = ExperimentState.from_records(spec, phases, records.items())
        self._live[name] = _Live(spec, phases, state, records)
        return self.get(name)

    def assign(self, name: str, given: Mapping[str, Any]) -> tuple[Assignment, str | None, int]:
        """Return (assignment, unit, phase index) of a request's fields; about 5 us."""
        live = self._find(name)
        unit = given.get(live.spec.unit)
        unit = None if unit is None else str(unit)
        return assign(live.spec, unit or "", given), unit, len(live.phases) - 1

    def spec(self, name: str) -> ExperimentSpec:
        """Return the spec of an experiment; raises NotFoundError."""
        return self._find(name).spec

    def exposed(self, predictions: Iterable[Prediction]) -> None:
        """Take in served predictions; those without an experiment are passed over."""
        for p in predictions:
            live = self._live.get(p.experiment or "")
            if live is not None and p.unit is not None:
                record = expose(live.records.get(p.unit), phase=p.phase, arm=p.arm)
                live.change(p.unit, record)

    def labelled(self, prediction: Prediction, old: float | None, new: float) -> None:
        """Take in a label that took effect; a revised one replaces what it said before."""
        live = self._live.get(prediction.experiment or "")
        record = None if live is None else live.records.get(prediction.unit or "")
        if live is None or record is None:
            return
        try:
            if old is not None:
                record = retract(record, live.spec.metrics, outcomes(prediction, old))
            record = observe(record, live.spec.metrics, outcomes(prediction, new))
        except ValidationError:
            return  # the label has no meaning for this experiment's metrics: a regression's value
        live.change(prediction.unit or "", record)

    def _find(self, name: str) -> _Live:
        live = self._live.get(name)
        if live is None:
            known = ", ".join(self.names()) or "none"
            raise NotFoundError(
                f"unknown experiment {name!r}; known: {known}",
                code="unknown_experiment",
                hint="mlpd experiments create makes one.",
            )
        return live


def outcomes(prediction: Prediction, label: float) -> dict[str, float]:
    """Return the metrics that one labelled prediction speaks for.

    `label`: the label itself; `correct`: whether the score, cut at 0.5, agreed with a 0/1 label;
    `squared_error`: (score - label) squared, the Brier score's terms for 0/1 labels.
    """
    return {
        "label": label,
        "correct": float((prediction.score >= 0.5) == (label >= 0.5)),  # noqa: PLR2004 - the cut
        "squared_error": (prediction.score - label) ** 2,
    }


def _check_fixed(old: ExperimentSpec, new: ExperimentSpec) -> None:
    before, after = old.to_dict(), new.to_dict()
    changed = sorted(k for k in before if k != "arms" and before[k] != after[k])
    if changed or before["arms"].keys() != after["arms"].keys():
        raise ConflictError(
            f"experiment {old.name!r} has begun: {', '.join(changed) or 'its arms'} can't change",
            code="experiment_fixed",
            hint="Only weights may change; anything else is a new experiment under a new name.",
        )


def _encode(spec: ExperimentSpec, phases: tuple[Phase, ...]) -> bytes:
    packed: bytes = msgpack.packb(
        [spec.to_dict(), [[p.started_us, dict(p.weights)] for p in phases]]
    )
    return packed


def _decode(value: bytes) -> tuple[ExperimentSpec, tuple[Phase, ...]]:
    spec, phases = msgpack.unpackb(value)
    return spec_from_dict(spec), tuple(Phase(started, weights) for started, weights in phases)
