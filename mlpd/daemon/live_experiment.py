"""One experiment at work: its stored part, its units' records, the sums over them, its guards."""

import asyncio
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import msgpack

from mlpd.core.errors import ConflictError
from mlpd.core.time import format_time
from mlpd.experiments.analysis import MAX_PHASES, ExperimentState, Phase, advance
from mlpd.experiments.bandit import Choice
from mlpd.experiments.documents import spec_from_dict
from mlpd.experiments.guardrails import FaultGuard, fault_guards
from mlpd.experiments.interleaving import Credits
from mlpd.experiments.records import UnitRecord
from mlpd.experiments.spec import MAX_ARMS, Arm, ExperimentSpec

EVENTS_MAX = 500
"""Events kept of an experiment; the oldest go."""
_SLICE_UNITS = 50
"""Units per turn of the loop while sums are made anew: below 1 ms."""


@dataclass(frozen=True, slots=True)
class Event:
    """Something that changed an experiment: by whom and why, and the weights from then on.

    `action`: created, weights, stopped (an arm, by a guardrail), promoted, bandit or ended.
    """

    at_us: int
    by: str
    action: str
    why: str
    weights: Mapping[str, float]
    arm: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON shape."""
        return {
            "at": format_time(self.at_us),
            **{name: getattr(self, name) for name in ("by", "action", "why", "arm")},
            "weights": dict(self.weights),
        }


@dataclass(frozen=True, slots=True)
class Kept:
    """What is stored of an experiment.

    `cooling`: until when (us) an arm that a guardrail stopped stays at 0, by arm.  `chosen`: the
    arm that everybody gets since the experiment has ended, None while it runs.
    """

    spec: ExperimentSpec
    phases: tuple[Phase, ...] = ()
    events: tuple[Event, ...] = ()
    cooling: Mapping[str, int] = field(default_factory=dict)
    chosen: str | None = None

    def encode(self) -> bytes:
        """Return the row's value."""
        more = {
            "events": [
                [e.at_us, e.by, e.action, e.why, dict(e.weights), e.arm] for e in self.events
            ],
            "cooling": dict(self.cooling),
            "chosen": self.chosen,
        }
        phases = [[p.started_us, dict(p.weights)] for p in self.phases]
        packed: bytes = msgpack.packb([self.spec.to_dict(), phases, more])
        return packed

    @classmethod
    def decode(cls, value: bytes) -> "Kept":
        """Return what `encode` packed; rows of earlier versions have no events."""
        spec, phases, *more = msgpack.unpackb(value)
        found = more[0] if more else {"events": [], "cooling": {}}
        return cls(
            spec_from_dict(spec),
            tuple(Phase(started_us, weights) for started_us, weights in phases),
            tuple(Event(*event) for event in found["events"]),
            found["cooling"],
            found.get("chosen"),
        )

    def with_weights(self, weights: Mapping[str, float], event: Event) -> "Kept":
        """Return it under other weights, with a new phase if shares changed, and why.

        What stops an arm may open more phases than people may.
        """
        limit = MAX_PHASES + (MAX_ARMS if event.action == "stopped" else 0)
        arms = tuple(Arm(arm.name, weights[arm.name]) for arm in self.spec.arms)
        return replace(
            self,
            spec=replace(self.spec, arms=arms),
            phases=advance(self.phases, weights, event.at_us, limit),
            events=self._events_with(event),
        )

    def with_end(self, event: Event) -> "Kept":
        """Return it ended: everybody gets the event's arm; phases stay, so results do."""
        return replace(self, events=self._events_with(event), chosen=event.arm)

    @property
    def state(self) -> str:
        """Return `running` or `ended`."""
        return "running" if self.chosen is None else "ended"

    def check_running(self) -> None:
        """Raise ConflictError(code="experiment_ended") if it isn't."""
        if self.chosen is not None:
            raise ConflictError(
                f"experiment {self.spec.name!r} has ended: everybody gets arm {self.chosen!r}",
                code="experiment_ended",
                hint="What was found stays readable; a new experiment takes a new name.",
            )

    def check_cooling(self, weights: Mapping[str, float], now_us: int) -> None:
        """Raise ConflictError if an arm that cools down would get traffic again."""
        for arm, until_us in self.cooling.items():
            if weights[arm] > 0 and now_us < until_us:
                raise ConflictError(
                    f"a guardrail stopped arm {arm!r} of experiment {self.spec.name!r}; "
                    f"it cools down until {format_time(until_us)}",
                    code="arm_cooling_down",
                    hint="Look at its history; if the cause is gone, force the weights.",
                )

    def _events_with(self, event: Event) -> tuple[Event, ...]:
        return (*self.events, event)[-EVENTS_MAX:]


