"""Files for the README's tour: history/ (January to September) and october/ (its first two weeks).

python conf/tour/prepare.py
"""

from datetime import UTC, datetime
from pathlib import Path

import polars as pl

from mlpd.cli.demo.flights import build_events, data_folder, read_flights

START, END = (int(datetime(2013, 10, day, tzinfo=UTC).timestamp() * 1e6) for day in (1, 15))
HISTORY, OCTOBER = Path("history"), Path("october")

HISTORY.mkdir(exist_ok=True)
OCTOBER.mkdir(exist_ok=True)
folder = data_folder()
flights = read_flights(folder)
for source, events in build_events(folder, flights).by_source().items():
    known = pl.col("known_at")
    events.filter(known < START).write_parquet(HISTORY / f"{source}.parquet")
    news = events.filter(known.is_between(START, END, closed="left"))
    news.write_parquet(OCTOBER / f"{source}.parquet")
scheduled = pl.col("scheduled_us").is_between(START, END, closed="left")
flights.filter(scheduled).write_parquet(OCTOBER / "flights.parquet")
