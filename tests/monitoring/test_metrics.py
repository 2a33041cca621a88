"""Counters, gauges, histograms, the series budget and the collectors."""

import threading
from bisect import bisect_left

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlpd.core.errors import ConflictError, ValidationError
from mlpd.monitoring.instruments import (
    LATENCY_BUCKETS_S,
    PENDING_OBSERVATIONS,
    Descriptor,
    Histogram,
    Kind,
)
from mlpd.monitoring.metrics import Collected, Registry
from mlpd.monitoring.metrics_lint import lint, lint_descriptors


def test_counter_adds_and_gauge_replaces() -> None:
    registry = Registry()
    events = registry.counter("mlpd_events_total", "Events.", labels=("source",))
    events.labels("a").inc()
    events.labels("a").inc(2.5)
    events.labels("b").inc()
    depth = registry.gauge("mlpd_queue_depth", "Depth.").labels()
    depth.set(7)
    depth.inc(-2)
    assert {values: child.value for values, child in events.children()} == {
        ("a",): 3.5,
        ("b",): 1.0,
    }
    assert depth.value == 5


@given(st.lists(st.floats(-1e3, 1e3), max_size=300))
def test_histogram_counts_like_a_plain_bisect(values: list[float]) -> None:
    histogram = Histogram((-5.0, 0.0, 0.5, 100.0))
    for value in values:
        histogram.observe(value)
    counts = [0] * 5
    for value in values:
        counts[bisect_left((-5.0, 0.0, 0.5, 100.0), value)] += 1
    state = histogram.snapshot()
    assert list(state.counts) == counts
    assert state.count == len(values)
    assert state.sum == pytest.approx(sum(values), abs=1e-6)


def test_histogram_holds_a_bounded_number_of_pending_values() -> None:
    histogram = Histogram()
    for index in range(3 * PENDING_OBSERVATIONS + 5):
        histogram.observe(index * 1e-6)
        assert len(histogram._pending) < PENDING_OBSERVATIONS
    assert histogram.snapshot().count == 3 * PENDING_OBSERVATIONS + 5


def test_histogram_takes_an_array_of_any_shape() -> None:
    histogram = Histogram((1.0, 2.0))
    histogram.observe_many(np.array([[0.5, 1.0], [1.5, 9.0]]))
    assert histogram.snapshot().counts == (2, 1, 1)


def test_nothing_is_lost_when_threads_observe_and_scrape_together() -> None:
    registry = Registry()
    counter = registry.counter("mlpd_hits_total", "Hits.").labels()
    histogram = registry.histogram("mlpd_age_seconds", "Age.", unit="seconds").labels()

    def work() -> None:
        for _ in range(20_000):
            counter.inc()
            histogram.observe(0.25)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        histogram.snapshot()
    for thread in threads:
        thread.join()
    assert counter.value == 80_000
    assert histogram.snapshot().count == 80_000
    assert histogram.snapshot().sum == 20_000.0


def test_label_sets_beyond_the_budget_land_on_other_and_are_counted() -> None:
    registry = Registry(max_series=10)
    hits = registry.counter("mlpd_hits_total", "Hits.", labels=("route", "code"))
    for index in range(50):
        hits.labels(f"r{index}", "200").inc()
    children = dict(hits.children())
    assert len(children) == 11
    assert children["other", "other"].value == 40
    dropped = dict(registry._dropped.children())
    assert dropped["mlpd_hits_total",].value == 40


def test_a_histogram_costs_as_many_series_as_it_exposes() -> None:
    registry = Registry(max_series=2 * (len(LATENCY_BUCKETS_S) + 3))
    family = registry.histogram("mlpd_age_seconds", "Age.", labels=("view",), unit="seconds")
    for view in "abc":
        family.labels(view).observe(1.0)
    assert [values for values, _ in family.children()] == [("a",), ("b",), ("other",)]


def test_removing_a_child_gives_its_room_back() -> None:
    registry = Registry(max_series=1)
    family = registry.gauge("mlpd_model_loaded", "Loaded.", labels=("model",))
    family.labels("a").set(1)
    family.remove("a")
    family.remove("never-there")
    family.labels("b").set(1)
    assert [values for values, _ in family.children()] == [("b",)]


