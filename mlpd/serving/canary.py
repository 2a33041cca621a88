"""Canaries: an arm's share of a route grows step by step while guards hold; pure values.

A canary names an arm, steps, and what must not happen.  `shares` are probabilities: at share s the
arm answers s of the rows and the others divide the rest as before, so no row moves between them.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from mlpd.core.errors import ValidationError
from mlpd.core.names import check_name
from mlpd.core.time import DAY_US, SECOND_US, format_duration, parse_duration

STEPS_MAX = 20
HOLD_US_MAX = 30 * DAY_US
CHANCE = 1e-4
"""A share is beyond its limit when chance would do that so rarely: it is looked at every second."""
Z = 4.0
"""Standard errors that a mean must lie beyond its limit, for the same reason."""

OnFailure = Literal["rollback", "stop"]
"""`rollback` sets the arm's weight to 0, `stop` leaves it as it is; either ends the canary."""


@dataclass(frozen=True, slots=True)
class Step:
    """The arm's share of the rows, for how long at least, and for how many of its rows."""

    share: float
    hold_us: int
    rows: int


@dataclass(frozen=True, slots=True)
class Guard:
    """What must not happen, judged from `rows` rows of the arm in this step on.

    `failed_share`: of its rows that its model could not answer, or not in time, on top of the
    others' share.  `slower`: its time for a request,
    as a multiple of the other arms'.  `score_shift`: distance of its mean score from theirs.  None
    isn't looked at; nor are the last two while the others have fewer than `rows` rows.
    """

    rows: int = 20
    failed_share: float | None = 0.01
    slower: float | None = None
    score_shift: float | None = None


@dataclass(frozen=True, slots=True)
class Canary:
    """A timetable: shares that grow, in (0, 1].  Constructing validates: `invalid_canary`."""

    arm: str
    steps: tuple[Step, ...]
    guard: Guard = Guard()
    on_failure: OnFailure = "rollback"

    def __post_init__(self) -> None:
        check_name(self.arm, "arm")
        shares = [step.share for step in self.steps]
        if not 1 <= len(shares) <= STEPS_MAX:
            raise _invalid(f"it takes 1 to {STEPS_MAX} steps")
        if not all(0.0 < share <= 1.0 for share in shares):
            raise _invalid(f"shares lie above 0 and up to 1, got {shares}")
        if any(after <= before for before, after in pairwise(shares)):
            raise _invalid(f"shares grow from step to step, got {shares}")
        if not all(SECOND_US <= step.hold_us <= HOLD_US_MAX for step in self.steps):
            raise _invalid("a step takes 1 s to 30 d")
        if any(step.rows < 0 for step in self.steps) or self.guard.rows < 1:
            raise _invalid("numbers of rows are 0 or more, those of the guard 1 or more")
        _check_guard(self.guard)
        if self.on_failure not in ("rollback", "stop"):
            raise _invalid(f"`on_failure` is rollback or stop, got {self.on_failure!r}")

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form that `from_dict` reads."""
        return {
            "arm": self.arm,
            "steps": [
                {"share": step.share, "for": format_duration(step.hold_us), "rows": step.rows}
                for step in self.steps
            ],
            "guard": asdict(self.guard),
            "on_failure": self.on_failure,
        }

    @classmethod
    def from_dict(cls, document: object) -> "Canary":
        """Return the canary in a JSON document; a step's `rows` default to the guard's.

        Raises ValidationError: `invalid_canary`, `invalid_duration`, `invalid_name`.
        """
        given = _fields(document, {"arm", "steps", "guard", "on_failure"}, "a canary")
        guard = _parse_guard(given.get("guard"))
        steps = given.get("steps")
        if not isinstance(steps, list):
            raise _invalid("`steps` is a list of objects with share, for and rows")
        return cls(
            given.get("arm", ""),
            tuple(_parse_step(step, guard.rows) for step in steps),
            guard,
            given.get("on_failure", "rollback"),
        )


@dataclass(frozen=True, slots=True)
class Moments:
    """Count, sum and sum of squares; NaN and infinities are left out."""

    n: int = 0
    total: float = 0.0
    squares: float = 0.0

    def plus(self, values: NDArray[np.float64]) -> "Moments":
        """Return this with values more."""
        finite = values[np.isfinite(values)]
        total, squares = float(finite.sum()), float(finite @ finite)
        return Moments(self.n + len(finite), self.total + total, self.squares + squares)

    @property
    def mean(self) -> float:
        """The mean; NaN without values."""
        return self.total / self.n if self.n else math.nan

    @property
    def error2(self) -> float:
        """The squared standard error of the mean; infinite below two values."""
        if self.n < 2:  # noqa: PLR2004 - one value has no spread
            return math.inf
        spread = max(self.squares - self.total * self.total / self.n, 0.0)
        return spread / (self.n - 1) / self.n


@dataclass(frozen=True, slots=True)
class Tally:
    """What some arms did in a step: rows in all and failed, us of each request, scores."""

    rows: int = 0
    failed: int = 0
    request_us: Moments = Moments()
    score: Moments = Moments()

    def answered(self, request_us: float, scores: NDArray[np.float64]) -> "Tally":
        """Return this and a request's scores, float64 [n]; 10 us."""
        took = self.request_us.plus(np.array([request_us]))
        return Tally(self.rows + len(scores), self.failed, took, self.score.plus(scores))

    def with_failed(self, rows: int) -> "Tally":
        """Return this and rows that the arm's model could not answer."""
        return replace(self, rows=self.rows + rows, failed=self.failed + rows)


