"""kill -9 of an owner and of its follower, at random moments: both come to the same bytes."""

import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mlpd.client import Client
from mlpd.core.errors import MlpdError
from mlpd.core.time import system_clock
from mlpd.storage.environment import Environment
from mlpd.storage.tables import Table
from tests.cluster import moving as t
from tests.cluster.replicas import eventually, make_map
from tests.conftest import PROFILE, Process

pytestmark = pytest.mark.timeout(900)
KILLS = 20 if PROFILE == "nightly" else 3


def tables(directory: Path) -> dict[Any, Any]:
    with (
        Environment.open(directory / "lmdb", clock=system_clock, readonly=True) as environment,
        environment.snapshot() as snapshot,
    ):
        return {table: list(snapshot.scan(table)) for table in Table}


@pytest.fixture
def running(tmp_path: Path) -> Iterator[list[Process]]:
    made = [Process(tmp_path / name) for name in ("owner", "follower")]
    try:
        yield made
    finally:
        for process in made:
            if hasattr(process, "process"):
                process.process.kill()
                process._reap()


def keep_port(process: Process) -> None:
    process.options = ("--port", process.url.rsplit(":", 1)[1])


def test_killed_again_and_again_a_follower_comes_to_the_bytes_of_its_owner(
    running: list[Process],
) -> None:
    owner, follower = running
    keep_port(owner.start())
    make_map({"a": owner.url})
    with Client(owner.url) as client:
        client.apply(t.DOCUMENT)
    follower.options = ("--follow", owner.url)
    keep_port(follower.start())
    acknowledged, stop = [0], threading.Event()

    def write() -> None:
        with Client(owner.url, timeout_s=30) as client:
            while not stop.is_set():
                row = {"at": time.time_ns() // 1000, "n": 1, "user": "u1", "shop": "s1"}
                key, done = f"k{acknowledged[0]}", False
                while not done and not stop.is_set():
                    try:
                        client.events.send("sales", [row], idempotency_key=key)
                        done = True
                    except MlpdError:
                        time.sleep(0.05)
                acknowledged[0] += done

    rng, thread = random.Random(PROFILE), threading.Thread(target=write)
    thread.start()
    try:
        for turn in range(KILLS):
            victim = running[turn % 2]
            time.sleep(rng.uniform(0.1, 0.8))
            victim.kill()
            victim.start()
    finally:
        stop.set()
        thread.join()

    def heads() -> list[str]:
        found = []
        for process in running:
            with Client(process.url, timeout_s=10) as client:
                found.append(client.cluster.role()["head"])
        return found

    eventually(lambda: len(set(heads())) == 1)
    with Client(owner.url) as client:
        found = client.read_features("users", entities=[{"user": "u1"}])
    for process in running:
        process.kill()
    # Between the last look and the kill the owner may have committed something of its own.
    left, right = (tables(process.directory) for process in running)
    if left[Table.META] == right[Table.META]:
        assert left == right
    assert left[Table.LOG] == right[Table.LOG]
    assert left[Table.ONLINE] == right[Table.ONLINE]
    assert found["columns"]["by_user.count_1d"][0] in (acknowledged[0], acknowledged[0] + 1)
    assert acknowledged[0] > 3
