"""Days of October as they happened: every five minutes the flights due to leave, then the news.

python conf/tour/replay.py FIRST LAST
"""

import os
import sys
from datetime import UTC, datetime, timedelta

import polars as pl

from mlpd.client import Client

FIELDS = ["carrier", "origin", "dest", "tailnum", "sched_hour", "day_of_week", "distance"]
SOURCES = ["weather_reports", "departures", "arrivals"]
STEP = timedelta(minutes=5)


def between(frame: pl.DataFrame, column: str, start: datetime) -> pl.DataFrame:
    """Return the rows of one step."""
    bounds = (int(time.timestamp() * 1e6) for time in (start, start + STEP))
    return frame.filter(pl.col(column).is_between(*bounds, closed="left"))


first, last = (datetime(2013, 10, int(day), tzinfo=UTC) for day in sys.argv[1:3])
sources = {name: pl.read_parquet(f"october/{name}.parquet") for name in SOURCES}
flights = pl.read_parquet("october/flights.parquet")
client = Client(os.environ.get("MLPD_URL", "http://127.0.0.1:8700"))
labels = []
now = first
while now < last + timedelta(days=1):
    due = between(flights, "scheduled_us", now)
    if len(due):
        answer = client.predict("flight-risk", due.select(FIELDS).to_dicts(), at=now)
        labels += [
            {"prediction_id": served["prediction_id"], "label": delay > 15, "label_time": landed}  # noqa: PLR2004 - minutes
            for served, delay, landed in zip(
                answer["predictions"], due["arr_delay"], due["arrival_us"], strict=True
            )
            if delay is not None  # cancelled or diverted: no label
        ]
    news = {name: between(events, "known_at", now).to_dicts() for name, events in sources.items()}
    if any(news.values()):
        client.events.send_many({name: rows for name, rows in news.items() if rows})
    now += STEP
sys.stdout.write(f"{len(labels)} labels: {client.feedback(labels)}\n")