class LiveExperiment:
    """An experiment at work; every method belongs to the loop."""

    def __init__(self, kept: Kept) -> None:
        self.kept = kept
        self.records: dict[str, UnitRecord] = {}
        self.expected: dict[str, UnitRecord] = {}
        """Of a bandit, units that come with their slots: they stay in their arms, too."""
        self.state = ExperimentState(kept.spec, kept.phases)
        self.guards: list[FaultGuard | None] = fault_guards(
            kept.spec.guardrails, kept.spec.control, kept.spec.weights
        )
        self.changed = 0
        """Counts changes of records, for whoever looks now and then."""
        self.choice: Choice | None = None
        """What the last look at a bandit found."""
        self.credits = Credits()
        """Of interleaved lists."""
        self._pending: set[str] = set()
        self._settled = asyncio.Event()
        self._settled.set()

    @property
    def spec(self) -> ExperimentSpec:
        """The definition, with the weights of now."""
        return self.kept.spec

    def is_open(self, arm: str, phase: int) -> bool:
        """Tell whether an arm gets traffic in a phase."""
        phases = self.kept.phases
        return phases[min(phase, len(phases) - 1)].weights.get(arm, 0.0) > 0

    def stays(self, unit: str) -> UnitRecord | None:
        """Return the record of a bandit's unit that stays in its arm, while that gets traffic."""
        if self.kept.spec.bandit is None:
            return None
        record = self.records.get(unit) or self.expected.get(unit)
        is_open = record is not None and self.kept.spec.weights[record.arm] > 0
        return record if is_open else None

    def weights_of(self, unit: str) -> Mapping[str, float]:
        """Return the weights that a unit was assigned by."""
        record = self.stays(unit)
        return self.kept.phases[-1 if record is None else record.phase].weights

    def change(self, unit: str, new: UnitRecord) -> None:
        """Replace a unit's record, and take the change into the sums."""
        old = self.records.get(unit)
        if new is old:
            return
        self.records[unit] = new
        self.changed += 1
        if unit not in self._pending:
            self.state.apply(unit, old, new)

    def forget(self, unit: str) -> None:
        """Forget a unit, whose predictions are on another shard now."""
        self.credits.forget(unit)
        old = self.records.pop(unit, None)
        if old is None:
            return
        self.changed += 1
        if unit in self._pending:
            self._pending.discard(unit)
        else:
            self.state.apply(unit, old, None)

    async def switch(self, kept: Kept) -> None:
        """Go on under another stored part, at once; return when the sums are those of its phases.

        A new phase moves units that were kept before, so sums are made anew, bit by bit.
        """
        await self._settled.wait()
        same_phases = kept.phases is self.kept.phases
        self.kept = kept
        for guard in self.guards:
            if guard is not None:
                guard.begin_phase(kept.spec.weights)
        if same_phases:
            return
        self._settled.clear()
        self._pending = set(self.records)
        self.state = ExperimentState(kept.spec, kept.phases)
        try:
            for number, unit in enumerate(_drain(self._pending), start=1):
                self.state.apply(unit, None, self.records[unit])
                if number % _SLICE_UNITS == 0:
                    await asyncio.sleep(0)
        finally:
            self._settled.set()

    async def result(self) -> dict[str, Any]:
        """Return the result at this look, worked out in a thread from a copy of the sums."""
        await self._settled.wait()
        frozen = self.state.copy()
        return await asyncio.to_thread(lambda: frozen.result().to_dict())

    async def frozen(self) -> ExperimentState:
        """Return a copy of the sums as they are, for another thread."""
        await self._settled.wait()
        return self.state.copy()


def _drain(units: set[str]) -> Iterator[str]:
    while units:
        yield units.pop()
