"""The formulas of the capacity page, with results small enough to reckon by hand."""

from typing import Any

import pytest

from bench.results import load
from bench.results.capacity import DRIFT_BUCKETS, SHOP, Load, Measured, size
from mlpd.core.time import DAY_US, HOUR_US
from mlpd.monitoring.buckets import BUCKET_US, Retention


def case(**figures: float) -> dict[str, Any]:
    return {"ours": {name: {"median": value} for name, value in figures.items()}}


@pytest.fixture
def measured() -> Measured:
    predict = {"by key, 4 rows, 16 concurrent": case(requests_per_s=100.0)}
    ingest = {"1000 rows, 4 writers": case(rows_per_s=1_000.0)}
    footprint = {
        "prediction": case(features=10, bytes=200, page_bytes=300),
        "label": case(bytes=30, page_bytes=50),
        "HTTP, predict 1 rows, JSON": case(in_bytes=300, out_bytes=350),
        "HTTP, predict 20 rows, JSON": case(in_bytes=2_200, out_bytes=4_150),
        "training run": case(rows=100_000, peak_mb=220),
        "training run, more rows": case(rows=200_000, peak_mb=240),
    }
    cases = {"predict": predict, "ingest": ingest, "footprint": footprint}
    return Measured({name: {"cases": found} for name, found in cases.items()})


def test_peaks_are_means_times_peak() -> None:
    load = Load(users=86_400, predictions=8, events=2, rows=4)
    assert (load.events_per_s, load.predictions_per_s, load.requests_per_s) == (6.0, 24.0, 6.0)


def test_predictions_and_events_share_the_loop(measured: Measured) -> None:
    load = Load(users=86_400, predictions=40, events=100, rows=4)
    assert measured.shards(load) == pytest.approx((30 / 100 + 300 / 1_000) / 0.6)


def test_bytes_on_the_wire_are_of_a_request_and_of_its_rows(measured: Measured) -> None:
    assert measured.wire("in") == (200.0, 100.0)
    assert measured.wire("out") == (150.0, 200.0)
    load = Load(users=86_400, predictions=4, events=0, rows=4)  # three requests a second
    assert measured.bandwidth(load) == (3 * 600.0, 3 * 950.0)


def test_a_training_run_lies_on_the_line_through_the_measured_ones(measured: Measured) -> None:
    assert measured.training_line() == (pytest.approx(200.0), pytest.approx(2.5))
    assert measured.training_mb(1_000_000) == pytest.approx(400.0)


def test_a_logged_prediction_counts_with_its_label_in_pages(measured: Measured) -> None:
    assert measured.logged_bytes == 350.0


def test_the_number_of_drift_buckets_is_that_of_the_retention() -> None:
    kept = Retention()
    hourly = (kept.hourly_us - kept.fine_us) // HOUR_US
    daily = (kept.daily_us - kept.hourly_us) // DAY_US
    assert kept.fine_us // BUCKET_US + hourly + daily == DRIFT_BUCKETS


def test_the_saved_results_give_the_shop_a_number_of_shards() -> None:
    assert Measured(load()).shards(SHOP) > 0.0


def test_bytes_have_decimal_units() -> None:
    assert [size(n) for n in (12.0, 1_500.0, 2.5e9, 3e12)] == ["12 B", "1.5 kB", "2.5 GB", "3 TB"]
