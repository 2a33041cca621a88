"""Verb experiments: keep them, assign units, and learn from predictions and labels.

Specs, phases and what happened are stored; the units' records live in memory and are rebuilt at
start from the prediction log and its labels, which are the truth.
"""

import asyncio
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from mlpd.core.errors import ConflictError, NotFoundError, UnavailableError, ValidationError
from mlpd.core.hashing import definition_hash
from mlpd.core.numbers import is_number
from mlpd.core.time import Clock, format_time, span_us
from mlpd.daemon.feature_places import FeaturePlaces
from mlpd.daemon.live_experiment import Event, Kept, LiveExperiment
from mlpd.daemon.parts import Parts
from mlpd.daemon.predictions import Prediction
from mlpd.experiments.analysis import ExperimentState
from mlpd.experiments.assignment import Assignment, assign
from mlpd.experiments.documents import spec_from_dict
from mlpd.experiments.exchange import merge_packed, pack_state
from mlpd.experiments.guardrails import Breach
from mlpd.experiments.interleaving import Preference, judge
from mlpd.experiments.records import UnitRecord, expose, observe, retract
from mlpd.experiments.spec import ExperimentSpec, check_disjoint
from mlpd.storage.changes import note
from mlpd.storage.environment import Environment
from mlpd.storage.tables import Table
from mlpd.storage.transactions import WriteTransaction
from mlpd.storage.writer import Writer

EXPERIMENTS_MAX = 1_000
WHY_CHARS_MAX = 1_000
"""Of what somebody says why: the experiment's row carries it."""
DAEMON = "mlpd"
"""Who did what no person did."""


@dataclass(frozen=True, slots=True)
class Coming:
    """A unit that comes from another shard, with its arm there."""

    experiment: str
    unit: str
    arm: str
    phase: int


def digest_of(kept: Kept) -> str:
    """Return a digest of what an experiment is and how it went: the same on shards that agree."""
    weights = [dict(phase.weights) for phase in kept.phases]
    return definition_hash([kept.spec.to_dict(), weights, kept.chosen])


