"""Moves that end at any of their steps, by whichever side: finished or cancelled, nothing lost."""

import random
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from mlpd.client import Client
from mlpd.cluster.members import connections
from mlpd.cluster.moving import cancel, newest_map, pending
from mlpd.core.errors import ConflictError, MlpdError
from mlpd.core.shards import ShardMap
from tests.cluster import moving as t
from tests.conftest import PROFILE, Process

pytestmark = pytest.mark.timeout(900)

NIGHTLY = PROFILE == "nightly"
KILLS = 40 if NIGHTLY else 4
STRIDE = 3 if PROFILE == "default" else 1
"""The driver ends at each step in nightly and before a merge, else at each third."""
MOVED = range(3000)


def fill(running: list[str], rows: int = 90) -> tuple[Any, Any]:
    """Apply, send events; return what is counted."""
    for url in running:
        with Client(url) as client:
            client.apply(t.DOCUMENT)
    now_us = time.time_ns() // 1000
    with Client(running) as client:
        events = [
            {"at": now_us - i, "n": i, "user": t.USERS[i % 30], "shop": t.SHOPS[i * 7 % 29]}
            for i in range(rows)
        ]
        assert client.events.send("sales", events)["accepted"] == rows
    return t.counts_of(running)


def pending_at(made: ShardMap) -> list[Any]:
    with connections("test") as connect:
        return list(pending(newest_map(made, connect), connect))


def cancel_all(made: ShardMap) -> None:
    """Cancel what is under way, or find that it is done."""
    with connections("test") as connect:
        newest = newest_map(made, connect)
        for part in list(pending(newest, connect)):
            cancel(newest, part, connect)


def test_a_driver_that_ends_anywhere_is_followed_by_one_that_finishes_or_cancels(
    three: Any, cluster_module: Any
) -> None:
    m, urls = cluster_module, [edge.url for edge in three]
    made = m.give_map(three)
    want = fill(urls)
    seen: list[str] = []
    number, turn, ended = 1, 0, True
    while ended:
        for finish in (True, False) if NIGHTLY else (bool(turn % 2),):
            owner = made.owner(MOVED[0]).name
            target = "b" if owner == "a" else "a"
            hook, steps = t.ends_at(number)
            ended = False
            try:
                made, _ = t.move(made, MOVED, target, hook)
            except t.Ended:
                ended = True
            seen = max(seen, steps, key=len)
            if not finish:
                try:
                    cancel_all(made)
                except ConflictError as error:
                    assert error.code == "move_done", error
            made, _ = t.move(made, MOVED, target)
            assert made.owner(MOVED[0]).name == target, steps
            assert not pending_at(made)
            assert t.counts_of(urls) == want, steps
            turn += 1
        number += STRIDE
    assert turn > 20 // STRIDE
    assert {"after leave pause", "after arrive seal", "after leave leave"} <= set(seen)


@pytest.fixture
def members(tmp_path: Path, transform_cache: Path) -> Iterator[dict[str, Process]]:
    """Daemons a, b, c in processes of their own, on ports that they keep."""
    running: dict[str, Process] = {}
    try:
        for name in "abc":
            (tmp_path / name / "cache").mkdir(parents=True)
            (tmp_path / name / "cache" / "kernels").symlink_to(transform_cache)
            running[name] = Process(tmp_path / name).start()
            running[name].options = ("--port", running[name].url.rsplit(":", 1)[1])
        yield running
    finally:
        for process in running.values():
            process.process.kill()
            process._reap()


def make_cluster(m: Any, members: dict[str, Process]) -> ShardMap:
    made: ShardMap = m.first_map("0f" * 16, [m.Shard(name, p.url) for name, p in members.items()])
    for name, process in members.items():
        with Client(process.url) as client:
            client.cluster.put_map(made.to_dict(), shard=name, expected=0)
    return made


def move_whole(made: ShardMap) -> tuple[ShardMap, list[str]]:
    """Move to b; return the new map and the steps after which a daemon may be killed."""
    hook, steps = t.ends_at(0)
    made, _ = t.move(made, MOVED, "b", hook)
    return made, [step for step in steps if step.startswith("after")]


def move_killed(
    made: ShardMap, members: dict[str, Process], steps: list[str], rng: random.Random
) -> tuple[ShardMap, str]:
    """Move to the other one of a and b, and again as one of them is killed after a random step."""
    target = "b" if made.owner(MOVED[0]).name == "a" else "a"
    number, victim = rng.randrange(len(steps)) + 1, rng.choice("ab")
    count = 0

    def strike(step: str) -> None:
        nonlocal count
        count += step.startswith("after")
        if count == number and step.startswith("after"):
            members[victim].kill()

    with suppress(MlpdError):
        t.move(made, MOVED, target, strike)
    members[victim].start()
    made, _ = t.move(made, MOVED, target)
    assert made.owner(MOVED[0]).name == target
    return made, f"{victim} killed {steps[number - 1]}"


