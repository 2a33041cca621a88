"""Canaries: what is refused, what a guard objects to, and how often by mistake."""

import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlpd.core.errors import ValidationError
from mlpd.core.time import HOUR_US, MINUTE_US
from mlpd.experiments.rendezvous import Rendezvous
from mlpd.serving.canary import Canary, Guard, Step, Tally, find_failure, share_weights
from mlpd.serving.routes import RouteSpec
from mlpd.serving.trial import Trial

SHARES = st.lists(st.floats(1e-6, 1.0), min_size=1, max_size=20, unique=True).map(sorted)
LIMITS = st.none() | st.floats(1.0, 10.0)


@st.composite
def canaries(draw: st.DrawFn) -> Canary:
    steps = [
        Step(share, draw(st.integers(1, 10**6)) * 1_000_000, draw(st.integers(0, 10**6)))
        for share in draw(SHARES)
    ]
    guard = Guard(
        draw(st.integers(1, 1000)), draw(st.none() | st.floats(0, 0.99)), draw(LIMITS), draw(LIMITS)
    )
    return Canary("new", tuple(steps), guard, draw(st.sampled_from(["rollback", "stop"])))


def document(**changes: Any) -> dict[str, Any]:
    return {"arm": "new", "steps": [{"share": 0.05, "for": "10m"}], **changes}


def tally(rows: int, failed: int = 0, us: float = 100.0, score: float = 0.3) -> Tally:
    """Rows of one request each, whose times and scores spread by a tenth."""
    found, spread = Tally(), np.linspace(0.9, 1.1, max(rows - failed, 2))
    for i in range(rows - failed):
        found = found.answered(us * spread[i], np.array([score * spread[-1 - i]]))
    return found.with_failed(failed)


@given(canaries())
def test_json_gives_the_same_canary_back(canary: Canary) -> None:
    assert Canary.from_dict(canary.to_dict()) == canary
    trial = Trial(canary, "m@2", {"new": 0.0, "old": 1.0}, 1, 2, arm=tally(30, 3))
    assert Trial.decode(trial.encode()) == trial


def test_a_steps_rows_are_the_guards_unless_it_says_so() -> None:
    steps = [{"share": 0.05, "for": "10m"}, {"share": 1, "for": "1h", "rows": 0}]
    canary = Canary.from_dict(document(steps=steps, guard={"rows": 70}))
    assert canary.steps == (Step(0.05, 10 * MINUTE_US, 70), Step(1.0, HOUR_US, 0))


def step(**changes: Any) -> dict[str, Any]:
    return {"share": 0.05, "for": "10m", **changes}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arm": None}, "valid name"),
        ({"arms": "new"}, "unknown key 'arms'"),
        ({"steps": []}, "1 to 20 steps"),
        ({"steps": {}}, "a list of objects"),
        ({"steps": [0.05]}, "a step is an object"),
        ({"steps": [step(share=i / 30) for i in range(1, 25)]}, "1 to 20 steps"),
        ({"steps": [step(share=0)]}, "above 0 and up to 1"),
        ({"steps": [step(share=1.5)]}, "above 0 and up to 1"),
        ({"steps": [step(share=float("nan"))]}, "above 0 and up to 1"),
        ({"steps": [step(share="5%")]}, "`share` is a number"),
        ({"steps": [step(share=True)]}, "`share` is a number"),
        ({"steps": [step(), step()]}, "grow from step to step"),
        ({"steps": [step(share=0.5), step()]}, "grow from step to step"),
        ({"steps": [{"share": 0.5}]}, "not a positive duration"),
        ({"steps": [step(**{"for": "soon"})]}, "not a positive duration"),
        ({"steps": [step(**{"for": "1ms"})]}, "1 s to 30 d"),
        ({"steps": [step(**{"for": "31d"})]}, "1 s to 30 d"),
        ({"steps": [step(rows=-1)]}, "0 or more"),
        ({"steps": [step(rows=2.5)]}, "`rows` is a whole number"),
        ({"steps": [step(until="noon")]}, "unknown key 'until'"),
        ({"guard": []}, "a guard is an object"),
        ({"guard": {"rows": 0}}, "1 or more"),
        ({"guard": {"failed_share": 1}}, "from 0 to below 1"),
        ({"guard": {"failed_share": "1%"}}, "`failed_share` is a number"),
        ({"guard": {"slower": 0.5}}, "at least 1"),
        ({"guard": {"score_shift": float("inf")}}, "finite"),
        ({"guard": {"auc": 0.7}}, "unknown key 'auc'"),
        ({"on_failure": "shrug"}, "rollback or stop"),
    ],
)
def test_an_invalid_canary_is_refused_with_its_reason(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValidationError, match=message):
        Canary.from_dict(document(**changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"canary": []}, "a canary is an object"),
        ({"canary": document(arm="other")}, "one of its arms"),
        ({"arms": [{"name": "new", "model": "m@2"}]}, "beside others"),
        ({"experiment": "colours"}, "an experiment and a canary"),
    ],
)
def test_a_canary_needs_a_route_that_fits(changes: dict[str, Any], message: str) -> None:
    arms = [{"name": "old", "model": "m@1"}, {"name": "new", "model": "m@2"}]
    route = {"name": "r", "service": "s", "arms": arms, "canary": document(), **changes}
    with pytest.raises(ValidationError, match=message):
        RouteSpec.from_dict(route)


