"""The continuous audit finds planted skew within one window, and names feature, values, events."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from mlpd.core.config import MonitoringConfig
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
from mlpd.core.hashing import SLOTS
from mlpd.core.time import MINUTE_US, SECOND_US
from mlpd.daemon.app import Daemon
from mlpd.daemon.audit_child import pick
from mlpd.daemon.looks import AuditLook
from mlpd.storage.tables import Table
from tests.conftest import SMALL, until
from tests.daemon.quick import send_clicks, serve_model

USERS = "abc"


def document() -> dict[str, Any]:
    """A model that reads a window and a latest value that is stale after ten minutes."""
    user = Entity("user")
    schema = {"user": "string", "amount": "float64", "bought": "int64", "shown_at": "timestamp"}
    clicks = Source("clicks", timestamp="at", schema=schema)
    spend = WindowView("spend", user, clicks, ["1h"], [Aggregate.mean("amount")])
    last = FeatureView("last", entity=user, source=clicks, features=["amount"], ttl="10m")
    risk = FeatureService("risk", [spend, last])
    job = Job(
        *("quick", risk, Spine(clicks, time="shown_at")),
        label="bought",
        params={"min_data_in_leaf": 5},
        num_boost_round=5,
        deploy="champion",
    )
    return build_document([user, clicks, spend, last, risk, job])


async def click(daemon: Daemon, ago_us: int = MINUTE_US, more: float = 0.0) -> None:
    """Send a click of each user."""
    at = daemon.clock() - ago_us
    count = len(USERS)
    await send_clicks(
        daemon,
        {
            **dict.fromkeys(("at", "shown_at"), [at] * count),
            "user": list(USERS),
            "amount": [1.5 + more, 2.5 + more, 3.5 + more],
            "bought": [1] * count,
        },
    )


async def predict(daemon: Daemon, count: int = 9) -> None:
    await daemon.predict.predict("risk", [{"user": USERS[i % 3]} for i in range(count)])


@pytest.fixture
async def served(daemon: Daemon, click_columns: Any) -> Daemon:
    await serve_model(daemon, document(), click_columns)
    await click(daemon)
    return daemon


async def audit(daemon: Daemon) -> dict[str, Any]:
    found = await daemon.audit.run_window()
    assert found is not None
    return found


async def test_what_is_served_right_matches_and_each_window_is_looked_at_once(
    served: Daemon,
) -> None:
    assert await served.audit.run_window() is None  # nothing was served
    await predict(served)
    found = await audit(served)
    assert (found["served"], found["rows_compared"], found["mismatches"]) == (9, 9, 0)
    assert found["cpu_s"] > 0
    assert await served.audit.run_window() is None


async def test_a_wrong_ttl_is_found_and_named(served: Daemon) -> None:
    look = AuditLook(served.audit)
    await click(served, ago_us=5 * SECOND_US)
    served.state.catalog.views["last"].plan._ttl_us = SECOND_US  # type: ignore[union-attr]
    await predict(served)
    found = await audit(served)
    assert found["by_feature"] == {"last.amount": 9}
    example = found["examples"][0]
    assert example["feature"] == "last.amount"
    assert math.isnan(float(example["served"]))
    assert float(example["recomputed"]) in (1.5, 2.5, 3.5)
    newest = example["events"][0]
    assert newest["source"] == "clicks"
    assert newest["values"]["amount"] == float(example["recomputed"])
    with served.environment.snapshot() as snapshot:
        place = USERS.index(newest["values"]["user"])
        assert newest["sequence"] == snapshot.sequence - 2 + place
    window = await look.look(served.clock())
    assert window is not None
    (measured,) = window.measured
    assert (measured.labels["alertname"], measured.value) == ("Inconsistent", 9.0)


async def test_an_event_that_the_online_state_lost_is_found_and_named(served: Daemon) -> None:
    with served.environment.snapshot() as snapshot:
        before = list(snapshot.scan(Table.ONLINE))
    await click(served, ago_us=SECOND_US, more=1.0)

    def lose(txn: Any) -> None:
        for key, value in before:
            txn.put(Table.ONLINE, key, value)

    await served.writer.write(lose)
    await predict(served)
    found = await audit(served)
    assert found["mismatched_rows"] == 9
    example = next(e for e in found["examples"] if e["feature"] == "last.amount")
    newest = example["events"][0]
    assert newest["sequence"] > 1_000 + len(USERS)  # the click that was lost


async def test_a_kernel_that_is_off_by_one_bit_is_found_and_named(
    served: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlpd.core.vector import PlacedVectorizer  # noqa: PLC0415

    vectorize = PlacedVectorizer.vectorize

    def off_by_one_bit(self: Any, *args: Any, **kwargs: Any) -> Any:
        vectors = vectorize(self, *args, **kwargs)
        return np.where(np.isfinite(vectors), np.nextafter(vectors, np.inf), vectors)

    monkeypatch.setattr(PlacedVectorizer, "vectorize", off_by_one_bit)
    await predict(served)
    found = await audit(served)
    assert "spend.amount_mean_1h" in found["by_feature"]
    example = next(e for e in found["examples"] if e["feature"].startswith("spend"))
    ours, theirs = float(example["served"]), float(example["recomputed"])
    assert ours == np.nextafter(theirs, np.inf)
    assert example["events"]


async def test_windows_are_audited_by_themselves(open_daemon: Any, click_columns: Any) -> None:
    config = replace(SMALL, monitoring=MonitoringConfig(audit_us=SECOND_US // 5, audit_cpu_share=1))
    async with open_daemon(config=config) as daemon:
        await serve_model(daemon, document(), click_columns)
        await predict(daemon)
        await until(lambda: daemon.audit.rows["match"] == 9)
        assert daemon.audit.cpu_s > 0


def test_samples_are_bounded_whole_by_unit_and_reach_every_unit() -> None:
    keys = [
        slot.to_bytes(2, "big") + bytes([i]) * 14
        for slot in range(0, SLOTS, SLOTS // 64)
        for i in range(4)
    ]
    seen = set()
    for turn in range(40):
        picked = pick(keys, 16, turn)
        assert len(picked) == 16
        assert len({key[:2] for key in picked}) == 4  # four units, each whole
        seen |= {key[:2] for key in picked}
    assert len(seen) == 64
    assert pick(keys[:3], 16, 5) == sorted(keys[:3])
