"""What must hold of a data directory after anything: nothing acknowledged lost, nothing doubled."""

import json
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import polars as pl

from mlpd.core.columns import Column, DType
from mlpd.core.convert import column_of
from mlpd.core.time import MIN_TIME_US
from mlpd.daemon.dropped import read_marks
from mlpd.daemon.offline import Offline
from mlpd.daemon.read import Read
from mlpd.daemon.replay_check import compare_with_replay
from mlpd.features.ingest import apply_batch
from mlpd.features.stamps import Stamps
from mlpd.features.tombstones import DELETED
from mlpd.registry.fsck import check as check_registry
from mlpd.storage.check import check, check_pages
from mlpd.storage.environment import Environment
from mlpd.storage.files import DataDirectory
from mlpd.storage.horizons import load_horizons
from mlpd.storage.log import DEFINITIONS_ONLY, read_records
from mlpd.storage.segments import load_manifests
from mlpd.storage.tables import Table
from mlpd.storage.writer import Writer
from tests.storage.powercut.live import MAP_BYTES, USERS, Store, opened, row_of, user_of

REPLAY_ROWS = 37
"""Rows of a block when the log is replayed: not the batches in which they came."""


@dataclass
class Told:
    """What was acknowledged before the end: what must be there after it."""

    start_us: int
    events: dict[int, int] = field(default_factory=dict)
    """Number of the event by sequence."""
    last_batch: list[int] = field(default_factory=list)
    last_sequence: int = 0
    applied: int = 0
    registered: int = 0
    champion: int = 0
    erased: set[int] = field(default_factory=set)
    """Sequences of events that must be there no more."""

    def copy(self) -> "Told":
        return replace(self, events=dict(self.events), erased=set(self.erased))

    def erase(self, user: str) -> None:
        """All events of a user are erased."""
        gone = {s for s, n in self.events.items() if row_of(n, self.start_us)["user"] == user}
        self.erased |= gone
        self.events = {s: n for s, n in self.events.items() if s not in gone}

    def hear(self, line: bytes) -> None:
        self.hear_fact(json.loads(line))

    def hear_fact(self, fact: dict[str, Any]) -> None:
        self.applied = fact.get("applied", self.applied)
        self.registered = fact.get("registered", self.registered)
        self.champion = fact.get("champion", self.champion)
        if "sent" in fact:
            numbers = self.last_batch = fact["sent"]
            self.last_sequence = fact["sequence"]
            first = fact["sequence"] - len(numbers) + 1
            self.events.update(zip(range(first, first + len(numbers)), numbers, strict=True))


async def verify(
    root: Path, told: Told, scratch: Path, *, going_on: bool = True, erased: str = ""
) -> None:
    """Start on the directory as the daemon does; AssertionError or any other error: it is broken.

    `scratch`: a folder that doesn't exist, for a replay of the log.  `going_on`: also write on.
    `erased`: a user whose erasure was on its way: it is done, or had not begun.
    """
    check_before(root)
    with opened(root) as store:
        await store.compactor.start()
        await store.erase.resume()
        if erased and store.erase.list()["receipts"]:
            told.erase(erased)
            check_erased(store, erased)
        note_expired(store, told)
        check_store(store, told, scratch)
        if going_on:
            await go_on(store, told)
            check_store(store, told, scratch)
    none_of(check_pages(store.data))


def check_erased(store: Store, user: str) -> None:
    """No key, value or file holds the user, other views are what the log makes, files are named."""
    assert not store.erase.list()["open"]
    text = user.encode()
    with store.environment.snapshot() as snapshot:
        for table in Table:
            assert not [k for k, v in snapshot.scan(table) if text in k or text in v], table
        named = {path for manifest in load_manifests(snapshot) for path in manifest.files}
        marks = read_marks(snapshot)
    files = [path for path in store.data.segments.rglob("*") if path.is_file()]
    assert {str(path.relative_to(store.data.segments)) for path in files} == named
    for path in files:
        assert text not in path.read_bytes()
        if path.suffix == ".parquet":
            assert user not in pl.read_parquet(path, glob=False)["user"].to_list()
    assert not marks
    differences: list[str] = []
    compare_with_replay(
        *(store.environment, store.data, store.state.catalog),
        lambda view, _, difference: differences.append(f"{view.view.name}: {difference}"),
    )
    none_of(differences)


def note_expired(store: Store, told: Told) -> None:
    """What went because its source keeps it no longer: as much as the manifests say, or nothing.

    The newest row of every user is not among it.
    """
    if not store.state.catalog.version:
        return
    frame = offline_of(store).frame("clicks", {"n": DType.INT64})
    gone = told.events.keys() - set(frame["__sequence"].to_list())
    with store.environment.snapshot() as snapshot:
        removed = [r for m in load_manifests(snapshot) for r in m.removed]
        horizons = load_horizons(snapshot)
    expired = sum(r.rows for r in removed if r.cause.startswith("retention"))
    assert len(gone) == expired
    assert bool(expired) == bool(horizons)
    newest: dict[str, tuple[int, int]] = {}
    for sequence, n in told.events.items():
        row = row_of(n, told.start_us)
        newest[row["user"]] = max(newest.get(row["user"], (0, 0)), (row["at"], sequence))
    assert not gone & {sequence for _, sequence in newest.values()}
    told.erased |= gone
    told.events = {s: n for s, n in told.events.items() if s not in gone}


