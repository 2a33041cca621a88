"""What must hold of a data directory after anything: nothing acknowledged lost, nothing doubled."""

import json
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from mlpd.core.columns import Column, DType
from mlpd.core.convert import column_of
from mlpd.core.time import MIN_TIME_US
from mlpd.daemon.offline import Offline
from mlpd.daemon.read import Read
from mlpd.features.ingest import apply_batch
from mlpd.features.stamps import Stamps
from mlpd.registry.fsck import check as check_registry
from mlpd.storage.check import check, check_pages
from mlpd.storage.environment import Environment
from mlpd.storage.files import DataDirectory
from mlpd.storage.log import DEFINITIONS_ONLY, read_records
from mlpd.storage.writer import Writer
from tests.storage.powercut.live import MAP_BYTES, USERS, Store, opened, row_of

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

    def copy(self) -> "Told":
        return replace(self, events=dict(self.events))

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


async def verify(root: Path, told: Told, scratch: Path, *, going_on: bool = True) -> None:
    """Start on the directory as the daemon does; AssertionError or any other error: it is broken.

    `scratch`: a folder that doesn't exist, for a replay of the log.  `going_on`: also write on.
    """
    check_before(root)
    with opened(root) as store:
        await store.compactor.start()
        check_store(store, told, scratch)
        if going_on:
            await go_on(store, told)
            check_store(store, told, scratch)
    none_of(check_pages(store.data))


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
    frame = offline.frame(source, source.schema)
    sequences = frame["__sequence"].to_list()
    found = dict(zip(sequences, frame["n"].to_list(), strict=True))
    missing = told.events.items() - found.items()
    assert not missing, f"acknowledged and lost: {sorted(missing)[:5]} of {len(told.events)}"
    assert len(found) == len(sequences) == len(set(found.values())), "rows are there twice"
    assert sorted([*sequences, *definition_sequences(store)]) == list(range(1, offline.through + 1))
    for row in frame.drop("__sequence", "__known_time").iter_rows(named=True):
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
        wanted = served(store, Read(replayed, store.state), newest_us + 1)
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
    users = {"user": column_of(DType.STRING, [*(f"u{i}" for i in range(USERS)), "never"])}
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
