"""Team draft and what clicks on it say: fair, repeatable, exact, and right at every look."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from mlpd.experiments.interleaving import Credits, draft_list, judge


@given(st.permutations(range(9)), st.permutations(range(9)), st.text())
def test_a_list_has_every_item_once_and_each_team_half(
    first: list[int], second: list[int], unit: str
) -> None:
    drafted = draft_list("e", unit, first, second)
    assert sorted(item for item, _ in drafted) == list(range(9))
    for end in range(1, 10):
        teams = [team for _, team in drafted[:end]]
        assert abs(teams.count(0) - teams.count(1)) <= 1
    left = set(range(9))
    for item, team in drafted:  # each pick is its team's best of what is left
        assert item == next(i for i in (first, second)[team] if i in left)
        left.discard(item)
    assert drafted == draft_list("e", unit, first, second)


def test_each_team_begins_as_often_and_by_unit() -> None:
    begins = [draft_list("e", f"u{i}", [0, 1], [0, 1])[0][1] for i in range(4_000)]
    assert 0.47 < np.mean(begins) < 0.53
    assert begins != [draft_list("other", f"u{i}", [0, 1], [0, 1])[0][1] for i in range(4_000)]


PAIRS = [(0, 0), (3, 0), (10, 12), (40, 75), (900, 1_100), (500_100, 499_000)]


@pytest.mark.parametrize("pair", PAIRS)
def test_the_sign_test_is_scipys(pair: tuple[int, int]) -> None:
    n = sum(pair)
    expected = stats.binomtest(pair[0], n).pvalue if n else 1.0
    assert judge(n, n, *pair, 0.05).p_value == pytest.approx(expected, rel=1e-9)


def test_the_interval_ends_where_the_mixture_excludes() -> None:
    found = judge(100, 100, 30, 70, 0.05)
    assert found.low is not None
    assert found.high is not None
    for share in (found.low, found.high):
        mixture = stats.betabinom(100, 0.5, 0.5).pmf(70) / stats.binom(100, share).pmf(70)
        assert mixture == pytest.approx(1 / 0.05, rel=1e-6)
    assert (found.verdict, found.share) == ("better", 0.7)
    assert judge(100, 100, 70, 30, 0.05).verdict == "worse"
    assert judge(5, 5, 0, 5, 0.05).high == 1.0
    assert judge(7, 0, 0, 0, 0.05).share is None


def test_a_fair_coin_is_called_at_no_look_too_often() -> None:
    rng = np.random.default_rng(5)
    called = 0
    for _ in range(100):
        second = np.cumsum(rng.random(600) < 0.5)
        called += any(
            judge(n, n, n - int(second[n - 1]), int(second[n - 1]), 0.05).e_value >= 20
            for n in range(20, 601, 20)
        )
    assert called / 100 <= 0.05


def test_credits_are_taken_back_without_residue() -> None:
    credits_ = Credits()
    for unit in ("a", "b", "c", "d"):
        credits_.show(unit)
    for unit, team, clicks in (("a", 0, 1), ("a", 1, 1), ("b", 1, 1), ("c", 0, 1), ("x", 0, 1)):
        credits_.add(unit, team, clicks)
    credits_.add("c", 0, -1)
    found = credits_.preference(0.05)
    assert (found.lists, found.clicked, found.first, found.second) == (4, 2, 0, 1)


CLICK = st.tuples(st.sampled_from("abcd"), st.integers(0, 1), st.integers(1, 3))


@given(st.lists(CLICK), st.data())
def test_what_is_counted_is_what_units_prefer(
    clicks: list[tuple[str, int, int]], data: st.DataObject
) -> None:
    credits_, kept = Credits(), {unit: [0, 0] for unit in "abc"}
    for unit in kept:
        credits_.show(unit)
    taken_back = data.draw(st.lists(st.sampled_from(clicks), unique=True)) if clicks else []
    for sign, part in ((1, clicks), (-1, taken_back)):
        for unit, team, count in part:
            credits_.add(unit, team, sign * count)
            if unit in kept:
                kept[unit][team] += sign * count
    found, pairs = credits_.preference(0.05), kept.values()
    counted = (found.lists, found.clicked, found.first, found.second)
    assert counted == (
        len(credits_),
        sum(a + b > 0 for a, b in pairs),
        sum(a > b for a, b in pairs),
        sum(b > a for a, b in pairs),
    )
