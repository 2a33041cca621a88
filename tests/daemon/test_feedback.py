"""Labels of a real daemon: idempotent, revised, contradicted, early, late, and after a restart."""

from typing import Any

import numpy as np
import pytest

from mlpd.core.time import DAY_US, HOUR_US, format_time
from mlpd.daemon.app import Daemon
from mlpd.daemon.collectors import outcome_collector
from mlpd.daemon.predictions import Prediction, PredictionIds, prediction_key
from mlpd.storage.tables import Table
from tests.conftest import ShiftedClock, until
from tests.daemon.quick import serve_model

T_US = 1_380_000_000_000_000
"""When predictions were made: history is replayed."""


async def predict(daemon: Daemon, count: int) -> list[str]:
    rows = [{"user": "abc"[i % 3], "amount": i / 10} for i in range(count)]
    answer = await daemon.predict.predict("risk", rows)
    return [row["prediction_id"] for row in answer["predictions"]]


def label(prediction_id: str, value: float, after_us: int | None = None) -> dict[str, Any]:
    """Return a label that is known so long after its prediction."""
    made_us = int(prediction_id[:16], 16)
    at = {} if after_us is None else {"label_time": format_time(made_us + after_us)}
    return {"prediction_id": prediction_id, "label": value, **at}


async def seen(daemon: Daemon) -> dict[str, Any]:
    """Return the whole of what labels taught, which a restart must not change."""
    (found,) = [
        c for c in (await daemon.monitor.performance("quick"))["cohorts"] if c["period"] == "all"
    ]
    return {name: value for name, value in found.items() if name != "revisions"}


