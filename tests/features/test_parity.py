"""What was served is what the log says: online reads, offline joins and brute force agree.

Random definitions, random streams through a real daemon, reads at random moments; afterwards every
served frame is recomputed.  MLPD_PARITY_EXAMPLES sets how many stories are tried (nightly: 3000).
"""

import asyncio
import math
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from mlpd.core.columns import Column, DType, concat
from mlpd.core.convert import column_of
from mlpd.core.time import parse_duration
from mlpd.daemon.app import Daemon
from mlpd.daemon.offline import Offline, offline_request, open_offline
from mlpd.daemon.read import ReadResult
from mlpd.features.assemble import FeatureFrame
from mlpd.features.ingest import parse_batch, rows_to_columns
from mlpd.features.offline import Mode, Spine, join_history
from mlpd.storage.compact import compact
from mlpd.storage.segments import purge_log, store_manifest
from tests.conftest import MEMORY, START_US, ManualClock, make_data_directory
from tests.features.reference import (
    MISSING,
    PRESENT,
    Aggregated,
    Event,
    Latest,
    Row,
    Select,
    Windowed,
    check_aggregate,
)

EXAMPLES = int(os.environ.get("MLPD_PARITY_EXAMPLES", "30"))

# --- what may be defined -------------------------------------------------------------------------

KEYS: dict[str, dict[str, str]] = {
    "user": {"user": "string"},
    "item": {"item": "int64"},
    "pair": {"user": "string", "item": "int64"},
    "blob": {"blob": "bytes"},
}
KEY_COLUMNS = {"user": "string", "item": "int64", "blob": "bytes"}
VALUES = {
    "x": "float64",
    "f": "float32",
    "k": "int64",
    "flag": "bool",
    "text": "string",
    "raw": "bytes",
    "seen": "timestamp",
}
SCHEMA = KEY_COLUMNS | VALUES
SOURCES = ("first", "second")
DEFAULTS: Row = {"x": -0.0, "f": 0.5, "k": 2**53 + 1, "flag": True, "text": "?"}


def nullable(*columns: str) -> Callable[[Callable[..., Any]], Select]:
    """Make a function of columns null where one of them is."""

    def wrap(function: Callable[..., Any]) -> Select:
        def select(row: Row) -> Any:
            values = [row[name] for name in columns]
            return None if None in values else function(*values)

        return select

    return wrap


def kleene_or(a: bool | None, b: bool | None) -> bool | None:
    if a is True or b is True:
        return True
    return None if None in (a, b) else False


INPUTS: dict[str, Select] = {
    "x": lambda row: row["x"],
    "f": lambda row: row["f"],
    "k": lambda row: row["k"],
    "flag": nullable("flag")(int),
    "x * 2": nullable("x")(lambda x: x * 2),
    "x > 0.5": nullable("x")(lambda x: int(x > 0.5)),
    "is_null(k)": lambda row: int(row["k"] is None),
}
COUNTED: dict[str, Select] = {"text": lambda row: row["text"], "blob": lambda row: row["blob"]}
FILTERS: dict[str, Select] = {
    "k > 0": nullable("k")(lambda k: k > 0),
    'text == "a"': nullable("text")(lambda text: text == "a"),
    "flag or x < 0": lambda row: kleene_or(row["flag"], nullable("x")(lambda x: x < 0)(row)),
    "not is_null(f)": lambda row: row["f"] is not None,
}
FUNCTIONS = ("count", "sum", "mean", "min", "max", "var", "std", "first", "last")

TRANSFORMS = {
    "mixed": {
        "source": "def mixed(x, amount):\n    if amount > 1.0:\n        return x / amount\n"
        "    return math.sin(x) + amount",
        "inputs": [["x", "base.x"], ["amount", "request.amount"]],
        "output": "float64",
    },
    "bucket": {
        "source": "def bucket(k, m):\n    return k // 7 + int(m > 0)",
        "inputs": [["k", "base.k"], ["m", "mixed"]],
        "output": "int64",
    },
}