class Experiments:
    """All experiments of a daemon; every method belongs to the loop."""

    def __init__(
        self,
        environment: Environment,
        writer: Writer,
        features: FeaturePlaces,
        parts: Parts,
        fence: Callable[[WriteTransaction], None],
        clock: Clock,
    ) -> None:
        self._parts = parts
        self._fence = fence
        parts.offer("experiment", self._give, name=str)
        self._environment = environment
        self._writer = writer
        self._features = features
        self._clock = clock
        self._live: dict[str, LiveExperiment] = {}
        self._lock = asyncio.Lock()
        with environment.snapshot() as snapshot:
            for key, value in snapshot.scan(Table.EXPERIMENTS):
                if b"\x00" not in key:  # a point of a timeline
                    self._live[key.decode()] = LiveExperiment(Kept.decode(value))

    def names(self) -> list[str]:
        """Return the names of all experiments, sorted."""
        return sorted(self._live)

    def all(self) -> list[LiveExperiment]:
        """Return all experiments."""
        return list(self._live.values())

    async def get(self, name: str) -> dict[str, Any]:
        """Return spec, state, phases, cooling arms and the result at this look, over all members.

        Raises NotFoundError, and as `Parts.others`.
        """
        live = self.find(name)
        if live.spec.interleaving:
            preference = (await self._preference(live)).to_dict()
            return self._show(live, preference=preference)
        merged = await self.merged(live)
        return self._show(live, await asyncio.to_thread(lambda: merged.result().to_dict()))

    async def _changed(self, name: str) -> dict[str, Any]:
        """Return what `get` does; without a result where a member's part is missing."""
        try:
            return await self.get(name)
        except UnavailableError:  # it is done all the same
            return self._show(self.find(name))

    def _show(
        self,
        live: LiveExperiment,
        result: Mapping[str, Any] | None = None,
        preference: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        kept, now_us = live.kept, self._clock()
        return {
            "spec": kept.spec.to_dict(),
            "state": kept.state,
            "chosen": kept.chosen,
            "phases": [
                {"phase": i, "started": format_time(p.started_us), "weights": dict(p.weights)}
                for i, p in enumerate(kept.phases, start=1)
            ],
            "bandit": live.choice and live.choice.to_dict(),
            "cooling": {a: format_time(us) for a, us in kept.cooling.items() if us > now_us},
            "result": result,
            "preference": preference,
        }

    async def merged(self, live: LiveExperiment) -> ExperimentState:
        """Return a copy of an experiment's sums over all members, for another thread.

        Raises as `Parts.others`.
        """
        others = await self._parts.others("experiment", {"name": live.spec.name})
        state = await live.frozen()
        for part in others:
            if part is not None:
                await asyncio.to_thread(merge_packed, state, part["state"])
        return state

    async def _preference(self, live: LiveExperiment) -> Preference:
        others = await self._parts.others("experiment", {"name": live.spec.name})
        tallies = [live.credits.tally(), *(part["tally"] for part in others if part is not None)]
        lists, clicked, first, second = map(sum, zip(*tallies, strict=True))
        return judge(lists, clicked, first, second, live.spec.alpha)

    async def _give(self, asked: Mapping[str, Any]) -> dict[str, Any] | None:
        """Return this member's sums of an experiment, None if it doesn't know it yet."""
        live = self._live.get(asked["name"])
        if live is None:
            return None
        state = await live.frozen()
        packed = await asyncio.to_thread(pack_state, state)
        return {"state": packed, "tally": live.credits.tally()}

    def history(self, name: str) -> list[dict[str, Any]]:
        """Return what happened to an experiment, newest first; raises NotFoundError."""
        return [event.to_dict() for event in reversed(self.find(name).kept.events)]

    async def put(
        self, name: str, document: Mapping[str, Any], *, by: str, force: bool = False
    ) -> dict[str, Any]:
        """Create an experiment, or change its weights (which opens a new phase).

        Anything but the weights is fixed once it has begun: raises ConflictError, also for an arm
        that a guardrail stopped and that still cools down, unless it is forced.
        """
        spec = spec_from_dict({**document, "name": name})
        async with self._lock:
            known = self._live.get(name)
            if known is None:
                await self._create(spec, by)
            else:
                known.kept.check_running()
                _check_fixed(known.spec, spec)
                if not force:
                    known.kept.check_cooling(spec.weights, self._clock())
                event = Event(self._clock(), by, "weights", "", spec.weights)
                if spec.weights != known.spec.weights:
                    await self._switch(known, known.kept.with_weights(spec.weights, event))
        return await self._changed(name)

    async def follow(self, names: Iterable[str]) -> None:
        """Go by what is stored of experiments now, whoever stored it; units stay as they are."""
        async with self._lock:
            with self._environment.snapshot() as snapshot:
                rows = {name: snapshot.get(Table.EXPERIMENTS, name.encode()) for name in names}
            for name, row in rows.items():
                if row is None:
                    continue  # none is ever removed
                kept, live = Kept.decode(row), self._live.get(name)
                if live is None:
                    self._live[name] = LiveExperiment(kept)
                    continue
                if kept.phases == live.kept.phases:
                    kept = replace(kept, phases=live.kept.phases)  # sums stay
                await live.switch(kept)

    async def stop_arm(self, name: str, breach: Breach) -> None:
        """Take all traffic from an arm, until it has cooled down; durable on return.

        Requests see it before it is on disk, and also if the disk refuses it.
        """
        async with self._lock:
            live = self.find(name)
            if live.kept.chosen is not None or not live.spec.weights.get(breach.arm):
                return  # it has ended while it was judged, or was stopped for another member
            kept = self._stopped(live, breach)
            storing = asyncio.ensure_future(self._store(kept))
            await live.switch(kept)
            await storing

    async def hold_arm(self, name: str, breach: Breach) -> None:
        """Take all traffic from an arm here, in memory, until `follow` says what is stored."""
        async with self._lock:
            live = self.find(name)
            if live.kept.chosen is None:
                await live.switch(self._stopped(live, breach))

    def _stopped(self, live: LiveExperiment, breach: Breach) -> Kept:
        weights = {**live.spec.weights, breach.arm: 0.0}
        if not any(weights.values()):
            weights[live.spec.control] = 1.0
        why = f"guardrail {breach.guardrail}: {breach.reason}"
        now_us = self._clock()
        event = Event(now_us, DAEMON, "stopped", why, weights, breach.arm)
        until_us = now_us + span_us(live.spec.cool_down_s)
        cooling = {**live.kept.cooling, breach.arm: until_us}
        return replace(live.kept.with_weights(weights, event), cooling=cooling)

    async def promote(self, name: str, arm: str, why: str) -> None:
        """Give all traffic to an arm, unless the experiment has ended."""
        live = self.find(name)
        total = sum(live.spec.weights.values())
        weights = {a: total if a == arm else 0.0 for a in live.spec.weights}
        await self._turn(live, Event(self._clock(), DAEMON, "promoted", why, weights, arm))

    async def move(self, name: str, weights: Mapping[str, float], why: str, *, phases: int) -> None:
        """Give a bandit's arms other weights, if these are still those of its `phases`-th phase.

        Nothing happens if an arm was stopped, somebody changed weights, or all has ended meanwhile.
        """
        live = self.find(name)
        event = Event(self._clock(), DAEMON, "bandit", why, weights)
        await self._turn(live, event, phases=phases)

    async def _turn(self, live: LiveExperiment, event: Event, *, phases: int | None = None) -> None:
        """Do what the daemon decided by itself, if nothing else came before."""
        async with self._lock:
            if live.kept.chosen is not None or phases not in (None, len(live.kept.phases)):
                return
            await self._switch(live, live.kept.with_weights(event.weights, event))

    async def end(
        self, name: str, arm: str, *, by: str, why: str = "", force: bool = False
    ) -> dict[str, Any]:
        """End an experiment: whoever asks its routes gets `arm`; durable on return.

        Results stay readable, and take in labels that are still to come; its namespace's buckets
        are free.  The same again changes nothing.  Raises NotFoundError, ValidationError(code=
        "unknown_arm" or "why_too_long"), and ConflictError: it has ended with another arm, or a
        guardrail stopped this one, unless it is forced.
        """
        if len(why) > WHY_CHARS_MAX:
            raise ValidationError(
                f"'why' has {len(why)} characters; the limit is {WHY_CHARS_MAX}",
                code="why_too_long",
                hint="Say it in short, or where it is written.",
            )
        async with self._lock:
            live = self.find(name)
            if arm not in live.spec.weights:
                raise ValidationError(
                    f"experiment {name!r} has no arm {arm!r}",
                    code="unknown_arm",
                    hint=f"Its arms: {', '.join(live.spec.weights)}.",
                )
            if live.kept.chosen != arm:
                live.kept.check_running()
                if not force:
                    alone = dict.fromkeys(live.spec.weights, 0.0) | {arm: 1.0}
                    live.kept.check_cooling(alone, self._clock())
                event = Event(self._clock(), by, "ended", why, live.spec.weights, arm)
                await self._switch(live, live.kept.with_end(event))
        return await self._changed(name)

    def assign(self, name: str, given: Mapping[str, Any]) -> tuple[Assignment, str | None, int]:
        """Return (assignment, unit, phase index) of a request's fields; about 5 us."""
        live = self.find(name)
        kept = live.kept
        unit = given.get(kept.spec.unit)
        unit = None if unit is None else str(unit)
        if kept.chosen is not None:
            return Assignment(kept.chosen, 1.0, "ended"), unit, len(kept.phases) - 1
        found, phase = assign(kept.spec, unit or "", given), len(kept.phases) - 1
        known = live.stays(unit or "") if found.reason == "assigned" else None
        if known is not None:
            phase, weights = known.phase, kept.phases[known.phase].weights
            share = weights[known.arm] / sum(weights.values())
            found = Assignment(known.arm, share, "assigned")
        return found, unit, phase

    def interleaved(self, name: str | None) -> tuple[str, ...]:
        """Return the control and the other arm of an interleaved experiment that runs, else ()."""
        if name is None:
            return ()
        kept = self.find(name).kept
        if not kept.spec.interleaving or kept.chosen is not None:
            return ()
        control = kept.spec.control
        return control, *(arm for arm in kept.spec.weights if arm != control)

    def arms(self, name: str) -> list[str]:
        """Return the arms that a route of the experiment needs: all, of an ended one the chosen.

        Raises NotFoundError.
        """
        kept = self.find(name).kept
        return [*kept.spec.weights] if kept.chosen is None else [kept.chosen]

    def exposed(self, predictions: Iterable[Prediction]) -> None:
        """Take in served predictions; those without an experiment are passed over."""
        for p in predictions:
            live = self._live.get(p.experiment or "")
            if live is not None and p.unit is not None and live.spec.interleaving:
                live.credits.show(p.unit)
            elif live is not None and p.unit is not None:
                old = live.records.get(p.unit)
                if old is not None and not live.is_open(old.arm, p.phase):
                    continue  # its arm has ended: whatever it sees now, it was assigned there
                covariates = self._covariates(live.spec, p) if old is None else ()
                phase = min(p.phase, len(live.kept.phases) - 1)  # a full disk lost the last one
                first_us = 0 if live.spec.bandit is None else p.t_us
                record = expose(
                    old, phase=phase, arm=p.arm, covariates=covariates, first_us=first_us
                )
                live.change(p.unit, record)

    async def prepare(self, predictions: Iterable[Prediction]) -> None:
        """Learn the features of versions that served before the start, for `exposed`."""
        for p in predictions:
            live = self._live.get(p.experiment or "")
            if live is not None and live.spec.covariates:
                await self._features.load(p.model, p.version)

    def expect(self, units: Iterable[Coming]) -> None:
        """Keep units of bandits that come with their slots in their arms, before they are here."""
        for coming in units:
            live = self._live.get(coming.experiment)
            if live is not None and live.spec.bandit is not None:
                live.expected.setdefault(coming.unit, UnitRecord(coming.phase, coming.arm))

    def expect_none(self) -> None:
        """Forget who was expected: they are here now, or don't come."""
        for live in self._live.values():
            live.expected.clear()

    def forget(self, name: str, unit: str) -> None:
        """Take a unit of an experiment out of all sums; 10 us per metric."""
        live = self._live.get(name)
        if live is not None:
            live.forget(unit)

    def known(self) -> list[Kept]:
        """Return what is stored of the experiments that units take part in."""
        return [live.kept for live in self._live.values() if live.records or len(live.credits)]

    def check_same(self, theirs: Mapping[str, str]) -> None:
        """Raise ConflictError(code="experiments_differ") unless these are here, just so.

        `theirs`: digests of another shard's, as `digests` makes them.
        """
        for name, digest in theirs.items():
            live = self._live.get(name)
            if live is None or digest_of(live.kept) != digest:
                what = "isn't here" if live is None else "has other arms, weights or phases here"
                raise ConflictError(
                    f"experiment {name!r}, of which units would come, {what}",
                    code="experiments_differ",
                    hint="Bring both shards to the same (mlpd experiments, with --url), then move.",
                )

    def labelled(self, prediction: Prediction, old: float | None, new: float) -> None:
        """Take in a label that took effect; a revised one replaces what it said before."""
        live = self._live.get(prediction.experiment or "")
        if live is not None and live.spec.interleaving:
            clicks = int(new > 0) - int(old is not None and old > 0)
            team = int(prediction.arm != live.spec.control)
            live.credits.add(prediction.unit or "", team, clicks)
            return
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

    def find(self, name: str) -> LiveExperiment:
        """Return an experiment at work; raises NotFoundError."""
        live = self._live.get(name)
        if live is None:
            known = ", ".join(self.names()) or "none"
            raise NotFoundError(
                f"unknown experiment {name!r}; known: {known}",
                code="unknown_experiment",
                hint="mlpd experiments create makes one.",
            )
        return live

    async def _create(self, spec: ExperimentSpec, by: str) -> None:
        if len(self._live) >= EXPERIMENTS_MAX:
            raise ConflictError(f"there are {EXPERIMENTS_MAX} experiments already")
        running = [live.spec for live in self._live.values() if live.kept.chosen is None]
        check_disjoint((*running, spec))
        event = Event(self._clock(), by, "created", "", spec.weights)
        kept = Kept(spec).with_weights(spec.weights, event)
        await self._store(kept)
        self._live[spec.name] = LiveExperiment(kept)

    async def _switch(self, live: LiveExperiment, kept: Kept) -> None:
        await self._store(kept)
        await live.switch(kept)

    async def _store(self, kept: Kept) -> None:
        key, stored = kept.spec.name.encode(), kept.encode()

        def write(txn: WriteTransaction) -> None:
            self._fence(txn)
            txn.put(Table.EXPERIMENTS, key, stored)
            note(txn, Table.EXPERIMENTS, key)

        await self._writer.write(write)

    def _covariates(self, spec: ExperimentSpec, p: Prediction) -> tuple[float | None, ...]:
        """Return the covariates as of the unit's first exposure: request fields, or features."""
        if p.moved:  # read after a start, when its vector and request lie in a file
            return (None,) * len(spec.covariates)
        if not spec.covariates:
            return ()
        places = self._features.get(p.model, p.version)
        found = []
        for name in spec.covariates:
            value = p.given.get(name)
            if value is None and name in places:
                value = float(p.vector[places[name]])
            found.append(float(value) if value is not None and is_number(value) else None)
        return tuple(found)


def outcomes(prediction: Prediction, label: float) -> dict[str, float]:
    """Return the metrics that one labelled prediction speaks for.

    `label`: the label itself; `correct`: whether the score, cut at 0.5, agreed with a 0/1 label;
    `squared_error`: (score - label) squared, the Brier score's terms for 0/1 labels.  Of several
    classes `correct` is whether the chosen one came, which `squared_error` takes for the label.
    """
    wanted = prediction.target(label)
    agreed = (prediction.score >= 0.5) == (wanted >= 0.5)  # noqa: PLR2004 - the cut
    return {
        "label": label,
        "correct": float(agreed) if prediction.chosen is None else wanted,
        "squared_error": (prediction.score - wanted) ** 2,
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
