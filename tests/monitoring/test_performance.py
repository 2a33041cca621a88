"""Cohorts by prediction day: coverage, maturity, revisions, union."""

import json
import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlpd.core.errors import ConfigurationError
from mlpd.core.time import DAY_US
from mlpd.monitoring.delays import Delays
from mlpd.monitoring.live import ServedKey
from mlpd.monitoring.performance import (
    CohortKey,
    Errors,
    Outcome,
    PerformanceTable,
    cohort_of,
    is_mature,
)

V1 = ServedKey("delay", 1, "flight-risk", "champion")
V2 = ServedKey("delay", 2, "flight-risk", "challenger")


def test_a_prediction_belongs_to_the_utc_day_it_was_made() -> None:
    assert cohort_of(V1, 3 * DAY_US + 5) == CohortKey(V1, 3 * DAY_US)
    assert cohort_of(V1, 4 * DAY_US - 1) == CohortKey(V1, 3 * DAY_US)


def test_coverage_is_the_labelled_share() -> None:
    table, key = PerformanceTable(), CohortKey(V1, 0)
    table.add_predictions(key, 4)
    table.record(key, 0.9, None, Outcome(1))
    table.record(key, 0.2, None, Outcome(0))
    table.record(key, float("nan"), None, Outcome(0))
    found = table.report([key])
    assert (found.predictions, found.labelled, found.unscored) == (4, 3, 1)
    assert found.coverage == 0.75
    assert found.performance.auc == 1.0
    json.dumps(found.to_dict(), allow_nan=False)


def test_an_empty_or_unknown_cohort_has_no_metrics() -> None:
    found = PerformanceTable().report([CohortKey(V1, 0)])
    assert (found.predictions, found.labelled, found.coverage) == (0, 0, None)
    assert found.performance.auc is None


@given(
    st.lists(
        st.tuples(
            st.integers(0, 9),  # prediction
            st.integers(0, 5),  # label time
            st.sampled_from([0, 1]),
        ),
        max_size=60,
    )
)
def test_the_last_label_time_wins_however_labels_arrive(
    arrivals: list[tuple[int, int, int]],
) -> None:
    key = CohortKey(V1, 0)
    scores = [0.05 + prediction / 10 for prediction in range(10)]
    table, known = PerformanceTable(), dict[int, tuple[int, int]]()
    for prediction, time, label in arrivals:  # what the caller does with its label table
        old = known.get(prediction)
        if old is None or time >= old[0]:
            before = None if old is None else Outcome(old[1], old[0])
            table.record(key, scores[prediction], before, Outcome(label, time))
            known[prediction] = (time, label)
    expected = PerformanceTable()
    for prediction, (time, label) in known.items():
        expected.record(key, scores[prediction], None, Outcome(label, time))
    found, whole = table.report([key]), expected.report([key])
    assert replace(found, revisions=0) == whole
    assert found.labelled == len(known)


def test_revisions_are_counted_and_a_repeated_label_is_none() -> None:
    table, key = PerformanceTable(), CohortKey(V1, 0)
    table.record(key, 0.5, None, Outcome(1))
    table.record(key, 0.5, Outcome(1), Outcome(1))
    table.record(key, 0.5, Outcome(1), Outcome(0))
    table.record(key, 2.0, None, Outcome(0))
    table.record(key, 2.0, Outcome(0), Outcome(1))
    table.record(key, 2.0, Outcome(1), None)
    found = table.report([key])
    assert (found.revisions, found.labelled, found.unscored) == (3, 1, 0)
    assert found.performance.positives == 0


def test_the_union_of_days_has_its_own_auc_and_versions_stay_apart() -> None:
    table = PerformanceTable()
    monday, tuesday = CohortKey(V1, 0), CohortKey(V1, DAY_US)
    for key, score, label in [(monday, 0.2, 0), (monday, 0.3, 1), (tuesday, 0.6, 0),
                              (tuesday, 0.7, 1), (CohortKey(V2, 0), 0.1, 1)]:  # fmt: skip
        table.record(key, score, None, Outcome(label))
    assert table.report([monday]).performance.auc == 1.0
    assert table.report([monday, tuesday]).performance.auc == 0.75  # not the mean of 1 and 1
    assert table.report([CohortKey(V2, 0)]).performance.rows == 1
    assert table.keys() == [monday, CohortKey(V2, 0), tuesday]


