import json
import statistics
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlpd.core.errors import DefinitionError, InternalError
from mlpd.core.sequences import sequence_multiplier
from mlpd.experiments.analysis import (
    MAX_PHASES,
    ExperimentResult,
    ExperimentState,
    Phase,
    advance,
)
from mlpd.experiments.assignment import assign
from mlpd.experiments.metric import Metric
from mlpd.experiments.records import UnitRecord, expose, observe
from mlpd.experiments.spec import Arm, ExperimentSpec
from mlpd.experiments.verdict import Comparison

EVEN, RAMP = {"v1": 1.0, "v2": 1.0}, {"v1": 9.0, "v2": 1.0}
SPEC = ExperimentSpec(
    name="flight-risk",
    unit="tailnum",
    arms=(Arm("v1"), Arm("v2")),
    metrics=(Metric("late", better="lower"), Metric("delay", "mean", better="lower")),
    planned_units=1000,
)
ONE_PHASE = (Phase(0, EVEN),)
Records = dict[str, UnitRecord]


def state_of(records: Records, spec: ExperimentSpec = SPEC) -> ExperimentState:
    return ExperimentState.from_records(spec, ONE_PHASE, records.items())


def one_phase(
    late: dict[str, tuple[int, int]], spec: ExperimentSpec = SPEC, predictions: int = 1
) -> Records:
    """Records of (units, units that are always late) per arm, the arm as the hash says."""
    records: Records = {}
    numbers = iter(range(10**6))
    for arm, (units, ones) in late.items():
        for k in range(units):
            unit = next(u for n in numbers if assign(spec, u := f"N{n}", {}).arm == arm)
            record = expose(None, phase=0, arm=arm)
            for _ in range(predictions):
                record = observe(record, spec.metrics, {"late": int(k < ones)})
            records[unit] = record
    return records


def verdict_of(records: Records, spec: ExperimentSpec = SPEC, metric: str = "late") -> Comparison:
    return comparison_of(state_of(records, spec).result(), metric)


def comparison_of(result: ExperimentResult, metric: str = "late") -> Comparison:
    return next(c for c in result.comparisons if c.metric == metric)


def test_estimates_are_means_and_their_interval_the_confidence_sequence() -> None:
    records = one_phase({"v1": (400, 120), "v2": (300, 45)})
    found = verdict_of(records)
    a, b = [1] * 120 + [0] * 280, [1] * 45 + [0] * 255
    std_error = (statistics.variance(a) / 400 + statistics.variance(b) / 300) ** 0.5
    half = std_error * sequence_multiplier(700, planned_units=1000, alpha=0.05)
    assert (found.units, found.phases, found.control) == (700, 1, "v1")
    assert (found.value, found.control_value) == pytest.approx((0.15, 0.30))
    assert found.difference == pytest.approx(-0.15)
    assert found.relative == pytest.approx(-0.5)
    assert found.std_error == pytest.approx(std_error)
    assert (found.low, found.high) == pytest.approx((-0.15 - half, -0.15 + half))
    assert found.verdict == "better"


def test_repeating_a_units_outcomes_adds_no_evidence() -> None:
    once, often = (one_phase({"v1": (200, 60), "v2": (200, 50)}, predictions=k) for k in (1, 50))
    assert verdict_of(often).std_error == pytest.approx(verdict_of(once).std_error)


@pytest.mark.parametrize(
    ("late", "reason"),
    [
        ({"v1": (200, 60), "v2": (99, 60)}, "v2 has 99 of 100 units"),
        ({"v1": (99, 60), "v2": (200, 60)}, "v1 has 99 of 100 units"),
        ({"v1": (200, 100), "v2": (200, 24)}, "v2 has 24 of 25 units with an event"),
        ({"v1": (200, 176), "v2": (200, 100)}, "v1 has 24 of 25 units with a non-event"),
    ],
)
def test_the_guard_withholds_numbers_and_says_what_is_missing(
    late: dict[str, tuple[int, int]], reason: str
) -> None:
    found = verdict_of(one_phase(late))
    assert (found.verdict, found.difference, found.p_value) == ("insufficient", None, 1.0)
    assert reason in found.reason


