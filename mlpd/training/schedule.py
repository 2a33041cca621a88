"""When jobs are due: by cron, interval, rows, event time, another job; arithmetic alone."""

import re
from bisect import bisect_left, bisect_right
from calendar import monthrange
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta, tzinfo
from itertools import islice
from typing import Final, NamedTuple, Self
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from mlpd.core.errors import DefinitionError
from mlpd.core.names import check_identifier, check_name
from mlpd.core.time import MINUTE_US, SECOND_US, parse_duration

MAX_CATCH_UP: Final = 366
GRACE_US: Final = 5 * MINUTE_US
"""How late a run may start and still count as on time: timers wake at least every 30 s."""

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND, _MINUTE = timedelta(microseconds=1), timedelta(minutes=1)
_LONGEST_WAIT_MONTHS = 41 * 12  # 29 February on one weekday: 40 years apart around 2100
_MAX_EXPRESSION_CHARS = 200
_ITEM = re.compile(r"(\*|(?P<low>[0-9a-z]+)(-(?P<high>[0-9a-z]+))?)(/(?P<step>[0-9]+))?")


class DataInterval(NamedTuple):
    """The half-open time [start_us, end_us) that a run covers; it is due at `end_us`.

    `start_us` is the schedule's previous due time: a fact of the schedule, not of when a daemon was
    up, so it can identify the run.
    """

    start_us: int
    end_us: int


class _Field(NamedTuple):
    name: str
    low: int
    high: int
    names: tuple[str, ...] = ()  # in order, the first one means `low`

    def number(self, text: str) -> int | None:
        """Return the value of a number or name, None if it is out of range or unknown."""
        if text in self.names:
            return self.low + self.names.index(text)
        value = int(text) if text.isdecimal() else -1
        return value if self.low <= value <= self.high else None


_MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
_DAYS = ("sun", "mon", "tue", "wed", "thu", "fri", "sat")
_FIELDS = (
    _Field("minute", 0, 59),
    _Field("hour", 0, 23),
    _Field("day of month", 1, 31),
    _Field("month", 1, 12, _MONTHS),
    _Field("day of week", 0, 7, _DAYS),
)
_DAYS_OF_MONTH = (31, 29, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)


