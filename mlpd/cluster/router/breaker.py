"""Breaker: a shard that doesn't answer is left alone for a while, and then tried by one call."""

from collections.abc import Callable

from mlpd.core.errors import UnavailableError

FAILURES = 3
"""In a row; fewer may be a restart."""
PAUSE_S, PAUSE_MAX_S = 0.25, 5.0


class Breaker:
    """Knows whether a shard may be asked; every method belongs to one thread.

    `draw` gives 0 to 1: pauses are up to half as long again, so that routers don't come together.
    """

    def __init__(self, draw: Callable[[], float]) -> None:
        self._draw = draw
        self._pause_s = PAUSE_S
        self._failures = 0
        self._until_s = 0.0

    @property
    def is_open(self) -> bool:
        """Whether the shard counts as down."""
        return self._failures >= FAILURES

    def check(self, name: str, now_s: float) -> None:
        """Raise UnavailableError(code="shard_down") if shard `name` is down and isn't to be tried.

        Whoever may try it holds the others off for another pause.
        """
        if not self.is_open:
            return
        if now_s < self._until_s:
            raise UnavailableError(
                f"shard {name} has not answered and counts as down",
                code="shard_down",
                hint="Try again shortly; mlpd shard status shows who answers.",
                details={"shard": name, "retry_after_s": max(0.1, self._until_s - now_s)},
            )
        self._wait(now_s)

    def succeeded(self) -> None:
        """Note that it answered, whatever it said."""
        self._failures, self._pause_s = 0, PAUSE_S

    def failed(self, now_s: float) -> None:
        """Note that it said nothing."""
        self._failures += 1
        if self._failures == FAILURES:
            self._wait(now_s)

    def trip(self, now_s: float) -> None:
        """Let it count as down from now on, if it doesn't yet."""
        if not self.is_open:
            self._failures = FAILURES
            self._wait(now_s)

    def _wait(self, now_s: float) -> None:
        self._until_s = now_s + self._pause_s * (1.0 + 0.5 * self._draw())
        self._pause_s = min(PAUSE_MAX_S, 2.0 * self._pause_s)
