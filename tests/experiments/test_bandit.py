"""Bandits: chances of arms within phases, floors, what counts, and what is left alone."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from bench.bandits import WORLDS, simulate
from mlpd.experiments.bandit import Bandit, Choice, choose, matured_pairs
from mlpd.experiments.guardrails import FaultGuard, Guardrail
from mlpd.experiments.metric import Metric
from mlpd.experiments.records import UnitRecord

METRIC = Metric("bought")
EVEN = {"a": 1.0, "b": 1.0}
Groups = dict[tuple[int, str], list[tuple[float, float]]]


def units(hits: int, n: int) -> list[tuple[float, float]]:
    """Return n units of one outcome each, of which some have the event."""
    return [(1.0, 1.0)] * hits + [(0.0, 1.0)] * (n - hits)


def look(pairs: Groups, weights: dict[str, float] | None = None, **changes: object) -> Choice:
    bandit = Bandit(**changes)  # type: ignore[arg-type]  # fields of the bandit
    return choose(bandit, METRIC, weights or EVEN, pairs, draw=1, phases=[EVEN, EVEN])


def test_the_chance_of_two_arms_is_the_normal_posteriors() -> None:
    found = look({(0, "a"): units(60, 400), (0, "b"): units(80, 500)})
    p, q = 60 / 400, 80 / 500
    error = math.sqrt(p * (1 - p) / 399 + q * (1 - q) / 499)
    assert found.chances["b"] == pytest.approx(stats.norm.cdf((q - p) / error), abs=0.01)
    assert found.units == {"a": 400, "b": 500}


def test_lower_is_better_where_the_metric_says_so() -> None:
    pairs = {(0, "a"): units(60, 400), (0, "b"): units(100, 400)}
    lower = choose(Bandit(), Metric("late", better="lower"), EVEN, pairs, draw=1, phases=[EVEN])
    assert lower.chances["a"] > 0.99
    assert lower.shares == {"a": pytest.approx(0.95, abs=0.01), "b": pytest.approx(0.05, abs=0.01)}


def test_a_base_rate_that_moves_with_the_shares_deceives_nobody() -> None:
    """In each phase b is better; of all units together a is, as it had the good times."""
    pairs = {
        (0, "a"): units(100, 1_000), (0, "b"): units(1_350, 9_000),
        (1, "a"): units(5_400, 9_000), (1, "b"): units(650, 1_000),
    }  # fmt: skip
    pooled = {arm: sum(x for (_, a), g in pairs.items() if a == arm for x, _ in g) for arm in "ab"}
    assert pooled["a"] > pooled["b"]  # of as many units
    assert look(pairs).chances["b"] > 0.99


def test_values_are_those_of_everybody_getting_the_arm() -> None:
    """The base rises from 10 to 60 % while b's share does, so plain means tell a false story."""
    phases = [{"a": 0.9, "b": 0.1}, {"a": 0.5, "b": 0.5}, {"a": 0.1, "b": 0.9}]
    bases, effect, n = (0.1, 0.3, 0.6), 0.02, 20_000
    pairs: Groups = {}
    for phase, (base, shares) in enumerate(zip(bases, phases, strict=True)):
        for arm, lift in (("a", 0.0), ("b", effect)):
            size = round(n * shares[arm])
            pairs[phase, arm] = units(round(size * (base + lift)), size)
    found = choose(Bandit(), METRIC, EVEN, pairs, draw=1, phases=phases).values
    plain = {
        arm: sum(x for (_, a), g in pairs.items() if a == arm for x, _ in g) / (1.5 * n)
        for arm in "ab"
    }
    truth = {"a": sum(bases) / 3, "b": sum(bases) / 3 + effect}
    for arm in "ab":
        assert abs(plain[arm] - truth[arm]) > 0.1
        assert found[arm].ips == pytest.approx(truth[arm], abs=1e-3)
        assert found[arm].dr == pytest.approx(truth[arm], abs=1e-3)
        assert 0.001 < found[arm].std_error < 0.02


def test_the_standard_error_is_how_far_estimates_lie_apart() -> None:
    rng = np.random.default_rng(2)
    phases, bases = [{"a": 0.8, "b": 0.2}, {"a": 0.3, "b": 0.7}], (0.2, 0.4)
    values = []
    for _ in range(200):
        pairs: Groups = {}
        for phase, shares in enumerate(phases):
            in_b = int(rng.binomial(1_000, shares["b"]))
            for arm, size in (("a", 1_000 - in_b), ("b", in_b)):
                pairs[phase, arm] = units(int(rng.binomial(size, bases[phase])), size)
        values.append(choose(Bandit(), METRIC, EVEN, pairs, draw=1, phases=phases).values["b"])
    spread = np.std([value.dr for value in values])
    assert np.mean([value.std_error for value in values]) == pytest.approx(spread, rel=0.2)
    assert np.mean([value.dr for value in values]) == pytest.approx(0.3, abs=0.005)
    assert np.mean([value.ips for value in values]) == pytest.approx(0.3, abs=0.01)


def test_a_prior_holds_back() -> None:
    pairs = {(0, "a"): units(60, 400), (0, "b"): units(90, 400)}
    wary = choose(Bandit(), Metric("bought", prior_sd=0.01), EVEN, pairs, draw=1, phases=[EVEN])
    assert 0.5 < wary.chances["b"] < look(pairs).chances["b"]


