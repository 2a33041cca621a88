"""Shadows behind a real daemon: they score what was served, and are the first to wait."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mlpd.client import Client
from tests.http import edge as edges

BODY = {"rows": [{"user": "abc"[i % 3], "age": i / 7} for i in range(9)]}


@pytest.fixture(scope="module")
def edge(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    folder: Path = tmp_path_factory.mktemp("shadows")
    with edges.serve(folder / "data") as running:
        edges.fill(running)
        edges.train_another(running)
        route = {"service": "risk", "arms": [{"model": "risk@1"}], "shadows": ["risk@2"]}
        with Client(running.url) as client:
            client.routes.put("shadowed", route)
        yield running


def executed(edge: Any) -> int:
    return int(edge.daemon.shadows.counters()["executed"])


def wait(reached: Callable[[], bool]) -> None:
    stop = time.monotonic() + 20
    while not reached():
        assert time.monotonic() < stop
        time.sleep(0.01)


def test_a_shadow_scores_what_the_primary_served(edge: Any) -> None:
    before = executed(edge)
    status, answer, _ = edge.call("POST", "/v1/predict/shadowed", BODY)
    assert (status, {row["version"] for row in answer["predictions"]}) == (200, {1})
    wait(lambda: executed(edge) == before + 9)
    (pair,) = edge.call("GET", "/v1/shadows")[1]["shadows"]
    assert (pair["route"], pair["primary"], pair["shadow"]) == ("shadowed", "risk@1", "risk@2")
    assert pair["n"] == before + 9
    assert pair["max_abs"] > 0.0


def test_shadows_wait_while_requests_crowd_and_catch_up_afterwards(edge: Any) -> None:
    limit, before = edge.daemon.limits["predict"], executed(edge)
    limit.in_flight += limit.limit // 2  # as if so many were under way
    try:
        assert edge.call("POST", "/v1/predict/shadowed", BODY)[0] == 200
        time.sleep(0.4)  # eight periods
        assert executed(edge) == before
        assert edge.daemon.shadows.counters()["waiting"] == 9
    finally:
        limit.in_flight -= limit.limit // 2
    wait(lambda: executed(edge) == before + 9)
