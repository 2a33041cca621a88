"""Thousands of histories of moves, maps and clients under faults; docs/decisions/simulation.md."""

import asyncio
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.clock import Loop, StuckError, Turns, run
from tests.cluster.histories import bugs
from tests.cluster.histories.nodes import lighter
from tests.cluster.histories.world import prepared, simulate
from tests.conftest import PROFILE

pytestmark = pytest.mark.timeout(900)

PARTS = 5
SEEDS = {"default": 50, "ci": 500, "nightly": 5000}[PROFILE]
BUG_SEEDS = 150
"""Within so many histories each planted bug is found; most within ten."""


@pytest.fixture(scope="module")
def place() -> Iterator[Path]:
    with lighter(), prepared() as root:
        yield root


@pytest.mark.parametrize("part", range(PARTS))
def test_no_seed_loses_doubles_or_misplaces_anything(place: Path, part: int) -> None:
    outcomes = [simulate(place, seed) for seed in range(part, SEEDS, PARTS)]
    assert {one.seed: one.violations for one in outcomes if one.violations} == {}
    assert sum(one.moves for one in outcomes) >= len(outcomes)
    assert sum(one.crashes for one in outcomes) >= len(outcomes) // 2


@pytest.mark.parametrize("bug", bugs.BUGS, ids=lambda bug: bug.__name__)
def test_a_planted_bug_is_found(
    place: Path, bug: Callable[[], AbstractContextManager[Any]]
) -> None:
    first = bugs.RARE.get(bug, 0)
    with bug():
        seeds = (*range(first, BUG_SEEDS), *range(first))
        assert any(_violates(place, seed) for seed in seeds)


def _violates(place: Path, seed: int) -> bool:
    return bool(simulate(place, seed).violations)


def test_a_seed_is_the_same_history_wherever_it_runs(place: Path) -> None:
    seeds = range(3)
    found = [simulate(place, seed, keep_trace=True) for seed in seeds]
    assert [simulate(place, seed).digest for seed in seeds] == [one.digest for one in found]
    assert len({one.digest for one in found}) == len(found)
    command = [sys.executable, "-m", "tests.cluster.histories", "--seed", "2", "--trace"]
    root = Path(__file__).parents[3]
    elsewhere = subprocess.run(  # noqa: PLW1510 - its code is looked at
        command, cwd=root, env={**os.environ, "PYTHONHASHSEED": "7"}, capture_output=True, text=True
    )
    assert elsewhere.returncode == 0, elsewhere.stderr
    *trace, summary = elsewhere.stdout.splitlines()
    assert trace == found[2].trace
    assert "1 seeds, 0 of them wrong" in summary


def test_what_waits_for_ever_is_told() -> None:
    async def wait() -> None:
        await asyncio.Event().wait()

    with pytest.raises(StuckError):
        run(Loop(), wait())


def test_work_that_takes_turns_is_killed_where_it_waits() -> None:
    done: list[str] = []

    def work() -> None:
        try:
            Turns.wait(lambda: asyncio.sleep(1.0))
            done.append("slept")
            Turns.wait(lambda: asyncio.sleep(1.0))
            done.append("slept again")
        finally:
            Turns.wait(lambda: asyncio.sleep(0.0))
            done.append("tidied up")

    async def main() -> float:
        task = asyncio.ensure_future(Turns(work).to_end())
        await asyncio.sleep(1.5)
        task.cancel()
        await asyncio.wait([task])
        return asyncio.get_running_loop().time()

    assert run(Loop(), main()) == pytest.approx(1.5)
    assert done == ["slept"]
