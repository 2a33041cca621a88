"""Retries: which calls are repeated, when, and that a failing daemon isn't flooded."""

import pytest

from mlpd.client.requests import Request
from mlpd.client.retries import ATTEMPTS_MAX, BUDGET_MAX, MOVING_ATTEMPTS_MAX, Retries
from mlpd.core.errors import (
    ConflictError,
    DeadlineExceededError,
    InternalError,
    MlpdError,
    OverloadedError,
    StorageFullError,
    UnavailableError,
)

READ = Request("GET", "/")
PREDICT = Request("POST", "/", repeatable=False)


def retries() -> Retries:
    return Retries(draw=lambda: 0.0)


def test_pauses_double() -> None:
    policy, error = retries(), UnavailableError("down")
    pauses = [policy.pause_s(READ, error, attempt, 60.0) for attempt in (1, 2, 3)]
    assert pauses == [0.05, 0.1, 0.2]
    assert policy.pause_s(READ, error, ATTEMPTS_MAX, 60.0) is None


def test_what_the_server_advises_is_waited() -> None:
    error = OverloadedError("full", details={"retry_after_s": 2.0})
    assert retries().pause_s(READ, error, 1, 60.0) == 2.0
    assert Retries(draw=lambda: 1.0).pause_s(READ, error, 1, 60.0) == 3.0


@pytest.mark.parametrize("advised_s", [4.0, 1000.0])
def test_no_retry_that_would_come_too_late(advised_s: float) -> None:
    error = OverloadedError("full", details={"retry_after_s": advised_s})
    assert retries().pause_s(READ, error, 1, 3.0) is None


def test_calls_that_are_not_repeatable_never_are() -> None:
    assert retries().pause_s(PREDICT, UnavailableError("down"), 1, 60.0) is None


def test_what_was_refused_unexecuted_may_always_be_asked_again() -> None:
    error = OverloadedError("full", details={"retry_after_s": 0.5})
    assert retries().pause_s(PREDICT, error, 1, 60.0) == 0.5


@pytest.mark.parametrize(
    "error",
    [
        *(ConflictError("x"), InternalError("x"), StorageFullError("x")),
        DeadlineExceededError("x"),
    ],
    ids=lambda e: type(e).__name__,
)
def test_errors_that_repeating_cannot_mend_are_final(error: MlpdError) -> None:
    assert retries().pause_s(READ, error, 1, 60.0) is None


def test_the_budget_bounds_retries_and_successes_refill_it() -> None:
    policy, error = retries(), UnavailableError("down")
    allowed = sum(policy.pause_s(READ, error, 1, 60.0) is not None for _ in range(100))
    assert allowed == BUDGET_MAX
    for _ in range(25):
        policy.succeeded()
    allowed = sum(policy.pause_s(READ, error, 1, 60.0) is not None for _ in range(100))
    assert allowed == 2


@pytest.mark.parametrize("code", ["slots_moving", "map_behind"])
def test_what_passes_by_itself_is_waited_for_at_no_cost(code: str) -> None:
    policy = retries()
    error = UnavailableError("wait", code=code, details={"retry_after_s": 0.05})
    for attempt in range(1, MOVING_ATTEMPTS_MAX):
        assert policy.pause_s(PREDICT, error, attempt, 60.0) == 0.05
    assert policy.pause_s(PREDICT, error, MOVING_ATTEMPTS_MAX, 60.0) is None
    assert policy.pause_s(READ, UnavailableError("down"), 1, 60.0) is not None
