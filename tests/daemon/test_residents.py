"""Cells that stay in memory: always those that a read of what is stored finds, to the bit."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from mlpd.core.convert import column_of
from mlpd.core.definitions import (
    Aggregate,
    Entity,
    FeatureService,
    FeatureView,
    Source,
    WindowView,
    build_document,
)
from mlpd.core.errors import MlpdError
from mlpd.core.names import TimeUs
from mlpd.core.time import MINUTE_US, SECOND_US, system_clock
from mlpd.daemon.ownership import Ownership
from mlpd.daemon.read import Read, given_columns
from mlpd.daemon.state import CatalogState
from mlpd.features import resident
from mlpd.features.ingest import apply_batch
from mlpd.features.kernels import load_feature_kernels
from mlpd.features.stamps import Stamps
from mlpd.storage.environment import Environment
from mlpd.storage.tables import Table
from mlpd.storage.touched import ENTITIES_MAX, KEPT_MAX, TouchedLog
from mlpd.storage.transactions import Snapshot, WriteTransaction
from mlpd.storage.writer import Writer

START_US = 1_700_000_000 * SECOND_US
USERS = ("a", "b", "c", None)

user, shop = Entity("user"), Entity("shop", key="int64")
schema = {"user": "string", "shop": "int64", "x": "float64", "n": "int64"}
sales = Source("sales", timestamp="at", schema=schema)
last = FeatureView("last", user, sales, ["x", "n"], ttl="1m", defaults={"n": 7})
seen = FeatureView("seen", shop, sales, ["x"])
spend = WindowView(
    *("spend", user, sales, ["10m", "1d"], [Aggregate.count(), Aggregate.sum("x")]),
    defaults={"x_sum_10m": -1.0},
)
trade = WindowView("trade", shop, sales, ["7d"], [Aggregate.mean("x"), Aggregate.max("n")])
service = FeatureService("s", [last, seen, spend, trade])
DOCUMENT = build_document([user, shop, sales, last, seen, spend, trade, service])


@dataclass
class Shop:
    """A real store, and a read that keeps what it has read."""

    environment: Environment
    writer: Writer
    state: CatalogState
    reading: Read

    def write(self, rows: Sequence[tuple[Any, Any, float]], event_us: int) -> None:
        given = {"user": 0, "shop": 1, "x": 2, "n": 2}
        columns = {
            name: column_of(dtype, [int(r[i]) if name == "n" else r[i] for r in rows], name)
            for (name, dtype), i in zip(
                self.state.catalog.definitions.source("sales").schema.items(),
                given.values(),
                strict=True,
            )
        }
        times = np.full(len(rows), event_us, np.int64)

        def put(txn: WriteTransaction) -> None:
            first = txn.take_sequences(len(rows))
            stamps = Stamps(times, times, np.arange(first, first + len(rows)))
            txn.note_times(event_us, event_us)
            views = self.state.catalog.views_by_source["sales"]
            apply_batch(txn, views, columns, stamps, txn.newest_known_us)

        self.writer.write_blocking(put)

    def found(self, read: Read, rows: list[dict[str, Any]], at_us: int) -> list[Any]:
        closure = read.closure("s")
        frame = read.read(closure, given_columns(closure, rows), at_us=TimeUs(at_us)).frame
        times = {view: found.tolist() for view, found in frame.event_us.items()}
        return [repr(frame.value_lists()), frame.status_lists(), times]

    def check(self, rows: list[dict[str, Any]], at_us: int) -> None:
        fresh = Read(self.environment, self.state, self.reading._ownership)
        assert self.found(self.reading, rows, at_us) == self.found(fresh, rows, at_us)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Shop]:
    with Environment.open(tmp_path / "lmdb", clock=system_clock) as environment:
        state = CatalogState(load_feature_kernels(), tmp_path / "cache")
        state.catalog = state.build(DOCUMENT, version=1, view_ids={}, next_view_id=1)
        writer = Writer(environment)
        writer.write_blocking(lambda txn: state.store(txn, state.catalog))
        whole = cast("Ownership", SimpleNamespace(part=None))
        yield Shop(environment, writer, state, Read(environment, state, whole))
        writer.close()


@pytest.mark.parametrize("seed", range(4))
def test_what_stays_is_what_a_read_of_the_store_finds(store: Shop, seed: int) -> None:
    lot, at_us, event_us = random.Random(seed), START_US, START_US
    for _ in range(60):
        step = lot.random()
        if step < 0.4:  # now and then an event that comes late
            event_us = max(event_us, at_us - lot.choice([0, 1, 5 * MINUTE_US]))
            late_us = lot.choice([0, 0, 30 * MINUTE_US])
            rows = [(lot.choice(USERS), lot.choice([1, 2, None]), lot.random() * 9)]
            store.write(rows * lot.randint(1, 3), event_us - late_us)
        elif step < 0.45:
            _delete_rows(store, lot.choice(["a", "b"]))
        at_us = max(at_us, event_us + 1) + lot.choice(
            [0, 1, 25 * SECOND_US, MINUTE_US, 7 * MINUTE_US]
        )
        back_us = max(event_us + 1, at_us - lot.choice([0, 0, 40 * SECOND_US, 6 * MINUTE_US]))
        rows_read = [
            {"user": lot.choice(USERS), "shop": lot.choice([1, 2, 3, None])}
            for _ in range(lot.choice([1, 1, 4]))
        ]
        store.check(rows_read, back_us)


def _delete_rows(store: Shop, name: str) -> None:
    """Delete whatever is stored of a user, as an erasure does."""

    def delete(txn: WriteTransaction) -> None:
        for table in (Table.ONLINE, Table.TILES):
            for key in [key for key, _ in txn.scan(table) if key.endswith(f"s{name}\0\0".encode())]:
                txn.delete(table, key)

    store.writer.write_blocking(delete)


def _gets(monkeypatch: pytest.MonkeyPatch) -> list[Table]:
    asked: list[Table] = []
    get_many = Snapshot.get_many

    def counted(self: Snapshot, table: Table, keys: Sequence[bytes]) -> list[bytes | None]:
        asked.extend([table] * len(keys))
        return get_many(self, table, keys)

    monkeypatch.setattr(Snapshot, "get_many", counted)
    return asked


def test_an_entity_is_read_again_when_a_commit_touched_it(
    store: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.write([("a", 1, 1.0), ("b", 2, 2.0)], START_US)
    asked, rows = _gets(monkeypatch), [{"user": "a", "shop": 1}]
    for _ in range(3):  # the first read of a hop keeps nothing, nor the first of an entity
        asked.clear()
        store.found(store.reading, rows, START_US + 1)
        assert asked
    asked.clear()
    store.found(store.reading, rows, START_US + 2)
    assert not asked  # nothing has changed
    store.write([("b", 2, 3.0)], START_US)
    asked.clear()
    store.found(store.reading, rows, START_US + 3)
    assert not asked  # others have
    with pytest.raises(MlpdError):
        store.writer.write_blocking(_fails)
    store.write([("a", 2, 4.0)], START_US)
    asked.clear()
    store.found(store.reading, rows, START_US + 4)
    assert len(asked) == 2 + 1  # the user's two rows and her older tiles; not the shop's
    asked.clear()
    store.found(store.reading, rows, START_US + 62 * SECOND_US)  # the row has come of age
    assert len(asked) == 2 + 1


def _fails(txn: WriteTransaction) -> None:
    txn.put(Table.ONLINE, bytes(6) + b"sa\0\0", b"")
    raise MlpdError("no", code="no")


def test_a_snapshot_before_what_stays_is_read_from_the_store(store: Shop) -> None:
    store.write([("a", 1, 1.0)], START_US)
    residents, layout = (
        store.reading._residents,
        store.state.catalog.layout(store.reading.closure("s")),
    )
    with store.environment.snapshot() as old:
        store.write([("a", 1, 2.0)], START_US)
        with store.environment.snapshot() as new, residents.at(new, None) as cells:
            assert cells.of(layout) is not None
            with residents.at(new, None) as others:  # somebody has it
                assert others.of(layout) is None
        with residents.at(old, None) as cells:
            assert cells.of(layout) is None


def test_a_full_layout_starts_anew(store: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resident, "PLACES_MAX", 6)
    monkeypatch.setattr(resident, "PLACES_MIN", 1)
    store.write([(name, 1, 1.0) for name in "abcdefgh"], START_US)
    for i in range(24):
        rows = [{"user": "abcdefgh"[(i + j) % 8], "shop": 1} for j in range(4)]
        store.check(rows, START_US + 1)


def test_commits_that_nobody_takes_are_forgotten_and_told_so() -> None:
    log = TouchedLog()
    log.note(1, set())
    assert log.take(1) == set()
    log.note(2, {b"a"})
    log.note(3, {b"b"})
    assert log.take(2) == {b"a"}
    assert log.take(3) == {b"b"}
    log.note(4, None)
    assert log.take(4) is None
    assert log.take(4) == set()
    many = {str(i).encode() for i in range(ENTITIES_MAX)}
    for txn_id in range(5, 5 + KEPT_MAX // ENTITIES_MAX + 1):
        log.note(txn_id, set(many))
    log.note(txn_id + 1, {b"c"})
    assert log.take(6) is None  # of a snapshot that shows less than was forgotten
    assert log.take(txn_id) is None
    assert log.take(txn_id + 1) == {b"c"}


def test_a_commit_that_touches_many_has_touched_anything(store: Shop) -> None:
    store.write([(None, number, 1.0) for number in range(ENTITIES_MAX + 1)], START_US)
    with store.environment.snapshot() as snapshot:
        assert store.environment.touched.take(snapshot.txn_id) is None
