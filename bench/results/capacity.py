"""Figures of mlpd/docs/capacity.md, reckoned from the saved results by the page's own formulas."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bench.results.table import median, number, table

DAY_S, DAYS = 86_400, 30
MAP_BYTES = 64 << 30
PAGE_BYTES, PAGE_HEAD_BYTES = 4_096, 16
DRIFT_BUCKETS = 2 * 24 * 12 + 12 * 24 + 386
"""Of 5 minutes for 2 days, of an hour to day 14, of a day to day 400."""
USED_SHARE, RAM_SHARE = 0.6, 0.5
MACHINE_PRICE, DISK_PRICE, TRAFFIC_PRICE = 60.0, 0.10, 0.09
MACHINE_RAM_GB = 8.0

_BYTES = (
    ("log, departures, in batches", "event in the log, 20,000 to a request: 4 strings, 1 float"),
    ("log, arrivals, in batches", "the same of 4 strings, 5 numbers"),
    ("log, departures, 10 to a request", "4 strings, 1 float, 10 to a request"),
    ("log, departures, 1 to a request", "the same, alone"),
    ("segment, departures", "event in a segment: 4 strings, 1 float"),
    ("segment, arrivals", "4 strings, 5 numbers"),
    ("online, aircraft", "latest-value row of 3 integers, key included"),
    ("online, weather", "of 5 floats"),
    ("online, tail_arrivals", "window view, 4 aggregates over 1 h, 1 d, 7 d: an event a day"),
    ("online, destination_arrivals", "30 events a day"),
    ("online, origin_arrivals", "1,000 events a day"),
    ("prediction", "prediction, with its vector and three request fields"),
    ("label", "label"),
    ("bucket of drift counts", "bucket of drift counts: one version, route and arm"),
    ("idempotency key", "idempotency key, kept a day"),
    ("model version", "model version with its files, at most 200 trees x 63 leaves"),
)

Results = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class Load:
    """What users do: `users` a day, `predictions` and `events` of each, `rows` in a request."""

    users: float
    predictions: float
    events: float
    rows: int
    peak: float = 3.0

    @property
    def events_per_s(self) -> float:
        """Events a second at peak."""
        return self.users * self.events * self.peak / DAY_S

    @property
    def predictions_per_s(self) -> float:
        """Predictions a second at peak."""
        return self.users * self.predictions * self.peak / DAY_S

    @property
    def requests_per_s(self) -> float:
        """Predict requests a second at peak."""
        return self.predictions_per_s / self.rows


FLIGHTS = Load(900, 1, 2 + 72 / 900, 1)
FLIGHTS_YEAR, LABELS_YEAR, TRAINING_ROWS = 336_776, 329_000, 244_453
SHOP = Load(1e6, 20, 30, 4)
SHOP_ARTICLES, SHOP_LATEST_BYTES, SHOP_TRAINING_ROWS = 1e5, 32 + 8 + 8 * 10 + 20, 2e6


class Measured:
    """What the formulas need of the saved results."""

    def __init__(self, results: Results) -> None:
        self._results = results
        self.footprint = results["footprint"]["cases"]
        self.width = int(self.bytes("prediction", "features"))

    def rate(self, scenario: str, case: str, figure: str = "requests_per_s") -> float:
        """Return the median rate of a case."""
        return median(self._results[scenario]["cases"][case], figure)

    def bytes(self, case: str, figure: str = "bytes") -> float:
        """Return a figure of the footprint."""
        return median(self.footprint[case], figure)

    def pages(self, case: str) -> float | None:
        """Return bytes in LMDB's pages; None for what isn't in LMDB or wasn't told apart."""
        found = "page_bytes" in self.footprint[case]["ours"]
        return self.bytes(case, "page_bytes") if found else None

    def predict_rate(self, rows: int) -> float:
        """Return R_p: requests a second of `rows` each, 16 at once."""
        return self.rate("predict", f"by key, {rows} rows, 16 concurrent")

    @property
    def event_rate(self) -> float:
        """Return R_e: rows a second, 1,000 to a request."""
        return self.rate("ingest", "1000 rows, 4 writers", "rows_per_s")

    @property
    def online_pages(self) -> float:
        """Return pages over bytes of the online rows."""
        return self.bytes("online, pages", "page_bytes") / self.bytes("online, pages")

    @property
    def logged_bytes(self) -> float:
        """Return bytes of a logged prediction and its label, in pages."""
        return self.bytes("prediction", "page_bytes") + self.bytes("label", "page_bytes")

    @property
    def segment_bytes(self) -> float:
        """Return bytes of an event in a segment, the mean of two sources."""
        return (self.bytes("segment, departures") + self.bytes("segment, arrivals")) / 2

    def wire(self, direction: str) -> tuple[float, float]:
        """Return bytes of a request or an answer: of each, and of each row in it."""
        one, twenty = (
            self.bytes(f"HTTP, predict {rows} rows, JSON", f"{direction}_bytes") for rows in (1, 20)
        )
        each = (twenty - one) / 19
        return one - each, each

    def training_mb(self, rows: float) -> float:
        """Return the memory of a training run, on the line through the two that were measured."""
        base, slope = self.training_line()
        return base + slope * rows * self.width * 8 / 1e6

    def training_line(self) -> tuple[float, float]:
        """Return MB of an empty run, and how often it holds its rows x F x 8 bytes."""
        (n, a), (m, b) = (
            (self.bytes(case, "rows") * self.width * 8 / 1e6, self.bytes(case, "peak_mb"))
            for case in ("training run", "training run, more rows")
        )
        slope = (b - a) / (m - n)
        return a - slope * n, slope

    def shards(self, load: Load) -> float:
        """Return how many daemons the loads of the loop need."""
        busy = load.requests_per_s / self.predict_rate(load.rows)
        return (busy + load.events_per_s / self.event_rate) / USED_SHARE

    def bandwidth(self, load: Load) -> tuple[float, float]:
        """Return bytes a second in and out at peak."""
        found = [fixed + each * load.rows for fixed, each in (self.wire("in"), self.wire("out"))]
        return load.requests_per_s * found[0], load.requests_per_s * found[1]


