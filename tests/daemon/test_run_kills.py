"""kill -9 of daemons and of what they train with, at random moments: no run is lost or doubled.

The default is a small number; HYPOTHESIS_PROFILE=nightly does a hundred, in some 15 minutes.
"""

import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from mlpd.client import Client
from mlpd.core.errors import MlpdError
from tests.conftest import PROFILE, Process, children_of

KILLS = 100 if PROFILE == "nightly" else 6
LONGEST_S = 4.0
"""A kill comes this long after the last one at most: a training takes some three seconds."""
DEADLINE_S = 45.0
REPOSITORY = Path(__file__).parents[2]
SCRIPT = REPOSITORY / "tests" / "plugins" / "ridge_script.py"
COMMAND = REPOSITORY / "plugins" / "mlpd_command"


@dataclass
class Story:
    """What was acknowledged, and what was killed."""

    process: Process
    mark: str
    chance: random.Random
    acknowledged: list[str] = field(default_factory=list)
    killed: Counter[str] = field(default_factory=Counter)

    def start_run(self) -> None:
        """Queue a run; it counts once the daemon has answered."""
        job = self.chance.choice(["quick", "program"])
        with suppress(MlpdError), Client(self.process.url) as client:
            self.acknowledged.append(client.runs.start(job)["run_id"])

    def kill(self) -> None:
        """Kill the daemon, a training child or its program, whatever is there."""
        daemon = self.process.process.pid
        children = [pid for pid in children_of(daemon) if is_training(pid)]
        programs = [pid for child in children for pid in children_of(child)]
        victims = {"daemon": [daemon], "child": children, "program": programs}
        there = [name for name, pids in victims.items() if pids]
        what = self.chance.choice(there)
        self.killed[what] += 1
        if what != "daemon":
            with suppress(ProcessLookupError):
                os.kill(victims[what][0], signal.SIGKILL)
            return
        self.process.kill()
        wait_for(lambda: not marked(self.mark), "processes outlived their daemon")
        self.process.start()


def is_training(pid: int) -> bool:
    return b"train" in command_of(pid).split(b"\0")


def command_of(pid: int | str) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def marked(mark: str) -> list[int]:
    """Return every process that works for the test's daemon: by environment, or command line."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal() and int(entry.name) != os.getpid():
            with suppress(OSError):
                environment = (entry / "environ").read_bytes()
                if mark.encode() in environment + command_of(entry.name):
                    found.append(int(entry.name))
    return found


def wait_for(reached: Callable[[], Any], problem: str, seconds: float = DEADLINE_S) -> None:
    deadline_s = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < deadline_s, problem
        time.sleep(0.02)


@pytest.fixture
def story(daemon_directory: Path, tmp_path: Path) -> Iterator[Story]:
    """A daemon whose processes can be told from all others, with a program to train with."""
    config = tmp_path / "mlpd.toml"
    config.write_text(
        "[training]\nthreads = 1\nconcurrency = 2\n"
        f'[plugins]\npaths = ["{COMMAND}"]\ncommands = ["ridge = {sys.executable} {SCRIPT}"]\n'
    )
    mark = f"kills-{os.getpid()}-{time.monotonic_ns()}"
    environment = {**os.environ, "MLPD_TEST": mark}
    process = Process(daemon_directory, options=("--config", str(config)), environment=environment)
    try:
        yield Story(process.start(), mark, random.Random(PROFILE))
    finally:
        with suppress(ProcessLookupError):
            process.process.kill()
        process._reap()
        for pid in marked(mark):
            os.kill(pid, signal.SIGKILL)


def two_jobs(document: dict[str, Any]) -> dict[str, Any]:
    quick = document["jobs"]["quick"]
    program = {**quick, "model": "program", "trainer": "command", "params": {"command": "ridge"}}
    return {**document, "jobs": {"quick": quick, "program": program}}


@pytest.mark.timeout(60 * KILLS)
def test_no_run_is_lost_or_published_twice(
    story: Story, trainable: Any, click_columns: Any
) -> None:
    with Client(story.process.url) as client:
        client.apply(two_jobs(trainable))
        client.events.send("clicks", click_columns)
    for _ in range(KILLS):
        story.start_run()
        time.sleep(story.chance.uniform(0, LONGEST_S))
        story.kill()
    with Client(story.process.url) as client:
        ended = {
            run_id: client.runs.wait(run_id, timeout_s=10 * DEADLINE_S)
            for run_id in story.acknowledged
        }
        versions = [
            version
            for model in client.models.list()["models"]
            for version in client.models.get(model["name"])["versions"]
        ]
        moves = [
            move
            for model in ("quick", "program")
            if any(found["name"] == model for found in client.models.list()["models"])
            for move in client.models.history(model, alias="champion")["events"]
        ]
    check_ends(ended)
    publications = Counter(version["created_by"] for version in versions)
    succeeded = {run_id for run_id, run in ended.items() if run["state"] == "succeeded"}
    assert set(publications.values()) <= {1}, "a run was published twice"
    assert {f"run {run_id}" for run_id in succeeded} <= publications.keys()
    assert set(Counter(move["by"] for move in moves).values()) <= {1}, "an alias moved twice"
    story.process.stop()
    wait_for(lambda: not marked(story.mark), "processes outlived their daemon")
    sys.stdout.write(
        f"{KILLS} kills ({dict(story.killed)}), {len(ended)} runs acknowledged, "
        f"{len(succeeded)} published, {len(ended) - len(succeeded)} ended as failed\n"
    )


def check_ends(ended: dict[str, Any]) -> None:
    """Every run came to an end; one that failed had its program killed, or was lost three times."""
    assert ended
    for run in ended.values():
        if run["state"] == "succeeded":
            continue
        assert run["state"] == "failed", run
        assert run["error"]["code"] in ("command_failed", "run_lost"), run
        assert run["error"]["code"] != "run_lost" or run["attempt"] == 3, run