@given(
    st.dictionaries(st.sampled_from("abcd"), st.floats(0.01, 100), min_size=1, max_size=4),
    st.floats(0, 1),
    st.floats(0, 1),
)
def test_rows_move_to_the_arm_alone(others: dict[str, float], low: float, high: float) -> None:
    low, high = sorted((low, high))
    shares = [share_weights({**others, "new": 5.0}, "new", share) for share in (low, high)]
    for weights, share in zip(shares, (low, high), strict=True):
        assert sum(weights.values()) == pytest.approx(1.0)
        assert weights["new"] == share
    before, after = (Rendezvous(("route", "r"), weights) for weights in shares)
    for i in range(300):
        old, new = before.choose(f"u{i}"), after.choose(f"u{i}")
        assert new in (old, "new")


@pytest.mark.parametrize(
    ("guard", "arm", "others", "found"),
    [
        (Guard(), tally(19, 19), tally(100), None),  # too few rows to judge
        (Guard(), tally(20, 20), tally(100), "20 of 20 rows failed"),
        (Guard(), tally(20, 20), Tally(), "20 of 20 rows failed"),  # nobody to compare with
        (Guard(), tally(200, 1), tally(100), None),
        (Guard(), tally(200, 3), tally(100), None),  # 1.5 % of 200 may be chance
        (Guard(), tally(2000, 60), tally(100), "60 of 2000 rows failed; 1.00% may"),
        (Guard(), tally(2000, 60), tally(2000, 60), None),  # the others fail as often
        (Guard(failed_share=None), tally(20, 20), tally(100), None),
        (Guard(slower=2.0), tally(100, us=190.0), tally(100), None),
        (Guard(slower=2.0), tally(100, us=250.0), tally(100), "2.50 times as long"),
        (Guard(slower=2.0), tally(100, us=250.0), tally(19), None),
        (Guard(), tally(100, us=9000.0, score=0.9), tally(100), None),
        (Guard(score_shift=0.1), tally(100, score=0.35), tally(100), None),
        (Guard(score_shift=0.1), tally(100, score=0.45), tally(100), r"off by \+0.15"),
        (Guard(score_shift=0.1), tally(100, score=0.15), tally(100), "off by -0.15"),
    ],
)
def test_what_a_guard_objects_to(
    guard: Guard, arm: Tally, others: Tally, found: str | None
) -> None:
    said = find_failure(guard, arm, others)
    if found is None:
        assert said is None
    else:
        assert said is not None
        assert re.search(found, said)


def test_values_that_are_not_finite_are_left_out() -> None:
    scores = np.array([0.25, np.nan, 0.75, np.inf])
    found = Tally().answered(10.0, scores).score
    assert (found.n, found.mean, found.squares) == (2, 0.5, 0.0625 + 0.5625)


def count_taken_back(rng: np.random.Generator, failing: float, trials: int) -> tuple[int, float]:
    """Look at every 10 of 5,000 rows of canaries with a limit of 1 %; number, median of rows."""
    guard, after = Guard(), []
    for _ in range(trials):
        failed = np.cumsum(rng.binomial(10, failing, 500))
        for look, count in enumerate(failed.tolist(), 1):
            if find_failure(guard, Tally(10 * look, count), Tally()) is not None:
                after.append(10 * look)
                break
    return len(after), float(np.median(after)) if after else 0.0


def test_looking_often_takes_hardly_a_healthy_canary_back_and_bad_ones_soon() -> None:
    rng = np.random.default_rng(1)
    assert count_taken_back(rng, 0.005, 200)[0] == 0
    assert count_taken_back(rng, 0.01, 200)[0] <= 2  # at the limit itself
    assert count_taken_back(rng, 0.5, 200) == (200, 20.0)
    worse, rows = count_taken_back(rng, 0.06, 200)
    assert worse == 200
    assert rows <= 200


def trial(**changes: Any) -> Trial:
    steps = (Step(0.1, MINUTE_US, 20), Step(1.0, MINUTE_US, 20))
    start = {"started_us": 1, "entered_us": 1}
    return Trial(Canary("new", steps), "m@2", {"old": 1.0, "new": 0.0}, **{**start, **changes})


@pytest.mark.parametrize(
    ("changes", "decision"),
    [
        ({}, ("wait", "time")),
        ({"elapsed_us": MINUTE_US - 1, "arm": tally(50)}, ("wait", "time")),
        ({"elapsed_us": MINUTE_US, "arm": tally(19)}, ("wait", "rows")),
        ({"elapsed_us": MINUTE_US, "arm": tally(20)}, ("advance", "")),
        ({"elapsed_us": MINUTE_US, "arm": tally(20), "step": 1}, ("finish", "the last step")),
        ({"elapsed_us": MINUTE_US, "arm": tally(40, 20)}, ("fail", "20 of 40 rows failed")),
        ({"arm": tally(40, 20)}, ("fail", "20 of 40 rows failed")),  # at once, not at the end
    ],
)
def test_a_step_lasts_as_long_as_it_says_and_until_its_rows_are_there(
    changes: dict[str, Any], decision: tuple[str, str]
) -> None:
    found, why = trial(**changes).decide()
    assert (found, why[: len(decision[1])]) == decision


def test_the_next_step_counts_anew() -> None:
    found = trial(elapsed_us=MINUTE_US, arm=tally(20), others=tally(9)).advanced(7)
    assert (found.step, found.entered_us, found.elapsed_us, found.started_us) == (1, 7, 0, 1)
    assert found.arm == found.others == Tally()
