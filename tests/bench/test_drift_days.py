"""Days of the flights' year: what they were, and which of them are called drifted."""

import json
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pytest

from bench.drift_days import (
    DEMO,
    OTHERS,
    WIDTHS,
    as_demo,
    build_fold,
    case_of,
    drift_days,
    judge_days,
    judge_widths,
    months_apart,
)
from bench.flights_year import KINDS, Kind, Year, kind_of_share, kinds_of_days, load_year
from bench.options import Options
from bench.results import load
from mlpd.core.errors import UnavailableError
from tests.conftest import PROFILE

DAY_US = 86_400_000_000
CAUGHT = ("2013-02-08", "2013-02-09", "2013-12-09", "2013-12-10", "2013-12-14", "2013-12-17")
"""Of the storms of February and December all days but December 5."""
CAUGHT_BY = {OTHERS: CAUGHT, DEMO: ("2013-12-09", "2013-12-10", "2013-12-17")}


def number_of(day: str) -> int:
    return int(datetime.fromisoformat(day).replace(tzinfo=UTC).timestamp()) // 86_400


def name_of(day: int) -> str:
    return datetime.fromtimestamp(day * 86_400, UTC).date().isoformat()


def rate(flagged: Mapping[Kind, int], days: Mapping[Kind, int], kind: Kind = "ordinary") -> float:
    return flagged.get(kind, 0) / days[kind]


@pytest.fixture(scope="module")
def year() -> Year:
    try:
        return load_year()
    except UnavailableError as error:
        pytest.skip(f"{error.message}: {error.hint}")


@pytest.fixture(scope="module")
def kinds(year: Year) -> dict[int, Kind]:
    return kinds_of_days(year.day, year.failed)


@pytest.mark.parametrize(
    ("share", "kind"),
    [(0.0, "ordinary"), (0.1499, "ordinary"), (0.15, "rough"), (0.2499, "rough"), (0.25, "storm")],
)
def test_a_day_is_what_the_share_of_failed_flights_makes_it(share: float, kind: Kind) -> None:
    assert kind_of_share(share) == kind


def test_days_begin_with_the_eighth_and_have_a_hundred_flights() -> None:
    sizes = [*[100] * 9, 99, 200]
    day = np.repeat(np.arange(40, 51), sizes)
    failed = np.zeros(len(day), np.bool_)
    failed[np.flatnonzero(day == 50)[:50]] = True
    assert kinds_of_days(day, failed) == {47: "ordinary", 48: "ordinary", 50: "storm"}


def made_up_year() -> Year:
    """Return sixty days from January 25 on, of 400 flights each; February 20 is another world.

    A hundred flights in each quarter of a day, which has its own level of x.
    """
    rng = np.random.default_rng(4)
    first = number_of("2013-01-25")
    day = np.repeat(np.arange(first, first + 60), 400)
    quarter = np.tile(np.repeat(np.arange(4), 100), 60)
    x = rng.normal(size=len(day)) + 4.0 * quarter
    vectors = np.column_stack([x, rng.integers(0, 3, len(day))])
    odd = day == number_of("2013-02-20")
    vectors[odd] = [3.0, 7.0]
    return Year(
        names=("x", "code"),
        categorical=frozenset({1}),
        vectors=vectors,
        t_us=day * DAY_US + quarter * DAY_US // 4,
        landed=rng.random(len(day)) < 0.99,
        late=np.zeros(len(day)),
        failed=odd,
    )


def test_each_month_is_judged_by_landed_flights_of_the_others() -> None:
    made = made_up_year()
    kinds = kinds_of_days(made.day, made.failed)
    months = list(months_apart(made, kinds))
    assert sorted(day for _, days in months for day in days) == sorted(kinds)
    for reference, days in months:
        assert {name_of(day)[:7] for day in days} == {name_of(days[0])[:7]}
        others = {day for day in kinds if name_of(day)[:7] != name_of(days[0])[:7]}
        assert set(made.day[reference].tolist()) == others
        assert reference.sum() == np.isin(made.day, list(others))[made.landed].sum()


