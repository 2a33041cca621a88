"""The log of slow requests: one line each, with the time that every step took; bounded."""

import logging
import time

from mlpd.core.trace import Span

LINES_PER_S = 5.0
"""More are counted in the next line: a slow second has thousands of slow requests."""

_log = logging.getLogger("mlpd.slow")


class SlowLog:
    """Writes requests that took `slow_s` or longer."""

    def __init__(self, slow_s: float) -> None:
        self.slow_s = slow_s
        self._next_s = 0.0
        self._passed_over = 0

    def note(self, method: str, path: str, status: int, seconds: float, span: Span) -> None:
        """Log one request that was slow; 20 us, five times a second at most."""
        now_s = time.monotonic()
        if now_s < self._next_s:
            self._passed_over += 1
            return
        self._next_s = now_s + 1.0 / LINES_PER_S
        fields = {
            "method": method,
            "route": path,
            "status": status,
            "took_ms": round(1e3 * seconds, 3),
            "steps_ms": span.steps_ms(),
            "passed_over": self._passed_over,
        }
        self._passed_over = 0
        _log.warning(
            "slow request: %s %s took %.0f ms",
            method,
            path,
            1e3 * seconds,
            extra={"fields": fields},
        )
