"""Erasing: nothing of the entity is left, all else is as if its events had never come."""

import asyncio
import hashlib
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from mlpd.core.columns import DType
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
from mlpd.core.errors import MlpdError, StorageFullError
from mlpd.core.hashing import canonical_json, sha256_digest
from mlpd.core.keys import encode_entity
from mlpd.core.time import MINUTE_US
from mlpd.daemon.app import Daemon
from mlpd.daemon.fsck import check_stopped
from mlpd.daemon.offline import Offline
from mlpd.daemon.predictions import Prediction
from mlpd.daemon.read import given_columns
from mlpd.features.ingest import parse_batch
from mlpd.features.offline import JoinOptions, Spine, join_history
from mlpd.storage.offline import scan_events
from mlpd.storage.tables import Table
from tests.conftest import START_US, ManualClock, until

OpenDaemon = Callable[..., AbstractAsyncContextManager[Daemon]]
USERS = ["keep-one", "gone-secret", "keep-two", "gone-as-well"]
SECRET = "gone-secret"

user, shop = Entity("user"), Entity("shop", key="int64")
pair = Entity("pair", key={"user": "string", "shop": "int64"})
schema = {"user": "string", "shop": "int64", "id": "string", "x": "float64"}
visits = Source("visits", timestamp="at", schema=schema, event_id="id")
stock = Source("stock", timestamp="at", schema={"shop": "int64", "x": "float64"})
last = FeatureView("last", user, visits, ["x", "id"])
seen = FeatureView("seen", shop, visits, ["user", "x"])
load = WindowView("load", user, visits, ["1h"], [Aggregate.count(), Aggregate.sum("x")])
busy = WindowView("busy", shop, visits, ["1h"], [Aggregate.count(), Aggregate.mean("x")])
both = WindowView("both", pair, visits, ["1h"], [Aggregate.count()])
goods = FeatureView("goods", shop, stock, ["x"])
views = [last, seen, load, busy, both, goods]
service = FeatureService("all", views)
DOCUMENT = build_document([user, shop, pair, visits, stock, *views, service])


def visit_columns(first: int, count: int) -> dict[str, list[Any]]:
    numbers = range(first, first + count)
    return {
        "at": [START_US - MINUTE_US + n for n in numbers],
        "user": [USERS[n % 4] for n in numbers],
        "shop": [n % 3 for n in numbers],
        "id": [f"{USERS[n % 4]} {n}" for n in numbers],
        "x": [0.37 * n for n in numbers],
    }


async def send(daemon: Daemon, columns: dict[str, list[Any]], source: str = "visits") -> int:
    spec = daemon.state.catalog.definitions.source(source)
    batch = parse_batch(spec, columns, now_us=START_US)
    assert not batch.rejected
    return (await daemon.ingest.ingest([batch])).sequence


async def fill(daemon: Daemon, batches: int = 12) -> None:
    """Events in segments and in the log's tail, some with other columns; predictions."""
    await daemon.definitions.apply(DOCUMENT)
    for number in range(batches):
        await send(daemon, visit_columns(number * 10, 10))
        if number == batches // 2:
            await daemon.compactor.run()
            await send(daemon, {"at": [START_US] * 3, "shop": [0, 1, 2], "x": [1.0] * 3}, "stock")
    for number, name in enumerate(USERS):
        log(daemon, name, number)
    daemon.predictions.flush()


def log(daemon: Daemon, name: str, number: int) -> None:
    given = {"user": name, "shop": number}
    vector, prediction_id = np.zeros(1), f"{START_US:016x}{number:04x}{number:012x}"
    daemon.predictions.append(
        Prediction(prediction_id, START_US, 1, "r", "a", "m", 1, 0.5, vector, given, name)
    )


def features(daemon: Daemon) -> dict[str, list[Any]]:
    closure = daemon.read.closure("all")
    rows = [{"user": name, "shop": number} for name in USERS for number in range(3)]
    at_us = START_US + MINUTE_US
    columns = daemon.read.read(closure, given_columns(closure, rows), at_us=at_us).frame.columns
    return {
        name: [v.hex() if isinstance(v, float) else v for v in column.to_list()]
        for name, column in columns.items()
    }


def joined(daemon: Daemon) -> dict[str, list[Any]]:
    """Return the same features by a join over the log."""
    catalog = daemon.state.catalog
    users = [name for name in USERS for _ in range(3)]
    given = {
        "user": column_of(DType.STRING, users),
        "shop": column_of(DType.INT64, [*range(3)] * 4),
    }
    with daemon.environment.snapshot() as snapshot:
        offline = Offline(daemon.paths, daemon.environment, catalog, int(snapshot.sequence))
    frame = join_history(
        catalog,
        catalog.closures["all"],
        Spine(given, np.full(len(users), START_US + MINUTE_US)),
        offline.events,
        JoinOptions("as_known"),
    )
    return {
        name: [v.hex() if isinstance(v, float) else v for v in column.to_list()]
        for name, column in frame.columns.items()
    }