def test_a_day_of_another_world_is_flagged_and_shown() -> None:
    made = made_up_year()
    kinds = kinds_of_days(made.day, made.failed)
    judged = [
        one
        for reference, days in months_apart(made, kinds)
        for one in judge_days(made, build_fold(made, reference, days, with_score=False), kinds)
    ]
    notes = case_of(judged)["notes"]
    assert notes["days"] == {"ordinary": 52, "storm": 1}
    assert (notes["flagged"]["storm"], notes["flagged"]["ordinary"]) == (1, 0)
    shown = notes["shown"][0]
    assert (shown["day"], shown["drifted"]) == ("2013-02-20", ["x", "code"])
    code = next(one for one in judged if name_of(one.day) == "2013-02-20").report.features[1]
    assert code.missing_share == 1.0  # a category that the reference never had


def test_a_quarter_of_a_day_is_drift_by_thresholds_of_days_alone() -> None:
    made = replace(made_up_year(), landed=np.ones(24_000, np.bool_))
    kinds = kinds_of_days(made.day, made.failed)
    for reference, days in months_apart(made, kinds):
        calm = [day for day in days if kinds[day] == "ordinary"]
        fold = build_fold(made, reference & ~made.failed, calm, with_score=False)
        six_hours = [flags for width, *flags in judge_widths(fold) if width == DAY_US // 4]
        assert len(six_hours) == 4 * len(calm)
        own, by_days = np.array(six_hours).mean(axis=0)
        assert by_days == 1.0
        assert own <= 0.05


@pytest.mark.timeout(240)
def test_the_demos_reference_is_what_the_demo_trains_on(year: Year, kinds: dict[int, Kind]) -> None:
    reference, days = as_demo(year, kinds)
    before = year.landed & (year.t_us < number_of("2013-10-01") * DAY_US)
    assert reference.sum() == pytest.approx(0.7 * before.sum(), abs=1)
    assert year.t_us[reference].max() <= year.t_us[before & ~reference].min()
    assert [name_of(days[0]), name_of(days[-1])] == ["2013-10-01", "2013-12-31"]


@pytest.mark.timeout(240)
def test_the_storms_of_february_and_december_are_drift_and_few_other_days(
    year: Year, kinds: dict[int, Kind]
) -> None:
    """The features alone: a model for the score takes most of the time."""
    judged = [
        one
        for reference, days in months_apart(year, kinds)
        if name_of(days[0])[:7] in ("2013-02", "2013-12")
        for one in judge_days(year, build_fold(year, reference, days, with_score=False), kinds)
    ]
    flagged = {kind: {name_of(one.day)[5:] for one in judged if one.kind == kind and one.is_flagged}
               for kind in KINDS}  # fmt: skip
    assert flagged["storm"] == {day[5:] for day in CAUGHT}
    assert flagged["ordinary"] == {"02-10", "02-14", "12-31"}  # of 45
    assert sum(one.kind == "ordinary" and one.alone.state != "ok" for one in judged) > 3


@pytest.mark.parametrize("name", [OTHERS, DEMO])
def test_of_the_saved_days_few_ordinary_ones_are_flagged_and_the_storms_are(name: str) -> None:
    notes = load()["drift_days"]["cases"][name]["notes"]
    shown: dict[str, Any] = {one["day"]: one for one in notes["shown"]}
    assert all(shown[day]["kind"] == "storm" and shown[day]["drifted"] for day in CAUGHT_BY[name])
    assert rate(notes["flagged"], notes["days"]) <= 0.05
    assert rate(notes["flagged"], notes["days"]) < rate(notes["flagged_alone"], notes["days"])
    assert set(notes["days"]) == set(KINDS)


def test_of_the_saved_windows_of_six_hours_few_are_flagged_and_by_thresholds_of_days_all() -> None:
    notes = load()["drift_days"]["cases"][f"{WIDTHS}, 6 h"]["notes"]
    assert notes["windows"] > 1_000
    assert notes["flagged"] <= 0.1 * notes["windows"]
    assert notes["flagged_by_days"] == notes["windows"]


@pytest.mark.skipif(PROFILE != "nightly", reason="trains 13 models: two minutes of a processor")
@pytest.mark.timeout(1_800)
def test_the_whole_year_comes_out_as_it_was_saved() -> None:
    found = drift_days(Options())
    saved = load()["drift_days"]["cases"]
    assert set(found) == set(saved)
    for name, case in found.items():
        assert json.loads(json.dumps(case["notes"])) == saved[name]["notes"]
