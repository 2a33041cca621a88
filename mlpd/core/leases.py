"""Leases: an owner writes while its followers promise not to be promoted as if it were lost.

No two clocks are compared.  The owner gives each answer a ticket; a follower's next question brings
it back, and from when the ticket was given the follower's promise holds: it came later.
"""

import random
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass

DRIFT = 0.01
"""How much faster or slower than time a clock may run."""
TICKETS_MAX = 1024


class Lease:
    """The owner's side; all times are seconds on one monotonic clock.  `lease_s` 0: none is needed.

    `first`: the first ticket, at random, so that those of an earlier process mean nothing.
    """

    def __init__(self, lease_s: float, first: int | None = None) -> None:
        self.lease_s = lease_s
        self._next = random.getrandbits(52) if first is None else first
        self._given: OrderedDict[int, float] = OrderedDict()
        self._until: dict[str, float] = {}

    def give(self, now_s: float) -> int:
        """Return a ticket for an answer that is about to be sent."""
        ticket, self._next = self._next, self._next + 1
        self._given[ticket] = now_s
        while len(self._given) > TICKETS_MAX:
            self._given.popitem(last=False)
        return ticket

    def renew(self, follower: str, ticket: int | None) -> None:
        """Note the promise that a follower gave after it had seen a ticket."""
        given_s = None if ticket is None else self._given.get(ticket)
        if given_s is not None:
            until_s = given_s + self.lease_s * (1.0 - DRIFT)
            self._until[follower] = max(until_s, self._until.get(follower, until_s))

    def holds(self, followers: Iterable[str], now_s: float) -> bool:
        """Tell whether all of these followers promise still."""
        return not self.lease_s or all(self._until.get(f, now_s) > now_s for f in followers)


@dataclass
class Promise:
    """The follower's side: until when it must not take the place of an owner that seems lost."""

    until_s: float = 0.0

    def give(self, lease_s: float, now_s: float) -> None:
        """Promise anew, by a question that is about to be sent."""
        self.until_s = max(self.until_s, now_s + lease_s * (1.0 + DRIFT))

    def left_s(self, now_s: float) -> float:
        """Return how long it still holds."""
        return max(0.0, self.until_s - now_s)
