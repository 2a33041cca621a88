"""Predictions joined with labels in a child: days, slices, estimates, concept, bad questions."""

import asyncio
import json
import subprocess
import sys
from collections.abc import Callable
from random import Random
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from mlpd.core.errors import NotFoundError, ValidationError
from mlpd.core.time import DAY_US, HOUR_US, format_time
from mlpd.daemon.app import Daemon
from mlpd.daemon.served_sample import Lottery
from tests.conftest import ShiftedClock
from tests.daemon.quick import serve_model

ROWS = 300


async def predict(daemon: Daemon, count: int) -> list[dict[str, Any]]:
    rows = [{"user": "abc"[i % 3], "amount": (i % 50) / 20 - 1} for i in range(count)]
    return list((await daemon.predict.predict("risk", rows))["predictions"])


async def label(
    daemon: Daemon, rows: list[dict[str, Any]], value: Callable[[int, float], float]
) -> None:
    """Label rows an hour after they were predicted."""
    done = await daemon.feedback.record(
        [
            {
                "prediction_id": row["prediction_id"],
                "label": value(i, row["score"]),
                "label_time": format_time(int(row["prediction_id"][:16], 16) + HOUR_US),
            }
            for i, row in enumerate(rows)
        ]
    )
    assert done.joined == len(rows)


