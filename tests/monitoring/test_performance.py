"""Cohorts by prediction day: coverage, revisions, union, storage."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlpd.core.errors import ConfigurationError
from mlpd.core.time import DAY_US
from mlpd.monitoring.live import ServedKey
from mlpd.monitoring.performance import CohortKey, PerformanceTable, cohort_of

V1 = ServedKey("delay", 1, "flight-risk", "champion")
V2 = ServedKey("delay", 2, "flight-risk", "challenger")


def test_a_prediction_belongs_to_the_utc_day_it_was_made() -> None:
    assert cohort_of(V1, 3 * DAY_US + 5) == CohortKey(V1, 3 * DAY_US)
    assert cohort_of(V1, 4 * DAY_US - 1) == CohortKey(V1, 3 * DAY_US)


def test_coverage_is_the_labelled_share() -> None:
    table, key = PerformanceTable(), CohortKey(V1, 0)
    table.add_predictions(key, 4)
    table.record(key, 0.9, None, 1)
    table.record(key, 0.2, None, 0)
    table.record(key, float("nan"), None, 0)
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
            table.record(key, scores[prediction], None if old is None else old[1], label)
            known[prediction] = (time, label)
    expected = PerformanceTable()
    for prediction, (_, label) in known.items():
        expected.record(key, scores[prediction], None, label)
    assert table.report([key]).performance == expected.report([key]).performance
    assert table.report([key]).labelled == len(known)


def test_revisions_are_counted_and_a_repeated_label_is_none() -> None:
    table, key = PerformanceTable(), CohortKey(V1, 0)
    table.record(key, 0.5, None, 1)
    table.record(key, 0.5, 1, 1)
    table.record(key, 0.5, 1, 0)
    table.record(key, 2.0, None, 0)
    table.record(key, 2.0, 0, 1)
    table.record(key, 2.0, 1, None)
    found = table.report([key])
    assert (found.revisions, found.labelled, found.unscored) == (3, 1, 0)
    assert found.performance.positives == 0


def test_the_union_of_days_has_its_own_auc_and_versions_stay_apart() -> None:
    table = PerformanceTable()
    monday, tuesday = CohortKey(V1, 0), CohortKey(V1, DAY_US)
    for key, score, label in [(monday, 0.2, 0), (monday, 0.3, 1), (tuesday, 0.6, 0),
                              (tuesday, 0.7, 1), (CohortKey(V2, 0), 0.1, 1)]:  # fmt: skip
        table.record(key, score, None, label)
    assert table.report([monday]).performance.auc == 1.0
    assert table.report([monday, tuesday]).performance.auc == 0.75  # not the mean of 1 and 1
    assert table.report([CohortKey(V2, 0)]).performance.rows == 1
    assert table.keys() == [monday, CohortKey(V2, 0), tuesday]


def test_storage_that_applies_the_changes_holds_every_cohort() -> None:
    table, storage = PerformanceTable(cohorts_max=3), dict[CohortKey, bytes]()
    for day in range(6):
        key = CohortKey(V1, day * DAY_US)
        table.add_predictions(key, 2)
        table.record(key, 0.4, None, day % 2)
        if day % 2:
            changes = table.take_changes()
            for gone in changes.delete:
                storage.pop(gone, None)
            storage.update(changes.put)
    again = PerformanceTable()
    for key, data in storage.items():
        again.restore(key, data)
    assert again.keys() == table.keys() == [CohortKey(V1, day * DAY_US) for day in (3, 4, 5)]
    assert again.report(again.keys()) == table.report(table.keys())
    assert again.take_changes().put == {}


def test_a_late_label_of_a_forgotten_day_changes_nothing_else() -> None:
    table = PerformanceTable(cohorts_max=2)
    for day in (5, 6, 1):
        table.record(CohortKey(V1, day * DAY_US), 0.4, None, 1)
    assert table.keys() == [CohortKey(V1, day * DAY_US) for day in (5, 6)]
    assert CohortKey(V1, DAY_US) not in table.take_changes().put


def test_room_for_no_cohort_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="cohorts_max"):
        PerformanceTable(cohorts_max=0)
