import polars as pl
import pytest

from mlpd.cli.demo.flights import EventTables
from mlpd.cli.demo.timeline import (
    REQUEST,
    Stream,
    Timeline,
    backfill_batches,
    build_timeline,
    month_us,
)
from mlpd.core.time import DAY_US

OCTOBER_US = month_us(10)


@pytest.fixture(scope="module")
def timeline(flights: pl.DataFrame, events: EventTables) -> Timeline:
    return build_timeline(flights, events, OCTOBER_US, OCTOBER_US + 2 * DAY_US)


def make_stream(*, known_at_once: bool) -> Stream:
    columns = {"known_at": [1, 3, 3, 5], "x": ["a", "b", "c", "d"]}
    return Stream("s", columns, known_at_once=known_at_once)


def test_months_are_utc() -> None:
    assert month_us(10) == 1_380_585_600_000_000
    assert month_us(13) - month_us(12) == 31 * DAY_US


def test_stream_holds_back_what_happens_at_the_moment_itself() -> None:
    stream = make_stream(known_at_once=False)
    assert stream.take(3) == {"known_at": [1], "x": ["a"]}
    assert stream.take(3) is None
    assert stream.take(4) == {"known_at": [3, 3], "x": ["b", "c"]}


def test_stream_of_reports_gives_what_is_known_at_the_moment() -> None:
    stream = make_stream(known_at_once=True)
    assert stream.take(3) == {"known_at": [1, 3, 3], "x": ["a", "b", "c"]}
    assert stream.take(9) == {"known_at": [5], "x": ["d"]}


def test_ticks_cover_every_scheduled_flight_once(timeline: Timeline, flights: pl.DataFrame) -> None:
    wanted = flights.filter(
        pl.col("scheduled_us") >= OCTOBER_US, pl.col("scheduled_us") < OCTOBER_US + 2 * DAY_US
    )
    rows = [row for tick in timeline.ticks for row in timeline.rows(tick)]
    assert rows == wanted.select(REQUEST).rows(named=True)
    times = [tick.t_us for tick in timeline.ticks]
    assert times == sorted(set(times))


def test_labels_come_by_arrival_and_leave_cancelled_flights_out(
    timeline: Timeline, flights: pl.DataFrame
) -> None:
    assert timeline.labels == sorted(timeline.labels)
    scheduled = flights.filter(
        pl.col("scheduled_us") >= OCTOBER_US, pl.col("scheduled_us") < OCTOBER_US + 2 * DAY_US
    )
    assert len(timeline.labels) == scheduled["arr_delay"].count()
    for label in timeline.labels:
        assert label.is_late == (scheduled["arr_delay"][label.flight] > 15)
        assert label.time_us == scheduled["arrival_us"][label.flight]
        assert label.time_us > scheduled["scheduled_us"][label.flight]


def test_no_event_that_a_prediction_may_not_see_is_sent_before_it(
    flights: pl.DataFrame, events: EventTables
) -> None:
    """The daemon's rule for `at`: at or after the newest known time, after the newest event."""
    fresh = build_timeline(flights, events, OCTOBER_US, OCTOBER_US + DAY_US)
    sent = 0
    for tick in fresh.ticks:
        for stream in fresh.streams:
            batch = stream.take(tick.t_us) or {"known_at": [], "event_time": []}
            assert all(known_us <= tick.t_us for known_us in batch["known_at"])
            assert all(event_us < tick.t_us for event_us in batch["event_time"])
            sent += len(batch["known_at"])
    assert sent > 1_500


def test_backfill_and_replay_split_the_events_without_gap_or_overlap(
    flights: pl.DataFrame, events: EventTables
) -> None:
    batches = list(backfill_batches(events, 0, OCTOBER_US, 50_000))
    assert all(len(columns["known_at"]) <= 50_000 for _, columns in batches)
    assert sum(len(c["known_at"]) for s, c in batches if s == "planes") == events.planes.height
    replayed = build_timeline(flights, events, OCTOBER_US, month_us(13))
    for stream in replayed.streams:
        before = sum(len(c["known_at"]) for s, c in batches if s == stream.source)
        whole = events.by_source()[stream.source].height
        assert before + len(stream.columns["known_at"]) == whole