async def test_predictions_are_judged_by_day_and_slice_and_agree_with_the_live_cohorts(
    open_daemon: Any, trainable: Any, click_columns: Any
) -> None:
    clock = ShiftedClock()
    async with open_daemon(clock=clock) as daemon:
        await serve_model(daemon, trainable, click_columns)
        rows = await predict(daemon, ROWS)
        clock.shift_us = 2 * HOUR_US
        await label(daemon, rows[: ROWS // 2], lambda i, x: float(x > 0.5) if i % 4 else 1.0)
        clock.shift_us = 3 * DAY_US
        found = await daemon.analysis.run("quick")
        (version,) = found["versions"]
        assert (version["predictions"], version["labelled"]) == (ROWS, ROWS // 2)
        assert (version["task"], version["calibrated"]) == ("binary", True)
        assert version["delay_p50_s"] == version["delay_p95_s"] == 3600.0
        cohorts = (await daemon.monitor.performance("quick"))["cohorts"]
        live = next(c for c in cohorts if c["period"] == "all")
        (day,) = version["days"][:1]  # two, if midnight passes
        if len(version["days"]) == 1:
            assert day["realized"]["auc"] == live["performance"]["auc"]
            assert day["realized"]["log_loss"] == pytest.approx(live["performance"]["log_loss"])
            assert day["at_maturity"] == day["realized"]
            assert day["mature"] is True
            band = day["estimated"]["auc"]
            assert 0.5 < band["low"] < band["value"] < band["high"] <= 1.0
        by_user = (await daemon.analysis.run("quick", by="user"))["versions"][0]["slices"]
        assert {part["value"] for part in by_user} == {"a", "b", "c"}
        assert sum(part["predictions"] for part in by_user) == ROWS
        by_bin = (await daemon.analysis.run("quick", by="amount"))["versions"][0]["slices"]
        assert sum(part["labelled"] for part in by_bin) == ROWS // 2
        none = await daemon.analysis.run("quick", end_us=1)
        assert none["versions"] == []


async def test_slices_and_vectors_are_the_same_when_rows_have_moved_into_files(
    open_daemon: Any, trainable: Any, click_columns: Any
) -> None:
    clock = ShiftedClock()
    async with open_daemon(clock=clock) as daemon:
        await serve_model(daemon, trainable, click_columns)
        rows = await predict(daemon, ROWS)
        clock.shift_us = 2 * HOUR_US
        await label(daemon, rows, lambda i, _: float(i % 2))
        clock.shift_us = 3 * DAY_US
        before, vectors = await looks(daemon), await vectors_of(daemon)
        assert len(vectors) == ROWS
        sample = await vectors_of(daemon, 40)
        assert sample == vectors[:40]  # by lot, and in its order
        assert {part["value"] for part in before[0][0]["slices"]} == {"a", "b", "c"}
        await daemon.prediction_files.run_if_due()
        assert daemon.prediction_files.moved == ROWS
        assert (await looks(daemon), await vectors_of(daemon)) == (before, vectors)
        assert await vectors_of(daemon, 40) == sample
        with pytest.raises(ValidationError, match="'colour': no row has it"):
            await daemon.analysis.run("quick", by="colour")


async def looks(daemon: Daemon) -> list[Any]:
    return [(await daemon.analysis.run("quick", by=by))["versions"] for by in ("user", "amount")]


SAMPLE = """
import json, sys
from mlpd.daemon.served_sample import draw_served
asked = {"directory": sys.argv[1], "start_us": 0, "end_us": 2**62, "model": "quick"}
pairs = zip(*draw_served(asked, 1, rows_max=int(sys.argv[2])), strict=True)
print(json.dumps([row.tobytes().hex() + score.tobytes().hex() for row, score in pairs]))
"""


async def vectors_of(daemon: Daemon, rows_max: int = 10**6) -> list[str]:
    """Vectors with their scores, as checks of drift see them: in a process of their own."""
    call = [sys.executable, "-c", SAMPLE, str(daemon.paths.root), str(rows_max)]
    done = await asyncio.to_thread(subprocess.run, call, check=True, capture_output=True)
    return list(json.loads(done.stdout))


@given(st.lists(st.binary(min_size=16, max_size=16), unique=True), st.integers(1, 30), st.randoms())
def test_the_lot_is_of_the_rows_alone(keys: list[bytes], rows_max: int, order: Random) -> None:
    def draw(keys: list[bytes]) -> list[float]:
        lottery = Lottery(rows_max)
        for key in keys:
            row = np.float64(numbers[key])
            if lottery.wants(key):
                lottery.add(key, row.tobytes(), float(row))
        vectors, scores = lottery.take()
        assert vectors.ravel().tolist() == scores.tolist()
        return list(scores.tolist())

    numbers = {key: i for i, key in enumerate(keys)}
    drawn = draw(keys)
    assert len(drawn) == min(rows_max, len(keys))
    shuffled = keys.copy()
    order.shuffle(shuffled)
    assert draw(shuffled) == drawn


def test_every_row_is_drawn_alike() -> None:
    keys = [i.to_bytes(16, "big") for i in range(20_000)]
    lottery = Lottery(2_000)
    for i, key in enumerate(keys):
        lottery.add(key, np.float64(i).tobytes(), float(i))
    _, drawn = lottery.take()
    assert stats.kstest(drawn / len(keys), "uniform").pvalue > 1e-3


async def test_a_changed_concept_is_called_worse(
    open_daemon: Any, trainable: Any, click_columns: Any
) -> None:
    clock = ShiftedClock()
    async with open_daemon(clock=clock) as daemon:
        await serve_model(daemon, trainable, click_columns)
        rows = await predict(daemon, 3 * ROWS)
        clock.shift_us = 2 * HOUR_US
        await label(daemon, rows, lambda _, score: float(score < 0.5))  # the contrary comes
        young = (await daemon.analysis.run("quick"))["versions"][0]["concept"]
        assert (young["state"], young["sequence"]) == ("insufficient", [])  # no day is mature
        clock.shift_us = 3 * DAY_US
        concept = (await daemon.analysis.run("quick"))["versions"][0]["concept"]
        assert concept["state"] == "worse"
        assert concept["sequence"][-1]["low"] > 0


async def test_a_version_without_a_calibration_has_no_estimates(
    open_daemon: Any, trainable: Any, click_columns: Any, monkeypatch: Any
) -> None:
    async with open_daemon() as daemon:
        await serve_model(daemon, trainable, click_columns)
        rows = await predict(daemon, 20)
        monkeypatch.setattr("mlpd.daemon.performance.CALIBRATION_FILE", "report.msgpack")
        await daemon.feedback.record(
            [{"prediction_id": row["prediction_id"], "label": 9.5} for row in rows]
        )
        (version,) = (await daemon.analysis.run("quick"))["versions"]
        assert (version["task"], version["calibrated"]) == ("regression", False)
        assert version["concept"]["state"] == "no_reference"
        assert version["days"][0]["estimated"] is None
        assert 8.5 < version["days"][0]["realized"]["mae"] <= version["days"][0]["realized"]["rmse"]


async def test_questions_without_an_answer(
    open_daemon: Any, trainable: Any, click_columns: Any
) -> None:
    async with open_daemon() as daemon:
        with pytest.raises(NotFoundError, match="unknown model"):
            await daemon.analysis.run("nothing")
        await serve_model(daemon, trainable, click_columns)
        assert (await daemon.analysis.run("quick", by="anything"))["versions"] == []
        await predict(daemon, 1)
        with pytest.raises(ValidationError, match="no row has it"):
            await daemon.analysis.run("quick", by="colour")
        with pytest.raises(ValidationError, match="before 'end'"):
            await daemon.analysis.run("quick", start_us=5, end_us=5)