@dataclass(frozen=True, slots=True)
class Cron:
    """Wall-clock minutes by the rules of Vixie cron; build it with `Cron.parse`.

    A due time is the first moment at which the zone's clock shows a matching minute OR LATER: a
    minute that summer time skips runs once, when the clock has jumped over it, and a minute that
    the clock shows twice runs once, the first time.  Several skipped minutes run once together.
    """

    expression: str
    timezone: str
    minutes_of_day: tuple[int, ...]
    days: frozenset[int]
    months: frozenset[int]
    weekdays: frozenset[int]  # Sunday is 0
    either_day: bool
    """True if both day fields are restricted: a day then matches by either of them."""

    @classmethod
    def parse(cls, expression: str, timezone: str = "UTC") -> Self:
        """Return the schedule of `minute hour day-of-month month day-of-week`.

        Lists `1,15`, ranges `mon-fri`, steps `*/15` and `8-18/2`, names of months and days; days of
        the week are 0 to 7 with Sunday 0 and 7.  If neither day field starts with `*`, a day
        matches by one of them, else by both.  Raises DefinitionError naming the field and its
        range, or if no date can ever match.
        """
        _zone(timezone)
        texts = expression.lower().split()
        if len(expression) > _MAX_EXPRESSION_CHARS:
            raise _invalid(expression, f"is longer than {_MAX_EXPRESSION_CHARS} characters")
        if len(texts) != len(_FIELDS):
            names = ", ".join(f.name for f in _FIELDS)
            raise _invalid(expression, f"has {len(texts)} fields, expected 5: {names}")
        minutes, hours, days, months, weekdays = (
            frozenset(n for item in text.split(",") for n in _parse_item(expression, f, item))
            for f, text in zip(_FIELDS, texts, strict=True)
        )
        either = not texts[2].startswith("*") and not texts[4].startswith("*")
        if not either and all(min(days) > _DAYS_OF_MONTH[month - 1] for month in months):
            raise _invalid(expression, f"never runs: no month of {set(months)} has day {min(days)}")
        times = tuple(sorted(60 * hour + minute for hour in hours for minute in minutes))
        weekdays = frozenset(day % 7 for day in weekdays)
        return cls(" ".join(texts), timezone, times, days, months, weekdays, either)

    def next_after(self, t_us: int) -> int:
        """Return the first due time > `t_us`, in microseconds UTC.  Costs about 20 us.

        `t_us` may lie in the years 1902 to 9950.
        """
        zone = _zone(self.timezone)
        wall = _wall(t_us, zone)
        while True:
            wall = self._nearest(wall, 1)
            found = _first_moment(wall, zone)
            if found > t_us:
                return found
            wall += _MINUTE

    def at_or_before(self, t_us: int) -> int:
        """Return the last due time <= `t_us`, in microseconds UTC.  Costs as `next_after`."""
        zone = _zone(self.timezone)
        wall = _latest_wall(t_us, zone)
        while True:
            wall = self._nearest(wall, -1)
            found = _first_moment(wall, zone)
            if found <= t_us:
                return found
            wall -= _MINUTE

    def _nearest(self, wall: datetime, direction: int) -> datetime:
        """Return the matching minute nearest to `wall` (itself included), later (1) or earlier."""
        times, minute = self.minutes_of_day, 60 * wall.hour + wall.minute
        for day in self._days(wall.date(), direction):
            index = 0 if direction > 0 else len(times) - 1
            if day == wall.date():
                after, upto = bisect_left(times, minute), bisect_right(times, minute) - 1
                index = after if direction > 0 else upto
            if 0 <= index < len(times):
                return datetime.combine(day, time()) + times[index] * _MINUTE
        raise AssertionError(f"{self.expression} matches no date: parse should have refused it")

    def _days(self, start: date, direction: int) -> Iterator[date]:
        """Yield the matching days from `start` on, forwards (1) or backwards (-1) in time."""
        first = 12 * start.year + start.month - 1
        for index in range(first, first + direction * _LONGEST_WAIT_MONTHS, direction):
            year, month = index // 12, index % 12 + 1
            if month in self.months:
                days = (date(year, month, day) for day in self._days_of(year, month)[::direction])
                yield from (day for day in days if direction * (day - start).days >= 0)

    def _days_of(self, year: int, month: int) -> list[int]:
        monday_based, length = monthrange(year, month)
        return [day for day in range(1, length + 1) if self._matches(day, (monday_based + day) % 7)]

    def _matches(self, day: int, weekday: int) -> bool:
        by_day, by_weekday = day in self.days, weekday in self.weekdays
        return (by_day or by_weekday) if self.either_day else (by_day and by_weekday)


@dataclass(frozen=True, slots=True)
class Interval:
    """Every `every_us` microseconds (at least a second), at `anchor_us` + k x `every_us`."""

    every_us: int
    anchor_us: int = 0

    def __post_init__(self) -> None:
        """Refuse a period below a second."""
        if self.every_us < SECOND_US:
            raise _invalid(f"every {self.every_us} us", "the period is below 1s")

    def next_after(self, t_us: int) -> int:
        """Return the first due time > `t_us`."""
        return self.at_or_before(t_us) + self.every_us

    def at_or_before(self, t_us: int) -> int:
        """Return the last due time <= `t_us`."""
        return t_us - (t_us - self.anchor_us) % self.every_us


@dataclass(frozen=True, slots=True)
class NewRows:
    """Due once `rows` (>= 1) events of `source` have come in since the last run."""

    rows: int
    source: str

    def __post_init__(self) -> None:
        """Refuse a count below one and an impossible name."""
        check_identifier(self.source, "source of a schedule")
        if self.rows < 1:
            raise _invalid(f"every {self.rows} rows of {self.source}", "rows is below 1")


