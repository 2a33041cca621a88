"""180 kill -9 of a process that ingests, applies definitions and compacts: nothing is lost.

With the 20 of a whole daemon (tests/daemon) that makes 200, and test_crash.py adds 20 that look at
the log alone.
"""

import asyncio
import random
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from mlpd.core.time import HOUR_US, system_clock
from tests.storage.powercut.power import REPOSITORY
from tests.storage.powercut.verify import Told, verify

KILLS = 15
"""Per test; each has a data directory of its own, which lives on from kill to kill."""


@contextmanager
def killer(root: Path, start_us: int) -> Iterator["subprocess.Popen[bytes]"]:
    command = [sys.executable, "-m", "tests.storage.powercut.kill_child", str(root), str(start_us)]
    with subprocess.Popen(
        command, cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        try:
            yield child
            assert child.stdin is not None
            child.stdin.close()
            assert child.wait(20) == 0
        finally:
            child.kill()


MOMENTS = (("sent", 1, 30), ("applied", 1, 3), ("compacted", 1, 2), ("sent", 0, 0))
"""When a life is killed: a little after so many acknowledgements of a kind; or while it starts."""


def live(child: "subprocess.Popen[bytes]", life: int, rng: random.Random, told: Told) -> int:
    """Let a life begin, die, and tell what was acknowledged; return how often it compacted."""
    kind, least, most = MOMENTS[life % len(MOMENTS)]
    count, more_s = rng.randint(least, most), rng.uniform(0, 0.03)
    assert child.stdin is not None
    assert child.stdout is not None
    child.stdin.write(f"{life} {kind} {count} {more_s:f}\n".encode())
    child.stdin.flush()
    compacted = 0
    while (line := child.stdout.readline()) != b"end\n":
        assert line, "the killer is gone"
        told.hear(line)
        compacted += b"compacted" in line
    return compacted


@pytest.mark.parametrize("part", range(12))
def test_killed_writers_lose_and_double_nothing(part: int, tmp_path: Path) -> None:
    rng, root = random.Random(part), tmp_path / "data"
    told = Told(system_clock() - HOUR_US)
    compacted = 0
    with killer(root, told.start_us) as child:
        for life in range(KILLS):
            compacted += live(child, life, rng, told)
            asyncio.run(verify(root, told, tmp_path / "replay", going_on=life % 5 == 4))
    assert len(told.events) > KILLS
    assert told.applied > KILLS // 4
    assert compacted >= KILLS // 4