def test_a_late_label_of_a_forgotten_day_changes_nothing_else() -> None:
    table = PerformanceTable(cohorts_max=2)
    for day in (5, 6, 1):
        table.record(CohortKey(V1, day * DAY_US), 0.4, None, Outcome(1))
    assert table.keys() == [CohortKey(V1, day * DAY_US) for day in (5, 6)]


def test_room_for_no_cohort_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="cohorts_max"):
        PerformanceTable(cohorts_max=0)


@given(
    st.lists(
        st.tuples(st.floats(-1e6, 1e6), st.floats(-1e6, 1e6), st.booleans()),
        min_size=1,
        max_size=40,
    )
)
def test_errors_are_what_plain_python_gives_and_leave_no_residue(
    rows: list[tuple[float, float, bool]],
) -> None:
    table, key = PerformanceTable(), CohortKey(V1, 0)
    for score, label, _ in rows:
        table.record(key, score, None, Outcome(label))
    for score, label, taken_back in rows:
        if taken_back:
            table.record(key, score, Outcome(label), None)
    kept = [score - label for score, label, taken_back in rows if not taken_back]
    found = table.report([key]).errors
    if not kept:
        assert found == Errors(0, None, None, None)
        return
    assert found.rows == len(kept)
    assert found.rmse == pytest.approx(math.sqrt(sum(e * e for e in kept) / len(kept)), abs=1e-4)
    assert found.mae == pytest.approx(sum(map(abs, kept)) / len(kept), abs=1e-9)
    assert found.bias == pytest.approx(sum(kept) / len(kept), abs=1e-9)


def test_labels_that_are_numbers_have_errors_and_no_classes() -> None:
    table, key = PerformanceTable(), CohortKey(V1, 0)
    table.add_predictions(key, 3)
    for score, label in ((10.0, 12.5), (3.0, 3.0), (1e300, 0.0)):  # its square overflows
        table.record(key, score, None, Outcome(label))
    found = table.report([key])
    assert (found.labelled, found.unscored, found.performance.rows) == (3, 3, 0)
    assert (found.errors.rows, found.errors.mae, found.errors.bias) == (2, 1.25, -1.25)
    json.dumps(found.to_dict(), allow_nan=False)


@given(st.lists(st.integers(-10, 10**13), min_size=1, max_size=50), st.sampled_from([0.5, 0.95]))
def test_delay_quantiles_are_right_to_nine_percent(delays_us: list[int], share: float) -> None:
    delays = Delays()
    for delay_us in (*delays_us, 5):
        delays.add(delay_us)
    delays.add(5, -1)
    ordered = sorted(max(delay_us, 0) / 1e6 for delay_us in delays_us)
    exact = ordered[math.ceil(share * len(ordered)) - 1]
    found = delays.quantile_s(share)
    assert found is not None
    assert exact + 1 < (found + 1) * (1 + 1e-9)
    assert found + 1 <= (exact + 1) * 1.0906
    assert Delays().quantile_s(share) is None


def test_a_day_is_mature_once_all_of_it_is_older_than_labels_take() -> None:
    table, today, older = PerformanceTable(), CohortKey(V1, 9 * DAY_US), CohortKey(V1, 0)
    assert table.maturity_s([older]) is None
    assert not is_mature(0, None, 99 * DAY_US)
    for hours in range(100):
        table.record(older, 0.5, None, Outcome(1.0, hours * 3_600_000_000))
    table.record(today, 0.5, None, Outcome(1.0, 0))
    maturity_s = table.maturity_s([older, today])
    assert maturity_s is not None
    assert 94 * 3600 <= maturity_s < 95 * 3600 * 1.1
    end_us = DAY_US + int(maturity_s * 1e6)
    assert is_mature(0, maturity_s, end_us + 1)
    assert not is_mature(0, maturity_s, end_us - 1_000_000)
    assert not is_mature(today.day_us, maturity_s, 10 * DAY_US)