def test_the_guard_is_passed_at_its_bounds() -> None:
    assert verdict_of(one_phase({"v1": (100, 25), "v2": (100, 75)})).verdict == "worse"


def test_verdicts_follow_the_metrics_direction() -> None:
    records = one_phase({"v1": (400, 120), "v2": (400, 40)})
    higher = replace(SPEC, metrics=(Metric("late", better="higher"),))
    assert verdict_of(records).verdict == "better"
    assert verdict_of(records, higher).verdict == "worse"
    equal = verdict_of(one_phase({"v1": (400, 120), "v2": (400, 119)}))
    assert equal.verdict == "undecided"
    assert "no difference shown" in equal.reason


def test_a_sample_ratio_mismatch_blocks_every_decision() -> None:
    result = state_of(one_phase({"v1": (1000, 300), "v2": (600, 60)})).result()
    assert result.sample_ratio.alarm
    assert {c.verdict for c in result.comparisons} == {"blocked"}


def test_welch_waits_for_its_horizon() -> None:
    welch = replace(SPEC, method="welch")
    early = verdict_of(one_phase({"v1": (400, 120), "v2": (400, 40)}), welch)
    assert early.verdict == "undecided"
    assert "800 of 1000 planned units" in early.reason
    assert verdict_of(one_phase({"v1": (500, 120), "v2": (500, 40)}), welch).verdict == "better"


def test_many_comparisons_are_corrected() -> None:
    records = one_phase({"v1": (400, 120), "v2": (400, 75)})
    spec = replace(SPEC, metrics=(*SPEC.metrics, *(Metric(f"m{i}") for i in range(18))))
    alone, among_many = verdict_of(records), verdict_of(records, spec)
    assert alone.verdict == "better"
    assert alone.p_value == among_many.p_value
    assert among_many.p_adjusted == pytest.approx(20 * alone.p_value)
    assert among_many.verdict == "undecided"
    assert "not after holm" in among_many.reason


def test_phases_are_shown_by_numbers_from_1() -> None:
    phases = advance(ONE_PHASE, RAMP, 5)
    few = one_phase({"v1": (10, 3), "v2": (10, 3)})
    document = ExperimentState.from_records(SPEC, phases, few.items()).result().to_dict()
    assert [table["phase"] for table in document["phases"]] == [1, 2]
    assert document["comparisons"][0]["reason"].startswith("in phase 2, v1 has 0 of 100 units")
    with pytest.raises(InternalError, match="exposed in phase 3, but only 2 have begun"):
        ExperimentState(SPEC, phases).apply("u", None, UnitRecord(2, "v1"))


def test_units_without_an_outcome_are_exposed_but_not_analysed() -> None:
    records = one_phase({"v1": (150, 50), "v2": (150, 50)})
    waiting = {u: UnitRecord(0, r.arm) for u, r in records.items() if r.arm == "v2"}
    state = state_of(records | waiting)
    assert state.exposed[0, "v2"] == 150
    assert "v2 has 0 of 100 units with an outcome" in comparison_of(state.result()).reason


def test_a_change_of_shares_opens_a_phase_and_a_common_factor_does_not() -> None:
    phases = advance((), EVEN, 10)
    assert phases == (Phase(10, EVEN),)
    assert advance(phases, {"v1": 3, "v2": 3, "v3": 0}, 20) is phases
    assert advance(phases, RAMP, 20) == (*phases, Phase(20, RAMP))


def test_phases_are_bounded() -> None:
    phases = tuple(Phase(i, RAMP if i % 2 else EVEN) for i in range(MAX_PHASES))
    with pytest.raises(DefinitionError, match="100 phases"):
        advance(phases, {"v1": 1, "v2": 2}, 1000)


def test_units_seen_in_two_arms_are_excluded_and_alerted_above_one_percent() -> None:
    records = one_phase({"v1": (200, 60), "v2": (200, 60)})
    unit = next(u for u, r in records.items() if r.arm == "v1" and r.sums[0][0] == 1)
    records[unit] = expose(records[unit], phase=0, arm="v2")
    result = state_of(records).result()
    assert result.to_dict()["units_switched"] == 1
    assert not result.to_dict()["switch_alert"]
    assert comparison_of(result).control_value == pytest.approx(59 / 199)
    for other in list(records)[:5]:
        records[other] = records[other]._replace(switched=True)
    assert state_of(records).result().to_dict()["switch_alert"]


