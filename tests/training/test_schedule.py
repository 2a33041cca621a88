from datetime import UTC, date, datetime, timedelta
from functools import cache
from itertools import pairwise
from zoneinfo import ZoneInfo

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mlpd.core.errors import DefinitionError, MlpdError
from mlpd.training.schedule import (
    GRACE_US,
    Cron,
    DataInterval,
    Interval,
    Manual,
    NewRows,
    due,
    next_dues,
    parse_schedule,
)

MINUTE_US = 60_000_000
DAY_US = 24 * 60 * MINUTE_US


def us(text: str) -> int:
    """Microseconds of an RFC 3339 time."""
    return round(datetime.fromisoformat(text).timestamp()) * 1_000_000


def text_of(t_us: int, zone: str = "UTC") -> str:
    return datetime.fromtimestamp(t_us / 1e6, ZoneInfo(zone)).isoformat(timespec="minutes")


def runs(expression: str, start: str, count: int, zone: str = "UTC") -> list[str]:
    cron, t_us, found = Cron.parse(expression, zone), us(start), []
    for _ in range(count):
        t_us = cron.next_after(t_us)
        found.append(text_of(t_us, zone))
    return found


# Known cases


@pytest.mark.parametrize(
    ("expression", "first"),
    [
        ("0 3 * * *", "2013-10-02T03:00+00:00"),
        ("0 3 * * 1", "2013-10-07T03:00+00:00"),  # a Monday: the standard number, not APScheduler's
        ("0 3 * * mon", "2013-10-07T03:00+00:00"),
        ("0 3 * * 0", "2013-10-06T03:00+00:00"),
        ("0 3 * * 7", "2013-10-06T03:00+00:00"),
        ("0 3 * * Sun", "2013-10-06T03:00+00:00"),
        ("0 0 * * fri-sun", "2013-10-04T00:00+00:00"),
        ("0 0 * * 5-7", "2013-10-04T00:00+00:00"),
        ("0 0 * * 0-0", "2013-10-06T00:00+00:00"),
        ("*/15 * * * *", "2013-10-01T12:15+00:00"),
        ("5-59/20 12 * * *", "2013-10-01T12:05+00:00"),
        ("0 0 1 jan *", "2014-01-01T00:00+00:00"),
        ("0 0 31 * *", "2013-10-31T00:00+00:00"),
        ("30 4 1,15 * 5", "2013-10-04T04:30+00:00"),  # the 1st, the 15th, and Fridays
        ("30 4 */2 * 5", "2013-10-11T04:30+00:00"),  # odd days that are Fridays
        ("30 4 1-7 * */7", "2013-10-06T04:30+00:00"),  # the first Sunday
        ("0 0 29 2 *", "2016-02-29T00:00+00:00"),
        ("0 0 30 2 mon", "2014-02-03T00:00+00:00"),  # 30 February never comes, Mondays do
        ("00 09-17/04 * * *", "2013-10-01T13:00+00:00"),
    ],
)
def test_first_run_after_noon_of_the_first_of_october_2013(expression: str, first: str) -> None:
    assert runs(expression, "2013-10-01T12:00:00Z", 1) == [first]


def test_a_due_time_is_strictly_after_and_at_or_before_includes_it() -> None:
    cron, at = Cron.parse("0 3 * * *"), us("2013-10-02T03:00:00Z")
    assert cron.next_after(at - 1) == at == cron.at_or_before(at)
    assert cron.next_after(at) == at + DAY_US
    assert cron.at_or_before(at - 1) == at - DAY_US


def test_leap_days_on_one_weekday_are_found_forty_years_ahead() -> None:
    assert runs("0 0 29 2 */7", "2060-03-01T00:00:00Z", 2) == [
        "2088-02-29T00:00+00:00",
        "2128-02-29T00:00+00:00",
    ]
    cron = Cron.parse("0 0 29 2 */7")
    assert text_of(cron.at_or_before(us("2128-02-28T00:00:00Z"))) == "2088-02-29T00:00+00:00"


