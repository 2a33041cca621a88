"""Guardrails on requests: evidence, tripwire, and a small profile of the simulations."""

import statistics
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.guardrails import is_stopped_for_nothing, requests_until_stopped
from mlpd.experiments.guardrails import (
    RATIOS,
    WINDOW_UNITS,
    FaultGuard,
    FaultSequence,
    Guardrail,
    Tripwire,
    fault_guards,
    guardrail_alpha,
)

ERRORS = Guardrail("errors")
EVEN = {"a": 1.0, "b": 1.0}


def brute_e(arms: list[bool], share: float, tolerance: float) -> float:
    """The e-value by its definition: bets of every ratio, begun at every fault."""
    rest = [1 / (1 + np.log1p(j)) for j in range(len(arms) + 1)]
    base = share * tolerance / (share * tolerance + 1 - share)
    total = rest[-1]
    for ratio in RATIOS:
        bet = base * ratio / (base * ratio + 1 - base)
        for start in range(len(arms)):
            wealth = rest[start] - rest[start + 1]
            for in_arm in arms[start:]:
                wealth *= bet / base if in_arm else (1 - bet) / (1 - base)
            total += wealth / len(RATIOS)
    return float(total)


@settings(max_examples=40)
@given(st.lists(st.booleans(), max_size=25), st.floats(0.01, 0.99), st.sampled_from([1.0, 1.5]))
def test_the_e_value_is_its_definition(arms: list[bool], share: float, tolerance: float) -> None:
    sequence = FaultSequence()
    for in_arm in arms:
        sequence = sequence.after(in_arm=in_arm, share=share, tolerance=tolerance)
    assert sequence.e == pytest.approx(brute_e(arms, share, tolerance), rel=1e-9)


@settings(max_examples=40)
@given(st.lists(st.booleans(), max_size=12), st.floats(0.05, 0.95))
def test_one_more_fault_leaves_the_expected_e_value_as_it_is(
    arms: list[bool], share: float
) -> None:
    sequence = FaultSequence()
    for in_arm in arms:
        sequence = sequence.after(in_arm=in_arm, share=share)
    after = [sequence.after(in_arm=in_arm, share=share).e for in_arm in (True, False)]
    assert share * after[0] + (1 - share) * after[1] == pytest.approx(sequence.e, rel=1e-9)


@pytest.mark.parametrize("before", [0, 2_000])
@pytest.mark.parametrize(("jump", "most"), [(0.5, 200), (0.05, 3_000)])
def test_an_arm_that_turns_bad_is_stopped_in_time(before: int, jump: float, most: int) -> None:
    rng = np.random.default_rng(3)
    found = [requests_until_stopped(rng, before=before, base=0.01, jump=jump) for _ in range(9)]
    assert 0 < statistics.median(found) <= most


def test_units_that_come_back_hide_nothing() -> None:
    rng = np.random.default_rng(4)
    found = [
        requests_until_stopped(rng, before=2_000, base=0.01, jump=0.05, visits=10) for _ in range(5)
    ]
    assert 0 < statistics.median(found) <= 3_000


@pytest.mark.parametrize(("share", "base"), [(0.5, 0.02), (0.1, 0.05), (0.01, 0.02)])
def test_a_healthy_arm_is_left_alone(share: float, base: float) -> None:
    rng = np.random.default_rng(6)
    stopped = [
        is_stopped_for_nothing(rng, base=base, share=share, requests=20_000) for _ in range(40)
    ]
    assert sum(stopped) <= 1


def guard(weights: dict[str, float] | None = None, **changes: Any) -> FaultGuard:
    return FaultGuard(Guardrail("errors", **changes), "a", weights or EVEN, 0.01)


def test_a_broken_client_is_one_fault_however_often_it_comes() -> None:
    watched = guard()
    for i in range(200):
        assert watched.observe(f"u{i}", "a", fault=False) is None
        assert watched.observe("broken", "b", fault=True) is None


def test_a_breach_is_told_once_and_again_when_the_arm_comes_back() -> None:
    watched = guard()

    def break_it(first: int) -> list[Any]:
        return [watched.observe(f"u{i}", "b", fault=True) for i in range(first, first + 40)]

    told = [breach for breach in break_it(0) if breach]
    assert len(told) == 1
    assert (told[0].arm, told[0].guardrail) == ("b", "errors")
    assert "p < 0.01 at every look" in told[0].reason
    watched.begin_phase({"a": 1.0, "b": 0.0})
    assert not any(break_it(100))
    watched.begin_phase(EVEN)
    assert sum(breach is not None for breach in break_it(200)) == 1


def test_a_control_that_fails_stops_nobody() -> None:
    watched = guard()
    assert not any(watched.observe(f"u{i}", "a", fault=True) for i in range(500))


def test_what_is_tolerated_stops_nobody() -> None:
    rng = np.random.default_rng(7)
    for tolerance, stops in ((1.0, True), (3.0, False)):
        watched = guard(tolerance=tolerance)
        told = []
        for i in range(6_000):
            arm = "b" if i % 2 else "a"
            rate = 0.06 if arm == "b" else 0.02
            told.append(watched.observe(f"u{i}", arm, fault=bool(rng.random() < rate)))
        assert any(told) == stops


def test_the_tripwire_sees_what_the_sequence_has_counted_before() -> None:
    watched = guard()
    for i in range(WINDOW_UNITS):  # everybody has failed once: the sequence knows all units
        watched.observe(f"u{i}", "a", fault=True)
        watched.observe(f"v{i}", "b", fault=True)
    for _ in range(3):
        for i in range(WINDOW_UNITS):
            assert watched.observe(f"u{i}", "a", fault=False) is None
            assert watched.observe(f"v{i}", "b", fault=False) is None
    told = [watched.observe(f"v{i}", "b", fault=True) for i in range(WINDOW_UNITS)]
    place = next(i for i, breach in enumerate(told) if breach)
    assert place == 14  # 15 of 50 are 30 points
    assert "tripwire" in told[place].reason  # type: ignore[union-attr]  # it is a breach


def test_the_tripwire_needs_full_windows_and_six_sigmas() -> None:
    arm, control = Tripwire(), Tripwire()
    for i in range(WINDOW_UNITS - 1):
        arm.observe(f"u{i}", fault=True)
        control.observe(f"u{i}", fault=i % 2 == 0)
    assert not arm.trips(control)
    arm.observe("last", fault=True)
    control.observe("last", fault=False)
    assert arm.trips(control)  # 100 % against half: 7 sigmas
    for i in range(8):
        arm.observe(f"u{i}", fault=False)
    assert not arm.trips(control)  # 84 %: 34 points, 4.8 sigmas


def test_levels_are_shared_by_guardrails_and_arms() -> None:
    rails = (ERRORS, Guardrail("metric", metric="label"))
    guards = fault_guards(rails, "a", {"a": 1.0, "b": 1.0, "c": 1.0})
    assert guards[0] is not None
    assert guards[1] is None
    assert guardrail_alpha(rails, 3) == pytest.approx(0.01 / 4)
