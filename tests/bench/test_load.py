"""The load generator counts what was answered and compares in turns."""

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import msgpack
import pytest

from bench.load import Target, compare, run_round, spread
from bench.scenarios import SCENARIOS, bare
from bench.world import build_events


@pytest.fixture
def url(tmp_path: Path) -> Iterator[str]:
    with bare("ingest", tmp_path) as found:
        yield found


def test_spread_is_least_median_greatest() -> None:
    assert spread([3.0, 1.0, 2.0]) == {"min": 1.0, "median": 2.0, "max": 3.0}


def test_a_round_counts_answers_of_a_real_server(url: str) -> None:
    found = asyncio.run(run_round(Target(url, [b"body"]), concurrency=2, seconds=0.2))
    assert found.requests_per_s > 0
    assert 0 < found.p50_ms <= found.p99_ms


def test_a_comparison_of_a_target_with_itself_is_about_one(url: str) -> None:
    target = Target(url, [msgpack.packb({"x": 1})])
    found = compare(target, target, concurrency=1, seconds=0.2, rounds=2)
    assert 0.05 < found["ratio"]["median"] < 20.0


def test_a_refused_request_is_an_error_not_a_figure(url: str) -> None:
    with pytest.raises(RuntimeError, match="404"):
        asyncio.run(run_round(Target(f"{url}nowhere", [b""]), concurrency=1, seconds=0.2))


def test_the_command_lists_every_scenario() -> None:
    command = [sys.executable, "-m", "bench"]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert all(name in listed for name in SCENARIOS)


def test_the_made_up_events_fit_their_sources() -> None:
    events = build_events(50, now_us=1_700_000_000_000_000)
    assert {len(column) for column in events["arrivals"].values()} == {50}
    assert max(events["arrivals"]["event_time"]) < 1_700_000_000_000_000
