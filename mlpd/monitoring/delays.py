"""How long labels take: a histogram of delays that can be revised, and its quantiles."""

import math
from collections import Counter
from collections.abc import Iterable
from typing import Final

STEPS: Final = 8
"""Bins per doubling of 1 s + delay: a quantile is right to 2^(1/8), 9 %."""


class Delays:
    """Counts of label delays (label time minus prediction time) by bin.  One thread at a time.

    A label that claims to be older than its prediction has a delay of 0.

    >>> delays = Delays()
    >>> for minutes in (1, 2, 60):
    ...     delays.add(minutes * 60_000_000)
    >>> 110 < delays.quantile_s(0.5) < 130
    True
    """

    __slots__ = ("counts",)

    def __init__(self) -> None:
        self.counts: Counter[int] = Counter()

    def add(self, delay_us: int, weight: int = 1) -> None:
        """Note a delay, or with weight -1 take one back."""
        self.counts[math.floor(STEPS * math.log2(1.0 + max(delay_us, 0) / 1e6))] += weight

    @property
    def rows(self) -> int:
        """How many delays there are."""
        return self.counts.total()

    def quantile_s(self, share: float) -> float | None:
        """Return the end in seconds of the bin below which `share` of the delays lie.

        None without any.
        """
        wanted, seen = share * self.rows, 0
        for index in sorted(index for index, count in self.counts.items() if count):
            seen += self.counts[index]
            if seen >= wanted:
                return math.exp2((index + 1) / STEPS) - 1.0
        return None


def merge_delays(parts: Iterable[Delays]) -> Delays:
    """Return the sum of parts."""
    total = Delays()
    for part in parts:
        total.counts.update(part.counts)
    return total
