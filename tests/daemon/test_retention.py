"""What is too old goes, in small writes; what is not stays, whole."""

import asyncio
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from mlpd.core.config import Config, PredictionsConfig
from mlpd.core.names import TimeUs
from mlpd.core.time import DAY_US, HOUR_US
from mlpd.daemon.app import Daemon
from mlpd.daemon.predictions import Prediction, PredictionIds, prediction_key
from mlpd.storage.tables import Table
from tests.conftest import until

NOW_US = 1_700_000_000_000_000
LONG_AGO_US = 1_380_000_000_000_000
KEPT = PredictionsConfig(retention_us=30 * DAY_US, orphans_max=50, orphan_retention_us=2 * DAY_US)


@dataclass
class Clock:
    now_us: int = NOW_US

    def __call__(self) -> TimeUs:
        return TimeUs(self.now_us)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
async def keeper(open_daemon: Any, clock: Clock) -> Any:
    async with open_daemon(config=Config(predictions=KEPT), clock=clock) as daemon:
        yield daemon


async def serve(daemon: Daemon, count: int, *, t_us: int = LONG_AGO_US) -> list[str]:
    """Log predictions as of `t_us`, as a replay does, and return their ids."""
    ids = PredictionIds()
    named = [ids.make(t_us + i, f"u{i}") for i in range(count)]
    for name in named:
        daemon.predictions.append(prediction(name, t_us))
    daemon.predictions.flush()
    await daemon.writer.write(lambda _: None)
    return named


def prediction(name: str, t_us: int) -> Prediction:
    vector = np.zeros(3)
    return Prediction(name, t_us, 1, "r", "a", "m", 1, 0.5, vector, {"user": "u"}, unit="u")


async def label(daemon: Daemon, ids: list[str], value: int = 1) -> Any:
    return await daemon.feedback.record([{"prediction_id": i, "label": value} for i in ids])


def counts(daemon: Daemon) -> dict[str, int]:
    tables = (Table.PREDICTIONS, Table.LABELS, Table.SERVED, Table.ORPHANS)
    with daemon.environment.snapshot() as snapshot:
        return {str(table): snapshot.count(table) for table in tables}


def has_labels(daemon: Daemon, ids: list[str]) -> list[bool]:
    keys = [prediction_key(name) for name in ids]
    with daemon.environment.snapshot() as snapshot:
        return [value is not None for value in snapshot.get_many(Table.LABELS, keys)]


async def test_rows_go_by_when_they_were_served_not_by_their_own_time(
    keeper: Daemon, clock: Clock
) -> None:
    old = await serve(keeper, 700)
    await label(keeper, old[:300])
    clock.now_us += 20 * DAY_US
    new = await serve(keeper, 100)
    await label(keeper, new[:50])
    await keeper.retention.run()
    assert counts(keeper)["predictions"] == 800
    clock.now_us += 10 * DAY_US + HOUR_US
    before = keeper.writer.stats.operations
    await keeper.retention.run()
    assert keeper.writer.stats.operations - before >= 3  # never all at once
    assert counts(keeper) == {"predictions": 100, "labels": 50, "served": 4, "orphans": 0}
    assert has_labels(keeper, new) == [True] * 50 + [False] * 50
    removed = {"predictions": 700, "labels": 300, "orphans": 0, "event_ids": 0}
    assert keeper.retention.removed == removed


async def test_orphans_are_bounded_in_number(keeper: Daemon) -> None:
    strangers = [PredictionIds().make(NOW_US, f"u{i}") for i in range(120)]
    for start in (0, 60):
        answer = await label(keeper, strangers[start : start + 60])
        assert answer.orphans == 60
    assert counts(keeper) == {"predictions": 0, "labels": 50, "served": 0, "orphans": 50}
    assert has_labels(keeper, strangers[:60]) == [False] * 60  # the oldest went
    assert keeper.feedback.orphans_dropped == 70
    await label(keeper, strangers[60:], 0)  # a revision is no new orphan; what was dropped is one
    assert counts(keeper)["orphans"] == counts(keeper)["labels"] == 50


async def test_orphans_are_bounded_in_age(keeper: Daemon, clock: Clock) -> None:
    ids = PredictionIds()
    late, strangers = ids.make(NOW_US, "late"), [ids.make(2**62, f"u{i}") for i in range(20)]
    await label(keeper, [late, *strangers])
    keeper.predictions.append(prediction(late, NOW_US))  # its prediction comes after it
    clock.now_us += DAY_US
    fresh = ids.make(NOW_US, "fresh")
    await label(keeper, [fresh])
    clock.now_us += DAY_US + HOUR_US
    await keeper.retention.run()
    assert has_labels(keeper, [late, *strangers, fresh]) == [True, *[False] * 20, True]
    assert counts(keeper)["orphans"] == 1
    assert keeper.retention.removed["orphans"] == 20


async def test_what_a_stop_interrupts_goes_on_after_the_restart(
    open_daemon: Any, clock: Clock
) -> None:
    config = Config(predictions=KEPT)
    async with open_daemon(config=config, clock=clock) as daemon:
        await label(daemon, await serve(daemon, 1_000))
        clock.now_us += 31 * DAY_US
        removing = asyncio.create_task(daemon.retention.run())
        await until(lambda: daemon.retention.removed["predictions"])
        removing.cancel()
        await asyncio.gather(removing, return_exceptions=True)
        left = counts(daemon)
        assert 0 < left["predictions"] == left["labels"] < 1_000
    async with open_daemon(config=config, clock=clock) as daemon:
        await until(lambda: not counts(daemon)["predictions"])  # by itself: nobody calls `run`
        assert set(counts(daemon).values()) == {0}


async def test_what_was_removed_is_told_to_prometheus(keeper: Daemon, clock: Clock) -> None:
    await serve(keeper, 10)
    clock.now_us += 31 * DAY_US
    await keeper.retention.run()
    body, _ = await keeper.monitor.expose_metrics("")
    assert b'mlpd_removed_rows_total{kind="predictions"} 10' in body
    assert b'mlpd_removed_rows_total{kind="orphans_over_limit"} 0' in body
