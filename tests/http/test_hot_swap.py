"""Versions swapped under load, over HTTP: nobody fails, nobody gets a mixture."""

import asyncio
import os
from collections import Counter
from pathlib import Path
from typing import Any

from aiohttp import ClientSession

from mlpd.client import Client
from tests.http import edge as edges

SWAPS, CLIENTS = int(os.environ.get("MLPD_SWAPS", "20")), 16
REQUESTS = 100 * SWAPS
BODY = {
    "rows": [{"user": "abc"[i % 3], "age": i / 7} for i in range(5)],
    "at": "2999-01-01T00:00:00Z",  # the same features for all, hence the same scores
}


def scores_of(edge: Any, version: int) -> tuple[float, ...]:
    with Client(edge.url) as client:
        client.models.move_alias("risk", "champion", version)
    status, answer, _ = edge.call("POST", "/v1/predict/risk", BODY)
    assert status == 200
    assert {row["version"] for row in answer["predictions"]} == {version}
    return tuple(row["score"] for row in answer["predictions"])


async def swap_under_load(url: str, expected: dict[int, tuple[float, ...]]) -> Counter[int]:
    """Ask from CLIENTS at once; one of them swaps whenever it is time, while the others go on."""
    answered, served = 0, Counter[int]()

    async def ask(session: ClientSession) -> None:
        nonlocal answered
        while answered < REQUESTS:
            async with session.post(f"{url}/v1/predict/risk", json=BODY) as response:
                assert response.status == 200, await response.text()
                rows = (await response.json())["predictions"]
            (version,) = {row["version"] for row in rows}
            assert tuple(row["score"] for row in rows) == expected[version]
            served[version] += 1
            answered += 1
            if answered % (REQUESTS // SWAPS) == 0:
                await swap(session, answered // (REQUESTS // SWAPS))

    async def swap(session: ClientSession, number: int) -> None:
        path = f"{url}/v1/models/risk/aliases/champion"
        async with session.put(path, json={"version": number % 2 + 1}) as response:
            assert response.status == 200, await response.text()

    async with ClientSession() as session, asyncio.TaskGroup() as group:
        for _ in range(CLIENTS):
            group.create_task(ask(session))
    return served


def test_swaps_under_load_neither_fail_nor_mix(tmp_path: Path) -> None:
    with edges.serve(tmp_path / "data") as edge:
        edges.fill(edge)
        edges.train_another(edge)
        expected = {version: scores_of(edge, version) for version in (1, 2)}
        assert expected[1] != expected[2]
        served = asyncio.run(swap_under_load(edge.url, expected))
    assert sum(served.values()) >= REQUESTS
    assert min(served.values()) >= REQUESTS // 4
