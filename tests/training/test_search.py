"""Searches: bounded, pruned, and killed and taken up the same as in one go."""

import importlib.util
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from mlpd.core.errors import UnavailableError
from mlpd.core.specs import SearchRange, SearchSpec
from mlpd.training.search import Outcome, Search, Trial, Watch

pytest.importorskip("optuna", reason="pip install 'mlpd[search]'")

SPACE: dict[str, Any] = {
    "rate": SearchRange(0.001, 1.0, log=True),
    "leaves": SearchRange(4, 64),
    "kind": ("a", "b"),
}
SPEC = SearchSpec(trials=14, space=SPACE)


class Killed(BaseException):
    """Ends a search in the middle of a trial, as kill -9 does for the journal."""


def merit_of(params: Mapping[str, Any]) -> float:
    """Best at a rate of 0.1 with many leaves of kind b."""
    away = abs(math.log10(params["rate"]) + 1)
    return params["leaves"] / 64 - away - (params["kind"] == "a")


def evaluate(params: Mapping[str, Any], watch: Watch) -> Outcome:
    """Thirty rounds that come ever nearer to the merit."""
    merit = merit_of(params)
    for round_ in range(1, 31):
        if watch(round_, merit - 1 / round_):
            return Outcome(merit, round_)
    return Outcome(merit, 30)


def killed_in(trial: int) -> Callable[[Mapping[str, Any], Watch], Outcome]:
    """Evaluate, but die in the middle of this trial, counted from 0."""
    seen = iter(range(1_000))

    def run(params: Mapping[str, Any], watch: Watch) -> Outcome:
        if next(seen) == trial:
            watch(10, 0.0)
            raise Killed
        return evaluate(params, watch)

    return run


def open_search(path: Path, spec: SearchSpec = SPEC, *, name: str = "s", seed: int = 3) -> Search:
    return Search(path, spec, name=name, seed=seed)


def silent(_: list[Trial]) -> None:
    pass


def tried(trials: list[Trial]) -> list[tuple[Any, ...]]:
    return [(t.state, dict(t.params), t.merit, t.rounds) for t in trials]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[tuple[Any, ...]], bytes]:
    """What a search in one go tries, and its journal."""
    path = tmp_path_factory.mktemp("whole") / "journal"
    trials = open_search(path).run(evaluate, silent)
    return tried(trials), path.read_bytes()


def test_trials_stay_in_the_space_and_the_best_one_wins(tmp_path: Path) -> None:
    told: list[int] = []
    search = open_search(tmp_path / "journal", SearchSpec(40, SPACE, prune=False))
    trials = search.run(evaluate, lambda ended: told.append(len(ended)))
    assert told == list(range(40))
    for trial in trials:
        assert 0.001 <= trial.params["rate"] <= 1
        assert 4 <= trial.params["leaves"] <= 64
        assert isinstance(trial.params["leaves"], int)
        assert trial.merit == merit_of(trial.params)
    assert search.best == max(trials, key=lambda trial: trial.merit or -9.0)
    learned = [merit_of(t.params) for t in trials]
    assert sum(learned[20:]) / 20 > sum(learned[:10]) / 10 + 0.3  # it looks where it was good


@pytest.mark.parametrize("at", [0, 1, 6, 13])
def test_killed_and_taken_up_is_as_in_one_go(
    tmp_path: Path, whole: tuple[list[tuple[Any, ...]], bytes], at: int
) -> None:
    path = tmp_path / "journal"
    for trial in (at, 0):  # killed twice in the same trial
        with pytest.raises(Killed):
            open_search(path).run(killed_in(trial), silent)
    assert tried(open_search(path).trials) == whole[0][:at]
    assert tried(open_search(path).run(evaluate, silent)) == whole[0]


def test_a_journal_cut_off_anywhere_is_taken_up(
    tmp_path: Path, whole: tuple[list[tuple[Any, ...]], bytes]
) -> None:
    expected, journal = whole
    for number, end in enumerate(range(0, len(journal), len(journal) // 8)):
        path = tmp_path / str(number)
        path.write_bytes(journal[:end])
        assert tried(open_search(path).run(evaluate, silent)) == expected, end


def test_a_search_that_has_ended_tries_nothing_more(
    tmp_path: Path, whole: tuple[list[tuple[Any, ...]], bytes]
) -> None:
    path = tmp_path / "journal"
    path.write_bytes(whole[1])
    assert tried(open_search(path).run(killed_in(0), silent)) == whole[0]


def test_what_is_behind_is_given_up_and_never_the_best(tmp_path: Path) -> None:
    search = open_search(tmp_path / "journal", SearchSpec(25, SPACE))
    trials = search.run(evaluate, silent)
    pruned = [trial for trial in trials if trial.state == "pruned"]
    assert pruned
    assert all(trial.merit is None and trial.rounds < 30 for trial in pruned)
    assert all(trial.state == "complete" for trial in trials[:5])
    assert search.best is not None
    assert search.best.merit == max(t.merit for t in trials if t.merit is not None)


def test_time_bounds_it_over_attempts(tmp_path: Path) -> None:
    def slow(params: Mapping[str, Any], watch: Watch) -> Outcome:
        time.sleep(0.05)
        return evaluate(params, watch)

    spec = SearchSpec(1_000, SPACE, timeout_us=200_000)
    trials = open_search(tmp_path / "journal", spec).run(slow, silent)
    assert 1 <= len(trials) <= 4
    assert len(open_search(tmp_path / "journal", spec).run(slow, silent)) == len(trials)


def test_another_name_begins_anew(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    open_search(path, SearchSpec(3, SPACE)).run(evaluate, silent)
    assert open_search(path, SearchSpec(3, SPACE), name="other data").trials == []
    assert len(open_search(path, SearchSpec(3, SPACE)).trials) == 3


def test_without_optuna_it_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UnavailableError) as raised:
        open_search(tmp_path / "journal")
    assert (raised.value.code, raised.value.hint) == (
        "missing_extra",
        "pip install 'mlpd[search]'",
    )