def rates(results: Results) -> str:
    """Return what one daemon answered over HTTP."""
    rows = [
        (f"{scenario}: {name}", *_rates(name, case))
        for scenario, kind in (("predict", "by key"), ("read", ""), ("ingest", ""))
        for name, case in results[scenario]["cases"].items()
        if name.startswith(kind)
    ]
    shown = table(("", "requests/s", "rows/s", "p50, p99", "over its bare limit"), rows)
    m = Measured(results)
    times = number(m.event_rate / m.rate("ingest", "1 rows, 64 writers", "rows_per_s"))
    why = f"a row alone costs {times} times a row among a thousand"
    return f"{shown}\n\n**Send events in batches**: {why}."


def _rates(name: str, case: Mapping[str, Any]) -> tuple[str, ...]:
    found = re.search(r"(\d+) (?:rows|entities)", name)
    assert found is not None
    rate = median(case, "requests_per_s")
    p50, p99 = (number(median(case, figure)) for figure in ("p50_ms", "p99_ms"))
    share = number(case["ratio"]["median"])
    return number(rate), number(rate * int(found[1])), f"{p50}, {p99} ms", share


def bytes_table(results: Results) -> str:
    """Return the bytes that things take."""
    m = Measured(results)
    rows = [_bytes_row(m, what, case) for case, what in _BYTES]
    return table(("what", "bytes", "in pages"), rows)


def _bytes_row(m: Measured, what: str, case: str) -> tuple[str, str, str]:
    pages = m.pages(case)
    return what, number(m.bytes(case)), "" if pages is None else number(pages)