def find_failure(guard: Guard, arm: Tally, others: Tally) -> str | None:
    """Return what a guard objects to, None if nothing; beyond what chance does."""
    if arm.rows < guard.rows:
        return None
    if guard.failed_share is not None:
        usual = others.failed / others.rows if others.rows else 0.0
        limit = min(guard.failed_share + usual, 1.0)
        if _is_beyond_chance(arm.failed, arm.rows, limit):
            return f"{arm.failed} of {arm.rows} rows failed; {limit:.2%} may"
    if others.rows < guard.rows:
        return None
    mine, theirs = arm.request_us, others.request_us
    if guard.slower is not None and _exceeds(mine, theirs, factor=guard.slower):
        ratio = mean_ratio(mine, theirs)
        return f"requests took {ratio:.2f} times as long as the others'; {guard.slower:g} may be"
    if guard.score_shift is not None and any(
        _exceeds(*pair, distance=guard.score_shift)
        for pair in ((arm.score, others.score), (others.score, arm.score))
    ):
        shift = arm.score.mean - others.score.mean
        return f"the mean score is off by {shift:+.4g}; {guard.score_shift:g} may be"
    return None


def mean_ratio(mine: Moments, theirs: Moments) -> float:
    """Return the quotient of two means; NaN where one is missing or zero."""
    return mine.mean / theirs.mean if theirs.total else math.nan


def share_weights(weights: Mapping[str, float], arm: str, share: float) -> dict[str, float]:
    """Return weights, summing to 1, with `share` for the arm and the rest as the others' were.

    >>> share_weights({"old": 3.0, "older": 1.0, "new": 9.0}, "new", 0.2)
    {'old': 0.6000000000000001, 'older': 0.2, 'new': 0.2}
    """
    rest = math.fsum(weight for name, weight in weights.items() if name != arm)
    return {
        name: share if name == arm else (1.0 - share) * weight / rest
        for name, weight in weights.items()
    }


def _exceeds(a: Moments, b: Moments, *, factor: float = 1.0, distance: float = 0.0) -> bool:
    """Tell whether a's mean is above factor x b's + distance, by more than Z standard errors."""
    error = math.sqrt(a.error2 + factor * factor * b.error2)
    return a.mean - factor * b.mean - distance > Z * error


def _is_beyond_chance(hits: int, n: int, limit: float) -> bool:
    """Tell whether so many hits are too many for a share of `limit`, whatever chance does.

    By Chernoff's bound (1952): with that share, hits as frequent have probability below
    exp(-n KL(hits/n, limit)), for small n too.
    """
    share = hits / n
    if share <= limit:
        return False
    if limit == 0.0:
        return True
    rest = (1.0 - share) * math.log((1.0 - share) / (1.0 - limit)) if hits < n else 0.0
    return n * (share * math.log(share / limit) + rest) > -math.log(CHANCE)


def _check_guard(guard: Guard) -> None:
    if guard.failed_share is not None and not 0.0 <= guard.failed_share < 1.0:
        raise _invalid(f"`failed_share` lies from 0 to below 1, got {guard.failed_share}")
    for name, least in (("slower", 1.0), ("score_shift", 0.0)):
        limit = getattr(guard, name)
        if limit is not None and not least <= limit < math.inf:
            raise _invalid(f"`{name}` is finite and at least {least:g}, got {limit}")


def _parse_step(document: object, rows: int) -> Step:
    given = _fields(document, {"share", "for", "rows"}, "a step")
    hold_us = parse_duration(given.get("for"), "`for` of a canary's step")
    return Step(_number(given, "share"), hold_us, _count(given, "rows", rows))


def _parse_guard(document: object) -> Guard:
    known = {"rows", "failed_share", "slower", "score_shift"}
    given = _fields({} if document is None else document, known, "a guard")
    limits = {
        name: None if given[name] is None else _number(given, name)
        for name in known - {"rows"}
        if name in given
    }
    return Guard(rows=_count(given, "rows", Guard().rows), **limits)


def _fields(document: object, known: set[str], what: str) -> Mapping[str, Any]:
    if not isinstance(document, Mapping):
        raise _invalid(f"{what} is an object, got {document!r:.60}")
    if unknown := sorted(map(str, document.keys() - known)):
        raise _invalid(
            f"{what} has the unknown key {unknown[0]!r}; known: {', '.join(sorted(known))}"
        )
    return document


def _number(given: Mapping[str, Any], name: str) -> float:
    value = given.get(name)
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    raise _invalid(f"`{name}` is a number, got {value!r:.60}")


def _count(given: Mapping[str, Any], name: str, default: int) -> int:
    value = given.get(name, default)
    if type(value) is int:
        return value
    raise _invalid(f"`{name}` is a whole number, got {value!r:.60}")


def _invalid(problem: str) -> ValidationError:
    return ValidationError(
        f"canary: {problem}",
        code="invalid_canary",
        hint='Such as {"arm": "new", "steps": [{"share": 0.05, "for": "10m"}, ...]}; see /docs.',
    )
