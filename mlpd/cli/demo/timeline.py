"""What happens when: events, predictions and labels of a period, laid out for a replay.

Months are UTC's, as the daemon's cohorts are.  Everything is plain Python values in order of time,
so that a moment of the replay costs a few slices.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final, NamedTuple

import polars as pl

from mlpd.cli.demo.flights import EventTables
from mlpd.core.time import SECOND_US

LATE_MINUTES: Final = 15
REQUEST: Final = (
    *("carrier", "origin", "dest", "tailnum"),
    *("sched_hour", "day_of_week", "distance"),
)
"""Entity keys and request fields of a prediction, as the service flight_risk takes them."""

Values = dict[str, list[Any]]
"""Columns of equal length by name."""


class Tick(NamedTuple):
    """One moment of scheduled departures: the flights at positions first up to stop, exclusive."""

    t_us: int
    first: int
    stop: int


class Label(NamedTuple):
    """What became of the flight at position `flight`, known at `time_us`."""

    time_us: int
    flight: int
    is_late: bool


@dataclass(slots=True)
class Stream:
    """Events of one source in order of `known_at`, handed out from front to back.

    `known_at_once`: whether what is known at t counts at t.  Weather does; a departure at the very
    minute of a scheduled departure comes after its prediction, since features see events before t.
    """

    source: str
    columns: Values
    known_at_once: bool
    taken: int = 0

    def take(self, t_us: int) -> Values | None:
        """Return the events that became known up to `t_us` and were not taken before."""
        bisect = bisect_right if self.known_at_once else bisect_left
        start, stop = self.taken, bisect(self.columns["known_at"], t_us, self.taken)
        if start == stop:
            return None
        self.taken = stop
        return {name: values[start:stop] for name, values in self.columns.items()}


@dataclass(frozen=True, slots=True)
class Timeline:
    """A period laid out: `ticks` in order of time, `flights` by column, `labels` by arrival."""

    ticks: list[Tick]
    flights: Values
    labels: list[Label]
    streams: list[Stream]

    def rows(self, tick: Tick) -> list[dict[str, Any]]:
        """Return the flights of a tick as rows of a prediction request."""
        columns = (self.flights[name][tick.first : tick.stop] for name in REQUEST)
        return [dict(zip(REQUEST, row, strict=True)) for row in zip(*columns, strict=True)]


def month_us(month: int) -> int:
    """Return the beginning of a month of 2013 in microseconds UTC; 13 is the next January."""
    year, month = 2013 + (month - 1) // 12, (month - 1) % 12 + 1
    return int(datetime(year, month, 1, tzinfo=UTC).timestamp()) * SECOND_US


def build_timeline(
    flights: pl.DataFrame, events: EventTables, start_us: int, end_us: int, *, days: int = 31
) -> Timeline:
    """Return the flights scheduled in [start, end) and all events known since `start_us`.

    `flights` as `read_flights` gives them; `days`: flights of the first so many days of a month
    alone.  A flight's features are left to the daemon.
    """
    time_us = pl.col("scheduled_us")
    scheduled = flights.filter(
        time_us.is_between(start_us, end_us, closed="left"),
        pl.from_epoch(time_us, "us").dt.day() <= days,
    )
    pool: dict[Any, Any] = {}
    return Timeline(
        ticks=list(_ticks(scheduled["scheduled_us"].to_list())),
        flights=_columns(scheduled.select(REQUEST), pool),
        labels=_labels(scheduled),
        streams=[
            Stream(
                source,
                _columns(_between(frame, start_us, None), pool),
                known_at_once=source == "weather_reports",
            )
            for source, frame in events.by_source().items()
        ],
    )


def backfill_batches(
    events: EventTables, start_us: int, end_us: int, rows: int
) -> Iterator[tuple[str, Values]]:
    """Yield (source, columns) of at most `rows` events each: those known in [start, end).

    The register of aircraft has no date and always comes along.
    """
    for source, frame in events.by_source().items():
        known = frame if source == "planes" else _between(frame, start_us, end_us)
        for part in known.iter_slices(rows):
            yield source, part.to_dict(as_series=False)


def _between(frame: pl.DataFrame, start_us: int, end_us: int | None) -> pl.DataFrame:
    """Return the events known in [start, end)."""
    known = pl.col("known_at")
    return frame.filter(known >= start_us, True if end_us is None else known < end_us)


def _columns(frame: pl.DataFrame, pool: dict[Any, Any]) -> Values:
    """Return the columns; texts and times that are equal are one object: 60 MB less a quarter.

    Integers and floats must not be mixed up (1 == 1.0), so numbers of measure aren't pooled.
    """
    return {
        name: [pool.setdefault(value, value) for value in values]
        if frame[name].dtype in (pl.String, pl.Int64)
        else values
        for name, values in frame.to_dict(as_series=False).items()
    }


def _ticks(scheduled_us: list[int]) -> Iterator[Tick]:
    first = 0
    while first < len(scheduled_us):
        t_us = scheduled_us[first]
        stop = bisect_right(scheduled_us, t_us, first)
        yield Tick(t_us, first, stop)
        first = stop


def _labels(scheduled: pl.DataFrame) -> list[Label]:
    landed = scheduled.with_row_index("flight").filter(pl.col("arr_delay").is_not_null())
    rows = landed.select("arrival_us", "flight", pl.col("arr_delay") > LATE_MINUTES).rows()
    return sorted(Label(*row) for row in rows)
