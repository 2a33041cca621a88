"""What was served is what the log says: online reads, offline joins and brute force agree.

Random definitions, random streams through a real daemon, reads at random moments; the clock jumps,
the daemon restarts, the log is compacted, old history goes and the definitions change in between.
Afterwards every served frame is recomputed that isn't too old for what is kept.  How many stories
are tried depends on the profile (HYPOTHESIS_PROFILE); MLPD_PARITY_EXAMPLES sets another number.
"""

import asyncio
import math
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from mlpd.core.columns import Column, DType, concat
from mlpd.core.convert import column_of
from mlpd.core.errors import ValidationError
from mlpd.core.specs import Closure
from mlpd.core.time import parse_duration
from mlpd.daemon.app import Daemon
from mlpd.daemon.expire_child import rewrite
from mlpd.daemon.offline import Offline, offline_request, open_offline
from mlpd.daemon.read import ReadResult
from mlpd.features.assemble import FeatureFrame
from mlpd.features.bounded import Budget, join_bounded
from mlpd.features.horizon import check_kept, find_kept, first_moment
from mlpd.features.ingest import parse_batch, rows_to_columns
from mlpd.features.offline import JoinOptions, Mode, Spine, join_history
from mlpd.storage.compact import compact
from mlpd.storage.segments import purge_log, store_manifest
from tests.conftest import MEMORY, PROFILE, START_US, ManualClock, make_data_directory
from tests.features.reference import (
    DELETED,
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
from tests.storage.powercut.live import InProcessDefinitions

BY_PROFILE = {"default": 30, "ci": 300, "nightly": 10_000}
EXAMPLES = int(os.environ.get("MLPD_PARITY_EXAMPLES", BY_PROFILE[PROFILE]))
SECONDS_PER_EXAMPLE = 8
"""At most, with others on the machine; of the time limit."""
PARTS = 3
"""The stories are told in parts, so that several processes can tell them."""

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
    "ids": "list[int64]",
    "tags": "list[string]",
    "point": "vector[float32, 3]",
}
SCHEMA = KEY_COLUMNS | VALUES
SOURCES = ("first", "second")
RETENTION = "310us"
"""Of the second source: some microseconds more than the longest window and its hop."""
DEFAULTS: Row = {"x": -0.0, "f": 0.5, "k": 2**53 + 1, "flag": True, "text": "?"}
DEFAULTS |= {"ids": [], "tags": ["?"], "point": [0.0, -0.0, 0.5]}


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
COUNTED: dict[str, Select] = {
    "text": lambda row: row["text"],
    "blob": lambda row: row["blob"],
    "seen": lambda row: row["seen"],
}
FILTERS: dict[str, Select] = {
    "k > 0": nullable("k")(lambda k: k > 0),
    'text == "a"': nullable("text")(lambda text: text == "a"),
    "flag or x < 0": lambda row: kleene_or(row["flag"], nullable("x")(lambda x: x < 0)(row)),
    "not is_null(f)": lambda row: row["f"] is not None,
}
FUNCTIONS = (
    *("count", "sum", "mean", "min", "max", "var", "std", "first", "last"),
    *("ewma", "approx_distinct", "last_n", "topk"),
)

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
Versions = tuple[list[View], list[View]]


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
    inputs: list[str | None] = [*INPUTS]
    if function in ("count", "approx_distinct"):
        inputs += COUNTED
    if function == "count":
        inputs.append(None)
    half_lives = st.sampled_from(["1us", "7us", "40us", "1d"])
    return {
        "function": function,
        "input": draw(st.sampled_from(inputs)),
        "filter": draw(st.sampled_from([None, None, *FILTERS])),
        "half_life": draw(half_lives) if function == "ewma" else None,
        "n": draw(st.integers(1, 16)) if function == "last_n" else None,
        "k": draw(st.integers(1, 16)) if function == "topk" else None,
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
        "sources": {
            "first": {"timestamp": "at", "schema": SCHEMA, "retention": "1500us"},
            "second": {"timestamp": "at", "schema": SCHEMA, "retention": RETENTION},
        },
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
            None if a["half_life"] is None else parse_duration(a["half_life"]),
            a["n"] or a["k"] or 0,
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
        "ids": st.sampled_from([None, [], [2**53 + 1, -(2**63)]]),
        "tags": st.sampled_from([None, [], ["", "é\x00"], ["a"] * 40]),
        "point": st.sampled_from([None, [0.0, -0.0, math.nan], [0.5, math.inf, -7.25]]),
        DELETED: st.sampled_from([None, False, False, False, True]),
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


@dataclass(frozen=True)
class Expire:
    """After a while, what the sources keep no longer goes."""

    after_us: int


@dataclass(frozen=True)
class Redefine:
    """The other views of the story are applied; models pin those that ran."""


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
    st.builds(Expire, st.sampled_from([0, 30, 400, 2_000])),
    st.just(Redefine()),
)
VIEWS = st.lists(st.one_of(latest_views(), window_views()), min_size=1, max_size=4)
STORIES = st.tuples(st.tuples(VIEWS, VIEWS), st.lists(STEPS, min_size=4, max_size=25))

