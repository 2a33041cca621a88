from datetime import UTC, datetime
from zoneinfo import ZoneInfo

import polars as pl
import pytest

from mlpd.cli.demo import flights as module
from mlpd.cli.demo.flights import EventTables, data_folder
from mlpd.core.errors import UnavailableError
from mlpd.core.time import HOUR_US, MINUTE_US


def utc_us(text: str) -> int:
    return int(datetime.fromisoformat(text).timestamp()) * 1_000_000


def clock(time_us: int, zone: str) -> int:
    """Return HHMM on a zone's clock, by the standard library's own zone files."""
    local = datetime.fromtimestamp(time_us / 1e6, UTC).astimezone(ZoneInfo(zone))
    return local.hour * 100 + local.minute


def one(flights: pl.DataFrame, **values: object) -> dict[str, object]:
    found = flights.filter(*(pl.col(name) == value for name, value in values.items()))
    assert found.height == 1
    return found.row(0, named=True)


def test_every_flight_is_there_in_order_of_its_scheduled_departure(flights: pl.DataFrame) -> None:
    assert flights.height == 336_776
    assert flights["scheduled_us"].is_sorted()
    assert flights["scheduled_us"].null_count() == 0
    assert flights["scheduled_us"][0] == utc_us("2013-01-01T10:15:00+00:00")


