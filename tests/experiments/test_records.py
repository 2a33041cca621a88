import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlpd.core.errors import ValidationError
from mlpd.experiments.metric import Metric
from mlpd.experiments.records import UnitRecord, expose, observe, pair_of, retract

LATE, DELAY, COST = Metric("late"), Metric("delay", "mean"), Metric("cost", "ratio")
METRICS = (LATE, DELAY, COST)
OUTCOMES = st.fixed_dictionaries(
    {},
    optional={
        "late": st.sampled_from([0, 1, True, False, 0.0, 1.0]),
        "delay": st.integers(-1000, 1000),
        "cost": st.tuples(st.integers(-1000, 1000), st.integers(0, 1000)),
    },
)


def test_the_first_exposure_stays() -> None:
    record = expose(None, phase=1, arm="v1")
    assert record == UnitRecord(1, "v1")
    assert expose(record, phase=2, arm="v1") is record


def test_another_arm_marks_the_unit_as_switched_once() -> None:
    switched = expose(UnitRecord(0, "v1"), phase=1, arm="v2")
    assert switched == UnitRecord(0, "v1", switched=True)
    assert expose(switched, phase=2, arm="v2") is switched
    assert expose(switched, phase=2, arm="v1") is switched


def test_outcomes_sum_up_per_metric() -> None:
    record = UnitRecord(0, "v1")
    for late, delay, cost in ((1, 20.5, (100, 3)), (0, -5.5, (50, 2)), (1, 0.0, (0, 0))):
        record = observe(record, METRICS, {"late": late, "delay": delay, "cost": cost})
    assert record.sums == ((2.0, 3.0), (15.0, 3.0), (150.0, 5.0))


def test_unnamed_metrics_and_foreign_names_change_nothing() -> None:
    record = observe(UnitRecord(0, "v1"), METRICS, {"delay": 3.0, "clicks": 7.0})
    assert [pair_of(record, i, m) for i, m in enumerate(METRICS)] == [None, (3.0, 1.0), None]
    assert pair_of(UnitRecord(0, "v1"), 0, LATE) is None


def test_a_metric_added_later_starts_empty() -> None:
    record = observe(UnitRecord(0, "v1"), (LATE,), {"late": 1})
    assert observe(record, (LATE, DELAY), {"delay": 2}).sums == ((1.0, 1.0), (2.0, 1.0))


@given(st.lists(OUTCOMES, max_size=8), OUTCOMES)
def test_retracting_undoes_observing(outcomes: list[dict[str, Any]], last: dict[str, Any]) -> None:
    record = observe(UnitRecord(0, "v1"), METRICS, {})
    for outcome in outcomes:
        record = observe(record, METRICS, outcome)
    assert retract(observe(record, METRICS, last), METRICS, last) == record


def test_a_numerator_without_denominator_counts_for_a_ratio_only() -> None:
    record = UnitRecord(0, "v1", sums=((0.0, 0.0), (1e-17, 0.0), (5.0, 0.0)))
    assert [pair_of(record, i, m) for i, m in enumerate(METRICS)] == [None, None, (5.0, 0.0)]


def test_covariates_are_those_of_the_first_exposure() -> None:
    first = expose(None, phase=0, arm="v1", covariates=(1.5, None))
    assert expose(first, phase=1, arm="v1", covariates=(9.0, 9.0)) is first
    switched = expose(first, phase=1, arm="v2", covariates=(9.0, 9.0))
    assert (switched.switched, switched.covariates) == (True, (1.5, None))


def test_outcomes_beyond_the_bounds_count_as_the_bounds() -> None:
    bounded = Metric("delay", "mean", low=-10, high=60.5)
    cost = Metric("cost", "ratio", high=100)
    record = UnitRecord(0, "v1")
    for delay in (-50, 0, 70, 500.0):
        record = observe(record, (bounded, cost), {"delay": delay, "cost": (1000, 4)})
    assert record.sums == ((-10 + 60.5 + 60.5, 4.0), (400.0, 16.0))
    back = retract(record, (bounded, cost), {"delay": 500.0, "cost": (1000, 4)})
    assert back.sums == ((50.5, 3.0), (300.0, 12.0))


@pytest.mark.parametrize(
    ("outcome", "expected"),
    [
        ({"late": 0.5}, "0 or 1"),
        ({"late": "yes"}, "0 or 1"),
        ({"late": (1, 1)}, "0 or 1"),
        ({"delay": math.nan}, "a number up to"),
        ({"delay": math.inf}, "a number up to"),
        ({"delay": None}, "a number up to"),
        ({"delay": 10**400}, "a number up to"),
        ({"delay": -1e200}, "a number up to"),
        ({"cost": (1.0, 10**400)}, "two numbers up to"),
        ({"cost": 3.0}, "two numbers up to"),
        ({"cost": (1.0, -1.0)}, "denominator >= 0"),
        ({"cost": (math.nan, 1.0)}, "two numbers up to"),
        ({"cost": (1.0, 2.0, 3.0)}, "two numbers up to"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_wrong_outcome_names_the_metric_and_what_it_takes(
    outcome: dict[str, Any], expected: str
) -> None:
    record = UnitRecord(0, "v1")
    with pytest.raises(ValidationError, match=f"'{next(iter(outcome))}'.*{expected}") as caught:
        observe(record, METRICS, outcome)
    assert caught.value.code == "invalid_outcome"
    assert record == UnitRecord(0, "v1")
