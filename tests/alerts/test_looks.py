"""What looks measure on a real daemon: refused rows, lag, standstill, freshness, disk, audits."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest

from mlpd.core.config import AlertsConfig
from mlpd.core.definitions import Entity, FeatureService, FeatureView, Source, build_document
from mlpd.core.time import HOUR_US, SECOND_US
from mlpd.daemon.app import Daemon
from mlpd.daemon.looks import AuditLook, DiskLook, SloLook, SourceLook, StandstillLook
from mlpd.daemon.served_looks import Boundaries
from mlpd.features.ingest import parse_batch
from mlpd.monitoring.alerts import Measurement
from mlpd.monitoring.freshness import Freshness
from mlpd.monitoring.metrics import Registry

CONFIG = AlertsConfig()


@pytest.fixture
async def fed(daemon: Daemon) -> Daemon:
    """A daemon with a source whose views promise 60 s and 10 s, and one without a promise."""
    user = Entity("user")
    clicks = Source("clicks", timestamp="at", schema={"user": "string", "x": "float64"})
    other = Source("other", timestamp="at", schema={"user": "string", "y": "float64"})
    slow = FeatureView("slow", user, clicks, ["x"], freshness="60s")
    quick = FeatureView("quick", user, clicks, ["x"], freshness="10s")
    plain = FeatureView("plain", user, other, ["y"])
    service = FeatureService("s", [slow, plain])
    await daemon.definitions.apply(
        build_document([user, clicks, other, slow, quick, plain, service])
    )
    return daemon


async def send(
    daemon: Daemon, good: int, bad: int = 0, *, late_us: int = 0, source: str = "clicks"
) -> None:
    spec = daemon.state.catalog.definitions.source(source)
    now_us = daemon.clock()
    columns = {"at": [now_us - late_us] * good + [None] * bad, "user": ["u"] * (good + bad)}
    await daemon.ingest.ingest([parse_batch(spec, columns, now_us=now_us)])


def by_name(measured: Sequence[Measurement]) -> dict[str, Measurement]:
    return {one.labels["alertname"]: one for one in measured}


async def test_refused_rows_are_measured_by_window_against_what_is_usual(fed: Daemon) -> None:
    look = SourceLook(fed.ingest, fed.monitor.freshness, fed.state, CONFIG)
    await send(fed, 97, 3)
    (first,) = [m for m in look.measure() if m.labels["alertname"] == "SourceQuality"]
    assert first.labels["source"] == "clicks"
    assert (first.value, first.threshold) == (0.03, 0.05)
    assert look.measure() == []  # nothing came since
    await send(fed, 96, 4)
    assert by_name(look.measure())["SourceQuality"].threshold == pytest.approx(0.09)
    await send(fed, 50, 50)
    bad = by_name(look.measure())["SourceQuality"]
    assert (bad.value, bad.threshold) == (0.5, pytest.approx(0.105))
    await send(fed, 100)
    assert by_name(look.measure())["SourceQuality"].threshold == pytest.approx(0.105)


async def test_few_rows_say_nothing_about_shares(fed: Daemon) -> None:
    look = SourceLook(fed.ingest, fed.monitor.freshness, fed.state, CONFIG)
    await send(fed, 10, 9)
    assert "SourceQuality" not in by_name(look.measure())


async def test_lag_is_measured_in_freshness_periods_where_one_is_promised(fed: Daemon) -> None:
    look = SourceLook(fed.ingest, fed.monitor.freshness, fed.state, CONFIG)
    await send(fed, 1, late_us=25 * SECOND_US)
    await send(fed, 1, late_us=25 * SECOND_US, source="other")
    (lag,) = look.measure()
    assert lag.labels == {"alertname": "SourceLag", "source": "clicks"}
    assert 2.5 <= lag.value < 100
    assert lag.threshold == 1.0


@dataclass
class Seconds:
    now_s: float = 1000.0

    def __call__(self) -> float:
        return self.now_s


async def standing(look: StandstillLook) -> float | None:
    window = await look.look(0)
    assert window is not None
    (value,) = [one.value for one in window.measured] or [None]
    return value


async def test_a_source_stands_still_from_its_last_news_on(fed: Daemon) -> None:
    seconds = Seconds()
    look = StandstillLook(fed.monitor.freshness, fed.state, {}, seconds)
    assert look.least_period_s() == 10.0
    assert await standing(look) is None  # it never had an event: nothing has stopped
    await send(fed, 1)
    assert await standing(look) == 0.0
    seconds.now_s += 7.9
    assert await standing(look) == pytest.approx(0.79)
    seconds.now_s += 0.1
    assert await standing(look) == pytest.approx(0.8)  # fires before the first feature is too old
    await send(fed, 1, late_us=HOUR_US)  # old news is no news
    assert await standing(look) == pytest.approx(0.8)
    await send(fed, 1)
    assert await standing(look) == 0.0


async def test_the_time_that_a_daemon_was_down_does_not_count(fed: Daemon) -> None:
    seconds = Seconds()
    await send(fed, 1)
    look = StandstillLook(fed.monitor.freshness, fed.state, {}, seconds)
    await standing(look)
    seconds.now_s += 6.0
    kept = look.standing()
    fed.monitor.freshness._sources.clear()  # as after a start
    later = Seconds(5.0)  # a monotonic clock begins anew with the machine
    again = StandstillLook(fed.monitor.freshness, fed.state, kept, later)
    assert await standing(again) == pytest.approx(0.6)
    later.now_s += 2.0
    assert await standing(again) == pytest.approx(0.8)


async def test_a_daemon_without_promises_measures_nothing(daemon: Daemon) -> None:
    look = StandstillLook(daemon.monitor.freshness, daemon.state, {})
    assert look.least_period_s() == math.inf
    assert await standing(look) is None


def test_the_freshness_budget_burns_by_window() -> None:
    freshness = Freshness(Registry())
    view = freshness.view("v", slo_s=10.0)
    look = SloLook(freshness, CONFIG)
    for age_s in [1.0] * 95 + [11.0, 12.0, math.nan, math.nan, math.nan]:
        view.observe(age_s)
    (burn,) = look.measure()
    assert burn.labels == {"alertname": "FreshnessSlo", "view": "v"}
    assert burn.value == pytest.approx(1.0)  # 5 % missed of 5 % allowed
    assert look.measure() == []
    for age_s in [1.0] * 15 + [11.0] * 5:
        view.observe(age_s)
    assert look.measure()[0].value == pytest.approx(5.0)
    for _ in range(19):
        view.observe(99.0)
    assert look.measure() == []  # too few to say


async def test_disk_map_and_refused_writes(daemon: Daemon) -> None:
    look = DiskLook(daemon.paths.root, daemon.environment, daemon.writer, CONFIG)
    found = by_name(look.measure())
    assert set(found) == {"DiskFull", "StoreMapFull", "WritesFail"}
    assert 0.0 < found["DiskFull"].value < 1.0
    assert 0.0 < found["StoreMapFull"].value < 0.1
    assert "GiB are free" in found["DiskFull"].text
    assert found["WritesFail"].value == 0.0
    daemon.writer.stats.storage_failures += 3
    assert by_name(look.measure())["WritesFail"].value == 3.0
    assert by_name(look.measure())["WritesFail"].value == 0.0


async def test_each_audit_is_looked_at_once(daemon: Daemon) -> None:
    look = AuditLook(daemon.audit)
    assert await look.look(0) is None
    await daemon.audit.run()
    window = await look.look(0)
    assert window is not None
    assert [one.value for one in window.measured] == [0.0]
    assert await look.look(0) is None
    found: dict[str, Any] = {**(daemon.audit.last() or {}), "mismatched_rows": 2}
    daemon.audit._last = found  # a mismatch is a bug of ours: none can be had otherwise
    window = await look.look(0)
    assert window is not None
    assert window.measured[0].value == 2.0


def test_windows_close_once_and_follow_the_clock() -> None:
    boundaries = Boundaries(HOUR_US, 10 * HOUR_US + 5)
    assert boundaries.closed(10 * HOUR_US + 6) is None
    assert boundaries.closed(11 * HOUR_US) == (10 * HOUR_US, 11 * HOUR_US)
    assert boundaries.closed(11 * HOUR_US + 1) is None
    assert boundaries.closed(99 * HOUR_US) == (98 * HOUR_US, 99 * HOUR_US)  # the last one alone
    assert boundaries.closed(5 * HOUR_US) is None
    assert boundaries.closed(6 * HOUR_US) == (5 * HOUR_US, 6 * HOUR_US)