def check_before(root: Path) -> None:
    """LMDB's pages are whole before anybody writes again."""
    if (root / "lmdb" / "data.mdb").exists():
        none_of(check_pages(DataDirectory(root)))


def none_of(problems: Sequence[Any]) -> None:
    assert not problems, str(problems[:3])


def check_store(store: Store, told: Told, scratch: Path) -> None:
    none_of(check(store.environment, store.data))
    none_of(check_registry(store.environment, store.data.registry).problems)
    check_models(store, told)
    assert store.state.catalog.version >= told.applied, "acknowledged definitions are lost"
    if store.state.catalog.version:
        check_rows(store, told)
        check_replay(store, scratch)
    else:
        assert not told.events, "acknowledged events are lost, and the definitions"


def check_models(store: Store, told: Told) -> None:
    numbers = [v.number for v in store.registry.versions("clf")] if store.registry.models() else []
    assert numbers == list(range(1, len(numbers) + 1))
    assert len(numbers) >= told.registered, "an acknowledged model version is lost"
    if told.champion:
        assert store.registry.get("clf").number >= told.champion


def check_rows(store: Store, told: Told) -> None:
    """Every acknowledged row is there as it was sent, every row once, under dense sequences."""
    offline = offline_of(store)
    source = offline.catalog.definitions.source("clicks")
    frame = offline.frame(source.name, source.schema)
    sequences = frame["__sequence"].to_list()
    found = dict(zip(sequences, frame["n"].to_list(), strict=True))
    missing = told.events.items() - found.items()
    assert not missing, f"acknowledged and lost: {sorted(missing)[:5]} of {len(told.events)}"
    assert len(found) == len(sequences) == len(set(found.values())), "rows are there twice"
    found_sequences = [*sequences, *told.erased, *definition_sequences(store)]
    assert sorted(found_sequences) == list(range(1, offline.through + 1))
    assert frame[DELETED].is_null().all()
    for row in frame.select("__event_time", *source.schema).iter_rows(named=True):
        row["at"] = row.pop("__event_time")
        assert row == row_of(row["n"], told.start_us)


def definition_sequences(store: Store) -> list[int]:
    with store.environment.snapshot() as snapshot:
        return [int(r.first) for r in read_records(snapshot, 1, kinds=DEFINITIONS_ONLY)]


def offline_of(store: Store) -> Offline:
    with store.environment.snapshot() as snapshot:
        through = int(snapshot.sequence)
    return Offline(store.data, store.environment, store.state.catalog, through)


def check_replay(store: Store, scratch: Path) -> None:
    """Features of every user, as served, equal those of an empty store that replays the log."""
    with store.environment.snapshot() as snapshot:
        newest_us = int(snapshot.newest_known_us)
        if newest_us == MIN_TIME_US:
            return
    with Environment.open(scratch, clock=lambda: newest_us, map_bytes=MAP_BYTES) as replayed:
        writer = Writer(replayed)
        writer.write_blocking(partial(store.state.store, catalog=store.state.catalog))
        for block in blocks(store):
            writer.write_blocking(partial(apply_batch, **block, newest_known_us=newest_us))
        wanted = served(store, Read(replayed, store.state, store.ownership), newest_us + 1)
        writer.close()
    shutil.rmtree(scratch)
    found = served(store, store.read, newest_us + 1)
    assert found == wanted, "features differ from a replay of the log"


def blocks(store: Store) -> Iterator[dict[str, Any]]:
    """Yield the log, cut anew, as arguments of `apply_batch`."""
    catalog = store.state.catalog
    schema = catalog.definitions.source("clicks").schema
    events = offline_of(store).events("clicks", tuple(schema))
    for start in range(0, len(events.stamps.sequences), REPLAY_ROWS):
        part = slice(start, start + REPLAY_ROWS)
        yield {
            "views": catalog.views_by_source["clicks"],
            "columns": {name: column.take(part) for name, column in events.columns.items()},
            "stamps": Stamps(*(stamp[part] for stamp in events.stamps)),
        }


def served(store: Store, read: Read, at_us: int) -> list[Any]:
    """Return statuses and values of all services' features; floats by their bits."""
    return [served_by(read, name, at_us) for name in store.state.catalog.closures]


def served_by(read: Read, service: str, at_us: int) -> list[Any]:
    users = {"user": column_of(DType.STRING, [*map(user_of, range(USERS)), "never"])}
    frame = read.read(read.closure(service), users, at_us=at_us).frame
    statuses = [(name, status.tolist()) for name, status in frame.statuses.items()]
    return [*statuses, *((name, bits(column)) for name, column in frame.columns.items())]


def bits(column: Column) -> Iterable[Any]:
    return [v.hex() if isinstance(v, float) else v for v in column.to_list()]


async def go_on(store: Store, told: Told) -> None:
    """Life goes on: a batch sent again is known, a new one and a compaction work."""
    if told.last_batch:
        sequence = told.last_sequence
        again = await store.send(told.last_batch, told.start_us, lambda _: None)
        assert again.replayed, "a batch sent again was stored twice"
        assert again.sequence == sequence
    await store.apply(lambda _: None)
    first = 10_000_000 + len(told.events)
    await store.send([first, first + 1], told.start_us, told.hear_fact)
    await store.compactor.run()
    await store.register(10_000, lambda _: None)
