"""Adaptive limits: cut while many requests are slow, grown while few are."""

import random
from collections import deque

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlpd.core.errors import OverloadedError
from mlpd.core.limits import LEAST, MOST, START, AdaptiveLimit

TARGET_S = 0.1
DEADLINE_S = 0.25
REFUSAL_S = 8e-5


def test_it_lets_in_as_many_as_it_says_and_counts_the_others() -> None:
    limit = AdaptiveLimit(TARGET_S, start=3)
    for _ in range(3):
        limit.check()
        limit.enter()
    for ask in (limit.check, limit.enter):
        with pytest.raises(OverloadedError) as refused:
            ask()
        assert refused.value.code == "too_many_requests"
        assert refused.value.details["retry_after_s"] == TARGET_S
    assert (limit.in_flight, limit.refused) == (3, 2)
    limit.leave()
    limit.enter()


def overload(limit: AdaptiveLimit, *, service_s: float, rounds: int) -> None:
    """A server that serves whom it let in one after the other, always asked by more than that."""
    now_s = 0.0
    for _ in range(rounds):
        began_s = now_s
        while True:
            try:
                limit.enter()
            except OverloadedError:
                break
        for _ in range(limit.in_flight):
            now_s += service_s
            limit.leave_after(began_s, now_s)


def serve(loads: list[tuple[float, float]], *, service_s: float) -> list[float]:
    """Simulate a loop that serves in turns; `loads` are (times capacity, seconds), one by one.

    Whoever has come by the beginning of a turn is let in or refused, which takes REFUSAL_S; then
    those inside are served one by one.  Returns how many of each load were lucky, those with an
    answer DEADLINE_S after they came, as a share of capacity or, below it, of those who came.
    """
    rng, limit, now_s, start_s, shares = random.Random(5), AdaptiveLimit(0.5), 0.0, 0.0, []
    for times, seconds in loads:
        due, came_s = deque[float](), start_s
        while (came_s := came_s + rng.expovariate(times / service_s)) < start_s + seconds:
            due.append(came_s)
        good, most = 0, min(len(due), seconds / service_s)
        while due:
            now_s = max(now_s, due[0])
            inside: list[tuple[float, float]] = []
            while due and due[0] <= now_s:
                came_s = due.popleft()
                try:
                    limit.enter()
                    inside.append((came_s, now_s))
                except OverloadedError:
                    now_s += REFUSAL_S
            for came_s, began_s in inside:
                late = now_s - began_s >= DEADLINE_S
                now_s += 0.0 if late else service_s * rng.uniform(0.5, 1.5)
                may_take_s = 0.0 if late else DEADLINE_S / 4
                limit.leave_after(began_s, now_s, may_take_s=may_take_s)
                good += now_s - came_s <= DEADLINE_S
        shares.append(good / most)
        start_s += seconds
    return shares


@pytest.mark.parametrize("service_s", [0.002, 0.005, 0.01])
@pytest.mark.parametrize("times", [1.5, 2.0, 5.0])
def test_goodput_stays_under_overload_and_is_back_at_once(times: float, service_s: float) -> None:
    over, after, calm = serve([(times, 10.0), (0.5, 5.0), (0.5, 5.0)], service_s=service_s)
    assert over >= 0.85 - REFUSAL_S / service_s * (times - 1.0)
    assert after >= 0.95
    assert calm == 1.0


def test_without_a_limit_goodput_would_collapse(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AdaptiveLimit, "_adapt", lambda *_: None)
    monkeypatch.setattr(AdaptiveLimit, "check", lambda _: None)
    assert serve([(2.0, 10.0)], service_s=0.005)[0] < 0.3


def test_a_cut_is_felt_at_once_however_high_the_limit_was() -> None:
    limit = AdaptiveLimit(TARGET_S)
    for _ in range(20):
        limit.enter()
    for _ in range(20):
        limit.leave_after(0.0, 1.0)
    assert limit.limit == 14


def test_a_server_that_is_slow_anyhow_is_never_left_without_work() -> None:
    limit = AdaptiveLimit(TARGET_S)
    overload(limit, service_s=1.0, rounds=100)
    assert limit.limit == LEAST


def test_few_slow_requests_among_quick_ones_cut_nothing() -> None:
    limit = AdaptiveLimit(TARGET_S)
    for i in range(10 * START):
        limit.enter()
        limit.leave_after(0.0, 60.0 if i % 4 == 0 else 0.01)
    assert limit.limit == START


def test_late_requests_are_slow_ones_and_failed_ones_say_nothing() -> None:
    limit = AdaptiveLimit(TARGET_S)
    for _ in range(START):
        limit.enter()
        limit.leave()
    assert limit.limit == START
    for _ in range(START):
        limit.enter()
        limit.leave_after(1.0, 1.0 + 1e-6, may_take_s=0.0)
    assert limit.limit < START


def test_who_allows_more_or_less_time_is_measured_by_that() -> None:
    for may_take_s, limit_after in ((0.3, START), (0.05, LEAST)):
        limit = AdaptiveLimit(TARGET_S)
        for _ in range(START):
            limit.enter()
            limit.leave_after(0.0, 0.2, may_take_s=may_take_s)
        assert limit.limit == limit_after


def test_it_comes_back_to_its_start_and_grows_beyond_only_if_it_is_reached() -> None:
    limit = AdaptiveLimit(TARGET_S, start=LEAST)
    for _ in range(10 * START):
        limit.enter()
        limit.leave_after(0.0, 0.01)
    assert limit.limit == START
    overload(limit, service_s=1e-6, rounds=2000)
    assert limit.limit == MOST


@given(st.lists(st.tuples(st.booleans(), st.floats(0.0, 1.0)), max_size=600))
def test_the_limit_stays_within_its_bounds_and_the_count_is_right(
    events: list[tuple[bool, float]],
) -> None:
    limit, inside, now_s = AdaptiveLimit(TARGET_S, start=LEAST), [], 0.0
    for comes, dt_s in events:
        now_s += dt_s
        if comes or not inside:
            try:
                limit.enter()
                inside.append(now_s)
            except OverloadedError:
                assert len(inside) >= limit.limit
        else:
            limit.leave_after(inside.pop(0), now_s)
        assert limit.in_flight == len(inside)
        assert LEAST <= limit.limit <= MOST


@pytest.mark.parametrize(("in_flight", "crowded"), [(0, False), (63, False), (64, True)])
def test_it_is_crowded_from_half_of_the_limit_on(in_flight: int, crowded: bool) -> None:
    limit = AdaptiveLimit(1.0, start=128)
    for _ in range(in_flight):
        limit.enter()
    assert limit.is_crowded is crowded
