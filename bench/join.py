"""Scenario join: point-in-time joins over Parquet segments, against polars and numpy on the same.

    python -m bench.join latest|windows ours|floor DIRECTORY SPINE RESULT

is one side in a process of its own, as the daemon's children are: it reads the spine and the
segments from Parquet, writes the joined frame as an Arrow file, and prints its figures as JSON.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgpack
import numpy as np
from numpy.typing import NDArray

from bench.daemon import memory_mb, serve
from bench.options import Options
from bench.turns import Case, in_turns
from mlpd import Aggregate, Entity, FeatureService, FeatureView, Source, WindowView
from mlpd.client import Client
from mlpd.core.time import DAY_US, HOUR_US, MINUTE_US

if TYPE_CHECKING:
    import polars as pl

ENTITIES, VALUES = 10_000, 5
LARGE_SPINE, LARGE_EVENTS, LARGE_ENTITIES = 4_000_000, 20_000_000, 100_000
DAYS = 30
WINDOWS = {"1h": (HOUR_US, 5 * MINUTE_US), "1d": (DAY_US, HOUR_US), "7d": (7 * DAY_US, HOUR_US)}
"""Width and hop: a window at t begins at t - width, rounded down to the hop."""
START_US = 1_700_006_400_000_000
BATCH = 50_000
COMPACTED_S = 120.0
COMPACT = {"compact_rows": 1, "compact_interval": "1s"}
REQUEST = "offline.msgpack"

Figures = Mapping[str, float]


def join_large(options: Options) -> dict[str, Case]:
    """Joins larger than memory: 4 M rows on 20 M events of 100,000 entities, and their peaks.

    As `join`, with integer keys; the events' Parquet is written without a daemon.  Takes ten
    minutes a round and 3 GB of disk: it isn't one of `all`.
    """
    with _prepared_large() as data:
        return _compare("int64", data, options, LARGE_SPINE, LARGE_EVENTS, LARGE_ENTITIES)


def join(options: Options) -> dict[str, Case]:
    """Point-in-time joins of a spine on as many events, against polars' join_asof and numpy.

    Both sides are processes that read the same Parquet and write Arrow.  `s` runs from reading to
    writing, `rows_per_s_core` is spine rows over seconds of CPU in it; imports and start are in
    `process_s` alone.  Ours has one thread, as it has as a child of a daemon; polars has all cores.
    `windows`: count and mean over 1 h, 1 d and 7 d; its floor is prefix sums in numpy.
    """
    return {**compare_joins("int64", options), **compare_joins("string", options)}


def compare_joins(key: str, options: Options) -> dict[str, Case]:
    """Return the cases of one type of key; raises RuntimeError where the two sides differ."""
    with _prepared(key, options.rows) as data:
        return _compare(key, data, options, options.rows, options.rows, ENTITIES)


def _compare(
    key: str, paths: "Paths", options: Options, spine_rows: int, event_rows: int, entities: int
) -> dict[str, Case]:
    found: dict[str, Case] = {}
    for kind in ("latest", "windows"):
        ours, floor = (paths.folder / f"{kind}-{side}.arrow" for side in ("ours", "floor"))
        run = _runner(kind, paths)
        found[f"{kind}, {key} keys"] = in_turns(
            partial(run, "ours", ours),
            partial(run, "floor", floor),
            rounds=options.rounds,
            measure="s",
            spine_rows=spine_rows,
            event_rows=event_rows,
            entities=entities,
        )
        check_equal(ours, floor)
    return found


def definitions(key: str) -> list[Any]:
    """Return what the events' source and its two views are."""
    entity = Entity("driver", key=key)
    schema = {"driver": key, **dict.fromkeys(value_names(), "float64")}
    source = Source("trips", timestamp="event_time", schema=schema)
    latest = FeatureView("latest", entity=entity, source=source, features=value_names())
    aggregates = [Aggregate.count(), Aggregate.mean("v0")]
    windows = WindowView("lately", entity, source, list(WINDOWS), aggregates)
    services = [FeatureService("latest_service", [latest])]
    services += [FeatureService("window_service", [windows])]
    return [entity, source, latest, windows, *services]


def value_names() -> list[str]:
    """Return the names of the float columns."""
    return [f"v{i}" for i in range(VALUES)]


def check_equal(ours: Path, floor: Path) -> None:
    """Raise RuntimeError unless both sides joined the same values (sums: to rounding)."""
    import polars as pl  # noqa: PLC0415

    a, b = pl.read_ipc(ours), pl.read_ipc(floor)
    a = a.rename(lambda name: name.rpartition(".")[2])  # without the view's name
    keys = ["event_time", "driver"]
    if not a.select(keys).equals(b.select(keys)):
        raise RuntimeError("the two sides have other rows, or another order")
    for name in set(b.columns) - set(keys):
        x, y = a[name].cast(pl.Float64), b[name].cast(pl.Float64)
        same = (x.is_null() & y.is_null()) | ((x - y).abs() <= 1e-9 * (1.0 + y.abs()))
        if not same.fill_null(value=False).all():
            raise RuntimeError(f"the two sides differ in {name!r}")