@dataclass(frozen=True, slots=True)
class Watermark:
    """Due once the events of `source` have come past the end of an interval of `every`.

    Its times are event times: "now" is the newest one, so late data delays the run.
    """

    every: Interval
    source: str

    def __post_init__(self) -> None:
        """Refuse an impossible name."""
        check_identifier(self.source, "source of a schedule")


@dataclass(frozen=True, slots=True)
class After:
    """Due once a run of `job` has succeeded since."""

    job: str

    def __post_init__(self) -> None:
        """Refuse an impossible name."""
        check_name(self.job, "job of a schedule")


@dataclass(frozen=True, slots=True)
class Manual:
    """Never due: somebody starts the job, or an alert does."""


Schedule = Cron | Interval | NewRows | Watermark | After | Manual


def next_dues(schedule: Schedule, t_us: int, count: int) -> list[int]:
    """Return the first `count` due times > `t_us`, none where time alone doesn't decide."""
    found: list[int] = []
    while isinstance(schedule, Cron | Interval) and len(found) < count:
        t_us = schedule.next_after(t_us)
        found.append(t_us)
    return found


def due(
    schedule: Schedule, last_us: int, now_us: int, catch_up: str = "latest", *, new: int = 0
) -> list[DataInterval]:
    """Return the data intervals to run now, oldest first, for due times in (`last_us`, `now_us`].

    `last_us` is the `now_us` of the last call that returned something (at first, the time at which
    the job was defined): so nothing runs twice.  Of the due times since, `catch_up` runs `latest`
    (one), `all:N` (the last N, at most 366), or `skip` (one if it is at most five minutes old).
    What it leaves out is never enumerated: a call costs at most N + 1 steps of the schedule.
    `new` is what `NewRows` and `After` count since `last_us`: events of a source, runs of a job;
    their interval is [`last_us`, `now_us`).  For a `Watermark` both times are event times.  A clock
    that went back gives nothing, but to what is counted.
    """
    limit = _limit_of(catch_up)
    if isinstance(schedule, Manual):
        return []
    if isinstance(schedule, NewRows | After):
        needed = schedule.rows if isinstance(schedule, NewRows) else 1
        return [DataInterval(min(last_us, now_us), now_us)] if new >= needed else []
    if now_us <= last_us:
        return []
    if isinstance(schedule, Watermark):
        schedule = schedule.every
    after_us = max(last_us, now_us - GRACE_US - 1) if catch_up == "skip" else last_us
    return list(islice(_backwards(schedule, after_us, now_us), limit))[::-1]


def parse_schedule(text: str, timezone: str = "UTC") -> Schedule:
    """Return the schedule of a cron expression, or of one of the forms in words.

    `manual`, `every 6h` (a duration, counted from 1970 UTC), `every 10000 rows of departures`,
    `every 1d of departures` (of its event time), `after JOB`.
    """
    match text.split():
        case ["manual"]:
            return Manual()
        case ["after", job]:
            return After(job)
        case ["every", period, "of", source]:
            return Watermark(Interval(parse_duration(period, "period of the schedule")), source)
        case ["every", period]:
            return Interval(parse_duration(period, "period of the schedule"))
        case ["every", rows, "rows", "of", source] if rows.isdecimal():
            return NewRows(int(rows), source)
    return Cron.parse(text, timezone)


def _backwards(schedule: Cron | Interval, after_us: int, now_us: int) -> Iterator[DataInterval]:
    """Yield the data intervals due in (`after_us`, `now_us`], the newest first, lazily."""
    end_us = schedule.at_or_before(now_us)
    while end_us > after_us:
        start_us = schedule.at_or_before(end_us - 1)
        yield DataInterval(start_us, end_us)
        end_us = start_us


def check_catch_up(catch_up: str) -> None:
    """Raise DefinitionError(code="invalid_schedule") unless it is skip, latest or all:N."""
    _limit_of(catch_up)