View = dict[str, Any]


@st.composite
def latest_views(draw: st.DrawFn) -> View:
    features = draw(st.lists(st.sampled_from(sorted(SCHEMA)), min_size=1, max_size=4, unique=True))
    with_default = draw(st.sets(st.sampled_from(features)))
    return {
        "kind": "latest",
        "entity": draw(st.sampled_from(sorted(KEYS))),
        "source": draw(st.sampled_from(SOURCES)),
        "features": features,
        "ttl": draw(st.sampled_from([None, "1us", "20us", "150us", "1h"])),
        "defaults": {f: DEFAULTS[f] for f in sorted(with_default) if f in DEFAULTS},
    }


@st.composite
def aggregates(draw: st.DrawFn) -> dict[str, Any]:
    function = draw(st.sampled_from(FUNCTIONS))
    inputs = [None, *COUNTED, *INPUTS] if function == "count" else list(INPUTS)
    return {
        "function": function,
        "input": draw(st.sampled_from(inputs)),
        "filter": draw(st.sampled_from([None, None, *FILTERS])),
    }


@st.composite
def window_views(draw: st.DrawFn) -> View:
    found = draw(st.lists(aggregates(), min_size=1, max_size=5))
    widths = st.sampled_from(["10us", "23us", "50us", "300us"])
    return {
        "kind": "window",
        "entity": draw(st.sampled_from(sorted(KEYS))),
        "source": draw(st.sampled_from(SOURCES)),
        "windows": draw(st.lists(widths, min_size=1, max_size=3, unique=True)),
        "aggregates": [{**a, "name": f"a{i}"} for i, a in enumerate(found)],
        "hop": draw(st.sampled_from(["1us", "4us", "7us"])),
        "closed": draw(st.sampled_from(["left", "right"])),
    }


def build_document(views: list[View]) -> dict[str, Any]:
    """Return definitions of `views`, a fixed one that transforms read, and a service of all."""
    base = {"kind": "latest", "entity": "user", "source": "first", "features": ["x", "k"]}
    named = {"base": base} | {f"v{i}": view for i, view in enumerate(views)}
    features = [f"{name}.{f}" for name, view in named.items() for f in features_of(view)]
    return {
        "format": 1,
        "entities": {name: {"keys": keys} for name, keys in KEYS.items()},
        "sources": {name: {"timestamp": "at", "schema": SCHEMA} for name in SOURCES},
        "views": named,
        "transforms": TRANSFORMS,
        "services": {
            "all": {
                "features": [*features, *KEY_COLUMNS, *TRANSFORMS],
                "request": {"amount": "float64"},
            }
        },
    }


def features_of(view: View) -> list[str]:
    if view["kind"] == "latest":
        return list(view["features"])
    return [f"{a['name']}_{w}" for a in view["aggregates"] for w in view["windows"]]


def model_of(view: View) -> Latest | Windowed:
    """Return the reference's idea of a view."""
    keys = tuple(KEYS[view["entity"]])
    if view["kind"] == "latest":
        ttl = view.get("ttl")
        ttl_us = None if ttl is None else parse_duration(ttl)
        features = tuple(view["features"])
        return Latest(view["source"], keys, features, ttl_us, view.get("defaults", {}))
    widths = tuple(parse_duration(w) for w in view["windows"])
    hops = (parse_duration(view["hop"]),) * len(widths)
    selects = INPUTS | COUNTED
    found = tuple(
        Aggregated(
            a["function"],
            None if a["input"] is None else selects[a["input"]],
            None if a["filter"] is None else FILTERS[a["filter"]],
        )
        for a in view["aggregates"]
    )
    return Windowed(view["source"], keys, widths, hops, view["closed"], found)


# --- what may happen -----------------------------------------------------------------------------