# --- a story lived by a daemon -------------------------------------------------------------------


@dataclass(frozen=True)
class Served:
    """A read: of which of the story's views, for which keys, and what came."""

    version: int
    closure: Closure
    rows: list[Row]
    result: ReadResult


@dataclass
class Told:
    """What a daemon accepted and what it served; `closures` of the versions that were applied.

    `late` are versions whose views were made after old history had gone: of what was kept.
    """

    events: list[Event] = field(default_factory=list)
    served: list[Served] = field(default_factory=list)
    closures: dict[int, Closure] = field(default_factory=dict)
    late: set[int] = field(default_factory=set)
    imports: int = 0
    expired: int = 0

    async def read(self) -> dict[str, tuple[str, ...]]:
        """Return what is pinned, as `Pins` does: all that was ever applied."""
        return self.find(None)

    def find(self, _: Any) -> dict[str, tuple[str, ...]]:
        """Return the same inside a transaction."""
        return {closure.hash: ("model",) for closure in self.closures.values()}


async def define(daemon: Daemon, versions: Versions, version: int, told: Told) -> None:
    """Apply one of the story's versions, reading history in this process."""
    verb: Any = daemon.definitions
    verb._pins, verb._replay = told, partial(InProcessDefinitions._replay, verb)
    await daemon.definitions.apply(build_document(versions[version]))
    if told.expired + daemon.expire.removed and version not in told.closures:
        told.late.add(version)
    told.closures[version] = daemon.read.closure("all")


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
    for version, closure in told.closures.items():
        read = daemon.read.read(closure, given_of(step.keys), at_us=at_us)
        frame = read.frame
        columns = {name: column.to_list() for name, column in frame.columns.items()}
        assert repr(frame.value_lists()) == repr(columns)
        assert frame.status_lists() == {name: s.tolist() for name, s in frame.statuses.items()}
        told.served.append(Served(version, closure, step.keys, read))


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


async def expire(daemon: Daemon, told: Told) -> None:
    """Let old history go, in this process; what was served stands in for logged predictions.

    The daemon looks for it by itself, too: what went is what its verb has counted.
    """
    verb: Any = daemon.expire

    def first_seen(snapshot: Any, before_us: int) -> int:
        seen = [s.result.sequence for s in told.served if s.result.t_us >= before_us]
        return min(seen, default=int(snapshot.sequence))

    async def run_child(request: dict[str, Any]) -> list[bytes]:
        return await asyncio.to_thread(rewrite, daemon.environment, daemon.paths, request)

    verb._first_seen, verb._run_child = first_seen, run_child
    verb._cuts.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mlpd.storage.expire.SHARE", 1 << 40)  # whatever may go, not from halves on
        await daemon.expire.run()


OpenDaemon = Callable[..., AbstractAsyncContextManager[Daemon]]


