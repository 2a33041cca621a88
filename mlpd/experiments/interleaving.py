"""Team-draft interleaving: two arms rank one list, and clicks tell whose picks were better.

A list shows picks of both arms, so differences between users, days and searches cancel out, and a
preference shows after far fewer lists than when each user sees one arm.  It says which arm is
preferred, not by how much any metric would change.
Reference: Radlinski, Kurup & Joachims, "How does clickthrough data reflect retrieval quality?"
(CIKM 2008).
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

from mlpd.experiments.rendezvous import draw, salt, unit_bytes

_BISECTIONS: Final = 60
_NEGLIGIBLE: Final = 1e-17
"""Of a sum: smaller terms, which only fall from there, change no digit of it."""


def draft_list(
    experiment: str, unit: str, first: Sequence[int], second: Sequence[int]
) -> list[tuple[int, int]]:
    """Return the interleaved list of one unit: (item, team) from the top; team 0 is the first's.

    `first` and `second` are the same items as each arm ranks them.  In every round both teams pick
    their best item that is left; who begins is drawn by hash, so the same unit and rankings give
    the same list on every machine.  2 us for two items.
    """
    raw = unit_bytes(unit)

    def coin(number: int) -> bool:
        return draw(salt("interleaving", experiment, str(number)), raw) < 0.5  # noqa: PLR2004

    return [*_draft((first, second), coin)]


def _draft(
    rankings: tuple[Sequence[int], Sequence[int]], coin: Callable[[int], bool]
) -> Iterator[tuple[int, int]]:
    taken: set[int] = set()
    left = tuple(iter(ranking) for ranking in rankings)
    for number in range((len(rankings[0]) + 1) // 2):
        begins = 0 if coin(number) else 1
        for team in (begins, 1 - begins):
            pick = next((item for item in left[team] if item not in taken), None)
            if pick is None:
                return
            taken.add(pick)
            yield pick, team


@dataclass(frozen=True, slots=True)
class Preference:
    """Lists by whose picks got more clicks, and what that says of `share`.

    `share`: of the lists with a preference those that prefer the second arm; None without any.
    `low` and `high` hold at every look together, `p_value` is the exact sign test's, of one look.
    `e_value`: a mixture against a share of 1/2; it ever exceeds 1 / alpha with probability alpha at
    most.  `verdict`: of the second arm, better, worse or undecided.
    """

    lists: int
    clicked: int
    first: int
    second: int
    share: float | None
    low: float | None
    high: float | None
    e_value: float
    p_value: float
    verdict: str

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON shape."""
        return asdict(self)


class Credits:
    """Clicks by unit and team of one experiment; one thread at a time.

    Takes some 100 bytes a unit.  A click that is taken back leaves nothing.
    """

    def __init__(self) -> None:
        self._units: dict[str, tuple[int, int]] = {}
        self._clicked = self._first = self._second = 0
        """Units with a click, and those that prefer the first's picks or the second's."""

    def __len__(self) -> int:
        return len(self._units)

    def show(self, unit: str) -> None:
        """Note that a unit was shown a list."""
        self._units.setdefault(unit, (0, 0))

    def add(self, unit: str, team: int, clicks: int) -> None:
        """Add clicks on picks of a team, or take them back; others than shown ones do nothing."""
        known = self._units.get(unit)
        if known is not None:
            first, second = known
            new = (first + clicks, second) if team == 0 else (first, second + clicks)
            self._units[unit] = new
            self._count(known, -1)
            self._count(new, 1)

    def forget(self, unit: str) -> None:
        """Take a unit out, with its clicks."""
        known = self._units.pop(unit, None)
        if known is not None:
            self._count(known, -1)

    def tally(self) -> tuple[int, int, int, int]:
        """Return units, those with a click, and those that prefer either team: what `judge` takes.

        Those of other units add up.
        """
        return len(self._units), self._clicked, self._first, self._second

    def preference(self, alpha: float) -> Preference:
        """Return what the clicks say; below 1 ms, however many units there are."""
        return judge(len(self._units), self._clicked, self._first, self._second, alpha)

    def _count(self, clicks: tuple[int, int], sign: int) -> None:
        first, second = clicks
        self._clicked += sign * (first + second > 0)
        self._first += sign * (first > second)
        self._second += sign * (second > first)


def judge(lists: int, clicked: int, first: int, second: int, alpha: float) -> Preference:
    """Return the preference of so many lists; lists without one (ties) count for neither.

    >>> judge(100, 60, 10, 40, 0.05).verdict
    'better'
    """
    n = first + second
    log_e = _log_mixture(first, second) - _log_likelihood(first, second, 0.5)
    share = second / n if n else None
    low, high = _bounds(first, second, alpha) if n else (None, None)
    verdict = "undecided"
    if log_e >= -math.log(alpha):
        verdict = "better" if second > first else "worse"
    e_value = math.exp(min(log_e, 700.0))
    p_value = _sign_test(first, second)
    return Preference(lists, clicked, first, second, share, low, high, e_value, p_value, verdict)


def _log_mixture(first: int, second: int) -> float:
    """Return ln of the probability of so many of each, in order, with Beta(1/2, 1/2) as the share.

    The Krichevsky-Trofimov mixture: its ratio to a share's own probability is a martingale if that
    share is right, so an e-value.
    """
    beta = math.lgamma(first + 0.5) + math.lgamma(second + 0.5) - math.lgamma(first + second + 1.0)
    return beta - 2.0 * math.lgamma(0.5)


def _log_likelihood(first: int, second: int, share: float) -> float:
    likely = first * math.log1p(-share) if first else 0.0
    return likely + (second * math.log(share) if second else 0.0)


def _bounds(first: int, second: int, alpha: float) -> tuple[float, float]:
    """Return the least and greatest share that the e-value has not excluded at alpha."""
    middle = second / (first + second)
    least = _log_mixture(first, second) + math.log(alpha)

    def search(inside: float, outside: float) -> float:
        for _ in range(_BISECTIONS):
            half = (inside + outside) / 2
            if not 0.0 < half < 1.0 or _log_likelihood(first, second, half) <= least:
                outside = half
            else:
                inside = half
        return outside

    return search(middle, 0.0) if second else 0.0, search(middle, 1.0) if first else 1.0


def _sign_test(first: int, second: int) -> float:
    """Return the exact two-sided p-value of a fair coin; 3,000 terms of a million lists count."""
    n, most = first + second, max(first, second)
    if n == 0:
        return 1.0
    log_term = math.lgamma(n + 1) - math.lgamma(most + 1) - math.lgamma(n - most + 1)
    term, total = math.exp(log_term - n * math.log(2.0)), 0.0
    for k in range(most, n + 1):
        total += term
        term *= (n - k) / (k + 1)
        if term <= _NEGLIGIBLE * total:
            break
    return min(1.0, 2.0 * total)