REALS = st.one_of(
    st.none(),
    st.sampled_from([math.nan, 0.0, -0.0, 0.1, 1e-3, -7.25, 1e6, math.inf]),
    st.integers(-8_000_000, 8_000_000).map(lambda n: n / 8),
)
INTEGERS = st.one_of(
    st.none(),
    st.sampled_from([0, 1, -1, 2**53 + 1, -(2**53) - 1, 2**63 - 1, -(2**63), 2**62]),
    st.integers(-1000, 1000),
)
ROWS = st.fixed_dictionaries(
    {
        "user": st.sampled_from(["a", "a", "b", "", "{a}b", "ü" * 300, None]),
        "item": st.sampled_from([0, 1, -1, 2**63 - 1, None]),
        "blob": st.sampled_from([b"", b"\x00", b"\xff\x00\xff", None]),
        "x": REALS,
        "f": REALS.map(lambda x: None if x is None else float(np.float32(x))),
        "k": INTEGERS,
        "flag": st.sampled_from([None, True, False]),
        "text": st.sampled_from([None, "", "a", "é\x00"]),
        "raw": st.sampled_from([None, b"", b"a\x00"]),
        "seen": st.sampled_from([None, START_US, -1]),
    }
)
LATENESS = st.sampled_from([0, 0, 0, 1, 3, 8, 20, 60, 400, -1, -3])


@dataclass(frozen=True)
class Send:
    """A batch: rows with their lateness and, for imports, how long ago they became known."""

    source: str
    rows: list[tuple[Row, int]]
    known_ago: list[int] | None
    repeated: bool


@dataclass(frozen=True)
class MoveClock:
    by_us: int


@dataclass(frozen=True)
class Look:
    """A read of some keys, now or `ahead_us` after the newest known event."""

    keys: list[Row]
    ahead_us: int | None


@dataclass(frozen=True)
class Restart:
    pass


@dataclass(frozen=True)
class Compact:
    pass


@st.composite
def sends(draw: st.DrawFn) -> Send:
    rows = draw(st.lists(st.tuples(ROWS, LATENESS), min_size=1, max_size=6))
    known = None
    if draw(st.integers(0, 3)) == 0:
        ago = st.sampled_from([0, 0, 1, 5, 50])
        known = [draw(ago) for _ in rows]
    return Send(draw(st.sampled_from(SOURCES)), rows, known, draw(st.integers(0, 9)) == 0)


KEY_ROWS = st.fixed_dictionaries(
    {
        "user": st.sampled_from(["a", "b", "", "{a}b", "ü" * 300, "never", None]),
        "item": st.sampled_from([0, 1, -1, 2**63 - 1, 77, None]),
        "blob": st.sampled_from([b"", b"\x00", b"\xff\x00\xff", None]),
        "amount": st.sampled_from([None, math.nan, 0.5, 3.0]),
    }
)
LOOKS = st.builds(
    Look,
    st.lists(KEY_ROWS, min_size=1, max_size=4),
    st.sampled_from([None, None, None, 1, 7, 100]),
)
STEPS = st.one_of(
    sends(),
    sends(),
    sends(),
    LOOKS,
    LOOKS,
    st.builds(MoveClock, st.sampled_from([1, 2, 5, 30, 400, -20, -1000])),
    st.just(Restart()),
    st.just(Compact()),
)
STORIES = st.tuples(
    st.lists(st.one_of(latest_views(), window_views()), min_size=1, max_size=4),
    st.lists(STEPS, min_size=4, max_size=25),
)

# --- a story lived by a daemon -------------------------------------------------------------------


@dataclass
class Told:
    """What a daemon accepted and what it served."""

    events: list[Event] = field(default_factory=list)
    served: list[tuple[list[Row], ReadResult]] = field(default_factory=list)
    imports: int = 0


