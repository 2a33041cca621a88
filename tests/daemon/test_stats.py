"""What mlpd features stats and freshness tell is what reads find."""

import math
import statistics
from typing import Any

import pytest

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
from mlpd.core.time import format_time
from mlpd.daemon.app import Daemon
from mlpd.daemon.read import given_columns
from mlpd.features.ingest import parse_batch
from mlpd.monitoring.freshness import AGE_BUCKETS_S
from tests.conftest import ManualClock

USERS = 5_000

user = Entity("user")
clicks = Source(
    "clicks",
    timestamp="at",
    schema={"user": "string", "x": "float64", "n": "int64", "place": "string"},
)
other = Source("other", timestamp="at", schema={"user": "string"})


def document(ttl: str = "1h", freshness: str | None = "2m") -> dict[str, Any]:
    last = FeatureView("last", user, clicks, ["x", "n", "place"], ttl=ttl, freshness=freshness)
    load = WindowView("load", user, clicks, ["1d"], [Aggregate.count(), Aggregate.mean("x")])
    never = FeatureView("never", user, other, ["user"])
    service = FeatureService("s", [user, load, last], request={"amount": "float64"})
    return build_document([user, clicks, other, last, load, never, service])


async def send(daemon: Daemon) -> None:
    """Store an event of each user, every third of them two hours old, some without values."""
    source, now = daemon.state.catalog.definitions.source("clicks"), int(daemon.clock())
    every = range(USERS)
    columns = {
        "at": [now - (7_200_000_000 if i % 3 == 0 else 60_000_000) - i for i in every],
        "user": [f"u{i}" for i in every],
        "x": [None if i % 5 == 0 else math.nan if i % 7 == 0 else i / 8 for i in every],
        "n": [2**60 + i for i in every],
        "place": ["JFK" if i % 2 else f"p{i % 40}" for i in every],
    }
    batch = parse_batch(source, columns, now_us=now)
    assert (await daemon.ingest.ingest([batch])).accepted == USERS


async def test_a_summary_is_that_of_what_reads_find(daemon: Daemon) -> None:
    await daemon.definitions.apply(document())
    await send(daemon)
    found = await daemon.stats.summarize("s")
    assert (found["name"], found["not_covered"]) == ("s", ["user", "amount"])
    by_name = {
        f"{view['view']}.{feature['name']}": feature
        for view in found["views"]
        for feature in view["features"]
    }
    closure = daemon.read.closure("s")
    rows = [{"user": f"u{i}", "amount": 1.0} for i in range(USERS)]
    frame = daemon.read.read(closure, given_columns(closure, rows)).frame
    assert set(by_name) == {"last.x", "last.n", "last.place", "load.count_1d", "load.x_mean_1d"}
    for name, feature in by_name.items():
        statuses = frame.statuses[name].tolist()
        for code, status in enumerate(("present", "null", "missing", "stale")):
            assert feature[status] == statuses.count(code), (name, status)
        values = frame.columns[name].to_list()
        present = [v for v, s in zip(values, statuses, strict=True) if s == 0]
        if name == "last.place":
            assert feature["top"][0] == {"value": "JFK", "rows": present.count("JFK")}
            continue
        known = [v for v in present if not math.isnan(v)]
        assert feature["nan"] == len(present) - len(known)
        assert (feature["min"], feature["max"]) == (min(known), max(known))
        assert feature["mean"] == pytest.approx(statistics.fmean(known))
        assert feature["quantiles"]["0.5"] == statistics.median_low(known)
    for view in found["views"]:
        assert (view["entities"], view["entities_total"], view["complete"]) == (USERS, USERS, True)
    ages = {view["view"]: view["ages_s"] for view in found["views"]}
    assert ages["load"] == {}
    assert 60 < ages["last"]["0.5"] < 7_200 < ages["last"]["1.0"]


async def test_a_sample_tells_how_many_there_are(daemon: Daemon) -> None:
    await daemon.definitions.apply(document())
    await send(daemon)
    found = (await daemon.stats.summarize("last", entities=1_000))["views"][0]
    assert (found["entities"], found["complete"]) == (1_000, False)
    assert USERS / 1.3 < found["entities_total"] < USERS * 1.3  # sd 3 %, and always the same
    everything = await daemon.stats.summarize("last", entities=USERS)
    assert everything["views"][0]["complete"]


async def test_a_view_without_rows_has_a_summary(daemon: Daemon) -> None:
    await daemon.definitions.apply(document())
    (found,) = (await daemon.stats.summarize("never"))["views"]
    assert (found["entities"], found["ages_s"]) == (0, {})
    (feature,) = found["features"]
    assert (feature["present"], feature["distinct"], feature["top"]) == (0, 0, [])


@pytest.mark.parametrize(
    ("asked", "code"),
    [
        ({"name": "nothing"}, "unknown_view"),
        ({"name": "last", "kind": "service"}, "unknown_service"),
        ({"name": "s", "kind": "view"}, "unknown_view"),
        ({"name": "last", "entities": 0}, "wrong_limit"),
        ({"name": "last", "entities": 1_000_001}, "wrong_limit"),
    ],
)
async def test_a_wrong_question_is_refused(
    daemon: Daemon, asked: dict[str, Any], code: str
) -> None:
    await daemon.definitions.apply(document())
    with pytest.raises(MlpdError) as refused:
        await daemon.stats.summarize(**asked)
    assert refused.value.code == code


async def test_sources_are_known_after_a_restart(open_daemon: Any) -> None:
    clock = ManualClock()
    async with open_daemon(clock=clock) as daemon:
        await daemon.definitions.apply(document())
        await send(daemon)
        before = daemon.monitor.freshness_report()
        watermark_us = clock.now_us - 60_000_000 - 1
        assert before["sources"]["clicks"]["watermark"] == format_time(watermark_us)
        assert before["sources"]["clicks"]["lag_s"] == pytest.approx(7_200, abs=1)
        assert before["views"]["load"]["behind_s"] == pytest.approx(60, abs=1)
        assert before["views"]["never"]["watermark"] is None
    async with open_daemon(clock=clock) as daemon:
        assert daemon.monitor.freshness_report()["sources"] == before["sources"]
        clock.now_us += 30_000_000
        now = daemon.monitor.freshness_report()["views"]["load"]
        assert now["behind_s"] == pytest.approx(90, abs=1)


async def test_ages_are_counted_against_the_goals_that_run(daemon: Daemon) -> None:
    """Another ttl or goal is another question: counting begins anew."""
    await daemon.definitions.apply(document())
    for ttl, freshness, goals in (("1h", "2m", (3600.0, 120.0)), ("3h", None, (10_800.0, None))):
        await daemon.definitions.apply(document(ttl, freshness))
        view = daemon.monitor._view("last")
        assert (view.goals, view.report().present) == (goals, 0)
        view.observe(90.0)
        view.observe(7_200.0)
        report = daemon.monitor.freshness_report()["views"]["last"]
        assert report["stale_share"] == (0.5 if ttl == "1h" else 0.0)
        assert report["slo_share"] == (0.5 if freshness else None)
        bounds = daemon.monitor.freshness_report()["age_bounds_s"]
        assert bounds == list(AGE_BUCKETS_S)
        assert dict(zip(bounds, report["ages"], strict=False))[300.0] == 1
        assert sum(report["ages"]) == 2