def test_units_that_new_weights_move_are_excluded_whether_they_return_or_not() -> None:
    phases = (Phase(0, RAMP), Phase(5, EVEN))
    ramp = replace(SPEC, arms=(Arm("v1", 9), Arm("v2", 1)))
    units = [f"N{i}" for i in range(2000)]
    records = {u: expose(None, phase=0, arm=str(assign(ramp, u, {}).arm)) for u in units}
    moved = {u for u in units if assign(ramp, u, {})[0] != assign(SPEC, u, {})[0]}
    for unit in sorted(moved)[::2]:
        records[unit] = expose(records[unit], phase=1, arm="v2")
    state = ExperimentState.from_records(SPEC, phases, records.items())
    assert state.standing == {"moved": len(moved), "kept": 2000 - len(moved)}
    assert not state.result().sample_ratio.alarm


def test_excluding_by_return_would_be_biased_and_by_hash_is_not() -> None:
    """Regular visitors are late more often; no arm has an effect; the ramp goes 10 % to 50 %."""
    rng = np.random.default_rng(11)
    ramp = replace(SPEC, arms=(Arm("v1", 9), Arm("v2", 1)))
    records: Records = {}
    for i in range(12_000):
        unit, regular = f"N{i}", rng.random() < 0.5
        record = expose(None, phase=0, arm=str(assign(ramp, unit, {}).arm))
        if regular:
            record = expose(record, phase=1, arm=str(assign(SPEC, unit, {}).arm))
        late = int(rng.random() < (0.7 if regular else 0.2))
        records[unit] = observe(record, SPEC.metrics, {"late": late})
    by_hash = ExperimentState.from_records(SPEC, (Phase(0, RAMP), Phase(5, EVEN)), records.items())
    by_return = ExperimentState.from_records(SPEC, (Phase(0, RAMP),), records.items())
    fair, biased = (comparison_of(s.result()) for s in (by_hash, by_return))
    assert fair.difference is not None
    assert fair.std_error is not None
    assert abs(fair.difference) < 3 * fair.std_error
    assert biased.verdict == "worse"


def test_phases_are_combined_by_traffic() -> None:
    records = one_phase({"v1": (300, 60), "v2": (300, 30)})
    later = one_phase({"v1": (600, 360), "v2": (600, 300)})
    state = ExperimentState(SPEC, (Phase(0, EVEN), Phase(5, EVEN)))
    for unit, record in records.items():
        state.apply(unit, None, record)
    for unit, record in later.items():
        state.apply(unit, None, record._replace(phase=1))
    found = comparison_of(state.result())
    assert found.control_value == pytest.approx((0.2 * 600 + 0.6 * 1200) / 1800)
    assert found.value == pytest.approx((0.1 * 600 + 0.5 * 1200) / 1800)
    assert (found.units, found.phases) == (1800, 2)


def test_a_phase_below_the_guard_stays_out() -> None:
    records = one_phase({"v1": (300, 60), "v2": (300, 30)})
    state = state_of(records)
    both = replace_phases(state, (*ONE_PHASE, Phase(5, EVEN)))
    both.apply("extra", None, UnitRecord(1, "v1", sums=((1.0, 1.0),)))
    assert comparison_of(both.result()).difference == comparison_of(state.result()).difference


def replace_phases(state: ExperimentState, phases: tuple[Phase, ...]) -> ExperimentState:
    return ExperimentState(
        state.spec, phases, state.exposed.copy(), state.standing.copy(), dict(state.cells)
    )


def test_a_record_of_an_unknown_phase_is_a_broken_invariant() -> None:
    with pytest.raises(InternalError, match="phase 2, but only 1 have begun"):
        state_of({}).apply("N1", None, UnitRecord(1, "v1"))


EVENTS = st.lists(
    st.tuples(
        st.integers(0, 12),
        st.sampled_from(["v1", "v2"]),
        st.dictionaries(st.sampled_from(["late", "delay"]), st.integers(0, 1)),
    ),
    max_size=60,
)


