"""Adaptive limits: how many requests of a kind may be under way, learned from how long they take.

Additive increase, multiplicative decrease (Chiu and Jain, 1989), as in TCP: while more than a
quarter of the requests take longer than they may, fewer are let in than were under way; while they
don't, the limit grows, beyond where it started only if it is reached.  A single request may wait
for a sequence, or bring 10,000 rows, and says nothing about how crowded it is.
"""

from mlpd.core.errors import OverloadedError

START = 128
LEAST = 4
"""Enough to keep every thread busy."""
MOST = 1024

_WINDOW = 16
_SLOW_MAX = 4
_CUT = 0.7
_STEP = 2


class AdaptiveLimit:
    """The limit of one kind of requests; every method belongs to one thread.

    A request asks `check`, then `enter`, and in the end `leave` or `leave_after`.  `target_s`: how
    long a request may take, from entering to leaving, whose caller sets no deadline.
    """

    __slots__ = (
        *("_count", "_full", "_peak", "_since_s", "_slow"),
        *("in_flight", "limit", "refused", "target_s"),
    )

    def __init__(self, target_s: float, *, start: int = START) -> None:
        self.target_s = target_s
        self.limit = start
        self.in_flight = 0
        self.refused = 0
        self._since_s = 0.0
        self._count = self._slow = self._peak = 0
        self._full = False

    @property
    def is_crowded(self) -> bool:
        """Whether half of what may be under way is: what can wait should.  Any thread."""
        return 2 * self.in_flight >= self.limit

    @property
    def is_full(self) -> bool:
        """Whether no request more may enter."""
        return self.in_flight >= self.limit

    def check(self) -> None:
        """Raise OverloadedError(code="too_many_requests") if no request more may enter."""
        if not self.is_full:
            return
        self._full = True
        self.refused += 1
        raise OverloadedError(
            f"{self.in_flight} requests of this kind are under way",
            code="too_many_requests",
            hint="Try again later, or send fewer at a time.",
            details={"retry_after_s": self.target_s},
        )

    def enter(self) -> None:
        """Count a request in; raises as `check` does."""
        self.check()
        self.in_flight += 1
        self._peak = max(self._peak, self.in_flight)

    def leave(self) -> None:
        """Count out a request that says nothing about the crowd: it failed, or nobody waited."""
        self.in_flight -= 1

    def leave_after(self, began_s: float, now_s: float, *, may_take_s: float | None = None) -> None:
        """Count out a request that entered at `began_s`, seconds on the same clock as `now_s`.

        `may_take_s`: instead of `target_s`; 0 for one that came too late.  About 0.4 us.
        """
        self.in_flight -= 1
        if began_s < self._since_s:  # it was let in under another limit
            return
        self._count += 1
        self._slow += now_s - began_s > (self.target_s if may_take_s is None else may_take_s)
        if self._count >= _WINDOW:
            self._adapt(now_s)

    def _adapt(self, now_s: float) -> None:
        if self._slow > _SLOW_MAX:
            # Of a limit that isn't reached the crowd would notice nothing.
            self.limit = max(LEAST, int(_CUT * min(self.limit, self._peak)))
            self._since_s = now_s
        elif self._full or self.limit < START:
            self.limit = min(MOST, self.limit + _STEP)
        self._count = self._slow = 0
        self._peak = self.in_flight
        self._full = False
