"""The process is killed at every operation on a file of a compaction, and of the start after one.

That includes those of LMDB: the pages and the meta page of every transaction that stores the
manifest and purges the log; a flush leaves nothing that the kill before it didn't.  After each kill
every row is there exactly once.
"""

import asyncio
import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from mlpd.core.time import DAY_US, HOUR_US, system_clock
from mlpd.storage import compact as compact_module
from mlpd.storage.compact import compact
from mlpd.storage.segments import store_manifest
from tests.storage.powercut.live import DOCUMENT, ERASABLE, Store, batches, expiring, opened
from tests.storage.powercut.power import run_module, scratch
from tests.storage.powercut.shim import Shim
from tests.storage.powercut.sweep_child import ERASED, SEGMENT_ROWS
from tests.storage.powercut.verify import Told, verify

BATCHES = 14


async def fill(store: Store, told: Told, document: dict[str, Any] = DOCUMENT) -> None:
    await store.apply(told.hear_fact, document)
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


async def compact_bit_by_bit(store: Store) -> None:
    while store.compactor.get_tail().rows:
        await store.compactor.run()


@pytest.mark.timeout(240)
@pytest.mark.parametrize("torn", ["whole", "torn"])
@pytest.mark.parametrize("scenario", ["compacting", "starting", "merging"])
def test_rows_are_there_once_after_a_kill_at_any_operation(
    scenario: str, torn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compact_module, "SEGMENT_ROWS_MIN", SEGMENT_ROWS)
    told = Told(system_clock() - HOUR_US)
    with scratch() as directory:
        base, work = directory / "base", directory / "work"
        work.mkdir()
        with opened(base, rows_max=1 if scenario == "merging" else 500_000) as store:
            asyncio.run(fill(store, told))
            if scenario == "merging":
                asyncio.run(compact_bit_by_bit(store))
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
        assert 0 < len(killed) < operations
        assert operations > LEAST[scenario]


async def fill_to_erase(store: Store, told: Told, document: dict[str, Any] = ERASABLE) -> None:
    """Some events in segments, some in the log's tail."""
    await fill(store, told, document)
    await store.compactor.run()
    for numbers in batches(1_000, 2):
        await store.send(numbers, told.start_us, told.hear_fact)


async def leave_half_erased(store: Store) -> None:
    """An order whose old files are still there, and whose views are still to be built."""

    class EndError(Exception):
        pass

    async def end(_: Any) -> Any:
        raise EndError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store.erase, "_rebuild", end)
        with pytest.raises(EndError):
            await store.erase.run("user", [{"user": ERASED}])


@pytest.mark.timeout(240)
@pytest.mark.parametrize("torn", ["whole", "torn"])
def test_old_history_is_there_or_gone_after_a_kill_at_any_operation(
    torn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compact_module, "SEGMENT_ROWS_MIN", SEGMENT_ROWS)
    now_us = system_clock()
    told, expired = Told(now_us - now_us % DAY_US - HOUR_US), 0
    with scratch() as directory:
        base, work = directory / "base", directory / "work"
        work.mkdir()
        with opened(base) as store:
            asyncio.run(fill_to_erase(store, told, expiring(now_us)))
        operations, killed = sweep("expiring", base, work, torn)
        for turn, number in enumerate(killed):
            root, heard = work / str(number), told.copy()
            try:
                going_on = turn % 10 == 0
                asyncio.run(verify(root, heard, directory / "replay", going_on=going_on))
            except Exception as error:
                error.add_note(f"killed at operation {number} of {operations} of expiring")
                raise
            expired += bool(heard.erased)
            shutil.rmtree(root)
        assert 0 < len(killed) < operations
        assert operations > LEAST["expiring"]
        assert 0 < expired < len(killed)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("torn", ["whole", "torn"])
@pytest.mark.parametrize("scenario", ["erasing", "resuming"])
def test_an_erasure_is_finished_after_a_kill_at_any_operation(
    scenario: str, torn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compact_module, "SEGMENT_ROWS_MIN", SEGMENT_ROWS)
    told = Told(system_clock() - HOUR_US)
    finished = 0
    with scratch() as directory:
        base, work = directory / "base", directory / "work"
        work.mkdir()
        with opened(base) as store:
            asyncio.run(fill_to_erase(store, told))
            if scenario == "resuming":
                asyncio.run(leave_half_erased(store))
        operations, killed = sweep(scenario, base, work, torn)
        for turn, number in enumerate(killed):
            root, heard = work / str(number), told.copy()
            try:
                going_on = turn % 10 == 0  # that it does is for the sweep above
                replay = directory / "replay"
                asyncio.run(verify(root, heard, replay, going_on=going_on, erased=ERASED))
            except Exception as error:
                error.add_note(f"killed at operation {number} of {operations} of {scenario}")
                raise
            finished += bool(heard.erased)
            shutil.rmtree(root)
        assert 0 < len(killed) < operations
        assert operations > LEAST[scenario]
        assert finished > len(killed) - 10
        assert (finished == len(killed)) == (scenario == "resuming")


LEAST = {
    "compacting": 60,
    "starting": 30,
    "merging": 40,
    "expiring": 30,
    "erasing": 100,
    "resuming": 30,
}
"""Operations of each scenario, at least: that the sweep sees what it is there for."""


def sweep(scenario: str, base: Path, work: Path, torn: str) -> tuple[int, list[int]]:
    """Run the scenario, killed at its operations; return how many it has, and where it was."""
    with Shim(work, work.parent / "shim") as shim:
        arguments = (scenario, base, work, shim.control_path, torn)
        done = run_module("sweep_child", *arguments, environment=shim.environment())
        assert done.returncode == 0, done.stderr[-3000:]
        operations, killed = json.loads(done.stdout)
        return operations, killed
