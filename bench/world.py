"""The data of the serving scenarios: flights made up from a seed, and a daemon that knows them."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from bench.daemon import Served, serve
from mlpd.cli.definitions import conf_folder, load_folder
from mlpd.client import Client
from mlpd.core.errors import MlpdError
from mlpd.core.time import DAY_US, HOUR_US, MINUTE_US

SERVICE: Final = "flight_risk"
JOB: Final = "flight-risk"
ROUTE: Final = "flight-risk"
DAYS: Final = 20
CARRIERS: Final = 16
ORIGINS: Final = ("EWR", "JFK", "LGA")
DESTINATIONS: Final = 100
TAILS: Final = 3_000

Columns = dict[str, list[Any]]


@dataclass(frozen=True, slots=True)
class World:
    """A running daemon with flights in it."""

    daemon: Served
    client: Client


def build_events(flights: int, *, now_us: int, seed: int = 1) -> dict[str, Columns]:
    """Return events of the last `DAYS` days by source, in time order, as columns for a backfill.

    Delays depend on carrier, origin and hour, so that there is something to learn.
    """
    rng = np.random.default_rng(seed)
    scheduled = np.sort(now_us - HOUR_US - rng.integers(0, DAYS * DAY_US, flights))
    carrier, origin = rng.integers(0, CARRIERS, flights), rng.integers(0, 3, flights)
    hour = scheduled // HOUR_US % 24
    risk = 0.7 * carrier + 4.0 * origin + 0.8 * hour
    dep_delay = np.round(rng.gamma(2.0, 1.0 + risk / 4.0) - 6.0)
    arr_delay = dep_delay + np.round(rng.normal(0.0, 8.0, flights))
    departed = np.minimum(scheduled + (dep_delay * MINUTE_US).astype(np.int64), now_us - MINUTE_US)
    arrived = np.minimum(departed + 2 * HOUR_US, now_us - MINUTE_US)
    keys = {
        "carrier": [f"C{i:02}" for i in carrier.tolist()],
        "origin": [ORIGINS[i] for i in origin.tolist()],
        "dest": [f"D{i:03}" for i in rng.integers(0, DESTINATIONS, flights).tolist()],
        "tailnum": [f"N{i:05}" for i in rng.integers(0, TAILS, flights).tolist()],
    }
    distance = rng.integers(90, 2_600, flights).astype(np.float64).tolist()
    return {
        "departures": {**_times(departed), **keys, "dep_delay": dep_delay.tolist()},
        "arrivals": {
            **_times(arrived),
            **keys,
            "arr_delay": arr_delay.tolist(),
            "scheduled_departure": scheduled.tolist(),
            "sched_hour": hour.tolist(),
            "day_of_week": (scheduled // DAY_US % 7).tolist(),
            "distance": distance,
        },
        "weather_reports": _weather(rng, now_us),
        "planes": _planes(rng, now_us),
    }


def build_requests(count: int, *, seed: int = 2) -> list[dict[str, Any]]:
    """Return rows of entity keys and request fields, as `flight_risk` takes them."""
    rng = np.random.default_rng(seed)
    return [
        {
            "carrier": f"C{rng.integers(CARRIERS):02}",
            "origin": ORIGINS[rng.integers(3)],
            "dest": f"D{rng.integers(DESTINATIONS):03}",
            "tailnum": f"N{rng.integers(TAILS):05}",
            "sched_hour": int(rng.integers(5, 23)),
            "day_of_week": int(rng.integers(7)),
            "distance": float(rng.integers(90, 2_600)),
        }
        for _ in range(count)
    ]


@contextmanager
def open_world(
    directory: Path, flights: int, *, model: bool = False, **settings: Any
) -> Iterator[World]:
    """Start a daemon in `directory` on flights; `model` trains one and opens a route to it."""
    with (
        serve(directory, **settings) as daemon,
        Client(daemon.url, timeout_s=300.0) as client,
    ):
        fill(client, flights)
        if model:
            train(client)
        yield World(daemon, client)


def fill(client: Client, flights: int) -> None:
    """Apply the definitions of conf/flights and import made-up events."""
    client.apply(load_folder(conf_folder()))
    for source, columns in build_events(flights, now_us=time.time_ns() // 1000).items():
        for start in range(0, len(columns["event_time"]), 20_000):
            batch = {name: values[start : start + 20_000] for name, values in columns.items()}
            client.events.send(source, batch, all_or_nothing=True)


def train(client: Client) -> None:
    """Train a version, make it the champion and open the route that serves it."""
    train_version(client)
    client.models.move_alias(JOB, "champion", 1, why="bench")
    arms = [{"name": "champion", "model": f"{JOB}@champion"}]
    client.routes.put(ROUTE, {"service": SERVICE, "arms": arms})


def train_version(client: Client) -> None:
    """Train one more version; it is deployed nowhere."""
    run = client.runs.wait(client.runs.start(JOB, deploy="none")["run_id"])
    if run["state"] != "succeeded":
        raise MlpdError(f"the model could not be trained: {run['error']}", code="bench_failed")


def _times(event_us: "np.ndarray[Any, np.dtype[np.int64]]") -> Columns:
    return {"event_time": event_us.tolist(), "known_at": event_us.tolist()}


def _weather(rng: np.random.Generator, now_us: int) -> Columns:
    hours = np.arange(now_us - (DAYS + 1) * DAY_US, now_us - HOUR_US, HOUR_US)
    times = np.repeat(hours, len(ORIGINS))
    names = ("temp", "visib", "precip", "wind_speed", "pressure")
    values = {name: rng.gamma(3.0, 3.0, len(times)).round(2).tolist() for name in names}
    known = {"event_time": times.tolist(), "known_at": (times + HOUR_US).tolist()}
    return {**known, "origin": list(ORIGINS) * len(hours), **values}


def _planes(rng: np.random.Generator, now_us: int) -> Columns:
    times = np.full(TAILS, now_us - (DAYS + 1) * DAY_US)
    return {
        **_times(times),
        "tailnum": [f"N{i:05}" for i in range(TAILS)],
        "year": rng.integers(1980, 2013, TAILS).tolist(),
        "seats": rng.integers(20, 300, TAILS).tolist(),
        "engines": rng.integers(1, 4, TAILS).tolist(),
    }