def test_a_minute_that_summer_time_skips_runs_once_when_the_clock_has_jumped() -> None:
    assert runs("30 2 * * *", "2013-03-09T12:00:00-05:00", 2, "America/New_York") == [
        "2013-03-10T03:00-04:00",
        "2013-03-11T02:30-04:00",
    ]


def test_a_minute_that_the_clock_shows_twice_runs_the_first_time_only() -> None:
    assert runs("30 1 * * *", "2013-11-02T12:00:00-04:00", 2, "America/New_York") == [
        "2013-11-03T01:30-04:00",
        "2013-11-04T01:30-05:00",
    ]
    cron = Cron.parse("30 1 * * *", "America/New_York")
    assert cron.next_after(us("2013-11-03T01:10:00-05:00")) == us("2013-11-04T01:30:00-05:00")
    assert cron.at_or_before(us("2013-11-03T01:10:00-05:00")) == us("2013-11-03T01:30:00-04:00")


def test_several_skipped_minutes_run_once_together() -> None:
    assert runs("*/20 * * * *", "2013-03-10T01:40:00-05:00", 2, "America/New_York") == [
        "2013-03-10T03:00-04:00",
        "2013-03-10T03:20-04:00",
    ]


def test_a_whole_skipped_day_runs_once() -> None:
    assert runs("0 12 * * *", "2011-12-29T00:00:00-10:00", 3, "Pacific/Apia") == [
        "2011-12-29T12:00-10:00",
        "2011-12-31T00:00+14:00",
        "2011-12-31T12:00+14:00",
    ]


def test_the_time_zone_is_that_of_the_schedule() -> None:
    assert runs("0 3 * * *", "2013-07-01T00:00:00Z", 1, "Europe/Berlin") == [
        "2013-07-01T03:00+02:00"
    ]


# Against a brute force that steps through every minute

Sets = tuple[set[int], set[int], set[int], set[int], set[int]]
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
CHANGES = {
    "UTC": "2013-06-01T00:00:00Z",
    "America/New_York": "2013-11-03T06:00:00Z",
    "Europe/Berlin": "2013-03-31T01:00:00Z",
    "America/Sao_Paulo": "2013-10-20T03:00:00Z",  # midnight is skipped
    "Australia/Lord_Howe": "2013-04-06T15:00:00Z",  # half an hour
    "Pacific/Apia": "2011-12-30T10:00:00Z",  # a whole day is skipped
    "Asia/Kathmandu": "2013-06-01T00:00:00Z",
}
MINUTES_EACH_SIDE = 800
Reached = list[tuple[int, list[datetime]]]