@settings(max_examples=60)
@given(EVENTS, EVENTS)
def test_incremental_updates_equal_a_rebuild_and_brute_force(
    first: list[tuple[int, str, dict[str, float]]], second: list[tuple[int, str, dict[str, float]]]
) -> None:
    records: Records = {}
    phases: tuple[Phase, ...] = ()
    state = ExperimentState(SPEC, phases)
    outcomes: dict[str, dict[str, list[float]]] = {}
    for phase, (weights, events) in enumerate(((RAMP, first), (EVEN, second))):
        phases = advance(phases, weights, phase)
        state = ExperimentState.from_records(SPEC, phases, records.items())
        for number, arm, outcome in events:
            unit, old = f"N{number}", records.get(f"N{number}")
            new = observe(expose(old, phase=phase, arm=arm), SPEC.metrics, outcome)
            state.apply(unit, old, new)
            records[unit] = new
            for metric, value in outcome.items():
                outcomes.setdefault(unit, {}).setdefault(metric, []).append(value)
    rebuilt = ExperimentState.from_records(SPEC, phases, records.items())
    assert +state.exposed == +rebuilt.exposed
    assert +state.standing == +rebuilt.standing
    expected = brute_force_cells(records, outcomes)
    for found in (state, rebuilt):
        assert {k for k, c in found.cells.items() if c.moments.n} == set(expected)
        for key, (n, ratio, events_, non_events) in expected.items():
            cell = found.cells[key]
            assert (cell.moments.n, cell.events, cell.non_events) == (n, events_, non_events)
            assert cell.moments.ratio == pytest.approx(ratio, abs=1e-12)
            assert cell.moments.ratio_variance == pytest.approx(
                rebuilt.cells[key].moments.ratio_variance, rel=1e-9, abs=1e-12
            )


def brute_force_cells(
    records: Records, outcomes: dict[str, dict[str, list[float]]]
) -> dict[tuple[int, str, str], tuple[int, float, int, int]]:
    even = SPEC.exposure
    groups: dict[tuple[int, str, str], list[list[float]]] = {}
    for unit, record in records.items():
        moved = record.phase == 0 and even.choose(unit) != record.arm
        if not record.switched and not moved:
            for metric, values in outcomes.get(unit, {}).items():
                groups.setdefault((record.phase, metric, record.arm), []).append(values)
    return {
        key: (
            len(units),
            sum(map(sum, units)) / sum(map(len, units)),
            sum(sum(values) != 0 for values in units),
            sum(sum(values) != len(values) for values in units),
        )
        for key, units in groups.items()
    }


def test_units_of_an_arm_that_ended_stay_where_they_were_assigned() -> None:
    records = one_phase({"v1": (200, 60), "v2": (200, 30)})
    ended = advance(ONE_PHASE, {"v1": 1.0, "v2": 0.0}, 5)
    state = ExperimentState.from_records(SPEC, ended, records.items())
    assert state.standing == {"kept": 400}
    assert verdict_of(records).difference == comparison_of(state.result()).difference
    back = ExperimentState.from_records(SPEC, advance(ended, RAMP, 9), records.items())
    assert 0 < back.standing["moved"] < 200  # fewer units see v2 again than did


def test_results_are_json_with_a_table_per_phase() -> None:
    result: dict[str, Any] = json.loads(
        json.dumps(state_of(one_phase({"v1": (150, 60), "v2": (150, 30)})).result().to_dict())
    )
    table = result["phases"][0]["arms"]["v2"]
    assert (table["weight"], table["units"], set(table["metrics"])) == (1.0, 150, {"late"})
    assert table["metrics"]["late"] == {"units": 150, "value": pytest.approx(0.2)}
    assert result["comparisons"][0]["metric"] == "late"
    assert result["units"] == 300


def test_an_experiment_before_its_first_phase_is_insufficient() -> None:
    result = ExperimentState(SPEC, ()).result()
    assert {(c.verdict, c.reason) for c in result.comparisons} == {
        ("insufficient", "no phase has begun")
    }
    assert result.excluded_share == 0.0
