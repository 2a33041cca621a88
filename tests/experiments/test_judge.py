"""What follows from a look: metric guardrails and automatic promotion."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from bench.simulations import cell_of
from mlpd.experiments.analysis import ExperimentState, Phase
from mlpd.experiments.guardrails import Guardrail
from mlpd.experiments.judge import judge
from mlpd.experiments.metric import Metric
from mlpd.experiments.promotion import Gain, Promotion, winner
from mlpd.experiments.spec import Arm, ExperimentSpec

SPEC = ExperimentSpec("e", "unit", (Arm("a"), Arm("b")), (Metric("late", better="lower"),), 2000)


def state(rates: dict[str, float], n: int = 2000, **changes: Any) -> ExperimentState:
    spec = replace(SPEC, **changes)
    found = ExperimentState(spec, (Phase(0, spec.weights),))
    for arm, rate in rates.items():
        late = (np.arange(n) < rate * n).astype(float)
        found.cells[0, "late", arm] = cell_of(late, np.ones(n))
        found.exposed[0, arm] = n
        found.standing["kept"] += n
    return found


def rail(margin: float = 0.0) -> tuple[Guardrail, ...]:
    return (Guardrail("metric", metric="late", margin=margin),)


def test_an_arm_whose_metric_is_worse_is_stopped() -> None:
    (breach,) = judge(state({"a": 0.2, "b": 0.3}, guardrails=rail())).breaches
    assert (breach.arm, breach.guardrail) == ("b", "late")
    assert "worse than a by 0.1, at least 0.0" in breach.reason


@pytest.mark.parametrize(
    ("rates", "margin"),
    [({"a": 0.2, "b": 0.21}, 0.0), ({"a": 0.2, "b": 0.3}, 0.1), ({"a": 0.3, "b": 0.2}, 0.0)],
)
def test_what_is_allowed_or_better_or_chance_is_not(rates: dict[str, float], margin: float) -> None:
    assert judge(state(rates, guardrails=rail(margin))).breaches == ()


def test_an_arm_without_traffic_is_not_stopped_again() -> None:
    arms = (Arm("a", 1.0), Arm("b", 0.0))
    stopped = state({"a": 0.2, "b": 0.3}, guardrails=rail(), arms=arms)
    assert judge(stopped).breaches == ()


def test_an_arm_is_promoted_when_harm_beyond_the_margin_is_excluded() -> None:
    for margin, promoted in ((0.0, False), (0.01, False), (0.06, True)):
        found = judge(state({"a": 0.2, "b": 0.2}, promotion=Promotion(margin=margin))).promoted
        assert (found is not None) == promoted
    found = judge(state({"a": 0.3, "b": 0.2}, promotion=Promotion())).promoted
    assert found is not None
    assert found[0] == "b"
    assert "late gains 0.1 over a, at least 0.0" in found[1]


def test_nobody_is_promoted_under_a_sample_ratio_alarm_or_a_breach() -> None:
    lost = state({"a": 0.3, "b": 0.2}, promotion=Promotion())
    lost.exposed[0, "b"] = 1_500
    assert judge(lost).sample_ratio_alarm
    assert judge(lost).promoted is None
    both = state({"a": 0.2, "b": 0.3}, promotion=Promotion(margin=1), guardrails=rail())
    assert judge(both).breaches
    assert judge(both).promoted is None


def test_whoever_has_all_traffic_already_stays() -> None:
    arms = (Arm("a", 0.0), Arm("b", 1.0))
    assert judge(state({"a": 0.3, "b": 0.2}, promotion=Promotion(), arms=arms)).promoted is None


def test_the_one_that_gains_most_wins() -> None:
    gains = {"b": Gain(0.01, 0.02, 0.03), "c": Gain(-0.01, 0.05, 0.1), "d": Gain(0.005, 0.03, 0.1)}
    assert winner(gains, 0.0) == "d"
    assert winner(gains, 0.02) == "c"
    assert winner({}, 1.0) is None
