from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlpd.core.errors import ValidationError
from mlpd.experiments.assignment import Assignment, assign, matches
from mlpd.experiments.metric import Metric
from mlpd.experiments.rendezvous import Rendezvous
from mlpd.experiments.spec import Arm, ExperimentSpec, Namespace, Op, Rule

UNITS = [f"N{i}" for i in range(5_000)]


def spec(**changes: Any) -> ExperimentSpec:
    values: dict[str, Any] = {
        "name": "flight-risk",
        "unit": "tailnum",
        "arms": (Arm("v1", 3), Arm("v2", 1)),
        "metrics": (Metric("late"),),
        "planned_units": 4000,
    }
    return ExperimentSpec(**values | changes)


def arms_of(experiment: ExperimentSpec, **request: Any) -> dict[str, Assignment]:
    return {unit: assign(experiment, unit, request) for unit in UNITS}


@given(st.text(min_size=1))
def test_assignment_is_the_weighted_rendezvous_with_its_propensity(unit: str) -> None:
    arm = Rendezvous(("exposure", "flight-risk"), {"v1": 3, "v2": 1}).choose(unit)
    propensity = {"v1": 0.75, "v2": 0.25}[arm]
    assert assign(spec(), unit, {}) == Assignment(arm, propensity, "assigned")


def test_an_empty_unit_takes_no_part() -> None:
    assert assign(spec(forced={"": "v2"}), "", {}) == Assignment(None, 1.0, "no_unit")


def test_forced_units_see_their_arm_whatever_else_holds() -> None:
    closed = spec(forced={"N1": "v2"}, holdout=0.999999, rules=(Rule("x", "eq", 1),))
    assert assign(closed, "N1", {}) == Assignment("v2", 1.0, "forced")
    assert assign(closed, "N2", {}).arm is None


def test_a_forced_unit_may_see_an_arm_of_weight_zero() -> None:
    ramped_down = spec(arms=(Arm("v1", 1), Arm("v2", 0)), forced={"N1": "v2"})
    assert assign(ramped_down, "N1", {}).arm == "v2"
    assert {a.arm for a in arms_of(ramped_down).values()} == {"v1", "v2"}


def test_the_holdout_is_its_share_and_moves_nobody_else() -> None:
    everyone, held = arms_of(spec()), arms_of(spec(holdout=0.2))
    out = {unit for unit, a in held.items() if a.reason == "holdout"}
    assert len(out) / len(UNITS) == pytest.approx(0.2, abs=0.03)
    assert all(held[unit] == everyone[unit] for unit in set(UNITS) - out)


def test_the_holdout_does_not_depend_on_targeting_or_weights() -> None:
    def held(**changes: Any) -> set[str]:
        found = arms_of(spec(holdout=0.1, **changes))
        return {u for u, a in found.items() if a.reason == "holdout"}

    assert held() == held(rules=(Rule("x", "eq", 1),)) == held(arms=(Arm("v1", 1), Arm("v2", 99)))


def test_a_larger_holdout_contains_the_smaller() -> None:
    small, large = (arms_of(spec(holdout=share)) for share in (0.1, 0.3))
    held = {u for u in UNITS if small[u].reason == "holdout"}
    assert held < {u for u in UNITS if large[u].reason == "holdout"}


def test_experiments_of_a_namespace_share_their_holdout() -> None:
    one, two = (
        arms_of(spec(name=name, holdout=0.1, namespace=Namespace("routing")))
        for name in ("one", "two")
    )
    held = [{u for u in UNITS if found[u].reason == "holdout"} for found in (one, two)]
    assert held[0] == held[1]


def test_disjoint_ranges_of_a_namespace_exclude_each_other_and_cover_it() -> None:
    left = arms_of(spec(name="left", namespace=Namespace("routing", 0, 3000)))
    right = arms_of(spec(name="right", namespace=Namespace("routing", 3000, 10_000)))
    assert all((left[u].arm is None) != (right[u].arm is None) for u in UNITS)
    assert sum(a.arm is not None for a in left.values()) / len(UNITS) == pytest.approx(
        0.3, abs=0.03
    )


def test_arms_are_balanced_within_namespace_and_holdout() -> None:
    found = arms_of(spec(holdout=0.3, namespace=Namespace("routing", 0, 5000)))
    counts = Counter(a.arm for a in found.values() if a.reason == "assigned")
    assert counts["v2"] / counts.total() == pytest.approx(0.25, abs=0.04)


def test_all_rules_must_match() -> None:
    targeted = spec(rules=(Rule("origin", "in", ("JFK", "LGA")), Rule("distance", "gt", 500)))
    assert assign(targeted, "N1", {"origin": "JFK", "distance": 501}).reason == "assigned"
    assert assign(targeted, "N1", {"origin": "EWR", "distance": 501}).reason == "targeting"
    assert assign(targeted, "N1", {"origin": "JFK", "distance": 500}).reason == "targeting"
    assert assign(targeted, "N1", {"origin": "JFK"}).reason == "targeting"


@pytest.mark.parametrize(
    ("op", "matching"),
    [
        ("eq", [2]),
        ("ne", [1, 3]),
        ("lt", [1]),
        ("le", [1, 2]),
        ("gt", [3]),
        ("ge", [2, 3]),
    ],
)
def test_rule_operators(op: Op, matching: list[int]) -> None:
    assert [x for x in (1, 2, 3) if matches(Rule("x", op, 2), {"x": x})] == matching


def test_membership_operators() -> None:
    values = ("a", "b", "c")
    assert [x for x in values if matches(Rule("x", "in", ("a", "c")), {"x": x})] == ["a", "c"]
    assert [x for x in values if matches(Rule("x", "not_in", ("a", "c")), {"x": x})] == ["b"]


@pytest.mark.parametrize("op", ["ne", "not_in"])
def test_a_missing_field_never_matches(op: Op) -> None:
    assert not matches(Rule("x", op, ("a",) if op == "not_in" else "a"), {})
    assert not matches(Rule("x", op, ("a",) if op == "not_in" else "a"), {"x": None})


def test_incomparable_types_are_an_error_that_names_the_field() -> None:
    with pytest.raises(ValidationError, match="'distance' is 'far'") as caught:
        matches(Rule("distance", "gt", 500), {"distance": "far"})
    assert caught.value.code == "targeting_type"
