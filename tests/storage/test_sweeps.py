"""The process is killed at every operation on a file of a compaction, and of the start after one.

That includes those of LMDB: the pages, the flush and the meta page of every transaction that stores
the manifest and purges the log.  After each kill every row is there exactly once.
"""

import asyncio
import json
import shutil
from functools import partial
from pathlib import Path

import pytest

from mlpd.core.time import HOUR_US, system_clock
from mlpd.storage import compact as compact_module
from mlpd.storage.compact import compact
from mlpd.storage.segments import store_manifest
from tests.storage.powercut.live import Store, batches, opened
from tests.storage.powercut.power import run_module, scratch
from tests.storage.powercut.shim import Shim
from tests.storage.powercut.sweep_child import SEGMENT_ROWS
from tests.storage.powercut.verify import Told, verify

BATCHES = 14


async def fill(store: Store, told: Told) -> None:
    await store.apply(told.hear_fact)
    for numbers in batches(0, BATCHES):
        await store.send(numbers, told.start_us, told.hear_fact)
    await store.register(1, told.hear_fact)


def leave_half_compacted(store: Store, rows_max: int) -> None:
    """A first compaction that wasn't purged, and files of a second one without a manifest."""
    with store.environment.snapshot() as snapshot:
        through = snapshot.sequence
    write = partial(compact, store.environment, store.data.segments, through=through)
    manifest = write(rows_max=rows_max)
    store.writer.write_blocking(lambda txn: store_manifest(txn, manifest))
    write(rows_max=rows_max)


@pytest.mark.timeout(240)
@pytest.mark.parametrize("torn", ["whole", "torn"])
@pytest.mark.parametrize("scenario", ["compacting", "starting"])
def test_rows_are_there_once_after_a_kill_at_any_operation(
    scenario: str, torn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compact_module, "SEGMENT_ROWS_MIN", SEGMENT_ROWS)
    told = Told(system_clock() - HOUR_US)
    with scratch() as directory:
        base, work = directory / "base", directory / "work"
        work.mkdir()
        with opened(base) as store:
            asyncio.run(fill(store, told))
            if scenario == "starting":
                leave_half_compacted(store, rows_max=len(told.events) // 2)
        operations, killed = sweep(scenario, base, work, torn)
        for number in killed:
            root = work / str(number)
            try:
                asyncio.run(verify(root, told.copy(), directory / "replay"))
            except Exception as error:
                error.add_note(f"killed at operation {number} of {operations} of {scenario}")
                raise
            shutil.rmtree(root)
        assert len(killed) == operations if torn == "whole" else 0 < len(killed) < operations
        assert operations > LEAST[scenario]


LEAST = {"compacting": 60, "starting": 30}
"""Operations of each scenario, at least: that the sweep sees what it is there for."""


def sweep(scenario: str, base: Path, work: Path, torn: str) -> tuple[int, list[int]]:
    """Run the scenario once per operation, killed there; return how many, and where it was."""
    with Shim(work, work.parent / "shim") as shim:
        arguments = (scenario, base, work, shim.control_path, torn)
        done = run_module("sweep_child", *arguments, environment=shim.environment())
        assert done.returncode == 0, done.stderr[-3000:]
        operations, killed = json.loads(done.stdout)
        return operations, killed
