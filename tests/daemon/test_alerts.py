"""Alerts of a real daemon: drift, a feed that stops, clocks, restarts, sinks that hang."""

from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mlpd.core.config import AlertsConfig, Config
from mlpd.core.definitions import Entity, FeatureService, FeatureView, Source, build_document
from mlpd.core.errors import ConfigurationError, NotFoundError, ValidationError
from mlpd.core.time import DAY_US, HOUR_US, MINUTE_US
from mlpd.daemon import alerts as verb
from mlpd.daemon.app import Daemon
from mlpd.features.ingest import parse_batch
from mlpd.monitoring.alerts import Measurement, State
from tests.alerts.receiver import OK, Receiver, receiving
from tests.conftest import SMALL, ShiftedClock, until
from tests.daemon.quick import serve_model

WINDOW_US = 5 * MINUTE_US


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    async with receiving() as running:
        yield running


@pytest.fixture
def by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Looks happen when a test says so."""
    monkeypatch.setattr(verb, "LOOK_S", 3600.0)
    monkeypatch.setattr(verb, "LOOK_S_MIN", 3600.0)


def told_of(receiver: Receiver, **more: Any) -> Config:
    """Return settings under which the receiver is told of everything."""
    alerts = AlertsConfig(
        targets=(f"127.0.0.1:{receiver.port}",),
        private_networks=("127.0.0.0/8",),
        webhook_url=receiver.url,
        messages_per_minute=6000,
        **more,
    )
    return replace(SMALL, alerts=alerts)


def heard(receiver: Receiver) -> list[tuple[str, str]]:
    """(alertname, status) of everything told, in order."""
    return [
        (alert["labels"]["alertname"], alert["status"])
        for message in receiver.messages()
        for alert in message["alerts"]
    ]


async def see(daemon: Daemon, value: float, source: str = "a") -> None:
    """Judge a window for a source by hand, as a look of the daemon's would."""

    class Look:
        names = frozenset({"SourceStalled"})

        async def look(self, _: int) -> Any:
            labels = {"alertname": "SourceStalled", "source": source}
            measured = Measurement(labels, f"source {source}", value, 1.0, "stands")
            return type("Window", (), {"number": id(self), "measured": [measured]})

    looks, daemon.alerts._looks = daemon.alerts._looks, [Look()]
    await daemon.alerts.look()
    daemon.alerts._looks = looks


def states(daemon: Daemon) -> dict[str, str]:
    return {a["labels"]["alertname"]: a["state"] for a in daemon.alerts.describe()["alerts"]}


async def predict(daemon: Daemon, count: int, amount: float) -> list[str]:
    rows = [{"user": "abc"[i % 3], "amount": amount + i / 1000} for i in range(count)]
    answer = await daemon.predict.predict("risk", rows)
    return [row["prediction_id"] for row in answer["predictions"]]


@pytest.mark.usefixtures("by_hand")
async def test_a_model_that_drifts_is_told_of_and_trained_again(
    open_daemon: Any, receiver: Receiver, trainable: Any, click_columns: Any
) -> None:
    clock = ShiftedClock()
    config = told_of(
        receiver,
        drift_window_us=WINDOW_US,
        train=("alertname=FeatureDrift severity=critical -> quick",),
    )
    async with open_daemon(config=config, clock=clock) as daemon:
        await serve_model(daemon, trainable, click_columns)
        clock.to_next(WINDOW_US)
        await daemon.alerts.look()
        for _ in range(3):
            ids = await predict(daemon, 200, 9.0)
            labels = [{"prediction_id": name, "label": i % 2} for i, name in enumerate(ids)]
            await daemon.feedback.record(labels)
            assert await daemon.alerts.look() == []  # the window is open
            clock.to_next(WINDOW_US)
            await daemon.alerts.look()
        await until(lambda: len(daemon.runs.list()) == 2)
        await until(lambda: all(s["waiting"] == 0 for s in daemon.alerts.describe()["sinks"]))
        again = daemon.runs.list()[0]
        assert (again.job, again.trigger[:18]) == ("quick", "alert FeatureDrift")
        await until(lambda: not daemon.runs.busy)
        assert len(daemon.runs.list()) == 2  # one a day is enough
        (amount,) = [f for f in daemon.quality.describe()["features"] if f["feature"] == "amount"]
        assert (amount["model"], amount["version"]) == ("quick", 1)
        expected = {"share": 1.0, "training": 0.0, "threshold": 0.05}
        assert amount["problems"]["out_of_range"] == expected
    messages = receiver.messages()
    assert {message["groupKey"] for message in messages} == {"model quick"}
    # What one window began is one message.
    assert len(messages) == 2
    first = {(a["labels"]["alertname"], a["labels"].get("problem")) for a in messages[0]["alerts"]}
    assert ("FeatureQuality", "out_of_range") in first
    assert "Performance" not in {name for name, _ in first}  # the day is not over
    second = [a["labels"] for a in messages[1]["alerts"]]
    drifted = [label for label in second if label["alertname"] == "FeatureDrift"]
    assert {"amount"} <= {label["feature"] for label in drifted}
    # The same feature is not told as a warning as well.
    assert [la["severity"] for la in drifted if la["feature"] == "amount"] == ["critical"]


