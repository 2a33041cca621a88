"""Scenarios: listed, on data that fits, and floors that do what ours does."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import msgpack
import pytest

from bench.bare import _read_plan
from bench.growth import _fill, _Store
from bench.scenarios import SCENARIOS
from bench.world import World, build_events, build_requests, open_world
from mlpd.core.time import system_clock
from mlpd.storage.environment import Environment


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    with open_world(tmp_path / "data", 500) as found:
        yield found


def test_the_command_lists_every_scenario() -> None:
    command = [sys.executable, "-m", "bench"]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert [line.split()[0] for line in listed.splitlines()] == list(SCENARIOS)


def test_the_made_up_events_fit_their_sources() -> None:
    events = build_events(50, now_us=1_700_000_000_000_000)
    assert {len(column) for column in events["arrivals"].values()} == {50}
    assert max(events["arrivals"]["event_time"]) < 1_700_000_000_000_000


def test_the_bare_read_gets_the_views_that_the_service_reads(world: World, tmp_path: Path) -> None:
    with Environment.open(tmp_path / "data" / "lmdb", clock=system_clock, readonly=True) as opened:
        width, entities = _read_plan(opened)
    answer = world.client.read_features("flight_risk", entities=build_requests(3))
    assert width == len(answer["columns"])
    assert {column for column, _ in entities} == {"carrier", "origin", "dest", "tailnum"}
    document = world.client.definitions()["document"]
    assert sum(len(ids) for _, ids in entities) == len(document["views"]) - 1  # tail_departures
    assert len(msgpack.packb(answer)) > 100


def test_growth_measures_what_it_filled(tmp_path: Path) -> None:
    found = _fill(_Store(tmp_path / "data", 300))
    assert 200 < found["online_bytes"] < 300  # a key and six words of values, twice
    assert found["online_page_bytes"] > found["online_bytes"]
    assert found["rows_per_s"] > 0