async def send(daemon: Daemon, clock: ManualClock, step: Send, told: Told) -> None:
    now_us = int(clock())
    rows = []
    for i, (row, lateness) in enumerate(step.rows):
        known_us = now_us - (step.known_ago[i] if step.known_ago else 0)
        rows.append({**row, "at": known_us - lateness})
        if step.known_ago:
            rows[-1]["known_at"] = known_us
    source = daemon.state.catalog.definitions.source(step.source)
    batch = parse_batch(source, rows_to_columns(source, rows), now_us=now_us)
    assert not batch.rejected
    key = f"batch {len(told.events)} {len(told.served)} {now_us}" if step.repeated else None
    done = await daemon.ingest.ingest([batch], key)
    if step.repeated:
        again = await daemon.ingest.ingest([batch], key)
        assert again.replayed
        assert (again.accepted, again.sequence) == (done.accepted, done.sequence)
    assert done.accepted == len(rows)
    told.imports += step.known_ago is not None
    for i, row in enumerate(rows):
        known_us = row.get("known_at", done.known_us)
        sequence = done.sequence - len(rows) + 1 + i
        told.events.append(
            Event(step.source, min(row["at"], known_us), known_us, sequence, step.rows[i][0])
        )


def look(daemon: Daemon, step: Look, told: Told) -> None:
    at_us = None
    if step.ahead_us is not None and told.events:
        at_us = max(e.known_us for e in told.events) + step.ahead_us
    closure = daemon.read.closure("all")
    told.served.append((step.keys, daemon.read.read(closure, given_of(step.keys), at_us=at_us)))


def given_of(rows: list[Row]) -> dict[str, Column]:
    types = {**KEY_COLUMNS, "amount": "float64"}
    return {n: column_of(DType(t), [row[n] for row in rows]) for n, t in types.items()}


async def compact_all(daemon: Daemon) -> None:
    """Compact as the compactor does, in this process, which has polars already."""
    with daemon.environment.snapshot() as snapshot:
        through = snapshot.sequence
    if daemon.compactor.get_tail().rows:
        manifest = await asyncio.to_thread(
            compact, daemon.environment, daemon.paths.segments, through=through
        )
        await daemon.writer.write(lambda txn: store_manifest(txn, manifest))
        await daemon.writer.write(lambda txn: purge_log(txn, 0))


OpenDaemon = Callable[..., AbstractAsyncContextManager[Daemon]]


async def live(opened: OpenDaemon, directory: Path, views: list[View], steps: list[Any]) -> Told:
    """Let a daemon live through `steps`, checking what it served along the way."""
    clock, told, waiting = ManualClock(), Told(), list(steps)
    last = Look([{"user": "a", "item": 0, "blob": b"\x00", "amount": 3.0}], None)
    while waiting:
        async with opened(directory, clock=clock) as daemon:
            await daemon.definitions.apply(build_document(views))
            while waiting and not isinstance(step := waiting.pop(0), Restart):
                if isinstance(step, Send):
                    await send(daemon, clock, step, told)
                elif isinstance(step, MoveClock):
                    clock.now_us += step.by_us
                elif isinstance(step, Compact):
                    await compact_all(daemon)
                else:
                    look(daemon, step, told)
            look(daemon, last, told)
            check_offline(offline_of(daemon), told)
            await compact_all(daemon)
            check_offline(offline_of(daemon), told)
            look(daemon, last, told)
    request = offline_request(daemon.paths, daemon.state.catalog, len(told.events) + 1)
    with open_offline(request) as offline:
        check_offline(offline, told)
    return told


def offline_of(daemon: Daemon) -> Offline:
    with daemon.environment.snapshot() as snapshot:
        through = snapshot.sequence
    return Offline(daemon.paths, daemon.environment, daemon.state.catalog, through)


# --- the comparisons -----------------------------------------------------------------------------


def check_offline(offline: Offline, told: Told) -> None:
    """Compare all that was served with both joins, bit for bit."""
    everything = list(range(len(told.served)))
    compare_join(offline, told, everything, "as_of_sequence")
    # A later import that claims to have been known before the read is seen by as_known alone.
    settled = [i for i in everything if not is_overtaken(told, told.served[i][1])]
    compare_join(offline, told, settled, "as_known")


def is_overtaken(told: Told, read: ReadResult) -> bool:
    return any(e.sequence > read.sequence and e.known_us <= read.t_us for e in told.events)


