"""Old history goes: features, joins from the horizon on and audits stay what they were."""

import asyncio
from typing import Any

import numpy as np
import pytest

from mlpd.client import AsyncClient
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
from mlpd.core.errors import DefinitionError, InvalidRequestError, StorageFullError, ValidationError
from mlpd.core.names import TimeUs
from mlpd.core.time import DAY_US, HOUR_US, format_time, system_clock
from mlpd.daemon import expire_child
from mlpd.daemon.app import Daemon
from mlpd.daemon.fsck import check_stopped
from mlpd.daemon.offline import Offline
from mlpd.daemon.predictions import Prediction
from mlpd.daemon.read import given_columns
from mlpd.daemon.training_set import build_training_set
from mlpd.features.horizon import check_kept, find_kept
from mlpd.features.ingest import parse_batch
from mlpd.features.offline import JoinOptions, join_history
from mlpd.features.offline import Spine as Rows
from tests.conftest import START_US, ManualClock, OpenDaemon, Served

USERS = ["often", "once", "twice", "gone", "never"]
NOW_US = START_US + 100 * DAY_US
CUT_US = NOW_US - 30 * DAY_US

user, shop = Entity("user"), Entity("shop", key="int64")
schema = {
    "user": "string",
    "shop": "int64",
    "x": "float64",
    "bought": "int64",
    "shown": "timestamp",
}


@pytest.fixture(autouse=True)
def expired_when_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """The daemon itself would look every minute, at a moment that no test knows."""
    monkeypatch.setattr("mlpd.daemon.expire.EXPIRE_S", 3600.0)


def document(retention: str | None = "30d", window: str = "7d") -> dict[str, Any]:
    visits = Source("visits", timestamp="at", schema=schema, retention=retention)
    other = Source("other", timestamp="at", schema={"user": "string", "x": "float64"})
    views: list[FeatureView | WindowView] = [
        FeatureView("last", user, visits, ["x", "shop"]),
        FeatureView("fresh", user, visits, ["x"], ttl="2d"),
        FeatureView("seen", shop, visits, ["user", "x"]),
        WindowView("load", user, visits, ["1h", window], [Aggregate.count(), Aggregate.sum("x")]),
        FeatureView("kept", user, other, ["x"]),
    ]
    service, latest = FeatureService("all", views), FeatureService("latest", [views[0]])
    trained = FeatureService("trained", [views[3]])
    job = Job("quick", trained, Spine(visits, time="shown"), label="bought")
    return build_document([user, shop, visits, other, *views, service, latest, trained, job])


def rows() -> list[dict[str, Any]]:
    """A visit every 6 hours of 100 days; users that came once, one row known late, a deletion."""
    found = []
    for n in range(400):
        at = START_US + n * 6 * HOUR_US
        row = {
            "at": at,
            "known_at": at + (20 if n == 278 else 1) * HOUR_US,
            "shop": n % 3,
            "x": 0.37 * n,
            "bought": n % 2,
            "shown": at,
        }
        name = {8: "once", 9: "twice", 17: "twice", 12: "gone"}.get(n, "often")
        found.append({**row, "user": name, "__deleted": False})
    gone = {
        "user": "gone",
        "shop": None,
        "x": None,
        "bought": None,
        "shown": None,
        "__deleted": True,
    }
    at = START_US + 4 * DAY_US
    return [*found, {"at": at, "known_at": at, **gone}]


def that_stay() -> list[tuple[Any, ...]]:
    """The plain rule: what is younger, or known later, and the newest of each user and shop."""
    old = [r for r in rows() if r["at"] < CUT_US and r["known_at"] < CUT_US]
    ordered = sorted(old, key=lambda r: (r["at"], r["known_at"]))
    newest = [{r[key]: r for r in ordered if r[key] is not None} for key in ("user", "shop")]
    stay = [r for r in rows() if r not in old or any(r in n.values() for n in newest)]
    assert sum(r["at"] < CUT_US for r in stay) == 7  # 3 users, 3 shops, and one known later
    return [(r["at"], r["user"], r["shop"]) for r in stay]


async def send(
    daemon: Daemon, source: str, sent: list[dict[str, Any]], now_us: int = NOW_US
) -> int:
    spec = daemon.state.catalog.definitions.source(source)
    columns = {name: [row[name] for row in sent] for name in sent[0]}
    batch = parse_batch(spec, columns, now_us=now_us)
    assert not batch.rejected
    return (await daemon.ingest.ingest([batch])).sequence


async def fill(daemon: Daemon) -> None:
    await daemon.definitions.apply(document())
    await send(daemon, "visits", rows())
    old = {"at": START_US, "known_at": START_US, "user": "once", "x": 1.0}
    await send(daemon, "other", [old, {**old, "at": START_US - 1}])
    await daemon.compactor.run()


