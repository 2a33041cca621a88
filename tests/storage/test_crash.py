"""kill -9 at random moments of ingest and compaction: what was acknowledged is there, once."""

import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from mlpd.core.time import system_clock
from mlpd.storage.check import check, check_pages
from mlpd.storage.environment import Environment
from mlpd.storage.files import DataDirectory
from mlpd.storage.offline import scan_events

KILLS = 20

INGEST = '''
import asyncio, sys
from pathlib import Path
import numpy as np
from mlpd.core.columns import DType
from mlpd.core.convert import column_of
from mlpd.core.time import system_clock
from mlpd.storage.compact import compact
from mlpd.storage.compactor import Compactor
from mlpd.storage.environment import Environment
from mlpd.storage.files import DataDirectory
from mlpd.storage.log import RecordKind, append
from mlpd.storage.writer import Writer

data, first, compacting = DataDirectory(Path(sys.argv[1])), int(sys.argv[2]), sys.argv[3] == "1"


async def ingest(writer, numbers):
    """Append events with numbers of their own, one to three a batch, telling each that is acked."""
    while True:
        batch = [next(numbers) for _ in range(1 + next(numbers) % 3)]
        columns = {"n": column_of(DType.INT64, batch)}
        times = np.array(batch) * 3_600_000_000

        def op(txn):
            return append(
                txn, kind=RecordKind.EVENTS, source="s", columns=columns, event_us=times
            )

        sequence, _ = await writer.write(op)
        told = "".join(f"{sequence + i} {n}\\n" for i, n in enumerate(batch))
        sys.stdout.write(told)
        sys.stdout.flush()


class SameProcess(Compactor):
    """Compacts in this process, so that the kill hits it too."""

    async def _run_child(self, through):
        environment = self._environment
        manifest = await asyncio.to_thread(
            compact, environment, data.segments, through=through, rows_max=300
        )
        return manifest.encode()


async def main():
    environment = Environment.open(data.lmdb, clock=system_clock)
    writer = Writer(environment)
    compactor = SameProcess(environment, writer, data)
    await compactor.start()
    numbers = iter(range(first, sys.maxsize))
    async with asyncio.TaskGroup() as group:
        for _ in range(4):
            group.create_task(ingest(writer, numbers))
        while compacting:
            if await compactor.run():
                print("compacted", flush=True)


asyncio.run(main())
'''


@pytest.mark.timeout(120)
def test_killed_ingest_loses_and_doubles_nothing(tmp_path: Path) -> None:
    data = DataDirectory(tmp_path / "data")
    rng = random.Random()
    acknowledged: dict[int, int] = {}
    compacted = 0
    for kill in range(KILLS):
        told = b"compacted" if kill % 4 == 1 else b""
        acknowledged |= ingest_until_killed(data, kill * 1_000_000, kill % 2 == 1, told, rng)
        frame = check_store(data)
        found = dict(frame.rows())
        assert frame.height == len(found) == frame["n"].n_unique()
        assert sorted(found) == list(range(1, frame.height + 1))
        missing = acknowledged.items() - found.items()
        assert not missing, f"lost after kill {kill}: {sorted(missing)[:5]}"
        compacted = len(list(data.segments.rglob("*.parquet")))
    assert len(acknowledged) > KILLS
    assert compacted > 0
    assert check_pages(data) == []


def ingest_until_killed(
    data: DataDirectory, first: int, compacting: bool, told: bytes, rng: random.Random
) -> dict[int, int]:
    """Return number by sequence of every event that a killed child said was acknowledged.

    It is killed a little after a line that begins with `told`.
    """
    command = [sys.executable, "-c", INGEST, str(data.root), str(first), str(int(compacting))]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        lines = [child.stdout.readline()]
        while lines[-1] and not lines[-1].startswith(told):
            lines.append(child.stdout.readline())
        time.sleep(rng.uniform(0.001, 0.9 if compacting else 0.2))
        child.kill()
        lines += child.stdout.readlines()
    assert child.returncode == -9
    whole = [line for line in lines if line.endswith(b"\n") and line != b"compacted\n"]
    return {int(s): int(n) for s, n in (line.split() for line in whole)}


def check_store(data: DataDirectory) -> Any:
    """Return (sequence, n) of all events after the kill; fsck finds nothing."""
    with Environment.open(data.lmdb, clock=system_clock, readonly=True) as environment:
        assert check(environment, data) == []
        frame = scan_events(environment, data.segments, "s").collect()
    return frame.select("__sequence", "n").sort("__sequence")