def stored(daemon: Daemon, source: str = "visits") -> pl.DataFrame:
    lazy = scan_events(daemon.environment, daemon.paths.segments, source)
    return lazy.sort("__sequence").collect()


def places_of(daemon: Daemon, text: bytes) -> list[str]:
    """Return where the text is found: rows of LMDB as reads see them, and files of segments."""
    found = []
    with daemon.environment.snapshot() as snapshot:
        for table in Table:
            found += [f"{table} {k!r}" for k, v in snapshot.scan(table) if text in k or text in v]
    for path in daemon.paths.segments.rglob("*"):
        if path.is_file() and text in path.read_bytes():
            found.append(str(path))
        if path.suffix == ".parquet":
            rows = pl.read_parquet(path, glob=False)
            found += [str(path) for row in rows.rows() if text.decode() in repr(row)]
    return found


async def test_nothing_of_it_is_left_and_the_rest_is_as_if_it_had_never_come(
    open_daemon: OpenDaemon, tmp_path: Path, daemon_directory: Path
) -> None:
    async with open_daemon(clock=ManualClock()) as daemon:
        await fill(daemon)
        assert len(places_of(daemon, SECRET.encode())) > 20
        receipt = await daemon.erase.run("user", [{"user": SECRET}])
        assert places_of(daemon, SECRET.encode()) == []
        assert len(places_of(daemon, b"gone-as-well")) > 20
        frame, found = stored(daemon), features(daemon)
        assert joined(daemon) == found
        check_receipt(daemon, receipt)
    wanted = visit_columns(0, 120)
    kept = [i for i, name in enumerate(wanted["user"]) if name != SECRET]
    assert frame["id"].to_list() == [wanted["id"][i] for i in kept]
    assert frame["__event_time"].to_list() == [wanted["at"][i] for i in kept]
    async with open_daemon(tmp_path / "other", clock=ManualClock()) as other:
        await other.definitions.apply(DOCUMENT)
        await send(other, {name: [column[i] for i in kept] for name, column in wanted.items()})
        await send(other, {"at": [START_US] * 3, "shop": [0, 1, 2], "x": [1.0] * 3}, "stock")
        assert features(other) == found
    report = await asyncio.to_thread(check_stopped, daemon_directory, ManualClock(), deep=True)
    assert report["problems"] == []
    assert report["checked"]["segments"]["unnamed_files"] == 0


def check_receipt(daemon: Daemon, receipt: dict[str, Any]) -> None:
    entity = encode_entity([DType.STRING], [SECRET], "user")
    assert entity is not None
    wanted = hashlib.sha256(receipt["id"].encode() + b":" + entity).hexdigest()
    assert receipt["key_digests"] == [f"sha256:{wanted}"]
    rows = {"rows": 30, "first_sequence": 3, "last_sequence": 122}
    assert receipt["sources"] == {"visits": rows}
    assert (receipt["online_rows"], receipt["tile_rows"]) == (2, 0)
    assert (receipt["predictions"], receipt["labels"], receipt["event_ids"]) == (1, 0, 30)
    assert receipt["views_rebuilt"] == ["both", "busy", "seen"]
    assert receipt["files_rewritten"] == 2
    assert receipt["through_sequence"] == 124
    assert any("Backups" in text for text in receipt["caveats"])
    fields = {name: value for name, value in receipt.items() if name != "digest"}
    assert receipt["digest"] == sha256_digest(canonical_json(fields))
    assert daemon.erase.list() == {"open": [], "receipts": [receipt]}
    assert daemon.erase.get(receipt["id"]) == {"order": None, "receipt": receipt}
    assert SECRET not in repr(receipt)


async def test_several_keys_go_at_once(open_daemon: OpenDaemon) -> None:
    async with open_daemon(clock=ManualClock()) as daemon:
        await fill(daemon)
        keys = [{"user": SECRET}, {"user": "gone-as-well"}, {"user": SECRET}]
        receipt = await daemon.erase.run("user", keys)
        assert (receipt["keys"], len(receipt["key_digests"])) == (2, 2)
        assert receipt["sources"]["visits"]["rows"] == 60
        assert places_of(daemon, b"gone-") == []
        assert joined(daemon) == features(daemon)


