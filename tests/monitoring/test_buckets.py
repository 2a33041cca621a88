"""Buckets by time: widening, retention, storing and taking back."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlpd.core.errors import ConfigurationError
from mlpd.core.time import DAY_US, HOUR_US, MINUTE_US
from mlpd.monitoring.buckets import BUCKET_US, BucketId, Buckets, Retention
from mlpd.monitoring.counting import CountLayout, PlainKernels
from mlpd.monitoring.reference import build_reference

PLAIN = PlainKernels()
LAYOUT = CountLayout(build_reference(np.arange(50.0)[:, None], names=["x"], kinds=["numeric"]))
SHORT = Retention(fine_us=2 * HOUR_US, hourly_us=2 * DAY_US, daily_us=5 * DAY_US)
TIMES = st.lists(st.integers(-2 * DAY_US, 9 * DAY_US), max_size=40)


def add(buckets: Buckets, time_us: int, value: float = 1.0) -> None:
    counts = buckets.counts_at(time_us)
    if counts is None:
        buckets.expired_rows += 1
    else:
        counts.add_rows(np.array([[value]]), kernels=PLAIN)


def apply(storage: dict[BucketId, bytes], buckets: Buckets) -> None:
    changes = buckets.take_changes()
    for bucket in changes.delete:
        storage.pop(bucket, None)
    storage.update(changes.put)


def test_young_rows_share_a_bucket_of_five_minutes() -> None:
    buckets = Buckets(LAYOUT)
    for minute in (0, 4, 5, 9, 12):
        add(buckets, DAY_US + minute * MINUTE_US)
    found = buckets.series(0, 9 * DAY_US, BUCKET_US)
    assert [(start - DAY_US, counts.rows) for start, counts in found] == [
        (0, 2),
        (5 * MINUTE_US, 2),
        (10 * MINUTE_US, 1),
    ]


@given(TIMES)
def test_no_row_is_lost_or_counted_twice_in_any_order_of_time(times: list[int]) -> None:
    buckets = Buckets(LAYOUT, SHORT)
    for time_us in times:
        add(buckets, time_us)
    newest_us = max(times, default=0) // BUCKET_US * BUCKET_US
    cut_us = (newest_us - SHORT.daily_us) // DAY_US * DAY_US
    assert buckets.between(-(10**18), 10**18).rows == sum(time_us >= cut_us for time_us in times)


@given(TIMES)
def test_memory_is_bounded_by_the_retention(times: list[int]) -> None:
    buckets = Buckets(LAYOUT, SHORT)
    for time_us in times:
        add(buckets, time_us)
    assert len(buckets) <= 3 * 12 + 3 * 24 + 7


def test_old_buckets_become_hours_then_days_then_nothing_with_exact_sums() -> None:
    buckets = Buckets(LAYOUT, SHORT)
    rng = np.random.default_rng(0)
    values = rng.uniform(-10, 60, 4 * 24 * 6)
    for index, value in enumerate(values):
        add(buckets, index * 10 * MINUTE_US, value)
    widths = {width for width, _ in buckets._buckets}
    assert widths == {BUCKET_US, HOUR_US, DAY_US}
    total = buckets.between(0, 4 * DAY_US)
    direct = Buckets(LAYOUT)
    counts = direct.counts_at(0)
    assert counts is not None
    counts.add_rows(values[:, None], kernels=PLAIN)
    assert total.column(0).bins.tolist() == counts.column(0).bins.tolist()
    add(buckets, 11 * DAY_US)
    assert buckets.between(0, 20 * DAY_US).rows == 1


def test_a_late_row_lands_in_the_bucket_of_its_age() -> None:
    buckets = Buckets(LAYOUT, SHORT)
    add(buckets, 4 * DAY_US)
    add(buckets, 4 * DAY_US - 5 * HOUR_US)
    add(buckets, DAY_US + 7 * HOUR_US)
    add(buckets, -9 * DAY_US)
    assert sorted(buckets._buckets) == [
        (BUCKET_US, 4 * DAY_US),
        (HOUR_US, 4 * DAY_US - 5 * HOUR_US),
        (DAY_US, DAY_US),
    ]
    assert buckets.expired_rows == 1


@given(TIMES, st.integers(1, 7))
def test_storage_that_applies_the_changes_holds_what_memory_holds(
    times: list[int], every: int
) -> None:
    buckets = Buckets(LAYOUT, SHORT)
    storage: dict[BucketId, bytes] = {}
    for index, time_us in enumerate(times):
        add(buckets, time_us)
        if index % every == 0:
            apply(storage, buckets)
    apply(storage, buckets)
    again = Buckets(LAYOUT, SHORT)
    for bucket, data in storage.items():
        again.restore(bucket, data)
    assert sorted(again._buckets) == sorted(buckets._buckets)
    everything = (-(10**18), 10**18)
    assert again.between(*everything).to_bytes() == buckets.between(*everything).to_bytes()
    assert again.take_changes().put == {}
    later = (max(times) if times else 0) + 3 * DAY_US
    for both in (again, buckets):
        add(both, later)
    assert sorted(again._buckets) == sorted(buckets._buckets)


def test_a_window_takes_the_buckets_that_begin_in_it() -> None:
    buckets = Buckets(LAYOUT)
    for minute in (0, 5, 10):
        add(buckets, minute * MINUTE_US)
    assert buckets.between(5 * MINUTE_US, 10 * MINUTE_US).rows == 1
    assert buckets.between(5 * MINUTE_US, 5 * MINUTE_US).rows == 0
    assert buckets.between(20 * MINUTE_US, 30 * MINUTE_US).rows == 0


def test_ages_that_do_not_ascend_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="ascending"):
        Retention(fine_us=DAY_US, hourly_us=HOUR_US)