def formulas(results: Results) -> str:
    """Return the formulas of disk and network with the constants that were measured."""
    m = Measured(results)
    rest = number(m.bytes("prediction") - 8 * m.width)
    factor = m.bytes("prediction", "page_bytes") / m.bytes("prediction")
    bucket = number(m.bytes("bucket of drift counts") / m.width)
    (fixed_in, each_in), (fixed_out, each_out) = m.wire("in"), m.wire("out")
    request = f"{number(fixed_in)} + {number(each_in)} b"
    answer = f"{number(fixed_out)} + {number(each_out)} b"
    lines = [
        f"segments        = U e T x bytes in a segment ({number(m.segment_bytes)})",
        f"online          = {number(m.online_pages)} x sum over views of n_v s_v",
        f"prediction log  = U p T x ({rest} + 8 F) x {number(factor)}",
        f"labels          = U p T x {number(m.bytes('label', 'page_bytes'))}",
        f"drift counts    = m x {DRIFT_BUCKETS:,} x ({bucket} F, rounded up to pages of 4 KiB)",
        f"bandwidth       = requests/s x ({request}) in, x ({answer}) out",
    ]
    held = MAP_BYTES / m.logged_bytes / 1e6
    return (
        "\n".join(f"    {line}" for line in lines)
        + f"\n\nWith {m.width} features the default map of 64 GiB holds "
        f"{number(held)} million labelled predictions."
    )


def memory(results: Results) -> str:
    """Return the memory of daemons and of a training run."""
    m, cases = Measured(results), results["start"]["cases"]
    empty, ten = (median(cases[name], "idle_mb") for name in ("empty", "10 models"))
    base, slope = m.training_line()
    events = sum(m.bytes(case, "rows") for case in m.footprint if case.startswith("log, "))
    rows = [
        ("daemon, empty, 3 s after its start", f"{number(empty)} MB"),
        ("the same with ten models behind ten routes", f"{number(ten)} MB"),
        (
            f"after {number(events)} events, a training run and some thousand predictions",
            f"{number(m.bytes('daemon, one route', 'resident_mb'))} MB",
        ),
        (
            "training run, in a child that ends",
            f"{number(base)} MB + {number(slope)} x rows x F x 8 B",
        ),
    ]
    for case in ("training run", "training run, more rows"):
        what = f"measured, {number(m.bytes(case, 'rows'))} x {m.width}"
        rows.append((what, f"{number(m.bytes(case, 'peak_mb'))} MB"))
    return table(("", ""), rows)


def flights(results: Results) -> str:
    """Return the first example."""
    m = Measured(results)
    year = LABELS_YEAR * m.logged_bytes
    events = f"{number(FLIGHTS.events_per_s)} events/s, {number(FLIGHTS.requests_per_s)} requests/s"
    training = f"{number(m.training_mb(TRAINING_ROWS))} MB for {TRAINING_ROWS:,} x {m.width}"
    segments = size(2 * FLIGHTS_YEAR * m.segment_bytes)
    rows = [
        ("peak", f"{events}: {number(m.shards(FLIGHTS))} daemons"),
        ("online", f"{size(m.bytes('online, pages', 'page_bytes'))} in pages"),
        ("segments", f"{FLIGHTS_YEAR:,} flights a year, 2 events: {segments} a year"),
        ("prediction log with labels", f"{LABELS_YEAR:,} a year: {size(year)} a year"),
        ("the real need", f"a training run: {training}"),
    ]
    return table(("", ""), rows)


def shop(results: Results) -> str:
    """Return the second example, and what it costs."""
    m = Measured(results)
    return f"{table(('', 'computed', ''), _shop_rows(m))}\n\n{_shop_cost(m)}"


