"""The fleet that scenarios read from."""

import asyncio
from pathlib import Path

from bench.cluster import USERS, pick_requests
from bench.fleet import CLUSTER, count, cpu_s, open_fleet, read_all
from mlpd.cluster.placement import first_map
from mlpd.core.hashing import slot_of
from mlpd.core.keys import encode_texts
from mlpd.core.shards import Shard


def test_a_request_has_as_many_rows_of_each_shard() -> None:
    made = first_map(CLUSTER, [Shard(f"s{i}", f"http://h{i}:1") for i in range(4)])
    requests = pick_requests(made, 16)
    asked = [row["user"] for request in requests for row in request]
    assert len(asked) == len(set(asked)) > len(USERS) / 2
    for request in requests:
        owners = [made.owner(slot_of(key)).name for key in encode_texts(r["user"] for r in request)]
        assert sorted(owners) == sorted([shard.name for shard in made.shards] * 4)


def test_a_fleet_answers_by_every_way_and_one_router_keeps_rows(tmp_path: Path) -> None:
    users = [f"u{i}" for i in range(40)]
    requests = [[{"user": name} for name in users]]
    with open_fleet(tmp_path, 2, users, cache_s=60.0) as fleet:
        before = cpu_s(*fleet.pids)
        for url in (fleet.urls, fleet.router.url, fleet.cached.url):
            assert asyncio.run(read_all(url, requests, range(3))) > 0.0
        assert cpu_s(*fleet.pids) > before
        counted = count(fleet.router.url)
        assert counted["cache_hits"] == counted["cache_misses"] == 0.0
        assert counted["calls s00"] >= 4 <= counted["calls s01"]  # and for the map
        counted = count(fleet.cached.url)
        assert counted["cache_hits"] + counted["cache_misses"] == 4 * len(users)
        assert counted["cache_hits"] > 0.0 < counted["cache_misses"]