def test_nothing_moves_before_each_arm_has_its_units() -> None:
    found = look({(0, "a"): units(10, 200), (0, "b"): units(9, 99)})
    assert (found.shares, found.chances) == (None, {})
    assert found.why == "arm b has 99 of 100 units that count"


@pytest.mark.parametrize(
    ("pairs", "weights", "why"),
    [
        ({(0, "a"): units(9, 200)}, {"a": 1.0, "b": 0.0}, "arm a is alone"),
        ({(0, "a"): [(3.0, 0.0)] * 200, (0, "b"): units(9, 200)}, EVEN, "arm a has 0 of 100"),
        ({(0, "a"): units(9, 200), (1, "b"): units(9, 200)}, EVEN, "no phase has units of all"),
    ],
)
def test_what_says_nothing_moves_nothing(
    pairs: Groups, weights: dict[str, float], why: str
) -> None:
    found = look(pairs, weights)
    assert found.shares is None
    assert why in found.why


def test_outcomes_that_never_vary_have_errors_all_the_same() -> None:
    found = look({(0, "a"): units(0, 120), (0, "b"): units(0, 120)})
    assert found.chances["a"] == pytest.approx(0.5, abs=0.02)
    same = {(0, arm): [(5.0, 1.0)] * 120 for arm in "ab"}
    constant = choose(Bandit(), Metric("amount", "mean"), EVEN, same, draw=1, phases=[EVEN])
    assert constant.why == "all outcomes are the same"


def test_small_changes_are_left() -> None:
    pairs = {(0, "a"): units(60, 400), (0, "b"): units(60, 400)}
    assert look(pairs).shares is None
    moved = look(pairs, {"a": 3.0, "b": 1.0}).shares
    assert moved == {"a": pytest.approx(0.5, abs=0.01), "b": pytest.approx(0.5, abs=0.01)}


def test_the_same_seed_and_draw_choose_the_same() -> None:
    pairs = {(0, arm): units(60 + i, 400) for i, arm in enumerate("abc")}
    weights = dict.fromkeys("abc", 1.0)
    one, again, other = (look(pairs, weights, seed=seed) for seed in (4, 4, 5))
    assert one == again
    assert one.chances != other.chances


@settings(max_examples=30, deadline=None)
@given(
    hits=st.lists(st.integers(0, 150), min_size=2, max_size=5),
    stopped=st.booleans(),
    floor=st.floats(0.001, 0.16),
)
def test_every_open_arm_keeps_the_floor_and_all_sum_to_one(
    hits: list[int], stopped: bool, floor: float
) -> None:
    weights = {f"arm{i}": float(i + 1) for i in range(len(hits))} | (
        {"off": 0.0} if stopped else {}
    )
    pairs = {(0, f"arm{i}"): units(n, 150) for i, n in enumerate(hits)}
    shares = look(pairs, weights, floor=floor).shares
    if shares is not None:
        assert shares.keys() == weights.keys()
        assert shares.get("off", 0.0) == 0.0
        assert all(share >= floor - 1e-6 for arm, share in shares.items() if arm != "off")
        assert math.fsum(shares.values()) == pytest.approx(1.0, abs=1e-5)


def test_units_count_once_they_are_old_and_pending_is_no_failure() -> None:
    records = [
        UnitRecord(0, "a", sums=((1.0, 1.0),), first_us=99),
        UnitRecord(1, "b", sums=((0.0, 2.0),), first_us=50),
        UnitRecord(0, "a", sums=((1.0, 1.0),), first_us=100),  # young
        UnitRecord(0, "a", first_us=1),  # no outcome
        UnitRecord(0, "a", switched=True, sums=((1.0, 1.0),), first_us=1),
    ]
    found = list(matured_pairs(records, 0, METRIC, 100))
    assert found == [((0, "a"), (1.0, 1.0)), ((1, "b"), (0.0, 2.0))]


@pytest.mark.parametrize("told", [True, False])
def test_guards_know_by_which_weights_a_unit_was_assigned(told: bool) -> None:
    """Units of the first phase stay half and half while the arm's weight is 5 % already."""
    now = {"a": 0.95, "b": 0.05}
    guard = FaultGuard(Guardrail("errors"), "a", EVEN, 0.01)
    guard.begin_phase(now)
    rng = np.random.default_rng(1)
    faults = [
        guard.observe(f"u{i}", arm, fault=True, weights=EVEN if told else None)
        for i, arm in enumerate(rng.choice(["a", "b"], 300))
        if rng.random() < 0.1
    ]
    assert any(breach is not None for breach in faults) is not told


@pytest.mark.parametrize("name", ["10 and 20 %", "10 and 13 %, outcomes late by 3 steps"])
def test_traffic_goes_where_less_is_lost(name: str) -> None:
    runs = [simulate(WORLDS[name], (0, 0, run), moves=True) for run in range(4)]
    even, _ = simulate(WORLDS[name], (0, 0, 0), moves=False)
    assert sum(lost for lost, _ in runs) / len(runs) < 0.8 * even
    assert min(share for _, share in runs) > 0.5