def _limit_of(catch_up: str) -> int:
    if catch_up in ("skip", "latest"):
        return 1
    kind, _, count = catch_up.partition(":")
    if kind == "all" and re.fullmatch("[0-9]{1,4}", count) and 1 <= int(count) <= MAX_CATCH_UP:
        return int(count)
    raise DefinitionError(
        f"catch_up is {catch_up!r}, expected skip, latest or all:N with N from 1 to {MAX_CATCH_UP}",
        code="invalid_schedule",
        hint="Use latest to run once after an outage, skip not to, all:7 for up to seven runs.",
    )


def _parse_item(expression: str, field: _Field, item: str) -> range:
    match = _ITEM.fullmatch(item)
    bounds = match and _bounds(field, match)
    if match is None or bounds is None:
        names = f" or {field.names[0]} to {field.names[-1]}" if field.names else ""
        raise _invalid(
            expression,
            f"{field.name} has {item!r}, expected {field.low} to {field.high}{names}, "
            "as a value, range low-high, *, or step */n or low-high/n",
        )
    step = int(match["step"] or 1)
    if not 1 <= step <= field.high:
        raise _invalid(expression, f"step of {field.name} in {item!r} is not in 1 to {field.high}")
    return range(bounds[0], bounds[1] + 1, step)


def _bounds(field: _Field, match: re.Match[str]) -> tuple[int, int] | None:
    """Return low and high (inclusive) of an item, None if it isn't one of the field."""
    if match["low"] is None:
        return field.low, field.high
    low = field.number(match["low"])
    if match["high"] is None:
        return (low, low) if low is not None and match["step"] is None else None
    high = field.number(match["high"])
    if field.names is _DAYS and high == 0 and low:
        high = 7  # fri-sun
    return (low, high) if low is not None and high is not None and low <= high else None


def _zone(timezone: str) -> tzinfo:
    if timezone == "UTC":
        return UTC
    try:
        return ZoneInfo(timezone)
    except (ZoneInfoNotFoundError, ValueError, TypeError, OSError):
        raise DefinitionError(
            f"time zone {timezone!r} is unknown",
            code="invalid_timezone",
            hint="Use UTC or an IANA name such as America/New_York; "
            "on a system without time zones, pip install tzdata.",
        ) from None


def _wall(t_us: int, zone: tzinfo) -> datetime:
    """Return what a clock in `zone` shows at `t_us`, without the zone."""
    return (_EPOCH + t_us * _MICROSECOND).astimezone(zone).replace(tzinfo=None)


def _latest_wall(t_us: int, zone: tzinfo) -> datetime:
    """Return a wall time that the zone's clock hasn't passed up to `t_us`, put back or not."""
    wall = (_EPOCH + t_us * _MICROSECOND).astimezone(zone)
    put_back_by = wall.astimezone(UTC) - wall.replace(fold=0).astimezone(UTC)
    return wall.replace(tzinfo=None) + put_back_by


def _first_moment(wall: datetime, zone: tzinfo) -> int:
    """Return the first moment at which a clock in `zone` shows `wall` or later.

    On a wall time that the zone skips (PEP 495: fold 0 lands after the gap, fold 1 before it),
    that is the jump itself, found by bisection to the second.
    """
    after = (wall.replace(tzinfo=zone) - _EPOCH) // _MICROSECOND
    if _wall(after, zone) == wall:
        return after
    before = (wall.replace(tzinfo=zone, fold=1) - _EPOCH) // _MICROSECOND
    low, high = before // SECOND_US, after // SECOND_US
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if _wall(middle * SECOND_US, zone) > wall else (middle, high)
    return high * SECOND_US


def _invalid(text: str, problem: str) -> DefinitionError:
    return DefinitionError(
        f"schedule {text[:_MAX_EXPRESSION_CHARS]!r}: {problem}",
        code="invalid_schedule",
        hint='Use a cron expression like "30 2 * * mon-fri" (minute, hour, day of month, month, '
        'day of week), "every 6h", "every 10000 rows of departures", "every 1d of departures", '
        '"after JOB" or "manual".',
    )
