"""Leases: an owner's never outlives the promise that it rests on, however the clocks run."""

import random

import pytest

from mlpd.core.leases import DRIFT, Lease, Promise


def test_without_a_lease_it_always_holds_and_without_followers_too() -> None:
    assert Lease(0.0).holds(["f"], 1e9)
    assert Lease(3.0).holds([], 1e9)
    assert not Lease(3.0).holds(["f"], 0.0)


def test_a_ticket_of_another_process_renews_nothing() -> None:
    lease = Lease(3.0, first=7)
    lease.renew("f", 7)
    lease.renew("f", None)
    assert not lease.holds(["f"], 0.0)
    assert lease.give(0.0) == 7
    lease.renew("f", 7)
    assert lease.holds(["f"], 2.9)
    assert not lease.holds(["f", "other"], 2.9)
    assert not lease.holds(["f"], 3.0)


@pytest.mark.parametrize("seed", range(20))
def test_while_an_owner_holds_its_lease_its_follower_still_promises(seed: int) -> None:
    rng = random.Random(seed)
    owner_rate, follower_rate = (rng.uniform(1 - DRIFT / 2, 1 + DRIFT / 2) for _ in range(2))
    lease, promise, now_s = Lease(3.0), Promise(), 100.0
    ticket: int | None = None
    for _ in range(300):
        now_s += rng.uniform(0.0, 1.5)
        if lease.holds(["f"], now_s * owner_rate):
            assert promise.left_s(now_s * follower_rate) > 0.0
        if rng.random() < 0.6:  # a question with what was seen last, which may be lost
            if ticket is not None:
                promise.give(3.0, now_s * follower_rate)
            now_s += rng.uniform(0.0, 1.0)
            if rng.random() < 0.7:
                lease.renew("f", ticket)
                found = lease.give(now_s * owner_rate)
                now_s += rng.uniform(0.0, 1.0)
                if rng.random() < 0.7:
                    ticket = found