def online(daemon: Daemon) -> list[Any]:
    closure = daemon.read.closure("all")
    keys = [{"user": name, "shop": number} for name in USERS for number in range(4)]
    frame = daemon.read.read(closure, given_columns(closure, keys), at_us=TimeUs(NOW_US)).frame
    return bits(frame.columns, frame.statuses)


def bits(columns: Any, statuses: Any) -> list[Any]:
    found = [(name, list(map(repr, column.to_list()))) for name, column in columns.items()]
    return [*found, *((name, status.tolist()) for name, status in statuses.items())]


def offline_of(daemon: Daemon) -> Offline:
    with daemon.environment.snapshot() as snapshot:
        through = int(snapshot.sequence)
    return Offline(daemon.paths, daemon.environment, daemon.state.catalog, through)


def spine(first_us: int) -> Rows:
    times = [first_us + i * 5 * HOUR_US for i in range((NOW_US - first_us) // (5 * HOUR_US))]
    users = [USERS[i % len(USERS)] for i in range(len(times))]
    given = {"user": column_of(DType.STRING, users)}
    given["shop"] = column_of(DType.INT64, [i % 4 for i in range(len(times))])
    return Rows(given, np.array(times, np.int64))


def joined(daemon: Daemon, service: str, first_us: int) -> list[Any]:
    offline, asked = offline_of(daemon), spine(first_us)
    closure = offline.catalog.closures[service]
    check_kept(offline.catalog, closure, offline.horizons(), asked.t_us, None, "as_known")
    frame = join_history(offline.catalog, closure, asked, offline.events, JoinOptions())
    return bits(frame.columns, frame.statuses)


async def test_only_what_nobody_can_see_any_more_goes(open_daemon: OpenDaemon) -> None:
    clock = ManualClock(NOW_US)
    windows_us = CUT_US + 7 * DAY_US + HOUR_US
    async with open_daemon(clock=clock) as daemon:
        await fill(daemon)
        found = online(daemon)
        joins = {"latest": CUT_US, "all": windows_us}
        before = {name: joined(daemon, name, first_us) for name, first_us in joins.items()}
        assert daemon.status()["history"] == {"visits": {"retention": "30d", "begins": None}}
        removed = await daemon.expire.run()
        kept = offline_of(daemon).frame("visits", {"user": DType.STRING, "shop": DType.INT64})
        stamps = kept.select("__event_time", "user", "shop").rows()
        assert sorted(stamps, key=repr) == sorted(that_stay(), key=repr)
        assert removed == 401 - len(stamps)
        assert online(daemon) == found
        for name, first_us in joins.items():
            assert joined(daemon, name, first_us) == before[name]
            with pytest.raises(ValidationError) as caught:
                joined(daemon, name, first_us - 1)
            assert caught.value.code == "history_gone"
            assert caught.value.details["first_us"] == first_us
            assert format_time(first_us) in caught.value.hint
        assert daemon.status()["history"]["visits"]["begins"] == format_time(CUT_US)
        body, _ = await daemon.monitor.expose_metrics("")
        assert f'mlpd_removed_rows_total{{kind="events"}} {removed}'.encode() in body


async def test_what_stays_is_whole_and_goes_on_shrinking(open_daemon: OpenDaemon) -> None:
    clock = ManualClock(NOW_US)
    async with open_daemon(clock=clock) as daemon:
        await fill(daemon)
        found = online(daemon)
        assert await daemon.expire.run()
        assert await daemon.expire.run() == 0  # not due again
        clock.now_us += 3 * DAY_US
        assert await daemon.expire.run() == 0  # less than half of the file may go
        root = daemon.paths.root
    report = await asyncio.to_thread(check_stopped, root, clock, deep=True)
    assert report["problems"] == []
    async with open_daemon(clock=clock) as daemon:
        assert online(daemon) == found
        clock.now_us += 60 * DAY_US
        await daemon.expire.run()
        assert daemon.expire.removed > 50  # by this run, or by that of the start
        frame = offline_of(daemon).frame("visits", {"user": DType.STRING})
        assert set(frame["user"]) == {"often", "once", "twice", "gone"}


async def test_a_retention_shorter_than_a_window_is_refused_by_name(daemon: Daemon) -> None:
    with pytest.raises(DefinitionError) as caught:
        await daemon.definitions.plan(document("7d", window="7d"))
    assert "'load'" in caught.value.message
    assert "'visits' keeps its history for 7d" in caught.value.message
    assert "takes 169h" in caught.value.message
    await daemon.definitions.plan(document("169h", window="7d"))


async def test_pinned_views_keep_what_they_look_back_at(open_daemon: OpenDaemon) -> None:
    async with open_daemon(clock=ManualClock(NOW_US)) as daemon:
        pins: Any = daemon.definitions
        await daemon.definitions.apply(document("90d", window="60d"))
        held = {c.hash: ("model",) for c in daemon.state.catalog.closures.values()}

        class Held:
            async def read(self) -> Any:
                return held

            def find(self, _: Any) -> Any:
                return held

        pins._pins = Held()
        await send(daemon, "visits", rows())
        await daemon.compactor.run()
        await daemon.definitions.apply(document("30d"))
        assert await daemon.expire.run() == 0  # 39 days are less than half of the file
        begin = NOW_US - 61 * DAY_US
        cut = daemon.expire._cuts["visits"]
        assert cut == begin


async def test_predictions_served_since_the_horizon_are_audited_despite_imports(
    open_daemon: OpenDaemon,
) -> None:
    """The rows of an import that a prediction had not seen yet stay, however old."""
    async with open_daemon(clock=ManualClock(NOW_US)) as daemon:
        await daemon.definitions.apply(document())
        seen = await send(daemon, "visits", rows()[:200])
        served_us = NOW_US - DAY_US
        key = f"{served_us:016x}{7:04x}{9:012x}"
        logged = Prediction(
            *(key, served_us, seen, "r", "a", "m", 1, 0.5, np.zeros(1), {"user": "often"}, "often")
        )
        daemon.predictions.append(logged)
        daemon.predictions.flush()
        await send(daemon, "visits", rows()[200:])
        await daemon.compactor.run()
        assert 190 <= await daemon.expire.run() < 200
        offline = offline_of(daemon)
        closure, horizons = offline.catalog.closures["latest"], offline.horizons()
        assert horizons["visits"].sequence <= seen
        asked = np.array([served_us, served_us, CUT_US - 1]), np.array([seen, seen - 20, seen])
        kept = find_kept(offline.catalog, closure, horizons, *asked)
        assert kept.tolist()[0]
        assert not kept.tolist()[2]
        early = np.array([1])
        with pytest.raises(ValidationError) as caught:
            check_kept(offline.catalog, closure, horizons, asked[0][:1], early, "as_of_sequence")
        assert f"sequence {horizons['visits'].sequence}" in caught.value.hint


async def test_a_job_leaves_out_rows_before_the_horizon(open_daemon: OpenDaemon) -> None:
    async with open_daemon(clock=ManualClock(NOW_US)) as daemon:
        await fill(daemon)
        await daemon.expire.run()
        offline = offline_of(daemon)
        job = offline.catalog.definitions.job("quick")
        data = build_training_set(offline, job, offline.catalog.closures["trained"])
        first_us = CUT_US + 7 * DAY_US + HOUR_US
        assert data.t_us.min() >= first_us
        assert len(data.t_us) == sum(row["at"] >= first_us for row in rows())
        assert data.left_out >= 28


async def test_a_full_disk_is_told_and_all_stays_as_it_was(
    open_daemon: OpenDaemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_daemon(clock=ManualClock(NOW_US)) as daemon:
        await fill(daemon)
        paths = daemon.paths
    before = sorted(path for path in paths.segments.rglob("*") if path.is_file())

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    request: dict[str, Any] = {"directory": str(paths.root), "source": "visits", "entities": []}
    request |= {"before_us": CUT_US, "through": 400}
    with monkeypatch.context() as patch:
        patch.setattr("mlpd.storage.segment_files.fsync_file", full)
        with pytest.raises(StorageFullError):
            await asyncio.to_thread(expire_child.run, request, lambda _: None)
    assert before == sorted(path for path in paths.segments.rglob("*") if path.is_file())
    assert len(await asyncio.to_thread(expire_child.run, request, lambda _: None)) == 1


async def test_the_answer_to_an_early_spine_tells_where_to_begin(served: Served) -> None:
    daemon, now_us = served.daemon, int(system_clock())
    await daemon.definitions.apply(document())
    shift_us = now_us - NOW_US
    moved = [
        {**row, **{name: row[name] + shift_us for name in ("at", "known_at")}} for row in rows()
    ]
    await send(daemon, "visits", moved, now_us)
    await daemon.compactor.run()
    assert await daemon.expire.run()
    spine: dict[str, list[Any]] = {
        "event_time": [now_us - 31 * DAY_US, now_us - DAY_US],
        "user": ["often"] * 2,
    }
    async with AsyncClient(served.url) as client:
        with pytest.raises(InvalidRequestError) as caught:
            await client.history("latest", spine=spine)
        assert caught.value.code == "history_gone"
        assert "1 of 2 rows lie before the horizon of view 'last', row 0" in caught.value.message
        spine["event_time"][0] = now_us - 2 * DAY_US
        answer = await client.history("latest", spine=spine)
        assert answer["last.x"].null_count() == 0
