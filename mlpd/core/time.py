"""Time: int64 microseconds UTC inside, RFC 3339 with an offset at the edges, durations like 15m."""

import re
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

from mlpd.core.errors import ValidationError
from mlpd.core.names import TimeUs

SECOND_US = 1_000_000
MINUTE_US = 60 * SECOND_US
HOUR_US = 60 * MINUTE_US
DAY_US = 24 * HOUR_US

MIN_TIME_US = -62_135_596_800_000_000
MAX_TIME_US = 253_402_300_800_000_000
"""Exclusive bounds of a valid time, the years 1 to 9999: what RFC 3339 can write.

A sum of such times and durations never overflows int64.
"""

Clock = Callable[[], TimeUs]
"""Returns the current time; passed in wherever time matters so that tests can move it."""

_SPAN_S_MAX = 1e11
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)
_UNITS_US = {"us": 1, "ms": 1000, "s": SECOND_US, "m": MINUTE_US, "h": HOUR_US, "d": DAY_US}
_DURATION = re.compile(r"([0-9]{1,18})(us|ms|s|m|h|d)")


def system_clock() -> TimeUs:
    """Return the wall clock in microseconds; may jump: storage keeps arrival times monotone."""
    return TimeUs(time.time_ns() // 1000)


def parse_time(value: object, what: str = "time") -> TimeUs:
    """Return microseconds UTC from an int, an aware datetime, or RFC 3339 text with an offset.

    A naive datetime or text without an offset raises ValidationError(code="naive_time"), anything
    else that is no time ValidationError(code="invalid_time").
    """
    if isinstance(value, int) and not isinstance(value, bool):
        return _checked(value, what)
    if isinstance(value, str):
        value = _parse_text(value, what)
    if isinstance(value, datetime):
        if value.tzinfo is None:
            raise ValidationError(
                f"{what} {value.isoformat()!r} has no UTC offset",
                code="naive_time",
                hint="Add the offset, for example 2013-01-01T10:00:00Z or ...+01:00, "
                "or send integer microseconds UTC.",
            )
        return _checked((value - _EPOCH) // _MICROSECOND, what)
    raise _invalid(value, what)


def format_time(time_us: int) -> str:
    """Return RFC 3339 text in UTC with as many sub-second digits as needed (0 or 6)."""
    return (_EPOCH + timedelta(microseconds=time_us)).isoformat().replace("+00:00", "Z")


def parse_duration(value: object, what: str = "duration") -> int:
    """Return microseconds from text like `90s`, `15m`, `1h`, `7d`, `1h30m`, or an integer.

    Zero and negative durations raise ValidationError(code="invalid_duration").
    """
    if isinstance(value, str):
        pieces = _DURATION.findall(value)
        if pieces and "".join(number + unit for number, unit in pieces) == value:
            value = sum(int(number) * _UNITS_US[unit] for number, unit in pieces)
    if isinstance(value, int) and not isinstance(value, bool) and 0 < value < MAX_TIME_US:
        return value
    raise ValidationError(
        f"{what} {value!r} is not a positive duration",
        code="invalid_duration",
        hint="Use a number and a unit: us, ms, s, m, h or d; for example 15m, 1h or 7d.",
    )


def span_us(seconds: float) -> int:
    """Return a span in us, of 3,000 years at most: what is farther away than that has no date."""
    return round(SECOND_US * min(seconds, _SPAN_S_MAX))


def format_duration(duration_us: int) -> str:
    """Return the shortest text that `parse_duration` reads back, for example `1h` or `90m`."""
    for unit in ("d", "h", "m", "s", "ms"):
        if duration_us % _UNITS_US[unit] == 0:
            return f"{duration_us // _UNITS_US[unit]}{unit}"
    return f"{duration_us}us"


def _parse_text(text: str, what: str) -> datetime:
    try:
        return datetime.fromisoformat(text)
    except ValueError:
        raise _invalid(text, what) from None


def _checked(time_us: int, what: str) -> TimeUs:
    if MIN_TIME_US < time_us < MAX_TIME_US:
        return TimeUs(time_us)
    raise _invalid(time_us, what)


def _invalid(value: object, what: str) -> ValidationError:
    return ValidationError(
        f"{what} {value!r} is not a time",
        code="invalid_time",
        hint="Send RFC 3339 text with an offset (2013-01-01T10:00:00Z) "
        "or integer microseconds since 1970 UTC.",
    )