async def test_later_events_are_new_ones_and_a_file_can_be_written_anew_again(
    open_daemon: OpenDaemon,
) -> None:
    async with open_daemon(clock=ManualClock()) as daemon:
        await daemon.definitions.apply(DOCUMENT)
        nothing = await daemon.erase.run("user", [{"user": SECRET}])
        assert (nothing["sources"], nothing["views_rebuilt"]) == ({}, [])
        await send(daemon, visit_columns(0, 20))
        await daemon.erase.run("user", [{"user": "gone-as-well"}])
        await send(daemon, visit_columns(20, 10))
        assert stored(daemon)["user"].to_list().count("gone-as-well") == 2
        again = await daemon.erase.run("user", [{"user": SECRET}])
        assert again["sources"]["visits"]["rows"] == 8
        assert places_of(daemon, SECRET.encode()) == []
        assert joined(daemon) == features(daemon)
        assert len(daemon.erase.list()["receipts"]) == 3


async def test_a_composite_key_takes_only_rows_that_have_all_of_it(open_daemon: OpenDaemon) -> None:
    async with open_daemon(clock=ManualClock()) as daemon:
        await fill(daemon)
        receipt = await daemon.erase.run("pair", [{"user": SECRET, "shop": 1}])
        assert receipt["views_rebuilt"] == ["busy", "last", "load", "seen"]
        rows = stored(daemon)
        gone = (pl.col("user") == SECRET) & (pl.col("shop") == 1)
        assert len(rows.filter(gone)) == 0
        assert len(rows.filter(pl.col("user") == SECRET)) == 20
        assert receipt["predictions"] == 1
        assert joined(daemon) == features(daemon)


async def test_ingest_goes_on_meanwhile(open_daemon: OpenDaemon, daemon_directory: Path) -> None:
    async with open_daemon(clock=ManualClock()) as daemon:
        await fill(daemon)
        erasing = asyncio.create_task(daemon.erase.run("user", [{"user": SECRET}]))
        number, sent = 120, 0
        while not erasing.done():
            columns = visit_columns(number, 4)
            columns["user"] = ["keep-one"] * 4
            await send(daemon, columns)
            number, sent = number + 4, sent + 1
            await asyncio.sleep(0.01)
        receipt = await erasing
        assert sent > 3
        assert receipt["sources"]["visits"]["rows"] == 30
        assert len(stored(daemon)) == number - 30
        assert joined(daemon) == features(daemon)
    report = await asyncio.to_thread(check_stopped, daemon_directory, ManualClock(), deep=True)
    assert report["problems"] == []


async def test_a_failed_step_is_told_and_done_again(
    open_daemon: OpenDaemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(_: Any) -> Any:
        raise StorageFullError("the disk is full")

    clock = ManualClock()
    async with open_daemon(clock=clock) as daemon:
        await fill(daemon)
        with monkeypatch.context() as patch:
            patch.setattr(daemon.erase, "_run_child", fail)
            with pytest.raises(StorageFullError) as caught:
                await daemon.erase.run("user", [{"user": SECRET}])
        (waiting,) = daemon.erase.list()["open"]
        assert caught.value.details["erasure"] == waiting["id"]
        assert daemon.erase.get(waiting["id"]) == {"order": waiting, "receipt": None}
        assert waiting["step"] == "rewrite"
        assert SECRET not in repr(waiting)
    async with open_daemon(clock=clock) as daemon:
        await until(lambda: not daemon.erase.list()["open"])
        (receipt,) = daemon.erase.list()["receipts"]
        assert receipt["id"] == waiting["id"]
        assert places_of(daemon, SECRET.encode()) == []
        assert joined(daemon) == features(daemon)


@pytest.mark.parametrize(
    ("entity", "keys", "code"),
    [
        ("nobody", [{"user": "a"}], "unknown_entity"),
        ("user", [], "wrong_number_of_keys"),
        ("user", [{"user": "a"}] * 101, "wrong_number_of_keys"),
        ("user", [{"name": "a"}], "wrong_entity_key"),
        ("user", [{"user": None}], "wrong_entity_key"),
        ("user", [{"user": 7}], "wrong_type"),
        ("pair", [{"user": "a"}], "wrong_entity_key"),
    ],
)
async def test_wrong_orders_are_refused(
    open_daemon: OpenDaemon, entity: str, keys: list[dict[str, Any]], code: str
) -> None:
    async with open_daemon(clock=ManualClock()) as daemon:
        await daemon.definitions.apply(DOCUMENT)
        with pytest.raises(MlpdError) as caught:
            await daemon.erase.run(entity, keys)
        assert caught.value.code == code
        assert daemon.erase.list() == {"open": [], "receipts": []}
