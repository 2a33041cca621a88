"""Hedging: when a read that is slow is asked once more, and how often that may be.

Dean and Barroso, The Tail at Scale (2013): after the p95 of recent reads, for 5 % more of them.
"""

from collections import deque

WINDOW = 512
LEAST = 64
"""Reads before the first one is hedged."""
_QUANTILE = 0.95
_EVERY = 32
"""Reads between two looks at the quantile: sorting takes 30 us."""
_SAVED_MAX = 10.0


class Hedging:
    """Learns from how long reads take; every method belongs to one thread.

    `share`: of the reads that may be asked twice, in the long run; 0 for none.
    """

    def __init__(self, share: float = 0.05) -> None:
        self._share = share
        self._seconds: deque[float] = deque(maxlen=WINDOW)
        self._saved = 1.0
        self._noted = 0
        self._delay_s: float | None = None
        self.hedged = self.won = 0

    @property
    def delay_s(self) -> float | None:
        """Seconds after which a read is slow; None while that isn't known, or never."""
        return self._delay_s

    def note(self, seconds: float) -> None:
        """Note how long a read took; pays into the budget.  0.2 us, 30 us now and then."""
        self._seconds.append(seconds)
        self._saved = min(_SAVED_MAX, self._saved + self._share)
        self._noted += 1
        if self._share and self._noted % _EVERY == 0 and len(self._seconds) >= LEAST:
            self._delay_s = sorted(self._seconds)[int(_QUANTILE * len(self._seconds))]

    def take(self) -> bool:
        """Tell whether a slow read may be asked once more, and count it."""
        if self._saved < 1.0:
            return False
        self._saved -= 1.0
        self.hedged += 1
        return True
