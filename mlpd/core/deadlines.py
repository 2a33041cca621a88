"""Deadlines: the moment, in `time.monotonic()` seconds, after which a caller waits no more."""

import time

from mlpd.core.errors import DeadlineExceededError


def check_deadline(deadline_s: float | None, when: str) -> None:
    """Raise DeadlineExceededError if the deadline has passed; `when` is "it arrived" or so."""
    if deadline_s is not None and time.monotonic() >= deadline_s:
        raise too_late(when)


def too_late(when: str) -> DeadlineExceededError:
    """Return the error for work that nobody waits for any more."""
    return DeadlineExceededError(
        f"the deadline of the request had passed when {when}; nothing was run",
        hint="Allow more time, or send less at a time.",
    )
