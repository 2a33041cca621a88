"""Checks by schedule become alerts: a changed concept, features that no longer go together."""

from typing import Any

from mlpd.core.time import DAY_US, HOUR_US, format_time
from mlpd.daemon.app import Daemon
from mlpd.daemon.looks import Window
from tests.conftest import ShiftedClock
from tests.daemon.quick import serve_model


async def predict(daemon: Daemon, count: int, amount: float) -> list[dict[str, Any]]:
    rows = [{"user": "abc"[i % 3], "amount": amount + (i * 37 % 101) / 50} for i in range(count)]
    return list((await daemon.predict.predict("risk", rows))["predictions"])


async def label_wrongly(daemon: Daemon, rows: list[dict[str, Any]]) -> None:
    """Label rows an hour after they were predicted with the contrary of what was said."""
    done = await daemon.feedback.record(
        [
            {
                "prediction_id": row["prediction_id"],
                "label": float(row["score"] < 0.5),
                "label_time": format_time(int(row["prediction_id"][:16], 16) + HOUR_US),
            }
            for row in rows
        ]
    )
    assert done.joined == len(rows)


async def check(daemon: Daemon) -> Any:
    """Check the last day; what was measured."""
    end_us = daemon.clock()
    await daemon.checks.run_once(end_us - DAY_US, end_us)
    return await daemon.checks.look(end_us)


def firing(daemon: Daemon) -> set[tuple[str, str | None]]:
    names = {"ConceptDrift", "MultivariateDrift"}
    return {
        (alert["labels"]["alertname"], alert["labels"].get("check"))
        for alert in daemon.alerts.describe()["alerts"]
        if alert["labels"]["alertname"] in names and alert["state"] == "firing"
    }


async def test_what_the_checks_find_alerts(
    open_daemon: Any, trainable: Any, click_columns: Any
) -> None:
    clock = ShiftedClock()
    async with open_daemon(clock=clock) as daemon:
        await serve_model(daemon, trainable, click_columns)
        assert (await check(daemon)).measured == []  # nothing was served: nothing to say
        first = await predict(daemon, 600, -1.0)
        clock.shift_us += 2 * HOUR_US
        await label_wrongly(daemon, first)
        clock.shift_us += 2 * DAY_US
        await predict(daemon, 300, 5.0)
        window = await check(daemon)
        assert await daemon.checks.look(0) is None  # a round is one window
        found = {(one.labels["alertname"], one.labels.get("check")): one for one in window.measured}
        concept, told = found["ConceptDrift", None], found["MultivariateDrift", "classifier"]
        assert concept.labels == {"alertname": "ConceptDrift", "model": "quick", "version": "1"}
        assert (concept.value, concept.threshold) == (1.0, 1.0)
        assert concept.text.startswith("worse since 20")
        assert told.value > 0.9
        assert told.threshold == 0.6
        for number in (1, 1, 2):
            assert ("MultivariateDrift", "classifier") not in firing(daemon)
            daemon.checks._window = Window(number, window.measured)
            await daemon.alerts.look()  # an interval that was seen before counts once
            assert ("ConceptDrift", None) in firing(daemon)
        assert ("MultivariateDrift", "classifier") in firing(daemon)


async def test_losses_of_long_ago_and_of_versions_that_rest_alert_nobody(
    open_daemon: Any, trainable: Any, click_columns: Any
) -> None:
    clock = ShiftedClock()
    async with open_daemon(clock=clock) as daemon:
        await serve_model(daemon, trainable, click_columns)
        first = await predict(daemon, 300, -1.0)
        clock.shift_us += 2 * HOUR_US
        await label_wrongly(daemon, first)
        for days, count in ((2, 1), (61, 0)):
            clock.shift_us += days * DAY_US
            window = await check(daemon)
            assert len([m for m in window.measured if "check" not in m.labels]) == count


async def test_an_answer_that_can_not_be_read_stops_no_other_check(
    daemon: Daemon, monkeypatch: Any, caplog: Any
) -> None:
    async def strange(*_: Any) -> dict[str, Any]:
        return {}

    monkeypatch.setattr(daemon.monitor, "versions_served", lambda: [("a", 1), ("b", 1)])
    monkeypatch.setattr(daemon.drift, "check", strange)
    monkeypatch.setattr(daemon.analysis, "run", strange)
    assert (await check(daemon)).measured == []
    for text in ("a@1 could not", "b@1 could not", "losses of a could", "losses of b could"):
        assert text in caplog.text