@pytest.mark.usefixtures("by_hand")
async def test_a_day_is_judged_once_it_is_older_than_labels_take(
    open_daemon: Any, receiver: Receiver, trainable: Any, click_columns: Any
) -> None:
    clock = ShiftedClock()
    config = told_of(receiver, drift_window_us=WINDOW_US)
    async with open_daemon(config=config, clock=clock) as daemon:
        await serve_model(daemon, trainable, click_columns)
        ids = await predict(daemon, 200, 9.0)
        served_us = clock()
        clock.shift_us += 3 * HOUR_US  # so long do labels take
        labels = [{"prediction_id": name, "label": i % 2} for i, name in enumerate(ids)]
        assert (await daemon.feedback.record(labels)).joined == 200
        day_ends_us = served_us - served_us % DAY_US + DAY_US
        for at_us, is_judged in ((day_ends_us + HOUR_US, False), (day_ends_us + 4 * HOUR_US, True)):
            clock.shift_us += max(0, at_us - clock())
            clock.to_next(WINDOW_US)
            await daemon.alerts.look()
            assert ("Performance" in states(daemon)) is is_judged
            cohorts = (await daemon.monitor.performance("quick"))["cohorts"]
            assert {cohort["mature"] for cohort in cohorts} == {is_judged}
        (whole, *_) = cohorts
        assert 3 * 3600 <= whole["delay_p50_s"] <= whole["delay_p95_s"] < 3.4 * 3600


@pytest.mark.usefixtures("by_hand")
async def test_few_rows_say_nothing(
    open_daemon: Any, receiver: Receiver, trainable: Any, click_columns: Any
) -> None:
    clock = ShiftedClock()
    config = told_of(receiver, drift_window_us=WINDOW_US)
    async with open_daemon(config=config, clock=clock) as daemon:
        await serve_model(daemon, trainable, click_columns)
        clock.to_next(WINDOW_US)
        for _ in range(3):
            await predict(daemon, 99, 9.0)
            clock.to_next(WINDOW_US)
            await daemon.alerts.look()
        assert states(daemon) == {}


@pytest.mark.usefixtures("by_hand")
async def test_states_silences_and_what_was_told_survive_a_restart(
    open_daemon: Any, receiver: Receiver
) -> None:
    config = told_of(receiver)
    async with open_daemon(config=config) as daemon:
        await see(daemon, 2.0)
        await daemon.alerts.silence({"source": "b*"}, lasts_us=HOUR_US, by="me", why="moved")
        await until(lambda: heard(receiver) == [("SourceStalled", "firing")])
        await until(lambda: daemon.alerts.describe()["sinks"][1]["waiting"] == 0)
        shown = daemon.alerts.describe()
    async with open_daemon(config=config) as daemon:
        again = daemon.alerts.describe()
        assert again["alerts"] == shown["alerts"]
        assert again["silences"] == shown["silences"]
        await see(daemon, 2.0, "bb")
        await see(daemon, 0.0)
        await until(lambda: len(heard(receiver)) == 2)
        assert heard(receiver)[1] == ("SourceStalled", "resolved")
        assert [a["silenced"] for a in daemon.alerts.describe()["alerts"]] == [True, False]
        (silence,) = again["silences"]
        await daemon.alerts.unsilence(silence["id"])
        await until(lambda: len(heard(receiver)) == 3)
        await until(lambda: daemon.alerts.describe()["sinks"][1]["waiting"] == 0)
        with pytest.raises(NotFoundError):
            await daemon.alerts.unsilence(silence["id"])
    async with open_daemon(config=config) as daemon:
        assert daemon.alerts.describe()["silences"] == []
    assert len(heard(receiver)) == 3


