"""The pending list between the loop and the counting thread."""

import threading

import numpy as np
import pytest

from mlpd.core.time import DAY_US, HOUR_US, MINUTE_US
from mlpd.monitoring.buckets import Retention
from mlpd.monitoring.counting import CountLayout, Counts, PlainKernels
from mlpd.monitoring.live import LiveCounts
from mlpd.monitoring.reference import build_reference

RNG = np.random.default_rng(0)
PROFILE = build_reference(
    RNG.normal(size=(300, 2)), names=["a", "b"], kinds=["numeric"] * 2, scores=RNG.random(300)
)
LAYOUT = CountLayout(PROFILE)
EVER = (-(10**18), 10**18)


def build(**options: int) -> LiveCounts:
    return LiveCounts(LAYOUT, PlainKernels(), **options)


def test_rows_and_blocks_are_counted_in_the_bucket_of_their_time() -> None:
    live = build()
    vectors, scores = RNG.normal(size=(9, 2)), RNG.random(9)
    for index in range(6):
        live.append(vectors[index], scores[index], DAY_US + index * 2 * MINUTE_US)
    live.append_block(vectors[6:], scores[6:], DAY_US)
    assert live.pending_rows == 9
    counted = live.drain()
    assert live.pending_rows == 0
    starts: dict[int, int] = {}
    for start_us, rows in counted:
        starts[start_us - DAY_US] = starts.get(start_us - DAY_US, 0) + rows
    assert starts == {0: 6, 5 * MINUTE_US: 2, 10 * MINUTE_US: 1}
    expected = Counts(LAYOUT)
    expected.add_rows(np.column_stack([vectors, scores]), kernels=PlainKernels())
    found = live.between(*EVER)
    for index in range(3):
        assert found.column(index).bins.tolist() == expected.column(index).bins.tolist()
        assert found.column(index).mean == pytest.approx(expected.column(index).mean)


def test_draining_nothing_counts_nothing() -> None:
    live = build()
    assert live.drain() == []
    live.append_block(np.empty((0, 2)), np.empty(0), DAY_US)
    assert live.drain() == []
    assert live.between(*EVER).rows == 0


def test_what_finds_the_list_full_is_dropped_and_counted() -> None:
    live = build(pending_max=5)
    for _ in range(8):
        live.append(np.zeros(2), 0.5, DAY_US)
    assert (live.pending_rows, live.dropped_rows) == (5, 3)
    live.append_block(np.zeros((6, 2)), np.zeros(6), DAY_US)
    assert (live.pending_rows, live.dropped_rows) == (5, 9)
    live.drain()
    live.append(np.zeros(2), 0.5, DAY_US)
    live.drain()
    assert live.between(*EVER).rows == 6


def test_rows_out_of_order_and_past_retention() -> None:
    live = LiveCounts(LAYOUT, PlainKernels(), retention=Retention(HOUR_US, HOUR_US, DAY_US))
    for days in (9, 3, 9, 8, 1):
        live.append(np.zeros(2), 0.5, days * DAY_US + 1)
    live.drain()
    assert live.between(*EVER).rows == 3  # a day back from the newest, on a day's boundary
    live.append(np.zeros(2), 0.5, DAY_US)
    live.drain()
    assert live.expired_rows == 1
    assert live.between(9 * DAY_US, 10 * DAY_US).rows == 2


def test_flags_of_some_rows_are_counted() -> None:
    live = build()
    live.append(np.zeros(2), 0.5, DAY_US)
    live.append(np.zeros(2), 0.5, DAY_US, np.array([1, 2], np.uint8))
    live.drain()
    found = live.between(*EVER)
    assert (found.column(0).stale, found.column(1).defaulted) == (1, 1)
    assert (found.column(0).defaulted, found.column(2).stale) == (0, 0)


def test_a_profile_without_scores_counts_features_alone() -> None:
    profile = build_reference(RNG.normal(size=(30, 2)), names=["a", "b"], kinds=["numeric"] * 2)
    live = LiveCounts(CountLayout(profile), PlainKernels())
    live.append(np.zeros(2), 0.5, DAY_US)
    live.append_block(np.zeros((3, 2)), np.zeros(3), DAY_US)
    live.drain()
    assert live.between(*EVER).rows == 4


def test_a_restart_goes_on_from_the_stored_buckets() -> None:
    first, second = build(), build()
    first.append(np.zeros(2), 0.5, DAY_US)
    first.drain()
    for bucket, data in first.take_changes().put.items():
        second.restore(bucket, data)
    second.append(np.zeros(2), 0.5, DAY_US)
    second.drain()
    assert second.between(*EVER).rows == 2
    assert [rows.rows for _, rows in second.series(DAY_US, 2 * DAY_US, HOUR_US)] == [2]


def test_every_row_is_counted_once_while_appending_and_draining_race() -> None:
    live = build(pending_max=100_000)
    vector = np.zeros(2)

    def serve() -> None:
        for index in range(3000):
            live.append(vector, 0.5, DAY_US + index)
            if index % 10 == 0:
                live.append_block(np.zeros((2, 2)), np.zeros(2), DAY_US)

    thread = threading.Thread(target=serve)
    thread.start()
    while thread.is_alive():
        live.drain()
    thread.join()
    live.drain()
    assert live.between(*EVER).rows == 3600
    assert live.pending_rows == 0
