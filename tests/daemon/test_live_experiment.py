"""What is kept of an experiment, and sums made anew while units go on changing."""

import asyncio
import random
from dataclasses import replace

import msgpack
import pytest

from mlpd.core.errors import ConflictError, DefinitionError
from mlpd.daemon.live_experiment import EVENTS_MAX, Event, Kept, LiveExperiment
from mlpd.experiments.analysis import MAX_PHASES, ExperimentState, Phase
from mlpd.experiments.documents import spec_from_dict
from mlpd.experiments.guardrails import Guardrail
from mlpd.experiments.records import expose, observe

SPEC = spec_from_dict(
    {
        "name": "e",
        "unit": "user",
        "arms": {"a": 1, "b": 1},
        "metrics": [{"name": "label"}],
        "planned_units": 100,
    }
)


def event(action: str = "weights", at_us: int = 1, **weights: float) -> Event:
    return Event(at_us, "me", action, "because", weights or SPEC.weights)


def begun() -> Kept:
    return Kept(SPEC).with_weights(SPEC.weights, event("created"))


def test_what_is_kept_comes_back() -> None:
    kept = begun().with_weights({"a": 1.0, "b": 3.0}, event(a=1.0, b=3.0))
    kept = replace(kept, cooling={"b": 17})
    assert Kept.decode(kept.encode()) == kept
    ended = kept.with_end(Event(2, "me", "ended", "it won", kept.spec.weights, "b"))
    assert (Kept.decode(ended.encode()), ended.state) == (ended, "ended")
    assert [e.to_dict()["action"] for e in kept.events] == ["created", "weights"]


def test_rows_of_earlier_versions_are_read() -> None:
    stored = msgpack.packb([SPEC.to_dict(), [[5, {"a": 1.0, "b": 1.0}]]])
    assert Kept.decode(stored) == Kept(SPEC, (Phase(5, {"a": 1.0, "b": 1.0}),))


def test_people_may_open_so_many_phases_and_a_guardrail_more() -> None:
    kept = begun()
    for number in range(2, MAX_PHASES + 1):
        kept = kept.with_weights({"a": 1.0, "b": float(number)}, event(at_us=number))
    with pytest.raises(DefinitionError, match="has had 100 phases"):
        kept.with_weights({"a": 1.0, "b": 200.0}, event())
    stopped = kept.with_weights({"a": 1.0, "b": 0.0}, event("stopped", a=1.0, b=0.0))
    assert len(stopped.phases) == MAX_PHASES + 1
    for _ in range(EVENTS_MAX):
        kept = kept.with_weights(kept.spec.weights, event())
    assert len(kept.events) == EVENTS_MAX


def test_an_arm_that_cools_down_gets_no_traffic_until_it_has() -> None:
    kept = replace(begun(), cooling={"b": 50})
    kept.check_cooling({"a": 1.0, "b": 0.0}, 49)
    kept.check_cooling({"a": 1.0, "b": 1.0}, 50)
    with pytest.raises(ConflictError, match="cools down until") as caught:
        kept.check_cooling({"a": 1.0, "b": 1.0}, 49)
    assert caught.value.code == "arm_cooling_down"


async def test_units_that_change_while_sums_are_made_anew_count_once() -> None:
    live, rng = LiveExperiment(begun()), random.Random(4)

    def change(number: int) -> None:
        unit = f"u{number}"
        phase = len(live.kept.phases) - 1
        arm = live.spec.exposure.choose(unit)
        record = expose(live.records.get(unit), phase=phase, arm=arm)
        live.change(unit, observe(record, SPEC.metrics, {"label": number % 2}))

    for number in range(1_000):
        change(number)
    kept = live.kept.with_weights({"a": 1.0, "b": 4.0}, event(at_us=9, a=1.0, b=4.0))
    switching = asyncio.create_task(live.switch(kept))
    while not switching.done():
        await asyncio.sleep(0)
        for _ in range(20):
            change(rng.randrange(1_200))
    await switching
    whole = ExperimentState.from_records(kept.spec, kept.phases, live.records.items())
    assert live.state.exposed == whole.exposed
    assert live.state.standing == whole.standing
    assert live.state.standing["moved"] > 50
    for key, cell in whole.cells.items():
        found = live.state.cells[key]
        assert (found.events, found.non_events) == (cell.events, cell.non_events)
        assert found.moments.x[:3] == pytest.approx(cell.moments.x[:3])
    assert (await live.result())["units"] == len(live.records)


async def test_guards_follow_the_weights() -> None:
    spec = replace(SPEC, guardrails=(Guardrail("errors"),))
    live = LiveExperiment(Kept(spec).with_weights(spec.weights, event("created")))
    (guard,) = live.guards
    assert guard is not None
    broken = [guard.observe(f"u{i}", "b", fault=True) for i in range(40)]
    assert sum(breach is not None for breach in broken) == 1
    for b in (0.0, 1.0):
        await live.switch(live.kept.with_weights({"a": 1.0, "b": b}, event(a=1.0, b=b)))
    again = [guard.observe(f"v{i}", "b", fault=True) for i in range(40)]
    assert sum(breach is not None for breach in again) == 1
