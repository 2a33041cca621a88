"""Tombstones: how they are sent, and that every kind of join sees what brute force sees.

That online reads agree with joins is for test_parity.py, whose stories have tombstones, too.
"""

import io
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
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
    Job,
    Source,
    Spine,
    WindowView,
    build_document,
)
from mlpd.daemon.app import Daemon
from mlpd.daemon.offline import Offline
from mlpd.daemon.read import given_columns
from mlpd.daemon.training_set import build_training_set
from mlpd.features import offline as joins
from mlpd.features.ingest import Batch, parse_batch, rows_to_columns
from mlpd.features.latest import LatestPlan
from mlpd.features.offline import Mode, join_history
from mlpd.features.status import Status
from mlpd.features.tombstones import DELETED
from mlpd.http.batches import parse_arrow
from tests.conftest import START_US
from tests.features.reference import Event, Latest

OpenDaemon = Callable[..., AbstractAsyncContextManager[Daemon]]

user, shop = Entity("user"), Entity("shop", key="int64")
schema = {"user": "string", "shop": "int64", "x": "float64", "text": "string", "seen": "timestamp"}
visits = Source("visits", timestamp="at", schema=schema)
of_user = FeatureView("of_user", user, visits, ["x", "text"], defaults={"x": 0.5})
of_shop = FeatureView("of_shop", shop, visits, ["x"])
count = WindowView("count", user, visits, ["1h"], [Aggregate.count()])
service = FeatureService("all", [of_user, of_shop, count])
job = Job("job", service, Spine(visits, time="seen"), label="x", categorical=["of_user.text"])
DOCUMENT = build_document([user, shop, visits, of_user, of_shop, count, service, job])
MISSING = (int(Status.MISSING), None)


def row(ago_us: int, **values: Any) -> dict[str, Any]:
    return {"at": START_US - ago_us, "user": "a", "shop": 1, **values}


async def send(daemon: Daemon, *rows: dict[str, Any]) -> int:
    source = daemon.state.catalog.definitions.source("visits")
    batch = parse_batch(source, rows_to_columns(source, rows), now_us=START_US)
    assert not batch.rejected
    return (await daemon.ingest.ingest([batch])).sequence


def read(daemon: Daemon, user: str | None = "a", shop: int | None = 1) -> dict[str, Any]:
    """Return (status, value) by feature, now."""
    closure = daemon.read.closure("all")
    found = daemon.read.read(closure, given_columns(closure, [{"user": user, "shop": shop}]))
    frame = found.frame
    return {n: (int(frame.statuses[n][0]), c.to_list()[0]) for n, c in frame.columns.items()}


@pytest.fixture
async def daemon(open_daemon: OpenDaemon) -> Any:
    async with open_daemon(clock=lambda: START_US) as daemon:
        await daemon.definitions.apply(DOCUMENT)
        yield daemon


async def test_a_tombstone_hides_what_is_older_until_something_newer_comes(daemon: Daemon) -> None:
    await send(daemon, row(30, x=1.0, text="one"))
    await send(daemon, row(20, x=7.0, text="kept in the log", **{DELETED: True}))
    found = read(daemon)
    assert found["of_user.x"] == (Status.MISSING, 0.5)
    assert found["of_user.text"] == found["of_shop.x"] == MISSING
    assert found["count.count_1h"] == (Status.PRESENT, 1)
    await send(daemon, row(25, x=2.0))
    assert read(daemon)["of_user.text"] == MISSING
    await send(daemon, row(20, x=3.0))  # as old, and later in the log
    assert read(daemon)["of_user.x"] == (Status.PRESENT, 3.0)
    assert read(daemon)["count.count_1h"] == (Status.PRESENT, 3)


async def test_a_null_key_keeps_that_entity(daemon: Daemon) -> None:
    await send(daemon, row(30, x=1.0), row(20, shop=None, **{DELETED: True}))
    found = read(daemon)
    assert found["of_user.text"] == MISSING
    assert found["of_shop.x"] == (Status.PRESENT, 1.0)


async def test_the_row_of_a_tombstone_holds_nothing_but_stamps(daemon: Daemon) -> None:
    sequence = await send(daemon, row(20, x=7.0, text="secret", **{DELETED: True}))
    plan = daemon.state.catalog.views["of_user"].plan
    assert isinstance(plan, LatestPlan)
    stamps, columns = joins.Stamps(*np.array([[1], [2], [sequence]])), {}
    for name, dtype in daemon.state.catalog.definitions.source("visits").schema.items():
        columns[name] = column_of(dtype, [{"x": 7.0, "text": "secret"}.get(name)])
    columns[DELETED] = column_of(DType.BOOL, [True])
    (value,) = plan.update([None], np.zeros(1, np.int64), stamps, columns)
    assert value is not None
    assert b"secret" not in value
    assert plan.fault(value) == ""
    assert np.frombuffer(value, np.uint64)[0] == 1 | 1 << 32
    assert np.frombuffer(value, np.uint64)[4:].tolist() == [0b11, 0, 0]