async def live(opened: OpenDaemon, directory: Path, versions: Versions, steps: list[Any]) -> Told:
    """Let a daemon live through `steps`, checking what it served along the way."""
    clock, told, waiting, version = ManualClock(), Told(), list(steps), 0
    last = Look([{"user": "a", "item": 0, "blob": b"\x00", "amount": 3.0}], None)
    while waiting:
        async with opened(directory, clock=clock) as daemon:
            await define(daemon, versions, version, told)
            while waiting and not isinstance(step := waiting.pop(0), Restart):
                if isinstance(step, Send):
                    await send(daemon, clock, step, told)
                elif isinstance(step, MoveClock):
                    clock.now_us += step.by_us
                elif isinstance(step, Compact):
                    await compact_all(daemon)
                elif isinstance(step, Expire):
                    clock.now_us += step.after_us
                    await compact_all(daemon)
                    await expire(daemon, told)
                elif isinstance(step, Redefine):
                    version = 1 - version
                    await define(daemon, versions, version, told)
                else:
                    look(daemon, step, told)
            look(daemon, last, told)
            check_offline(offline_of(daemon), told, bounded=True)
            await compact_all(daemon)
            check_offline(offline_of(daemon), told)
            removed = daemon.expire.removed
            await expire(daemon, told)
            if daemon.expire.removed > removed:  # otherwise all is as it was
                check_offline(offline_of(daemon), told)
            look(daemon, last, told)
            told.expired += daemon.expire.removed
    catalog = daemon.state.catalog  # its version is the number of definition records
    request = offline_request(daemon.paths, catalog, len(told.events) + catalog.version)
    with open_offline(request) as offline:
        check_offline(offline, told, bounded=True)
    return told


def offline_of(daemon: Daemon) -> Offline:
    with daemon.environment.snapshot() as snapshot:
        through = snapshot.sequence
    return Offline(daemon.paths, daemon.environment, daemon.state.catalog, through)


# --- the comparisons -----------------------------------------------------------------------------


def check_offline(offline: Offline, told: Told, *, bounded: bool = False) -> None:
    """Compare all that was served with both joins, bit for bit; `bounded`: of bounded memory too.

    Those need most of a story's time: they are made with a tail of the log, and without one.
    """
    for version in told.closures:
        everything = [served for served in told.served if served.version == version]
        compare_join(offline, everything, "as_of_sequence", bounded)
        # A later import that claims to have been known before the read is seen by as_known alone.
        settled = [served for served in everything if not is_overtaken(told, served.result)]
        compare_join(offline, settled, "as_known", bounded)


def is_overtaken(told: Told, read: ReadResult) -> bool:
    return any(e.sequence > read.sequence and e.known_us <= read.t_us for e in told.events)


def compare_join(offline: Offline, parts: list[Served], mode: Mode, bounded: bool) -> None:
    """Compare reads of one version with a join."""
    if not parts:
        return
    sizes = [len(part.rows) for part in parts]
    given = given_of([row for part in parts for row in part.rows])
    t_us = np.repeat(np.array([part.result.t_us for part in parts], np.int64), sizes)
    sequences = np.repeat(np.array([part.result.sequence for part in parts], np.int64), sizes)
    asked = sequences if mode == "as_of_sequence" else None
    closure = parts[0].closure
    whole, options = Spine(given, t_us, asked), JoinOptions(mode)
    kept = check_horizon(offline, closure, whole, mode)
    spine = whole.take(kept)
    joined = join_history(offline.catalog, closure, spine, offline.events, options)
    if bounded:
        compare_bounded(offline, closure, spine, options, joined)
    served = [part.result.frame for part in parts]
    assert list(joined.columns) == list(served[0].columns)
    for name, column in joined.columns.items():
        statuses = np.concatenate([frame.statuses[name] for frame in served])
        assert joined.statuses[name].tolist() == statuses[kept].tolist(), name
        values = concat(f.columns[name] for f in served).take(kept)
        assert bits_of(column) == bits_of(values), name
    for view, event_us in joined.event_us.items():
        assert (
            event_us.tolist() == np.concatenate([f.event_us[view] for f in served])[kept].tolist()
        )