def compare_join(offline: Offline, told: Told, reads: list[int], mode: Mode) -> None:
    if not reads:
        return
    parts = [told.served[i] for i in reads]
    sizes = [len(rows) for rows, _ in parts]
    given = given_of([row for rows, _ in parts for row in rows])
    t_us = np.repeat(np.array([r.t_us for _, r in parts], np.int64), sizes)
    sequences = np.repeat(np.array([r.sequence for _, r in parts], np.int64), sizes)
    asked = sequences if mode == "as_of_sequence" else None
    closure = offline.catalog.closures["all"]
    joined = join_history(
        offline.catalog, closure, Spine(given, t_us, asked), offline.events, mode=mode
    )
    served = [result.frame for _, result in parts]
    assert list(joined.columns) == list(served[0].columns)
    for name, column in joined.columns.items():
        statuses = np.concatenate([frame.statuses[name] for frame in served])
        assert joined.statuses[name].tolist() == statuses.tolist(), name
        assert bits_of(column) == bits_of(concat(f.columns[name] for f in served)), name
    for view, event_us in joined.event_us.items():
        assert event_us.tolist() == [t for f in served for t in f.event_us[view].tolist()]


def bits_of(column: Column) -> list[Any]:
    """Return values that are equal only if all bits are, but every NaN is one; None for null."""
    return [v.hex() if isinstance(v, float) else v for v in column.to_list()]


def check_reference(views: list[View], told: Told) -> None:
    document = build_document(views)
    models = {name: model_of(view) for name, view in document["views"].items()}
    for rows, result in told.served:
        seen = [e for e in told.events if e.sequence <= result.sequence]
        for i, row in enumerate(rows):
            for name, model in models.items():
                got = list(cells(result.frame, name, features_of(document["views"][name]), i))
                key = [row[column] for column in model.keys]
                check_view(model, seen, key, result.t_us, got)
            check_transforms(result.frame, i)


def cells(frame: FeatureFrame, view: str, features: list[str], row: int) -> Iterator[Any]:
    for feature in features:
        name = f"{view}.{feature}"
        yield int(frame.statuses[name][row]), frame.columns[name].take([row]).to_list()[0]


def check_view(
    model: Latest | Windowed, seen: list[Event], key: list[Any], t_us: int, got: list[Any]
) -> None:
    if isinstance(model, Latest):
        wanted = model.values(seen, key, t_us)
        assert [(s, repr(v)) for s, v in got] == [(s, repr(v)) for s, v in wanted]
        return
    for (function, values), (status, value) in zip(model.inputs(seen, key, t_us), got, strict=True):
        check_aggregate(function, values, value)
        assert (status == PRESENT) == (value is not None)
        assert status != MISSING


def check_transforms(frame: FeatureFrame, row: int) -> None:
    names = ("base.x", "amount", "base.k", "mixed", "bucket")
    x, amount, k, mixed, bucket = (frame.columns[n].take([row]).to_list()[0] for n in names)
    assert (mixed is None) == (None in (x, amount))
    if mixed is not None:
        wanted = math.nan if math.isinf(x) and not amount > 1 else None
        if wanted is None:
            wanted = x / amount if amount > 1 else math.sin(x) + amount
        assert repr(mixed) == repr(wanted)
    assert bucket == (None if None in (k, mixed) else k // 7 + (mixed > 0))


@pytest.mark.timeout(1800 if EXAMPLES > 30 else 120)
@settings(max_examples=EXAMPLES, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(story=STORIES)
def test_served_features_equal_the_joins_and_brute_force(
    open_daemon: OpenDaemon, transform_cache: Path, story: tuple[list[View], list[Any]]
) -> None:
    views, steps = story
    with tempfile.TemporaryDirectory(dir=MEMORY) as directory:
        root = make_data_directory(Path(directory) / "data", transform_cache)
        told = asyncio.run(live(open_daemon, root, views, steps))
    event(f"{sum(len(rows) for rows, _ in told.served) // 20 * 20} rows served")
    event(f"imports: {told.imports > 0}")
    check_reference(views, told)
