"""Retries: when a failed call may be repeated, after which pause, and how many in all; no I/O."""

import random
from collections.abc import Callable

from mlpd.client.requests import Request
from mlpd.core.errors import MlpdError, OverloadedError, UnavailableError

ATTEMPTS_MAX = 4
PAUSE_S = 0.05
PAUSE_MAX_S = 5.0
PASSING = frozenset(("slots_moving", "map_behind", "promoting"))
"""Codes of what a shard answers while slots move, before it heard that they have, or while another
daemon takes its place: all pass by themselves, say when to come back, and nothing was done."""
MOVING_ATTEMPTS_MAX = 40
"""Some five seconds: a pause takes a tenth of one, on a crowded machine more."""
BUDGET_MAX = 10.0
DEPOSIT = 0.1
"""Budget that a success pays in: in the long run at most one call in ten is a retry."""


class Retries:
    """Decides on retries of one client; safe to share between its threads.

    A retry costs 1 of a budget of at most 10, so that many clients of a failing daemon don't
    multiply its load; what waits for slots that move costs none.  Repeatable requests are retried
    after a 503 or a lost connection, others only after a 503 that says when to come back: those
    were refused unexecuted.
    """

    def __init__(self, draw: Callable[[], float] = random.random) -> None:
        self._draw = draw
        self._budget = BUDGET_MAX

    def pause_s(
        self, request: Request, error: MlpdError, attempt: int, left_s: float
    ) -> float | None:
        """Return the seconds to wait before the next attempt, or None to give up.

        `attempt` counts from 1; `left_s` is the time left for the whole call.  Waits what the
        server advised, else 50 ms doubled with each attempt, with up to half of it by chance.
        """
        is_moving = error.code in PASSING
        refused = is_moving or isinstance(error, OverloadedError)
        retriable = refused or (request.repeatable and error.status == UnavailableError.status)
        spent = attempt >= ATTEMPTS_MAX or self._budget < 1.0
        if not retriable or (attempt >= MOVING_ATTEMPTS_MAX if is_moving else spent):
            return None
        pause_s = float(error.details.get("retry_after_s", PAUSE_S * 2 ** (attempt - 1)))
        pause_s *= 1.0 + 0.5 * self._draw()
        if pause_s > min(PAUSE_MAX_S, left_s):
            return None
        self._budget -= 0.0 if is_moving else 1.0
        return pause_s

    def succeeded(self) -> None:
        """Pay into the budget."""
        self._budget = min(BUDGET_MAX, self._budget + DEPOSIT)
