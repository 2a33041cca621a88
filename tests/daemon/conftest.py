"""What the daemon's tests of runs share: a job that trains in a moment, and events for it."""

from typing import Any

import numpy as np
import pytest

from mlpd.core.definitions import (
    Aggregate,
    Entity,
    FeatureService,
    Job,
    Source,
    Spine,
    WindowView,
    build_document,
)
from mlpd.core.kernels import precompile
from mlpd.daemon.app import KERNEL_MODULES

FIRST_US = 1_356_998_400_000_000  # 2013-01-01T00:00:00Z
ROUNDS_FOREVER = 1_000_000
"""Trains for hours: a test ends it."""


def pytest_collection_finish() -> None:
    """Compile kernels before any test's clock runs: on a new machine it takes up to a minute."""
    precompile(KERNEL_MODULES)


@pytest.fixture
def trainable() -> dict[str, Any]:
    """Definitions with two jobs of one model each: `quick`, and `endless`, to be stopped."""
    user = Entity("user")
    schema = {"user": "string", "amount": "float64", "bought": "int64", "shown_at": "timestamp"}
    clicks = Source("clicks", timestamp="at", schema=schema)
    other = Source("other", timestamp="at", schema={"user": "string"})
    spend = WindowView("spend", user, clicks, ["1h"], [Aggregate.count(), Aggregate.mean("amount")])
    risk = FeatureService("risk", [spend], request={"amount": "float64"})
    spine = Spine(clicks, time="shown_at")
    params = {"min_data_in_leaf": 5}
    quick = Job(
        *("quick", risk, spine),
        label="bought",
        params=params,
        num_boost_round=5,
        deploy="champion",
    )
    endless = Job(
        *("endless", risk, spine),
        label="bought",
        params=params,
        num_boost_round=ROUNDS_FOREVER,
        early_stopping_rounds=ROUNDS_FOREVER,
    )
    return build_document([user, clicks, other, spend, risk, quick, endless])


@pytest.fixture
def click_columns() -> dict[str, Any]:
    """Columns of 1,000 clicks, one a minute, known as they happened."""
    rng = np.random.default_rng(7)
    times = FIRST_US + np.arange(1_000) * 60_000_000
    amount = rng.normal(size=1_000)
    return {
        **dict.fromkeys(("at", "known_at", "shown_at"), times.tolist()),
        "user": rng.choice(["a", "b", "c"], 1_000).tolist(),
        "amount": amount.tolist(),
        "bought": (amount + rng.normal(size=1_000) > 0).astype(int).tolist(),
    }
