"""Drift of a real daemon: four references, pictures, features together, bad questions."""

import xml.etree.ElementTree as ET
from typing import Any

import numpy as np
import pytest

from mlpd.core.errors import NotFoundError, ValidationError
from mlpd.core.time import DAY_US, HOUR_US
from mlpd.daemon.app import Daemon
from mlpd.daemon.drift import DriftQuery
from tests.conftest import ShiftedClock
from tests.daemon.quick import serve_model, train


async def predict(daemon: Daemon, count: int, amount: float | None) -> None:
    amounts = [None if amount is None else amount + (i * 37 % 101) / 100 for i in range(count)]
    rows = [{"user": "abc"[i % 3], "amount": amounts[i]} for i in range(count)]
    await daemon.predict.predict("risk", rows)
    daemon.predictions.flush()


async def jump(daemon: Daemon, clock: ShiftedClock, by_us: int) -> None:
    """Let the clock jump during a write: reads beside one that began before are of that time."""

    def move(_: Any) -> None:
        clock.shift_us += by_us

    await daemon.writer.write(move)


def amount_of(found: dict[str, Any], window: int = -1) -> dict[str, Any]:
    (column,) = [c for c in found["windows"][window]["features"] if c["name"] == "amount"]
    return dict(column)


async def test_a_window_is_compared_with_what_came_before_it(
    open_daemon: Any, trainable: Any, click_columns: Any
) -> None:
    clock = ShiftedClock()
    async with open_daemon(clock=clock) as daemon:
        await serve_model(daemon, trainable, click_columns)
        for amount in (-1.0, -1.0, -1.0, 1.0):  # not as in training, for three hours the same
            await jump(daemon, clock, HOUR_US - clock() % HOUR_US + HOUR_US // 2)
            await predict(daemon, 300, amount)
        end_us = clock() // HOUR_US * HOUR_US + HOUR_US
        hours = {"start_us": end_us - 3 * HOUR_US, "end_us": end_us, "step_us": HOUR_US}
        training = await daemon.drift.drift("quick", DriftQuery(**hours))
        assert [amount_of(training, i)["state"] for i in range(3)] == ["alert"] * 3
        rolling = await daemon.drift.drift(
            "quick", DriftQuery(**hours, reference="rolling", count=1)
        )
        assert [amount_of(rolling, i)["state"] for i in range(3)] == ["ok", "ok", "alert"]
        assert [w["reference_rows"] for w in rolling["windows"]] == [300] * 3
        one = DriftQuery(start_us=end_us - 3 * HOUR_US, end_us=end_us)
        trend = amount_of(await daemon.drift.drift("quick", one))["trend"]
        assert len(trend) == 18  # ten minutes each
        assert sum(value is not None for value in trend) == 3
        picture = ET.fromstring(await daemon.drift.picture("quick", "amount", one))
        assert len(list(picture.iter("{http://www.w3.org/2000/svg}polyline"))) <= 1
        assert "amount: reference and live" in {t.text for t in picture.iter() if t.text}


async def test_an_hour_is_held_against_the_hours_of_training(
    open_daemon: Any, trainable: Any
) -> None:
    """Amounts go with the hour of the day: every hour is far from the whole, as in training."""
    clock, n = ShiftedClock(), 6_000
    rng = np.random.default_rng(5)
    times = (clock() // DAY_US - 4) * DAY_US + np.arange(n) * HOUR_US // 120
    amount = times // HOUR_US % 24 + rng.normal(scale=0.3, size=n)
    clicks = {
        **dict.fromkeys(("at", "known_at", "shown_at"), times.tolist()),
        "user": rng.choice(["a", "b", "c"], n).tolist(),
        "amount": amount.tolist(),
        "bought": (rng.random(n) < 0.5).astype(int).tolist(),
    }
    async with open_daemon(clock=clock) as daemon:
        await serve_model(daemon, trainable, clicks)
        for level in (8.0, None):
            clock.shift_us += HOUR_US - clock() % HOUR_US + HOUR_US // 2
            await predict(daemon, 300, level)
        end_us = clock() // HOUR_US * HOUR_US + HOUR_US
        hours = DriftQuery(start_us=end_us - 2 * HOUR_US, end_us=end_us, step_us=HOUR_US)
        found = await daemon.drift.drift("quick", hours)
        usual, other = amount_of(found, 0), amount_of(found, 1)
        assert (usual["state"], other["state"]) == ("ok", "alert")
        assert usual["psi_adjusted"] > 1.0
        assert usual["threshold"] > usual["psi_adjusted"]
        ((_, judged),) = await daemon.monitor.drift_between(end_us - HOUR_US, end_us)
        assert judged.features[-1].name == "amount"
        assert judged.features[-1].threshold == other["threshold"] == usual["threshold"]


async def test_the_same_hour_of_the_weeks_before(
    open_daemon: Any, trainable: Any, click_columns: Any
) -> None:
    clock = ShiftedClock()
    async with open_daemon(clock=clock) as daemon:
        await serve_model(daemon, trainable, click_columns)
        await jump(daemon, clock, DAY_US - clock() % DAY_US + HOUR_US // 2)
        for amount, wait_us in ((-1.0, 12 * HOUR_US), (1.0, 7 * DAY_US - 12 * HOUR_US), (-1.0, 0)):
            await predict(daemon, 300, amount)
            await jump(daemon, clock, wait_us)
        start_us = clock() // HOUR_US * HOUR_US
        hour = {"start_us": start_us, "end_us": start_us + HOUR_US}
        weekly = await daemon.drift.drift("quick", DriftQuery(**hour, reference="same_hour"))
        assert (amount_of(weekly)["state"], weekly["windows"][0]["reference_rows"]) == ("ok", 300)
        rolling = await daemon.drift.drift(
            "quick", DriftQuery(**hour, reference="rolling", count=167)
        )
        assert amount_of(rolling)["psi_adjusted"] > 0.2  # half of what came before was another


async def test_a_version_is_compared_with_the_one_before(
    open_daemon: Any, trainable: Any, click_columns: Any
) -> None:
    async with open_daemon() as daemon:
        await serve_model(daemon, trainable, click_columns)
        with pytest.raises(NotFoundError, match="no version before"):
            await daemon.drift.drift("quick", DriftQuery(reference="previous"))
        await predict(daemon, 300, 7.0)
        await train(daemon)
        await daemon.routes.refresh()
        await predict(daemon, 300, 7.0)
        await daemon.monitor.drain()
        found = await daemon.drift.drift("quick", DriftQuery(version=2, reference="previous"))
        assert found["not_compared"] == []
        assert found["windows"][0]["reference_rows"] == 300
        # The same requests; counts of the user's last hour may have moved on.
        assert amount_of(found)["psi"] == 0.0


async def test_features_are_checked_together(
    open_daemon: Any, trainable: Any, click_columns: Any
) -> None:
    clock = ShiftedClock()
    async with open_daemon(clock=clock) as daemon:
        await serve_model(daemon, trainable, click_columns)
        await predict(daemon, 300, 0.0)
        first = await daemon.drift.check("quick", DriftQuery())
        assert first["rows"] == 300
        assert first["classifier"] == {"state": "no_reference", "auc": None}
        assert first["reconstruction"]["state"] in ("uncalibrated", "ok", "alert")
        await jump(daemon, clock, DAY_US)
        await predict(daemon, 300, 5.0)
        end_us = clock() // 300_000_000 * 300_000_000 + 300_000_000
        day = DriftQuery(start_us=end_us - DAY_US // 2, end_us=end_us)
        told = await daemon.drift.check("quick", day)
        assert told["classifier"]["state"] == "alert"
        assert told["classifier"]["auc"]["low"] > 0.9
        shown = await daemon.drift.drift("quick", day)
        assert shown["multivariate"] == told


async def test_questions_without_an_answer(
    open_daemon: Any, trainable: Any, click_columns: Any
) -> None:
    async with open_daemon() as daemon:
        await serve_model(daemon, trainable, click_columns)
        await predict(daemon, 300, 7.0)
        first = await daemon.drift.drift("quick", DriftQuery(reference="rolling"))
        assert (first["windows"][0]["state"], first["windows"][0]["reference_rows"]) == (
            "insufficient",  # nothing was served before
            0,
        )
        nothing = await daemon.drift.drift("quick", DriftQuery(reference="rolling", end_us=1))
        assert nothing["windows"] == []
        assert "<svg" in await daemon.drift.picture("quick", "amount", DriftQuery())
        with pytest.raises(NotFoundError, match="no feature 'colour'"):
            await daemon.drift.picture("quick", "colour", DriftQuery())
        with pytest.raises(ValidationError, match="'count' must be"):
            await daemon.drift.drift("quick", DriftQuery(reference="rolling", count=0))