def parsed(form: str, rows: list[dict[str, Any]], source: Any) -> Batch:
    columns = rows_to_columns(source, rows)
    if form != "arrow":
        return parse_batch(source, columns, now_us=START_US)
    buffer = io.BytesIO()
    pl.DataFrame(columns).write_ipc_stream(buffer)
    return parse_arrow(source, buffer.getvalue(), now_us=START_US, all_or_nothing=False)


@pytest.mark.parametrize("form", ["columns", "arrow"])
async def test_every_form_carries_the_mark(daemon: Daemon, form: str) -> None:
    source = daemon.state.catalog.definitions.source("visits")
    marks = [True, False, None]
    batch = parsed(form, [row(i, **{DELETED: mark}) for i, mark in enumerate(marks)], source)
    assert batch.columns[DELETED].to_list() == [True, False, False]
    assert DELETED not in parsed(form, [row(i) for i in range(3)], source).columns
    assert DELETED not in parsed(form, [row(0, **{DELETED: False})], source).columns


async def test_a_mark_of_another_type_refuses_its_row(daemon: Daemon) -> None:
    source = daemon.state.catalog.definitions.source("visits")
    columns = rows_to_columns(source, [row(1), row(2, **{DELETED: "yes"})])
    batch = parse_batch(source, columns, now_us=START_US)
    assert batch.rows == 1
    (refused,) = batch.rejected
    assert (refused["index"], refused["code"]) == (1, "wrong_type")
    assert DELETED in refused["message"]


async def test_a_tombstone_is_no_row_of_a_training_set(daemon: Daemon) -> None:
    seen = START_US - 5
    await send(
        daemon,
        *(row(50 + i, x=float(i), text="t", seen=seen + i) for i in range(3)),
        row(40, x=9.0, seen=seen, **{DELETED: True}),
    )
    with daemon.environment.snapshot() as snapshot:
        through = snapshot.sequence
    catalog = daemon.state.catalog
    offline = Offline(daemon.paths, daemon.environment, catalog, through)
    data = build_training_set(offline, catalog.definitions.job("job"), catalog.closures["all"])
    assert data.labels.tolist() == [0.0, 1.0, 2.0]


@pytest.mark.parametrize("mode", ["as_known", "as_corrected", "as_of_sequence"])
async def test_joins_of_every_mode_agree_with_brute_force(daemon: Daemon, mode: Mode) -> None:
    chance = np.random.default_rng(11)
    events: list[Event] = []
    for _ in range(40):
        rows = [
            row(
                int(chance.integers(60, 160)),
                user=f"u{chance.integers(3)}",
                shop=None if chance.random() < 0.2 else int(chance.integers(2)),
                x=None if chance.random() < 0.2 else float(chance.integers(100)),
                **({DELETED: True} if chance.random() < 0.3 else {}),
            )
            for _ in range(4)
        ]
        for one in rows:
            one["known_at"] = one["at"] + int(chance.integers(60))
        last = await send(daemon, *rows)
        for sequence, one in enumerate(rows, last - 3):
            known = {"x": None, "text": None, **one}
            events.append(Event("visits", one["at"], one["known_at"], sequence, known))
    spine = [
        (f"u{user}", shop, START_US - ago, int(chance.integers(1, 160)))
        for user in range(4)
        for shop in range(2)
        for ago in range(0, 170, 3)
    ]
    users, shops, times, sequences = (list(column) for column in zip(*spine, strict=True))
    given = {"user": column_of(DType.STRING, users), "shop": column_of(DType.INT64, shops)}
    asked = np.array(sequences, np.int64) if mode == "as_of_sequence" else None
    catalog = daemon.state.catalog
    offline = Offline(daemon.paths, daemon.environment, catalog, events[-1].sequence)
    joined = join_history(
        catalog,
        catalog.closures["all"],
        joins.Spine(given, np.array(times, np.int64), asked),
        offline.events,
        joins.JoinOptions(mode),
    )
    models = {
        "of_user": Latest("visits", ("user",), ("x", "text"), None, {"x": 0.5}),
        "of_shop": Latest("visits", ("shop",), ("x",), None, {}),
    }
    missing = 0
    for i, (user, shop, t_us, sequence) in enumerate(spine):
        visible = {
            "as_known": lambda e, t=t_us: e.known_us <= t,
            "as_corrected": lambda e, t=t_us: e.event_us <= t,
            "as_of_sequence": lambda e, s=sequence: e.sequence <= s,
        }[mode]
        seen = [event for event in events if visible(event)]
        for name, model in models.items():
            wanted = model.values(seen, [user if name == "of_user" else shop], t_us)
            found = [
                (int(joined.statuses[f"{name}.{f}"][i]), joined.columns[f"{name}.{f}"].to_list()[i])
                for f in model.features
            ]
            assert found == wanted, (name, spine[i])
            missing += wanted[0][0] == Status.MISSING
    assert 0 < missing < 2 * len(spine)