def test_a_failing_collector_is_counted_and_hides_no_other(
    caplog: pytest.LogCaptureFixture,
) -> None:
    registry = Registry()
    good = Collected(Descriptor("mlpd_up", "gauge", "Up."), [((), 1.0)])

    def broken() -> list[Collected]:
        raise RuntimeError("no")

    registry.add_collector("broken", broken)
    registry.add_collector("good", lambda: [good])
    assert registry.collect() == [good]
    assert dict(registry._failures.children())["broken",].value == 1
    assert "broken" in caplog.text


def test_a_collector_cannot_break_the_budget_nor_repeat_a_family() -> None:
    registry = Registry(max_series=3)
    registry.gauge("mlpd_up", "Up.").labels().set(1)
    many = Collected(
        Descriptor("mlpd_drift", "gauge", "Drift.", ("feature",)),
        [((str(index),), 0.0) for index in range(9)],
    )
    again = Collected(Descriptor("mlpd_up", "gauge", "Up."), [((), 2.0)])
    registry.add_collector("drift", lambda: [many, again])
    collected = registry.collect()
    assert [len(item.samples) for item in collected] == [2]
    assert dict(registry._dropped.children())["mlpd_drift",].value == 7
    assert dict(registry._failures.children())["drift",].value == 1


@pytest.mark.parametrize(
    ("name", "kind", "labels", "unit"),
    [
        ("mlpd_hits", "counter", (), ""),
        ("mlpd build_info", "info", (), ""),
        ("9lives", "gauge", (), ""),
        ("mlpd_age", "gauge", (), "seconds"),
        ("mlpd_age", "gauge", ("le",), ""),
        ("mlpd_age", "gauge", ("__x",), ""),
    ],
)
def test_malformed_declarations_are_refused(
    name: str, kind: Kind, labels: tuple[str, ...], unit: str
) -> None:
    with pytest.raises(ValidationError):
        Descriptor(name, kind, "Help.", labels, unit)


def test_declaring_twice_wrong_labels_and_wrong_bounds_are_errors() -> None:
    registry = Registry()
    family = registry.counter("mlpd_hits_total", "Hits.", labels=("route",))
    with pytest.raises(ConflictError, match="declared twice"):
        registry.counter("mlpd_hits_total", "Hits.")
    with pytest.raises(ValidationError, match="has labels"):
        family.labels("a", "b")
    for bounds in ((), (1.0, 1.0), (2.0, 1.0), tuple(range(15))):
        with pytest.raises(ValidationError, match="ascending"):
            registry.histogram("mlpd_x_seconds", "X.", unit="seconds", bounds=bounds)


def test_lint_finds_each_broken_rule_and_spares_good_names() -> None:
    good = [
        Descriptor("mlpd_predict_latency_seconds", "histogram", "Time.", ("route",), "seconds"),
        Descriptor("mlpd_log_bytes_total", "counter", "Bytes.", (), "bytes"),
        Descriptor("mlpd_build_info", "info", "Build.", ("python",)),
        Descriptor("nv_inference_queue_duration_us", "gauge", "no full stop"),
    ]
    assert lint_descriptors(good) == []
    bad = [
        Descriptor("predict_total", "counter", "No prefix."),
        Descriptor("mlpd_latency_ms", "gauge", "Scaled."),
        Descriptor("mlpd_latency_seconds", "gauge", "Unit not declared."),
        Descriptor("mlpd_rows_total", "gauge", "Not a counter."),
        Descriptor("mlpd_rows_count", "gauge", "Reserved."),
        Descriptor("mlpd_rows", "gauge", "No full stop"),
        Descriptor("mlpd_served", "gauge", "An id.", ("prediction_id",)),
    ]
    complaints = lint_descriptors(bad)
    assert [line.partition(":")[0] for line in complaints] == [item.name for item in bad]


def test_the_registry_passes_its_own_lint() -> None:
    assert lint(Registry()) == []
