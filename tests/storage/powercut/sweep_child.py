"""Child of the sweeps, under the shim: one process for every state of the files, ended in it.

    python -m tests.storage.powercut.sweep_child SCENARIO BASE WORK CONTROL TORN

BASE holds a data directory.  For k = 1, 2, ... a copy of it goes to WORK/k, and a process forked
from this one is killed before its k-th operation of the scenario (TORN is `torn`: half-way through
it, if it is a write), until one has fewer.  Left out are those that a first process, which isn't
killed, shows to leave no state of their own.  Prints how many operations there were, and at which
it was killed.
"""

import asyncio
import itertools
import json
import os
import shutil
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import polars as pl  # noqa: F401 - so that no process has to import it

from mlpd.daemon import dropped, erase
from mlpd.storage import compact, segments
from tests.storage.powercut.live import Store, opened, user_of
from tests.storage.powercut.shim import Control, map_file

SEGMENT_ROWS = 40
PURGE_RECORDS = 2
"""Small, so that one compaction writes several files and purges in several transactions."""
ERASED = user_of(3)


def compacting(root: Path, begin: Callable[[], None]) -> None:
    """A compaction of an open store: segments, manifest, switch, purge."""
    with opened(root) as store:
        begin()
        assert asyncio.run(store.compactor.run())


def starting(root: Path, begin: Callable[[], None]) -> None:
    """A start on what a crash left: files of no manifest, records that segments hold."""
    begin()
    with opened(root) as store:
        asyncio.run(store.compactor.start())


def erasing(root: Path, begin: Callable[[], None]) -> None:
    """An erasure: registration, compaction, new segments, switch, a view built anew, receipt."""
    with opened(root) as store:
        begin()
        assert asyncio.run(store.erase.run("user", [{"user": ERASED}]))


def resuming(root: Path, begin: Callable[[], None]) -> None:
    """A start on what a crash left of an erasure."""
    begin()
    with opened(root) as store:
        asyncio.run(store.compactor.start())
        asyncio.run(store.erase.resume())


def merging(root: Path, begin: Callable[[], None]) -> None:
    """A merging of small segments: new files, manifest, switch, removal of the old ones."""

    async def merge(store: Store) -> None:
        assert await store.compactor.merge_if_due()
        async with store.compactor.paused():
            await store.compactor.remove_replaced()

    with opened(root) as store:
        begin()
        asyncio.run(merge(store))


def expiring(root: Path, begin: Callable[[], None]) -> None:
    """Old history goes: new files, switch and horizon, removal of the old files."""

    async def expire(store: Store) -> None:
        assert await store.expire.run()
        async with store.compactor.paused():
            await store.compactor.remove_replaced()

    with opened(root) as store:
        begin()
        asyncio.run(expire(store))


SCENARIOS = {
    "expiring": expiring,
    "merging": merging,
    "compacting": compacting,
    "starting": starting,
    "erasing": erasing,
    "resuming": resuming,
}


def run(scenario: str, root: Path, control: Control, at: int, torn: bool) -> int:
    """Run the scenario in a process that ends at an operation; return how it ended."""
    pid = os.fork()
    if pid == 0:
        os.setpgid(0, 0)  # the shim kills the process group

        def begin() -> None:
            control.operations, control.torn, control.kill_at = 0, torn, at

        try:
            SCENARIOS[scenario](root, begin)
            os._exit(0)
        except BaseException:  # noqa: BLE001 - this process ends here, whatever it is
            traceback.print_exc()
        finally:
            os._exit(1)
    _, status = os.waitpid(pid, 0)
    control.kill_at = 0
    return os.waitstatus_to_exitcode(status)


def kinds_of(scenario: str, base: Path, work: Path, control: Control) -> bytes:
    """Return the kinds of the scenario's operations, in order; the letters of shim.c."""
    root = work / "whole"
    shutil.copytree(base, root)
    assert run(scenario, root, control, 0, torn=False) == 0
    shutil.rmtree(root)
    assert control.operations < len(control.seen)
    return bytes(control.seen[1 : control.operations + 1])


def is_new(kinds: bytes, at: int, torn: bool) -> bool:
    """Return whether a kill at the operation leaves what no other one does.

    Only a write can be torn.  A flush changes nothing that a killed process leaves.
    """
    if torn:
        return kinds[at - 1] == ord("W")
    return at == 1 or kinds[at - 2] != ord("S")


def main() -> None:
    scenario, base, work = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    torn = sys.argv[5] == "torn"
    compact.SEGMENT_ROWS_MIN, segments.PURGE_RECORDS = SEGMENT_ROWS, PURGE_RECORDS
    erase.PAUSE_S = dropped.PAUSE_S = 0.0
    control = Control.from_buffer(map_file(Path(sys.argv[4])))
    kinds, killed = kinds_of(scenario, base, work, control), []
    for at in itertools.count(1):
        if at <= len(kinds) and not is_new(kinds, at, torn):
            continue
        root = work / str(at)
        shutil.copytree(base, root)
        ended = run(scenario, root, control, at, torn)
        assert ended in {0, -signal.SIGKILL}
        if ended:
            killed.append(at)
        elif control.operations < at:
            break
        else:  # not a write this time
            assert torn
            shutil.rmtree(root)
    sys.stdout.write(json.dumps([at - 1, killed]))


if __name__ == "__main__":
    main()