@pytest.mark.usefixtures("by_hand")
async def test_a_sink_that_hangs_hurts_nobody_and_loses_nothing(
    open_daemon: Any, receiver: Receiver, trainable: Any, click_columns: Any
) -> None:
    receiver.answer = None
    config = told_of(receiver)
    async with open_daemon(config=config) as daemon:
        await serve_model(daemon, trainable, click_columns)
        await see(daemon, 2.0)
        await until(lambda: receiver.received)  # and hangs now
        await see(daemon, 2.0, "c")
        assert len(await predict(daemon, 300, 0.0)) == 300
        sinks = {sink["name"]: sink for sink in daemon.alerts.describe()["sinks"]}
        await until(lambda: daemon.alerts.describe()["sinks"][0]["sent"] == 2)  # the log
        assert (sinks["webhook"]["waiting"], sinks["webhook"]["sent"]) == (2, 0)
    # The daemon stopped without waiting for the sink, which hears of it all from the next one.
    receiver.received.clear()
    receiver.answer = OK
    async with open_daemon(config=config) as daemon:
        await until(lambda: daemon.alerts.describe()["sinks"][1]["waiting"] == 0)
        assert sorted(heard(receiver)) == [("SourceStalled", "firing")] * 2


@pytest.mark.usefixtures("by_hand")
async def test_a_clock_that_jumps_changes_no_state(
    open_daemon: Any, receiver: Receiver, caplog: pytest.LogCaptureFixture
) -> None:
    clock = ShiftedClock()
    async with open_daemon(config=told_of(receiver), clock=clock) as daemon:
        await see(daemon, 2.0)
        await daemon.alerts.silence({"source": "z"}, lasts_us=HOUR_US, by="me", why="")
        for jump_us in (3650 * DAY_US, -7300 * DAY_US, 3650 * DAY_US):
            clock.shift_us += jump_us
            await daemon.alerts.look()
            assert states(daemon) == {"SourceStalled": "firing"}
            assert daemon.alerts.failed_looks == 0
        assert len(daemon.alerts.describe()["silences"]) == 1
        clock.shift_us -= DAY_US
        await see(daemon, 0.0)
        (alert,) = daemon.alerts.describe()["alerts"]
        assert alert["starts"] <= alert["ends"]
        await until(lambda: len(heard(receiver)) == 2)
    assert "the clock jumped back" in caplog.text


async def test_a_feed_that_stops_is_told_and_so_is_its_return(
    open_daemon: Any, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verb, "LOOK_S", 0.1)
    user = Entity("user")
    clicks = Source("clicks", timestamp="at", schema={"user": "string", "x": "float64"})
    last = FeatureView("last", user, clicks, ["x"], freshness="1s")
    never = Source("never", timestamp="at", schema={"user": "string", "y": "float64"})
    unseen = FeatureView("unseen", user, never, ["y"], freshness="1s")
    document = build_document([user, clicks, never, last, unseen, FeatureService("s", [last])])
    async with open_daemon(config=told_of(receiver)) as daemon:
        await daemon.definitions.apply(document)
        source = daemon.state.catalog.definitions.source("clicks")

        async def send() -> None:
            columns = {"at": [daemon.clock()], "user": ["u"], "x": [1.0]}
            await daemon.ingest.ingest([parse_batch(source, columns, now_us=daemon.clock())])

        await send()
        await until(lambda: ("SourceStalled", "firing") in heard(receiver))
        (alert,) = [a for a in daemon.alerts.describe()["alerts"] if a["state"] == "firing"]
        assert alert["labels"] == {"alertname": "SourceStalled", "source": "clicks"}
        assert alert["value"] >= 0.8
        await send()
        await until(lambda: ("SourceStalled", "resolved") in heard(receiver))