@dataclass(frozen=True, slots=True)
class Paths:
    """A data directory whose events are all in segments, a spine, and where results may lie."""

    folder: Path

    @property
    def data(self) -> Path:
        """The data directory."""
        return self.folder / "data"

    @property
    def spine(self) -> Path:
        """The spine, as Parquet."""
        return self.folder / "spine.parquet"


@contextmanager
def _prepared(key: str, rows: int) -> Iterator[Paths]:
    with tempfile.TemporaryDirectory() as name:
        paths = Paths(Path(name))
        _frame(key, rows, seed=2).select("event_time", "driver").write_parquet(paths.spine)
        _fill(paths.data, key, rows)
        yield paths


@contextmanager
def _prepared_large() -> Iterator[Paths]:
    from bench.segments import fill_segments  # noqa: PLC0415

    rng = np.random.default_rng(1)
    step_us = DAYS * DAY_US // LARGE_EVENTS

    def make(start: int, stop: int) -> "pl.DataFrame":
        times = START_US + np.arange(start, stop) * step_us
        return _columns("int64", times, LARGE_ENTITIES, rng)

    with tempfile.TemporaryDirectory() as name:
        paths = Paths(Path(name))
        times = START_US + np.arange(LARGE_SPINE) * (DAYS * DAY_US // LARGE_SPINE) + 1
        asked = _columns("int64", times, LARGE_ENTITIES, rng).select("event_time", "driver")
        asked.write_parquet(paths.spine)
        schema = {"driver": "int64", **dict.fromkeys(value_names(), "float64")}
        rows = LARGE_EVENTS
        through = fill_segments(paths.data, definitions("int64"), "trips", schema, rows, make)
        _save_request(paths.data, through)
        yield paths


def _frame(key: str, rows: int, *, seed: int) -> "pl.DataFrame":
    rng = np.random.default_rng(seed)
    # No two times are equal, so that there is one right answer; spines lie between events.
    times = START_US + 2 * rng.permutation(rows) * (DAYS * DAY_US // (2 * rows)) + seed % 2
    return _columns(key, times, ENTITIES, rng).sort("event_time")


def _columns(
    key: str, times: NDArray[np.int64], entities: int, rng: np.random.Generator
) -> "pl.DataFrame":
    import polars as pl  # noqa: PLC0415

    drivers = rng.integers(0, entities, len(times))
    columns: dict[str, Any] = {
        "event_time": pl.Series(times).cast(pl.Datetime("us", "UTC")),
        "driver": pl.Series(drivers if key == "int64" else [f"driver-{d:06}" for d in drivers]),
    }
    return pl.DataFrame({**columns, **{n: rng.normal(size=len(times)) for n in value_names()}})


def _fill(data: Path, key: str, rows: int) -> None:
    """Import the events through a daemon, wait until all are compacted, and stop it."""
    events = _frame(key, rows, seed=1)
    with serve(data, storage=COMPACT) as daemon, Client(daemon.url, timeout_s=300.0) as client:
        client.apply(definitions(key))
        for start in range(0, rows, BATCH):
            part = events.slice(start, BATCH)
            client.events.send(
                "trips", part.with_columns(known_at=part["event_time"]), all_or_nothing=True
            )
        deadline_s = time.monotonic() + COMPACTED_S
        while (status := client.status())["log_tail_rows"]:
            if time.monotonic() > deadline_s:
                raise RuntimeError(f"{status['log_tail_rows']} rows are not in segments yet")
            time.sleep(0.5)
        through = status["sequence"]
    _save_request(data, through)


def _save_request(data: Path, through: int) -> None:
    """Keep what the daemon would send to its child."""
    from mlpd.core.time import system_clock  # noqa: PLC0415
    from mlpd.storage.environment import Environment  # noqa: PLC0415
    from mlpd.storage.tables import Table  # noqa: PLC0415

    with (
        Environment.open(data / "lmdb", clock=system_clock, readonly=True) as environment,
        environment.snapshot() as snapshot,
    ):
        stored = snapshot.get(Table.DEFINITIONS, b"current")
    assert stored is not None
    request = {"directory": str(data), "catalog": msgpack.unpackb(stored), "through": through}
    (data / REQUEST).write_bytes(msgpack.packb(request))


def _runner(kind: str, paths: Paths) -> Callable[[str, Path], Figures]:
    def run(side: str, result: Path) -> Figures:
        where = str(paths.data), str(paths.spine)
        command = [sys.executable, "-m", "bench.join", kind, side, *where]
        limits = {} if side == "floor" else {"POLARS_MAX_THREADS": "1", "OMP_NUM_THREADS": "1"}
        started = time.perf_counter()
        done = subprocess.run(
            [*command, str(result)], check=True, capture_output=True, env={**os.environ, **limits}
        )
        found: dict[str, float] = json.loads(done.stdout)
        return {**found, "process_s": time.perf_counter() - started}

    return run


def _join_ours(kind: str, data: Path, spine: Path, result: Path) -> int:
    """Do what the daemon's child does, from a file to a file."""
    from mlpd.core.media import ARROW_FILE, PARQUET  # noqa: PLC0415
    from mlpd.daemon.history_child import run  # noqa: PLC0415

    with tempfile.TemporaryDirectory(dir=result.parent) as folder:
        request = {
            **msgpack.unpackb((data / REQUEST).read_bytes()),
            "spine_file": str(spine),
            "spine_format": PARQUET,
            "folder": folder,
            "answer": str(result),
            "format": ARROW_FILE,
            "service": _service(kind),
            "mode": "as_known",
            "closed": "right",
            "statuses": False,
            "on_stale": "null",
            "part": None,
        }
        return run(request, lambda _: None)


def _service(kind: str) -> str:
    return "latest_service" if kind == "latest" else "window_service"


def _join_polars(data: Path, spine: Path, result: Path) -> int:
    """Join with join_asof, as somebody who has the same files and polars would."""
    import polars as pl  # noqa: PLC0415

    events = pl.scan_parquet(_segments(data)).select("__event_time", "driver", *value_names())
    events = events.with_columns(pl.col("__event_time").cast(pl.Datetime("us", "UTC")))
    asked = pl.scan_parquet(spine).with_row_index("row").sort("event_time")
    joined = asked.join_asof(
        events.sort("__event_time"),
        left_on="event_time",
        right_on="__event_time",
        by="driver",
        strategy="backward",
        check_sortedness=False,
    )
    names = ["event_time", "driver", *value_names()]
    frame = joined.sort("row").select(names).collect()
    frame.write_ipc(result)
    return frame.height


def _windows_numpy(data: Path, spine: Path, result: Path) -> int:
    """Count and average by prefix sums over events sorted by (driver, time)."""
    import polars as pl  # noqa: PLC0415

    events = (
        pl.scan_parquet(_segments(data))
        .select("driver", "__event_time", "v0")
        .sort("driver", "__event_time")
        .collect()
    )
    asked = pl.read_parquet(spine)
    keys = events["driver"].unique(maintain_order=True)
    codes = pl.DataFrame({"driver": keys, "code": np.arange(len(keys))})
    of_event = events.join(codes, on="driver", how="left", maintain_order="left")["code"]
    of_row = asked.join(codes, on="driver", how="left", maintain_order="left")["code"].fill_null(-1)
    # One ascending number for (driver, time): a window never reaches into another driver.
    shift = 64 * DAY_US
    place = of_event.to_numpy() * shift + (events["__event_time"].to_numpy() - START_US)
    t = asked["event_time"].to_physical().to_numpy() - START_US
    base = of_row.to_numpy() * shift
    sums = np.concatenate([[0.0], np.cumsum(events["v0"].to_numpy())])
    series: list[pl.Series] = []
    last = np.searchsorted(place, base + t)
    for window, (width_us, hop_us) in WINDOWS.items():
        begin = np.maximum(t - width_us, 0) // hop_us * hop_us
        first = np.searchsorted(place, base + begin)
        counts = last - first
        mean = np.divide(sums[last] - sums[first], counts, where=counts > 0, out=np.zeros(len(t)))
        series.append(pl.Series(f"count_{window}", counts))
        means = pl.Series(f"v0_mean_{window}", np.where(counts > 0, mean, np.nan))
        series.append(means.fill_nan(None))
    pl.DataFrame([*asked.get_columns(), *series]).write_ipc(result)
    return len(asked)


def _segments(data: Path) -> list[Path]:
    return sorted((data / "segments" / "trips").rglob("*.parquet"))


def main() -> None:
    """Run one side and print its figures."""
    kind, side, *paths = sys.argv[1:]
    data, spine, result = (Path(path) for path in paths)
    import polars as pl  # noqa: F401, PLC0415 - importing is not joining

    if side == "ours":
        import mlpd.daemon.history_child  # noqa: F401, PLC0415 - what the daemon's child imports

    cpu_s, started = time.process_time(), time.perf_counter()
    if side == "ours":
        rows = _join_ours(kind, data, spine, result)
    elif kind == "latest":
        rows = _join_polars(data, spine, result)
    else:
        rows = _windows_numpy(data, spine, result)
    taken_s, cpu_s = time.perf_counter() - started, time.process_time() - cpu_s
    rate, peak_mb = rows / cpu_s, memory_mb(os.getpid(), peak=True)
    print(json.dumps({"s": taken_s, "cpu_s": cpu_s, "rows_per_s_core": rate, "peak_mb": peak_mb}))


if __name__ == "__main__":
    main()