def check_horizon(
    offline: Offline, closure: Closure, spine: Spine, mode: Mode
) -> "np.typing.NDArray[np.int64]":
    """Return the rows whose history is kept: all from the latest horizon of any view on."""
    horizons, catalog = offline.horizons(), offline.catalog
    asked = catalog, closure, horizons, spine.t_us, spine.sequences
    kept = find_kept(*asked)
    layout = catalog.layout(closure)
    views = [part.view.view for part in (*layout.latest, *layout.windows)]
    firsts = [first_moment(v, horizons[v.source]) for v in views if v.source in horizons]
    assert kept[spine.t_us >= max(firsts, default=0)].all()
    if not kept.all():
        with pytest.raises(ValidationError) as caught:
            check_kept(*asked, mode)
        assert caught.value.code == "history_gone"
    return np.flatnonzero(kept)


def compare_bounded(
    offline: Offline,
    closure: Closure,
    spine: Spine,
    options: JoinOptions,
    joined: FeatureFrame,
) -> None:
    """Compare a join with one in many partitions and slices, bit for bit."""
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        frames = list(
            join_bounded(offline.catalog, closure, spine, offline, Path(folder), options, TINY)
        )
        assert not list(Path(folder).glob("part-*"))
    assert [len(frame) for frame in frames[:-1]] == [TINY.batch_rows] * (len(frames) - 1)
    for name, column in joined.columns.items():
        assert bits_of(concat(f.columns[name] for f in frames)) == bits_of(column), name
        statuses = np.concatenate([frame.statuses[name] for frame in frames])
        assert statuses.tolist() == joined.statuses[name].tolist(), name


TINY = Budget(whole_bytes=0, part_bytes=500, batch_rows=3, read_rows=4)


def bits_of(column: Column) -> list[Any]:
    """Return values that are equal only if all bits are, but every NaN is one; None for null."""
    return [
        v.hex() if isinstance(v, float) else repr(v) if isinstance(v, list) else v
        for v in column.to_list()
    ]


def check_reference(versions: Versions, told: Told) -> None:
    documents = [build_document(views) for views in versions]
    models = [{n: model_of(v) for n, v in found["views"].items()} for found in documents]
    for served in told.served:
        if served.version in told.late:
            continue  # `told.events` has more than those views were made of
        result, views = served.result, documents[served.version]["views"]
        seen = [e for e in told.events if e.sequence <= result.sequence]
        for i, row in enumerate(served.rows):
            for name, model in models[served.version].items():
                got = list(cells(result.frame, name, features_of(views[name]), i))
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
    for (aggregate, aged), (status, value) in zip(model.inputs(seen, key, t_us), got, strict=True):
        check_aggregate(aggregate, aged, value)
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


@pytest.mark.timeout(120 + SECONDS_PER_EXAMPLE * EXAMPLES)
@pytest.mark.parametrize("part", range(PARTS))
@settings(
    max_examples=-(-EXAMPLES // PARTS),
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(story=STORIES)
def test_served_features_equal_the_joins_and_brute_force(
    part: int, open_daemon: OpenDaemon, transform_cache: Path, story: tuple[Versions, list[Any]]
) -> None:
    versions, steps = story
    event(f"part {part}")
    with tempfile.TemporaryDirectory(dir=MEMORY) as directory:
        root = make_data_directory(Path(directory) / "data", transform_cache)
        told = asyncio.run(live(open_daemon, root, versions, steps))
    event(f"{sum(len(served.rows) for served in told.served) // 20 * 20} rows served")
    event(f"imports: {told.imports > 0}")
    event(f"expired: {told.expired > 0}")
    for kind in (Restart, Compact, MoveClock, Redefine):
        event(f"{kind.__name__}: {any(isinstance(step, kind) for step in steps)}")
    check_reference(versions, told)