async def test_labels_in_any_order_teach_what_the_last_ones_say_and_survive_a_restart(
    open_daemon: Any, trainable: Any, click_columns: Any
) -> None:
    clock = ShiftedClock()
    async with open_daemon(clock=clock) as daemon:
        await serve_model(daemon, trainable, click_columns)
        ids = await predict(daemon, 10)
        clock.shift_us = 100 * DAY_US
        batch = [label(name, i % 2, HOUR_US) for i, name in enumerate(ids)]
        first = await daemon.feedback.record(batch)
        assert (first.accepted, first.joined, first.stale) == (10, 10, 0)
        again = await daemon.feedback.record(batch)  # a retry
        assert (again.joined, again.stale, again.revised) == (0, 10, 0)
        before = await seen(daemon)
        older = await daemon.feedback.record([label(ids[0], 1, HOUR_US // 2)])
        assert (older.stale, older.joined) == (1, 0)
        against = await daemon.feedback.record([label(ids[0], 1, HOUR_US)])
        assert (against.conflicts, against.joined, against.stale) == (1, 0, 0)
        late = await daemon.feedback.record([label(ids[0], 1, 91 * DAY_US)])
        assert (late.accepted, late.late, late.joined) == (1, 1, 0)
        assert await seen(daemon) == before
        revised = await daemon.feedback.record([label(ids[0], 1, 2 * HOUR_US)])
        assert (revised.joined, revised.revised) == (1, 1)
        assert (await seen(daemon))["performance"]["positives"] == before["performance"][
            "positives"
        ] + 1
        confirmed = await daemon.feedback.record([label(ids[1], 1, 5 * HOUR_US)])
        assert (confirmed.joined, confirmed.stale) == (0, 1)
        assert (await seen(daemon))["delay_p95_s"] > 4 * 3600  # it counts as known then
        between = await daemon.feedback.record([label(ids[1], 0, 3 * HOUR_US)])
        assert (between.joined, between.stale) == (0, 1)
        counted = daemon.feedback.counts
        assert {fate: counted[fate] for fate in ("late", "conflict", "revised")} == {
            "late": 1, "conflict": 1, "revised": 1
        }  # fmt: skip
        after = await seen(daemon)
    async with open_daemon(clock=clock) as daemon:
        await until(lambda: daemon.outcomes.rebuilt)
        assert await seen(daemon) == after


async def test_numbers_as_labels_have_errors(
    open_daemon: Any, trainable: Any, click_columns: Any
) -> None:
    async with open_daemon() as daemon:
        await serve_model(daemon, trainable, click_columns)
        ids = await predict(daemon, 4)
        await daemon.feedback.record([label(name, 7.5) for name in ids])
        found = await seen(daemon)
        assert (found["labelled"], found["unscored"], found["performance"]["auc"]) == (4, 4, None)
        assert 6.5 < found["errors"]["mae"] == -found["errors"]["bias"] <= found["errors"]["rmse"]


async def test_labels_without_a_time_that_came_together_are_in_their_order(
    open_daemon: Any, trainable: Any, click_columns: Any
) -> None:
    async with open_daemon() as daemon:
        await serve_model(daemon, trainable, click_columns)
        (name,) = await predict(daemon, 1)
        done = await daemon.feedback.record([label(name, 0), label(name, 1)])
        assert (done.joined, done.revised, done.conflicts) == (2, 1, 0)
        assert (await seen(daemon))["performance"]["positives"] == 1


@pytest.mark.parametrize("after_us", [None, HOUR_US])
async def test_a_label_of_nothing_known_is_an_orphan_once(
    daemon: Any, after_us: int | None
) -> None:
    name = PredictionIds().make(T_US, None)
    for _ in range(3):
        done = await daemon.feedback.record([label(name, 1, after_us)])
    assert daemon.feedback.counts["orphan"] == 1
    assert done.stale == 1


async def test_labels_that_came_first_join_as_their_predictions_are_stored_and_once(
    open_daemon: Any, trainable: Any, click_columns: Any, monkeypatch: Any
) -> None:
    async with open_daemon() as daemon:
        await serve_model(daemon, trainable, click_columns)
        with monkeypatch.context() as full:
            full.setattr(daemon.predictions, "flush", lambda: None)  # as with a full queue
            ids = await predict(daemon, 3)
            early = await daemon.feedback.record([label(name, 1) for name in ids[:2]])
            assert (early.orphans, early.joined) == (2, 0)
            assert (await seen(daemon))["labelled"] == 0
        late = await daemon.feedback.record([label(ids[1], 0), label(ids[2], 0)])
        assert (late.joined, late.revised, late.orphans) == (2, 1, 0)
        before = await seen(daemon)
        assert (before["labelled"], before["performance"]["positives"]) == (3, 1)
        again = await daemon.feedback.record([label(ids[0], 1, HOUR_US)])
        assert again.joined == 0
    async with open_daemon() as daemon:
        await until(lambda: daemon.outcomes.rebuilt)
        assert await seen(daemon) == before


async def test_a_label_that_came_first_and_is_no_class_is_dropped_as_its_prediction_is_stored(
    daemon: Daemon, caplog: pytest.LogCaptureFixture
) -> None:
    ids, joined = PredictionIds(), list[Any]()
    names = [ids.make(T_US, None) for _ in range(3)]
    early = [label(name, value) for name, value in zip(names, [0.5, 2, 100], strict=True)]
    assert (await daemon.feedback.record(early)).orphans == 3
    served = [
        Prediction(
            *(name, T_US, 1, "r", "main", "kind", 1, 0.7),
            vector=np.zeros(1),
            given={},
            chosen=2,
        )
        for name in names
    ]
    for prediction in served:
        daemon.predictions.append(prediction)
    daemon.predictions._joined = joined.extend
    again = await daemon.feedback.record([label(names[0], 1)])
    assert (again.joined, again.revised) == (1, 0)
    assert [(p.prediction_id, found.label) for p, found in joined] == [(names[1], 2.0)]
    assert daemon.predictions.labels_refused == 2
    assert "2 labels that came before their predictions are no classes" in caplog.text
    with daemon.environment.snapshot() as snapshot:
        stored = [snapshot.get(Table.LABELS, prediction_key(name)) for name in names]
    assert [value is None for value in stored] == [False, False, True]
    parts = daemon.feedback, daemon.predictions, daemon.shadows, daemon.audit
    counted = {found.descriptor.name: dict(found.samples) for found in outcome_collector(*parts)()}
    assert counted["mlpd_feedback_labels_total"]["rejected",] == 2


async def test_a_label_that_no_float_holds_is_refused_alone(daemon: Daemon) -> None:
    ids = PredictionIds()
    rows = [label(ids.make(T_US, None), value) for value in (1, 10**400, -(10**400), 1e999)]
    done = await daemon.feedback.record(rows)
    assert (done.orphans, [refused["index"] for refused in done.rejected]) == (1, [1, 2, 3])
    assert {refused["code"] for refused in done.rejected} == {"invalid_label"}