def _shop_rows(m: Measured) -> list[tuple[str, str, str]]:
    (users, articles), (segments, log) = _shop_online(m), _shop_daily(m)
    window, busy = _shop_windows(m)
    into, out = (f"{size(each)}/s" for each in m.bandwidth(SHOP))
    events, requests = number(SHOP.events_per_s), number(SHOP.requests_per_s)
    busy_predict = f"{requests} / {number(m.predict_rate(SHOP.rows))}"
    busy_events = f"{events} / {number(m.event_rate)}"
    pages = number(m.online_pages)
    return [
        ("events at peak", "10^6 x 30 x 3 / 86,400", f"{events} /s"),
        (
            "predictions at peak",
            "10^6 x 20 x 3 / 86,400",
            f"{number(SHOP.predictions_per_s)} /s in {requests} requests/s",
        ),
        (
            "shards by rates",
            f"({busy_predict} + {busy_events}) / {USED_SHARE}",
            number(m.shards(SHOP)),
        ),
        (
            "online, users",
            f"{pages} x 10^6 x ({SHOP_LATEST_BYTES} + {number(window)}) B",
            size(users),
        ),
        (
            "online, articles",
            f"{pages} x 10^5 x ({SHOP_LATEST_BYTES} + {number(busy)}) B",
            size(articles),
        ),
        ("segments", f"30 x 10^6 x {number(m.segment_bytes)} B", f"{size(segments)} a day"),
        (
            "prediction log and labels",
            f"20 x 10^6 x {number(m.logged_bytes)} B",
            f"**{size(log)} a day**",
        ),
        ("the default map is full", "64 GiB over that", f"after {number(MAP_BYTES / log)} days"),
        ("bandwidth at peak", f"{requests} requests/s", f"{into} in, {out} out"),
        (
            "a training run",
            f"2 x 10^6 rows x {m.width} features",
            size(m.training_mb(SHOP_TRAINING_ROWS) * 1e6),
        ),
    ]


def _shop_cost(m: Measured) -> str:
    segments, log = _shop_daily(m)
    online = sum(_shop_online(m))
    machines = math.ceil(max(m.shards(SHOP), online / (RAM_SHARE * MACHINE_RAM_GB * 1e9)))
    disk = (online + DAYS * (segments + log)) / 1e9
    traffic = DAYS * DAY_S * m.bandwidth(SHOP)[1] / SHOP.peak / 1e9
    cost = machines * MACHINE_PRICE + DISK_PRICE * disk + TRAFFIC_PRICE * traffic
    share = DISK_PRICE * DAYS * log / 1e9 / cost
    return (
        f"In a month {number(disk)} GB of disk and {number(traffic)} GB out: {machines} x "
        f"{MACHINE_PRICE:.0f} + {DISK_PRICE:.2f} x {number(disk)} + {TRAFFIC_PRICE:.2f} x "
        f"{number(traffic)} = **{number(cost)} a month**, {share:.0%} of it for keeping every "
        "prediction."
    )


def _shop_windows(m: Measured) -> tuple[float, float]:
    """Return bytes of a user's and of an article's window view: as an aircraft, a destination."""
    return m.bytes("online, tail_arrivals"), m.bytes("online, destination_arrivals")


def _shop_online(m: Measured) -> tuple[float, float]:
    window, busy = _shop_windows(m)
    return (
        m.online_pages * SHOP.users * (SHOP_LATEST_BYTES + window),
        m.online_pages * SHOP_ARTICLES * (SHOP_LATEST_BYTES + busy),
    )


def _shop_daily(m: Measured) -> tuple[float, float]:
    """Return bytes of segments, and of logged predictions with labels, of a day."""
    events, predictions = SHOP.users * SHOP.events, SHOP.users * SHOP.predictions
    return events * m.segment_bytes, predictions * m.logged_bytes


def size(value: float) -> str:
    """Return bytes with a decimal unit."""
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1_000:  # noqa: PLR2004 - the units' step
            return f"{number(value)} {unit}"
        value /= 1_000
    return f"{number(value)} TB"
