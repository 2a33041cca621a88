"""Gates bound by bound: what passes, what fails, what waits, and why."""

from typing import Any

import pytest

from mlpd.training.gates import Evidence, close_report, gate_report, judge_shadow, shadow_rows

BESIDE = {"version": 1, "gains": {"auc": {"low": -0.01, "value": 0.02}}}
LATENCY = {"p99_us": 30.0, "champion_p99_us": 20.0}
DRIFT = {"share": 0.25, "rows": 500, "drifted": ["amount"]}
WHOLE = Evidence({"auc": 0.7, "rmse": 2.0}, True, BESIDE, LATENCY, DRIFT)
SHADOW = {"n": 900, "disagreement_interval": [0.01, 0.03], "mean_interval": [-0.02, 0.01]}


def verdict(gate: dict[str, float], evidence: Evidence) -> tuple[Any, Any]:
    [check] = gate_report(gate, evidence)["checks"]
    return check["passed"], check["value"]


@pytest.mark.parametrize(
    ("name", "value", "least"),
    [
        ("auc", 0.7, True),
        ("rmse", 2.0, False),
        ("auc_over_champion", -0.01, True),
        ("latency_p99_us", 30.0, False),
        ("latency_ratio", 1.5, False),
        ("drifted_features", 0.25, False),
    ],
)
def test_a_bound_is_inclusive_and_of_one_side(name: str, value: float, least: bool) -> None:
    outside, inside = (-1e-9, 1e-9) if not least else (1e-9, -1e-9)
    assert verdict({name: value}, WHOLE) == (True, value)
    assert verdict({name: value + inside}, WHOLE) == (True, value)
    assert verdict({name: value + outside}, WHOLE) == (False, value)


@pytest.mark.parametrize(
    "name",
    ["auc_over_champion", "latency_ratio", "drifted_features", "shadow_rows"],
)
def test_what_is_beside_a_champion_passes_without_one(name: str) -> None:
    assert verdict({name: 1.0}, Evidence({})) == (True, None)


@pytest.mark.parametrize(
    ("name", "evidence", "why"),
    [
        ("precision", WHOLE, None),
        ("latency_p99_us", Evidence({}), "it was not measured"),
        ("latency_ratio", Evidence({}, True, {"version": 1, "why": "it moved"}), "it moved"),
        ("drifted_features", Evidence({}, True), "it was not measured"),
        ("drifted_features", Evidence({}, True, drift={"rows": 3, "why": "served 3"}), "served 3"),
        ("logloss_over_champion", WHOLE, "the champion can't be compared by this metric"),
    ],
)
def test_what_cannot_be_told_fails_and_says_why(
    name: str, evidence: Evidence, why: str | None
) -> None:
    [check] = gate_report({name: 1e9}, evidence)["checks"]
    assert (check["passed"], check["value"], check.get("why")) == (False, None, why)


GATE = {"auc": 0.6, "shadow_rows": 500, "shadow_disagreement": 0.05, "shadow_difference": 0.03}


def test_a_shadow_that_has_yet_to_run_is_waited_for() -> None:
    report = gate_report(GATE, WHOLE)
    assert (report["passed"], report["waiting"], shadow_rows(report)) == (False, True, 500)
    failed = gate_report({**GATE, "auc": 0.9}, WHOLE)
    assert (failed["passed"], failed["waiting"], shadow_rows(failed)) == (False, False, None)
    alone = gate_report(GATE, Evidence({"auc": 0.7}))
    assert (alone["passed"], alone["waiting"]) == (True, False)


@pytest.mark.parametrize(
    ("change", "failing"),
    [
        ({}, []),
        ({"n": 499}, ["shadow_rows"]),
        ({"disagreement_interval": [0.0, 0.051]}, ["shadow_disagreement"]),
        ({"mean_interval": [-0.031, 0.0]}, ["shadow_difference"]),
        ({"mean_interval": None}, ["shadow_difference"]),
    ],
)
def test_a_shadow_is_judged_by_the_far_ends_of_its_intervals(
    change: dict[str, Any], failing: list[str]
) -> None:
    report = judge_shadow(gate_report(GATE, WHOLE), SHADOW | change)
    assert [check["metric"] for check in report["checks"] if not check["passed"]] == failing
    assert (report["passed"], report["waiting"]) == (not failing, False)


def test_a_closed_report_keeps_what_was_judged() -> None:
    report = close_report(gate_report(GATE, WHOLE), "superseded")
    assert (report["passed"], report["waiting"]) == (False, False)
    told = {check["metric"]: (check["passed"], check.get("why")) for check in report["checks"]}
    assert told["auc"] == (True, None)
    assert {told[name] for name in GATE if name != "auc"} == {(False, "superseded")}