def test_scheduled_time_shows_the_schedules_clock_in_new_york(flights: pl.DataFrame) -> None:
    local = pl.from_epoch("scheduled_us", "us").dt.replace_time_zone("UTC")
    local = local.dt.convert_time_zone("America/New_York")
    shown = local.dt.hour().cast(pl.Int64) * 100 + local.dt.minute()
    assert flights.filter(shown != pl.col("sched_dep_time")).height == 0
    assert flights.filter(pl.col("sched_hour") != pl.col("sched_dep_time") // 100).height == 0


def test_day_of_week_is_iso_and_local(flights: pl.DataFrame) -> None:
    # Tuesday, 1 January, 23:59 in New York is Wednesday in UTC.
    late = flights.filter(pl.col("scheduled_us") == utc_us("2013-01-02T04:59:00+00:00"))
    assert late.height >= 1
    assert set(late["day_of_week"]) == {2}
    assert set(flights["day_of_week"]) == set(range(1, 8))


def test_cancelled_flights_never_depart_nor_arrive(flights: pl.DataFrame) -> None:
    cancelled = flights.filter(pl.col("departure_us").is_null())
    assert cancelled.height == 8_255
    assert cancelled["arrival_us"].null_count() == cancelled.height


def test_departure_is_the_schedule_plus_the_delay(flights: pl.DataFrame) -> None:
    delay = (pl.col("departure_us") - pl.col("scheduled_us")) / MINUTE_US
    assert flights.filter(delay != pl.col("dep_delay")).height == 0


def test_every_landed_flight_was_in_the_air_for_its_air_time(flights: pl.DataFrame) -> None:
    elapsed = (pl.col("arrival_us") - pl.col("departure_us")) / MINUTE_US
    taxi = flights.select(taxi=elapsed - pl.col("air_time"))["taxi"].drop_nulls()
    assert len(taxi) == 327_346
    assert taxi.min() >= 5  # type: ignore[operator]  # a number
    assert taxi.max() <= 240  # type: ignore[operator]  # a number


def test_arrival_is_the_scheduled_arrival_plus_the_delay(flights: pl.DataFrame) -> None:
    """A second way to the same instant: in whole minutes of the clock, modulo a day."""
    late = (pl.col("arr_time") // 100 * 60 + pl.col("arr_time") % 100) - (
        pl.col("sched_arr_time") // 100 * 60 + pl.col("sched_arr_time") % 100
    )
    off = (late - pl.col("arr_delay").cast(pl.Int64)) % (24 * 60)
    odd = flights.filter(off != 0)
    # Only where the clocks change between the two: no more than a night's flights.
    assert odd.height <= 1


@pytest.mark.parametrize(
    ("dest", "zone"),
    [
        ("IAH", "America/Chicago"),
        ("LAX", "America/Los_Angeles"),
        ("HNL", "Pacific/Honolulu"),
        ("PHX", "America/Phoenix"),
        ("DEN", "America/Denver"),
        ("SJU", "America/Puerto_Rico"),
        ("BQN", "America/Puerto_Rico"),
        ("ANC", "America/Anchorage"),
        ("BOS", "America/New_York"),
    ],
)
def test_arrival_shows_arr_time_on_the_destinations_clock(
    flights: pl.DataFrame, dest: str, zone: str
) -> None:
    landed = flights.filter(pl.col("dest") == dest, pl.col("arrival_us").is_not_null())
    sample = landed.gather_every(max(1, landed.height // 200))
    for row in sample.iter_rows(named=True):
        assert clock(row["arrival_us"], zone) == row["arr_time"] % 2400


def test_flight_over_midnight_arrives_the_next_day(flights: pl.DataFrame) -> None:
    red_eye = flights.filter(pl.col("arr_time") < pl.col("sched_dep_time"), pl.col("dest") == "SJU")
    assert red_eye.height > 500
    assert red_eye.filter(pl.col("arrival_us") <= pl.col("departure_us")).height == 0


def test_time_2400_is_the_midnight_that_ends_the_day(flights: pl.DataFrame) -> None:
    at_midnight = flights.filter(pl.col("arr_time") == 2400, pl.col("dest") == "BOS")
    assert at_midnight.height > 0
    for arrival_us in at_midnight["arrival_us"]:
        assert clock(arrival_us, "America/New_York") == 0


def test_arrival_when_clocks_are_set_back_leaves_time_for_the_flight(
    flights: pl.DataFrame,
) -> None:
    flight = one(
        flights,
        origin="JFK",
        dest="LAX",
        departure_us=utc_us("2013-11-03T02:17:00+00:00"),
    )
    assert flight["arrival_us"] == utc_us("2013-11-03T08:14:00+00:00")


def test_arrival_in_the_hour_that_spring_skips_is_on_the_old_clock(flights: pl.DataFrame) -> None:
    flight = one(
        flights,
        origin="JFK",
        dest="PBI",
        departure_us=utc_us("2013-03-10T04:06:00+00:00"),
    )
    assert flight["arrival_us"] == utc_us("2013-03-10T07:03:00+00:00")


def test_no_flight_arrives_before_its_scheduled_departure(flights: pl.DataFrame) -> None:
    """Else its label would come before its prediction."""
    assert flights.filter(pl.col("arrival_us") <= pl.col("scheduled_us")).height == 0


def test_diverted_flights_bring_no_arrival(events: EventTables, flights: pl.DataFrame) -> None:
    assert events.departures.height == 328_521
    assert events.arrivals.height == 327_346
    assert events.arrivals.height == flights["arr_delay"].count()


def test_events_come_in_the_order_in_which_they_became_known(events: EventTables) -> None:
    for frame in events.by_source().values():
        assert frame["known_at"].is_sorted()
        assert frame["known_at"].null_count() == frame["event_time"].null_count() == 0
        assert frame.filter(pl.col("known_at") < pl.col("event_time")).height == 0


def test_weather_is_known_an_hour_after_its_hour_began(events: EventTables) -> None:
    weather = events.weather_reports
    assert weather.height == 26_115
    assert set(weather["known_at"] - weather["event_time"]) == {HOUR_US}
    first = weather.filter(pl.col("origin") == "EWR").row(0, named=True)
    assert first["event_time"] == utc_us("2013-01-01T06:00:00+00:00")


def test_events_carry_the_columns_of_their_sources(events: EventTables) -> None:
    from mlpd.cli.definitions import conf_folder, load_folder  # noqa: PLC0415 - this test alone

    sources = load_folder(conf_folder())["sources"]
    frames = events.by_source()
    assert frames.keys() == sources.keys()
    for name, frame in frames.items():
        source = sources[name]
        assert set(frame.columns) == {source["timestamp"], "known_at", *source["schema"]}


def test_missing_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PACKAGE", "no_such_package_of_flights")
    with pytest.raises(UnavailableError) as caught:
        data_folder()
    assert caught.value.code == "missing_extra"
    assert "mlpd[demo]" in caught.value.hint