@pytest.mark.usefixtures("by_hand")
async def test_a_look_that_fails_is_counted_and_the_others_go_on(
    daemon: Daemon, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken:
        names = frozenset({"Broken"})

        async def look(self, now_us: int) -> None:
            raise RuntimeError(str(now_us))

    daemon.alerts._looks = [Broken(), *daemon.alerts._looks]
    assert await daemon.alerts.look() == []
    assert daemon.alerts.failed_looks == 1
    assert "Broken could not be measured" in caplog.text


@pytest.mark.usefixtures("by_hand")
async def test_every_sink_is_tried_at_once(open_daemon: Any, receiver: Receiver) -> None:
    config = told_of(receiver)
    config = replace(
        config,
        alerts=replace(
            config.alerts,
            alertmanager_url=f"http://127.0.0.1:{receiver.port}",
            train=("alertname=MlpdTest -> quick",),
        ),
    )
    async with open_daemon(config=config) as daemon:
        tried = await daemon.alerts.test()
        assert [(t["sink"], t["sent"]) for t in tried] == [
            *(("log", True), ("alertmanager", True), ("webhook", True)),
        ]
        assert sorted(r.path for r in receiver.received) == ["/api/v2/alerts", "/hook?team=ml"]
        receiver.answer = b"HTTP/1.1 500 No\r\n\r\n"
        (tried_one,) = await daemon.alerts.test("webhook")
        assert tried_one["error"]["code"] == "target_refused"
        with pytest.raises(NotFoundError) as refused:
            await daemon.alerts.test("pager")
        assert "log, alertmanager, webhook" in refused.value.hint
        assert states(daemon) == {}


@pytest.mark.usefixtures("by_hand")
async def test_a_silence_that_makes_no_sense_is_refused(daemon: Daemon) -> None:
    for matchers, lasts_us, why in (
        ({}, 1, ""),
        ({"a": 5}, 1, ""),
        ({"a": "b"}, 91 * DAY_US, ""),
        ({"a": "b"}, 1, "x" * 501),
    ):
        with pytest.raises(ValidationError):
            await daemon.alerts.silence(matchers, lasts_us=lasts_us, by="me", why=why)
    assert daemon.alerts.describe()["silences"] == []


async def test_a_private_target_is_not_reached_unless_listed(
    open_daemon: Any, receiver: Receiver
) -> None:
    config = told_of(receiver)
    hidden = replace(config, alerts=replace(config.alerts, private_networks=()))
    async with open_daemon(config=hidden) as daemon:
        (tried,) = await daemon.alerts.test("webhook")
        assert tried["error"]["code"] == "address_not_allowed"
    assert receiver.connections == 0


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"targets": ()}, "target_not_allowed"),
        ({"webhook_secret_file": "nothing/there"}, "secret_unreadable"),
        ({"webhook_secret_file": "short"}, "secret_too_short"),
    ],
)
async def test_a_daemon_does_not_start_with_a_sink_that_can_not_work(
    open_daemon: Any,
    receiver: Receiver,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: dict[str, Any],
    code: str,
) -> None:
    (tmp_path / "short").write_text("short\n")
    monkeypatch.chdir(tmp_path)
    config = told_of(receiver)
    with pytest.raises(ConfigurationError) as refused:
        async with open_daemon(config=replace(config, alerts=replace(config.alerts, **change))):
            pass
    assert refused.value.code == code


@pytest.mark.usefixtures("by_hand")
async def test_a_run_is_queued_once_for_many_alerts_and_restarts(
    open_daemon: Any, receiver: Receiver, trainable: Any
) -> None:
    config = told_of(receiver, train=("alertname=SourceStalled -> quick", "source=x -> nothing"))
    async with open_daemon(config=config) as daemon:
        await daemon.definitions.apply(trainable)
        for source in "abc":
            await see(daemon, 2.0, source)
        await until(lambda: daemon.alerts.describe()["sinks"][2]["waiting"] == 0)
        assert len(daemon.runs.list()) == 1
        await see(daemon, 2.0, "x")
        await until(lambda: daemon.alerts.describe()["sinks"][2]["state"] == "failing")
        assert daemon.alerts.describe()["sinks"][2]["error"]["code"] == "unknown_job"
    async with open_daemon(config=config) as daemon:
        await until(lambda: daemon.alerts.describe()["sinks"][2]["failed"] >= 1)
        assert len(daemon.runs.list()) == 1
        assert {a["state"] for a in daemon.alerts.describe()["alerts"]} == {State.FIRING}
