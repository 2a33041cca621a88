"""Times are microseconds UTC, exact; naive ones are refused with the way to mend them."""

from datetime import UTC, datetime, timedelta, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlpd.core.errors import MlpdError, ValidationError
from mlpd.core.time import (
    MAX_TIME_US,
    MIN_TIME_US,
    format_duration,
    format_time,
    parse_duration,
    parse_time,
)

times = st.integers(MIN_TIME_US + 1, MAX_TIME_US - 1)


@given(times)
def test_times_survive_text(time_us: int) -> None:
    assert parse_time(format_time(time_us)) == time_us
    assert parse_time(time_us) == time_us


@given(
    st.datetimes(min_value=datetime(2, 1, 1), max_value=datetime(9998, 1, 1)),
    st.integers(-1439, 1439),
)
def test_any_offset_is_understood(naive: datetime, offset_minutes: int) -> None:
    aware = naive.replace(tzinfo=timezone(timedelta(minutes=offset_minutes)))
    exact = (aware - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(microseconds=1)
    assert parse_time(aware) == parse_time(aware.isoformat()) == exact


@pytest.mark.parametrize("naive", ["2013-01-01T10:00:00", "2013-01-01", datetime(2013, 1, 1)])
def test_a_naive_time_is_refused_with_a_way_to_mend_it(naive: object) -> None:
    with pytest.raises(ValidationError) as refused:
        parse_time(naive, "event_time")
    assert refused.value.code == "naive_time"
    assert "event_time" in refused.value.message
    assert "2013-01-01T10:00:00Z" in refused.value.hint


@pytest.mark.parametrize(
    "value", [True, 1.5, None, "", "yesterday", "9" * 5000, MIN_TIME_US, MAX_TIME_US, 2**63, b"1"]
)
def test_what_is_no_time_is_refused(value: object) -> None:
    with pytest.raises(ValidationError) as refused:
        parse_time(value)
    assert refused.value.code == "invalid_time"


@given(st.integers(1, MAX_TIME_US - 1))
def test_durations_survive_text(duration_us: int) -> None:
    assert parse_duration(format_duration(duration_us)) == duration_us
    assert parse_duration(duration_us) == duration_us


@pytest.mark.parametrize(
    ("text", "duration_us"),
    [("1h30m", 5_400_000_000), ("90m", 5_400_000_000), ("7d", 604_800_000_000), ("1ms5us", 1005)],
)
def test_durations_add_up(text: str, duration_us: int) -> None:
    assert parse_duration(text) == duration_us


@pytest.mark.parametrize(
    "value", ["", "0s", 0, -5, True, 1.5, "1", "h", "1h 30m", "-1h", "1w", "9" * 5000 + "s", "١h"]
)
def test_what_is_no_positive_duration_is_refused(value: object) -> None:
    with pytest.raises(ValidationError) as refused:
        parse_duration(value)
    assert refused.value.code == "invalid_duration"


@given(st.text(max_size=40))
def test_no_text_breaks_the_parsers(text: str) -> None:
    for parse in (parse_time, parse_duration):
        try:
            parse(text)
        except MlpdError as error:
            assert error.code
