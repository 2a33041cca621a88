"""Features by brute force: every event is looked at for every value, in plain Python.

Nothing here is shared with mlpd but the names of statuses.  Times are microseconds; sums are exact
fractions; an event is a winner if no other one has a larger (event_time, known_time, sequence).
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from decimal import Decimal, localcontext
from fractions import Fraction
from typing import Any

PRESENT, NULL, MISSING, STALE = 0, 1, 2, 3
DELETED = "__deleted"

Row = dict[str, Any]
Select = Callable[[Row], Any]
"""What an input or filter gives for a row; None is null."""


@dataclass(frozen=True)
class Event:
    source: str
    event_us: int
    known_us: int
    sequence: int
    row: Row

    @property
    def stamp(self) -> tuple[int, int, int]:
        return self.event_us, self.known_us, self.sequence


@dataclass(frozen=True)
class Latest:
    """A latest-value view as the reference knows it."""

    source: str
    keys: tuple[str, ...]
    features: tuple[str, ...]
    ttl_us: int | None
    defaults: Row

    def values(self, events: Iterable[Event], key: Sequence[Any], t_us: int) -> list[Any]:
        """Return (status, value) of every feature; `events` are those that are visible at t."""
        mine = [e for e in events if belongs(e, self.source, self.keys, key)]
        if not mine:
            return [(MISSING, self.defaults.get(f)) for f in self.features]
        winner = max(mine, key=lambda e: e.stamp)
        if winner.row.get(DELETED):
            return [(MISSING, self.defaults.get(f)) for f in self.features]
        if self.ttl_us is not None and t_us - winner.event_us > self.ttl_us:
            return [(STALE, self.defaults.get(f)) for f in self.features]
        return [
            (PRESENT, winner.row[f]) if winner.row[f] is not None else (NULL, self.defaults.get(f))
            for f in self.features
        ]


@dataclass(frozen=True)
class Aggregated:
    """One aggregate of a window view: what it selects, what it keeps, what it makes of it."""

    function: str
    select: Select | None
    keep: Select | None
    half_life_us: int | None = None
    length: int = 0


@dataclass(frozen=True)
class Windowed:
    """A window view as the reference knows it; results by aggregate, then window."""

    source: str
    keys: tuple[str, ...]
    windows_us: tuple[int, ...]
    hops_us: tuple[int, ...]
    closed: str
    aggregates: tuple[Aggregated, ...]

    def inputs(self, events: Iterable[Event], key: Sequence[Any], t_us: int) -> list[Any]:
        """Return (aggregate, (age, value) in the order of their stamps) of every feature."""
        mine = [e for e in events if belongs(e, self.source, self.keys, key)]
        mine = [e for e in mine if not e.row.get(DELETED)]
        found = []
        for aggregate in self.aggregates:
            for width_us, hop_us in zip(self.windows_us, self.hops_us, strict=True):
                inside = [e for e in mine if self.holds(e.event_us, t_us, width_us, hop_us)]
                aged = [(t_us - event_us, v) for event_us, v in selected(inside, aggregate)]
                found.append((aggregate, aged))
        return found

    def holds(self, event_us: int, t_us: int, width_us: int, hop_us: int) -> bool:
        start_us = (t_us - width_us) // hop_us * hop_us
        if self.closed == "left":
            return start_us <= event_us < t_us
        return start_us < event_us <= t_us


def belongs(event: Event, source: str, keys: Sequence[str], key: Sequence[Any]) -> bool:
    """Tell whether the event is of this entity; a null in the key is no entity."""
    own = [event.row[name] for name in keys]
    return event.source == source and None not in key and own == list(key)


def selected(events: Iterable[Event], aggregate: Aggregated) -> list[tuple[int, Any]]:
    """Return (event time, value) of what an aggregate sees, by stamp; True for counted events."""
    found = []
    for event in sorted(events, key=lambda e: e.stamp):
        if aggregate.keep is not None and aggregate.keep(event.row) is not True:
            continue
        value = True if aggregate.select is None else aggregate.select(event.row)
        if value is not None and value == value:  # noqa: PLR0124 - NaN is skipped
            found.append((event.event_us, value))
    return found


def check_aggregate(aggregate: Aggregated, aged: list[tuple[int, Any]], got: Any) -> None:
    """Assert that `got` is the aggregate of (age, value): exact, or the nearest float64 but one."""
    function, values = aggregate.function, [value for _, value in aged]
    if function == "count":
        assert got == len(values)
    elif function == "approx_distinct":
        check_distinct(values, got)
    elif function in ("last_n", "topk"):
        check_list(function, aggregate.length, values, got)
    elif function == "ewma":
        check_ewma(aged, aggregate.half_life_us, got)
    elif not values:
        assert got == (0 if function == "sum" else None)
    elif function in ("min", "max"):
        assert got == (min(values) if function == "min" else max(values))
    elif function in ("first", "last"):
        wanted = values[0] if function == "first" else values[-1]
        assert (got, math.copysign(1, got)) == (wanted, math.copysign(1, wanted))
    else:
        check_moment(function, values, got)


def check_moment(function: str, values: list[Any], got: Any) -> None:
    if any(isinstance(v, float) and math.isinf(v) for v in values):
        assert got is None if (function, len(values)) in LONELY else not math.isfinite(got)
        return
    exact = [Fraction(v) for v in values]
    n, total = len(exact), sum(exact, Fraction(0))
    if function == "sum" and isinstance(values[0], int):
        assert got == (total if -(2**63) <= total < 2**63 else None)
    elif function == "sum":
        assert_near(total, total, got)
    elif function == "mean":
        assert_near(total / n, total / n, got)
    elif n == 1:
        assert got is None
    else:
        variance = sum((v - total / n) ** 2 for v in exact) / (n - 1)
        # Squares of double-doubles: good to 2^-98 of the squared values themselves.
        error = n * n * (variance + (total / n) ** 2) * DOUBLE_DOUBLE
        low, high = max(variance - error, Fraction(0)), variance + error
        if function == "var":
            assert_near(low, high, got)
        else:
            assert below(math.sqrt(low)) <= got <= above(math.sqrt(high))


def check_distinct(values: list[Any], got: Any) -> None:
    """Assert that `got` counts the distinct values: exactly up to 32, else within 6 errors."""
    exact = len(set(values))
    assert got == exact if exact <= 32 else abs(got - exact) < 6 * 0.058 * exact


def check_list(function: str, length: int, values: list[Any], got: Any) -> None:
    """Assert that `got` has the values of last_n or topk, which may differ beyond 32 distinct."""
    if not values:
        assert got is None
    elif function == "last_n":
        assert repr(got) == repr(values[-length:])
    elif len(counts := Counter(v + 0 for v in values)) <= 32:  # -0.0 + 0 is 0.0
        assert repr(got) == repr(sorted(counts, key=lambda v: (-counts[v], v))[:length])


def check_ewma(aged: list[tuple[int, Any]], half_life_us: int | None, got: Any) -> None:
    """Assert that `got` is the mean of (age, value) by 2^(-age / half-life): to 2^-50 of sizes."""
    assert half_life_us is not None
    infinite = {v for _, v in aged if isinstance(v, float) and math.isinf(v)}
    if not aged:
        assert got is None
    elif infinite:
        assert got == infinite.pop() if len(infinite) == 1 else math.isnan(got)
    else:
        with localcontext(prec=100):
            weights = [Decimal(2) ** (Decimal(-age) / half_life_us) for age, _ in aged]
            weighted = [w * Decimal(v) for w, (_, v) in zip(weights, aged, strict=True)]
            exact = sum(weighted) / sum(weights)
            size = sum(map(abs, weighted)) / sum(weights)
            assert abs(Decimal(got) - exact) <= size / 2**50 + UNDERFLOW


UNDERFLOW = Decimal(2) ** -1060
LONELY = {("var", 1), ("std", 1)}
DOUBLE_DOUBLE = Fraction(1, 2**98)


def assert_near(low: Fraction, high: Fraction, got: Any) -> None:
    """Assert that `got` is a correctly rounded float64 of low to high, or a neighbour of one."""
    assert below(float(low)) <= got <= above(float(high))


def below(value: float) -> float:
    return math.nextafter(value, -math.inf)


def above(value: float) -> float:
    return math.nextafter(value, math.inf)