def test_daemons_that_are_killed_at_any_step_hold_all_afterwards(
    members: dict[str, Process], cluster_module: Any
) -> None:
    urls = [process.url for process in members.values()]
    made = make_cluster(cluster_module, members)
    want = fill(urls)
    made, steps = move_whole(made)
    rng = random.Random(PROFILE)
    for _ in range(KILLS):
        made, killed = move_killed(made, members, steps, rng)
        assert not pending_at(made)
        assert t.counts_of(urls) == want, killed


def serve(members: dict[str, Process], m: Any, archive: bytes) -> ShardMap:
    """Make a cluster that holds sales and serves the route person."""
    made = make_cluster(m, members)
    for process in members.values():
        with Client(process.url) as client:
            client.apply(m.DOCUMENT)
            client.models.adopt(archive)
            client.models.move_alias("person", "champion", 1)
            arms = [{"model": "person@champion"}]
            client.routes.put("person", {"service": "person", "arms": arms})
    with Client([process.url for process in members.values()]) as client:
        client.events.send("sales", m.sale_columns(200))
    return made


def archive_of(trio: Any) -> bytes:
    with Client(trio.single.url) as client:
        found: bytes = client.models.archive("person", 1)
        return found


def test_no_kill_loses_or_doubles_what_was_served(
    members: dict[str, Process], trio: Any, cluster_module: Any
) -> None:
    """The sweep of above, with predictions and labels; some more come after each move."""
    m, urls = cluster_module, [process.url for process in members.values()]
    made = serve(members, m, archive_of(trio))
    ids: list[str] = []
    labelled: list[str] = []

    def serve_more() -> None:
        with Client(urls) as client:
            rows = [{"user": name, "age": 0.5} for name in m.USERS]
            new = [one["prediction_id"] for one in client.predict("person", rows)["predictions"]]
            labels = [{"prediction_id": name, "label": name[-1] > "7"} for name in new[::2]]
            assert client.feedback(labels)["joined"] == len(labels)
        ids.extend(new)
        labelled.extend(new[::2])

    serve_more()
    made, steps = move_whole(made)
    rng = random.Random(f"served {PROFILE}")
    for _ in range(KILLS):
        made, _ = move_killed(made, members, steps, rng)
        t.check_served(urls, ids, labelled)
        serve_more()
    t.check_served(urls, ids, labelled)


def test_moves_under_load_of_predictions_and_labels_lose_nothing_and_double_nothing(
    members: dict[str, Process], trio: Any, cluster_module: Any
) -> None:
    m, urls = cluster_module, [process.url for process in members.values()]
    made = serve(members, m, archive_of(trio))
    serving, pauses = t.Serving(urls, m.USERS), []
    sent = 0
    with serving.running():
        time.sleep(0.5)
        for target in ("b", "c", "a") * (10 if NIGHTLY else 1):
            made, moved = t.move(made, range(5461), target)
            pauses += [one.pause_s for one in moved]
            with Client(urls) as client:
                columns = {k: v[sent : sent + 50] for k, v in m.sale_columns().items()}
                sent += client.events.send("sales", columns)["accepted"]
    print("pauses in ms:", [round(1000 * pause) for pause in sorted(pauses)])  # noqa: T201 - a measurement
    waits = [round(1000 * wait) for wait in sorted(serving.waits_s)]
    print("longest predictions in ms:", waits[-8:], "of", len(waits))  # noqa: T201 - a measurement
    assert not serving.failures
    assert len(serving.ids) > 20
    t.check_served(urls, serving.ids, serving.labelled)
    for url in urls:
        with Client(url) as client:
            assert client.run_consistency()["mismatches"] == 0


def test_moves_under_load_lose_nothing_and_double_nothing(
    members: dict[str, Process], cluster_module: Any
) -> None:
    urls = [process.url for process in members.values()]
    made = make_cluster(cluster_module, members)
    for url in urls:
        with Client(url) as client:
            client.apply(t.DOCUMENT)
    load, pauses = t.Load(urls), []
    with load.running():
        time.sleep(0.5)
        for target in ("b", "c", "a") * (10 if NIGHTLY else 2):
            made, moved = t.move(made, range(5461), target)
            pauses += [one.pause_s for one in moved]
            time.sleep(0.2)
    print("pauses in ms:", [round(1000 * pause) for pause in sorted(pauses)], "reads", load.reads)  # noqa: T201 - a measurement
    waits = [round(1000 * wait) for wait in sorted(load.waits_s)]
    print("longest writes in ms:", waits[-8:], "of", len(waits))  # noqa: T201 - a measurement
    assert not load.wrong
    assert not load.failures
    users, shops = t.counts_of(urls)
    assert {name: count for name, count in users.items() if count} == dict(load.users)
    assert {name: count for name, count in shops.items() if count} == dict(load.shops)