@cache
def reached(zone: str) -> Reached:
    """Every UTC minute around the zone's change, and the wall minutes first reached or passed."""
    change, info = us(CHANGES[zone]), ZoneInfo(zone)
    found: Reached = []
    latest = datetime.min  # noqa: DTZ901 - a wall time has no zone
    for k in range(-MINUTES_EACH_SIDE - 1, MINUTES_EACH_SIDE):
        t = change + k * MINUTE_US
        wall = (EPOCH + timedelta(microseconds=t)).astimezone(info).replace(tzinfo=None)
        minutes = max(0, (wall - latest) // timedelta(minutes=1)) if found else 0
        found.append((t, [wall - timedelta(minutes=m) for m in range(minutes)]))
        latest = max(latest, wall)
    return found[1:]


@st.composite
def fields(draw: st.DrawFn, low: int, high: int, stars: int) -> tuple[str, set[int]]:
    """Text of a field and the values it means."""
    if draw(st.integers(0, stars)):
        step = draw(st.sampled_from([1, 1, 1, 2, 3]))
        return ("*" if step == 1 else f"*/{step}"), set(range(low, high + 1, step))
    texts, values = [], set[int]()
    for _ in range(draw(st.integers(1, 3))):
        a, b = sorted((draw(st.integers(low, high)), draw(st.integers(low, high))))
        step = draw(st.sampled_from([0, 1, 2, 5]))
        texts.append(f"{a}-{b}/{step}" if step else str(a) if a == b else f"{a}-{b}")
        values |= set(range(a, b + 1, step or 1))
    return ",".join(texts), values


@st.composite
def expressions(draw: st.DrawFn) -> tuple[str, Sets]:
    parts = [
        draw(fields(0, 59, 1)),
        draw(fields(0, 23, 2)),
        draw(fields(1, 31, 3)),
        draw(fields(1, 12, 6)),
        draw(fields(0, 7, 3)),
    ]
    minutes, hours, days, months, weekdays = (values for _, values in parts)
    return " ".join(text for text, _ in parts), (minutes, hours, days, months, weekdays)


def matches_day(text: str, sets: Sets, day: date) -> bool:
    _, _, days, months, weekdays = sets
    by_day, by_weekday = day.day in days, day.isoweekday() % 7 in {d % 7 for d in weekdays}
    starred = text.split()[2][0] == "*" or text.split()[4][0] == "*"
    return day.month in months and ((by_day and by_weekday) if starred else (by_day or by_weekday))


def brute_force(text: str, sets: Sets, zone: str) -> list[int]:
    """Due times: the minutes at which a matching wall minute was first reached or passed."""
    minutes, hours, *_ = sets
    return [
        t
        for t, walls in reached(zone)
        if any(
            w.minute in minutes and w.hour in hours and matches_day(text, sets, w.date())
            for w in walls
        )
    ]


def never_runs(text: str, sets: Sets) -> bool:
    lengths = {
        1: 31,
        2: 29,
        3: 31,
        4: 30,
        5: 31,
        6: 30,
        7: 31,
        8: 31,
        9: 30,
        10: 31,
        11: 30,
        12: 31,
    }
    starred = text.split()[2][0] == "*" or text.split()[4][0] == "*"
    return starred and all(min(sets[2]) > lengths[month] for month in sets[3])


@settings(max_examples=150, deadline=None)
@given(expressions(), st.sampled_from(sorted(CHANGES)), st.data())
def test_next_and_previous_equal_stepping_through_every_minute(
    expression: tuple[str, Sets], zone: str, data: st.DataObject
) -> None:
    text, sets = expression
    if never_runs(text, sets):
        with pytest.raises(DefinitionError, match="never runs"):
            Cron.parse(text, zone)
        return
    cron, times = Cron.parse(text, zone), brute_force(text, sets, zone)
    first, last = reached(zone)[0][0], reached(zone)[-1][0]
    for _ in range(10):
        offset = data.draw(st.integers(-200, 200) | st.integers(-780, 780))
        t = us(CHANGES[zone]) + offset * MINUTE_US + data.draw(st.integers(-1, 1))
        later, earlier = [x for x in times if x > t], [x for x in times if x <= t]
        found, previous = cron.next_after(t), cron.at_or_before(t)
        assert (found == later[0]) if later else (found > last)
        assert (previous == earlier[-1]) if earlier else (previous < first)


@settings(max_examples=150, deadline=None)
@given(expressions(), st.dates(date(1999, 1, 1), date(2105, 1, 1)))
def test_far_runs_equal_stepping_through_every_day(
    expression: tuple[str, Sets], start: date
) -> None:
    text, sets = expression
    text = " ".join(["0", "12", *text.split()[2:]])
    if never_runs(text, sets):
        return
    cron = Cron.parse(text)
    noon = us(f"{start}T12:00:00Z")
    later = (start + timedelta(days=k) for k in range(1, 1500))
    earlier = (start - timedelta(days=k) for k in range(1, 1500))
    for days, found in ((later, cron.next_after(noon)), (earlier, cron.at_or_before(noon - 1))):
        expected = next((d for d in days if matches_day(text, sets, d)), None)
        if expected:
            assert found == us(f"{expected}T12:00:00Z")
        else:
            assert abs(found - noon) >= 1500 * DAY_US


# What is refused


@pytest.mark.parametrize(
    ("expression", "problem"),
    [
        ("60 * * * *", "minute has '60', expected 0 to 59"),
        ("0 24 * * *", "hour has '24', expected 0 to 23"),
        ("0 0 0 * *", "day of month has '0', expected 1 to 31"),
        ("0 0 32 * *", "day of month has '32', expected 1 to 31"),
        ("0 0 * 13 *", "month has '13', expected 1 to 12 or jan to dec"),
        ("0 0 * 0 *", "month has '0', expected 1 to 12"),
        ("0 0 * * 8", "day of week has '8', expected 0 to 7 or sun to sat"),
        ("0 0 * * monday", "day of week has 'monday'"),
        ("0 0 * mon *", "month has 'mon'"),
        ("0 17-9 * * *", "hour has '17-9'"),
        ("0 0 * * fri-tue", "day of week has 'fri-tue'"),
        ("5/15 * * * *", "minute has '5/15'.*low-high/n"),
        ("*/0 * * * *", "step of minute in '\\*/0' is not in 1 to 59"),
        ("0 */24 * * *", "step of hour in '\\*/24' is not in 1 to 23"),
        ("-1 * * * *", "minute has '-1'"),
        ("1,,2 * * * *", "minute has ''"),
        ("٣ * * * *", "minute has '٣'"),
        ("0 3 * *", "has 4 fields, expected 5: minute, hour, day of month, month, day of week"),
        ("0 3 * * * *", "has 6 fields"),
        ("", "has 0 fields"),
        ("0," * 200 + "0 * * * *", "is longer than 200 characters"),
        ("0 0 31 2 *", "never runs: no month of \\{2\\} has day 31"),
        ("0 0 31 4,6,9,11 *", "never runs"),
        ("0 0 30-31 feb *", "never runs: no month of \\{2\\} has day 30"),
    ],
)
def test_errors_name_the_field_and_its_range(expression: str, problem: str) -> None:
    with pytest.raises(DefinitionError, match=problem) as caught:
        Cron.parse(expression)
    assert caught.value.code == "invalid_schedule"
    assert "minute, hour" in caught.value.hint


@pytest.mark.parametrize("zone", ["Mars/Olympus", "", "../etc/passwd", "America", "UTC\0"])
def test_an_unknown_time_zone_is_named(zone: str) -> None:
    with pytest.raises(DefinitionError, match=r"time zone .* is unknown") as caught:
        Cron.parse("0 3 * * *", zone)
    assert caught.value.code == "invalid_timezone"


def test_schedules_are_read_from_words() -> None:
    assert parse_schedule("0 3 * * *", "Europe/Berlin") == Cron.parse("0 3 * * *", "Europe/Berlin")
    assert parse_schedule("every 6h") == Interval(6 * 60 * MINUTE_US)
    assert parse_schedule("every 10000 rows of departures") == NewRows(10_000, "departures")
    assert parse_schedule("manual") == Manual()


@pytest.mark.parametrize(
    "text",
    ["every 6 hours", "every 10ms", "every 0 rows of departures", "every 5 rows of Dep", "daily"],
)
def test_other_words_are_refused(text: str) -> None:
    with pytest.raises(MlpdError) as caught:
        parse_schedule(text)
    assert caught.value.status == 400
    assert caught.value.hint


# What is due

INTERVALS = st.builds(Interval, st.integers(1_000_000, 10**10), st.integers(-(10**12), 10**12))
CRONS = st.sampled_from(["* * * * *", "*/7 * * * *", "30 2 * * *", "0 3 * * 1"]).flatmap(
    lambda text: st.sampled_from(["UTC", "America/New_York"]).map(lambda z: Cron.parse(text, z))
)
TIMES = st.integers(us("2013-01-01T00:00:00Z"), us("2013-12-31T00:00:00Z"))


@settings(deadline=None)
@given(INTERVALS | CRONS, TIMES, st.integers(1, 10**12), st.integers(1, 9))
@example(Cron.parse("30 2 * * *", "America/New_York"), us("2013-03-09T12:00:00Z"), 3 * DAY_US, 5)
def test_due_equals_enumerating_every_run(
    schedule: Interval | Cron, last_us: int, span_us: int, n: int
) -> None:
    now_us = last_us + min(span_us, 300 * (schedule.next_after(last_us + DAY_US) - last_us))
    ends: list[int] = []
    t_us = last_us
    while (t_us := schedule.next_after(t_us)) <= now_us and len(ends) <= 10_000:
        ends.append(t_us)
    if len(ends) > 10_000:
        return
    found = due(schedule, last_us, now_us, f"all:{n}")
    assert [interval.end_us for interval in found] == ends[-n:]
    assert due(schedule, last_us, now_us, "latest") == found[-1:]
    on_time = bool(ends) and now_us - ends[-1] <= GRACE_US
    assert due(schedule, last_us, now_us, "skip") == (found[-1:] if on_time else [])
    for before, after in pairwise(found):
        assert before.end_us == after.start_us
    for start_us, end_us in found:
        assert schedule.next_after(start_us) == end_us


def test_a_run_covers_the_time_since_the_schedules_previous_run() -> None:
    found = due(Cron.parse("0 3 * * *"), us("2013-10-02T02:59:50Z"), us("2013-10-02T03:00:10Z"))
    assert found == [DataInterval(us("2013-10-01T03:00:00Z"), us("2013-10-02T03:00:00Z"))]


def test_the_day_of_the_change_is_one_interval_of_23_or_25_hours() -> None:
    cron = Cron.parse("30 2 * * *", "America/New_York")
    found = due(cron, us("2013-03-08T12:00:00Z"), us("2013-03-12T12:00:00Z"), "all:9")
    hours = [(i.end_us - i.start_us) / (60 * MINUTE_US) for i in found]
    assert hours == [24, 23.5, 23.5, 24]


def test_thirty_days_of_missed_minutes_are_not_enumerated(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = 0
    real = Cron.at_or_before

    def counted(self: Cron, t_us: int) -> int:
        nonlocal steps
        steps += 1
        return real(self, t_us)

    monkeypatch.setattr(Cron, "at_or_before", counted)
    last_us = us("2013-01-01T00:00:00Z")
    for catch_up, runs_expected in (("latest", 1), ("all:5", 5), ("skip", 1)):
        steps = 0
        found = due(Cron.parse("* * * * *"), last_us, last_us + 30 * DAY_US, catch_up)
        assert len(found) == runs_expected
        assert steps <= runs_expected + 1


def test_skip_leaves_out_what_is_more_than_five_minutes_late() -> None:
    cron, last, at = (
        Cron.parse("0 3 * * *"),
        us("2013-10-01T12:00:00Z"),
        us("2013-10-02T03:00:00Z"),
    )
    assert due(cron, last, at + 5 * MINUTE_US, "skip")
    assert due(cron, last, at + 5 * MINUTE_US + 1, "skip") == []


def test_nothing_is_due_twice_or_when_the_clock_went_back() -> None:
    cron, at = Cron.parse("0 3 * * *"), us("2013-10-02T03:00:00Z")
    assert due(cron, at, at + 60 * MINUTE_US) == []
    assert due(cron, at, at) == []
    assert due(cron, at + DAY_US, at) == []


def test_new_rows_are_due_by_count() -> None:
    schedule = NewRows(100, "departures")
    assert due(schedule, 10, 20, new=99) == []
    assert due(schedule, 10, 20, new=100) == [DataInterval(10, 20)]
    assert next_dues(schedule, 10, 1) == []


def test_a_manual_job_is_never_due() -> None:
    assert due(Manual(), 0, 10**15, "all:5") == []
    assert next_dues(Manual(), 0, 1) == []


def test_next_due_is_that_of_the_schedule() -> None:
    at = us("2013-10-02T03:00:00Z")
    assert next_dues(Cron.parse("0 3 * * *"), at - 5, 1) == [at]
    assert next_dues(Interval(DAY_US, 3 * 60 * MINUTE_US), at - 5, 1) == [at]


@pytest.mark.parametrize("catch_up", ["", "none", "all", "all:", "all:0", "all:367", "all:-1"])
def test_an_unknown_catch_up_is_refused_with_what_is_allowed(catch_up: str) -> None:
    with pytest.raises(DefinitionError, match="skip, latest or all:N with N from 1 to 366"):
        due(Manual(), 0, 1, catch_up)
