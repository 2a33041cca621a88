"""Ages, statuses, SLO shares and watermarks, and how they show in /metrics."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlpd.monitoring.exposition import encode
from mlpd.monitoring.freshness import AGE_BUCKETS_S, PENDING_AGES, Freshness
from mlpd.monitoring.instruments import MAX_BUCKETS
from mlpd.monitoring.metrics import Registry
from mlpd.monitoring.metrics_lint import lint


@given(st.lists(st.one_of(st.floats(-5, 200), st.just(math.nan), st.sampled_from([60.0, 100.0]))))
def test_rows_are_counted_by_status_and_slo(ages: list[float]) -> None:
    view = Freshness(Registry()).view("weather", ttl_s=100.0, slo_s=60.0)
    half = len(ages) // 2
    for age in ages[:half]:
        view.observe(age)
    view.observe_many(np.array(ages[half:]))
    found = view.report()
    known = [max(age, 0.0) for age in ages if not math.isnan(age)]
    assert found.missing == len(ages) - len(known)
    assert found.stale == sum(age > 100 for age in known)
    assert found.present == sum(age <= 100 for age in known)
    share = sum(age <= 60 for age in known) / len(ages) if ages else None
    assert found.slo_share == share
    assert found.age_max_s == max(known, default=None)
    assert found.age_mean_s == (pytest.approx(sum(known) / len(known)) if known else None)


def test_a_view_without_ttl_or_slo_is_never_stale_nor_late() -> None:
    view = Freshness(Registry()).view("plane")
    view.observe(1e9)
    assert (view.report().stale, view.report().present, view.report().slo_share) == (0, 1, None)


def test_pending_ages_are_bounded() -> None:
    view = Freshness(Registry()).view("plane")
    for _ in range(2 * PENDING_AGES + 1):
        view.observe(1.0)
    assert len(view._pending) == 1
    assert view.report().present == 2 * PENDING_AGES + 1


def test_the_watermark_never_goes_back_and_the_lag_is_of_the_last_batch() -> None:
    freshness = Freshness(Registry())
    freshness.note_ingest("departures", event_time_us_max=5_000_000, lag_us_max=900)
    freshness.note_ingest("departures", event_time_us_max=4_000_000, lag_us_max=100)
    assert freshness.sources() == {"departures": (5_000_000, 100)}


def test_metrics_show_ages_statuses_slo_and_sources() -> None:
    registry = Registry()
    freshness = Freshness(registry)
    weather = freshness.view("weather", ttl_s=10_800, slo_s=3600)
    weather.observe(1800.0)
    weather.observe(math.nan)
    assert freshness.view("weather") is weather
    freshness.note_ingest("observations", event_time_us_max=1_500_000, lag_us_max=250_000)
    text = encode(registry, "openmetrics").decode()
    for line in (
        'mlpd_feature_reads_total{view="weather",status="present"} 1.0',
        'mlpd_feature_reads_total{view="weather",status="missing"} 1.0',
        'mlpd_feature_slo_ratio{view="weather"} 0.5',
        'mlpd_source_watermark_timestamp_seconds{source="observations"} 1.5',
        'mlpd_source_lag_seconds{source="observations"} 0.25',
    ):
        assert line in text
    assert 'mlpd_feature_age_seconds_count{view="weather"} 1' in encode(registry, "text").decode()
    assert lint(registry) == []
    freshness.forget_view("weather")
    freshness.forget_view("never")
    assert 'view="weather"' not in encode(registry, "text").decode()


def test_age_buckets_fit_a_histogram() -> None:
    assert len(AGE_BUCKETS_S) <= MAX_BUCKETS
