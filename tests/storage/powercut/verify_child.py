"""Child of the power cuts: builds disk states out of a record and looks at each.

    python -m tests.storage.powercut.verify_child ROOT RECORD WORK START_US SEED STATES DONE

Prints one line per state, `ok` or what is wrong.  A process of its own, because a broken LMDB file
may end it; the parent then goes on after the DONE states that it has heard of.
"""

import asyncio
import random
import shutil
import sys
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.storage.powercut.choices import choose
from tests.storage.powercut.disk import Disk
from tests.storage.powercut.shim import read_record
from tests.storage.powercut.verify import Told, verify


@dataclass(frozen=True)
class Job:
    """What to look at; `done` states were looked at before."""

    root: Path
    record: Path
    work: Path
    start_us: int
    seed: int
    states: int
    done: int


def look(job: Job) -> Iterator[str]:
    """Yield what each state is, before it is looked at, then what was found."""
    operations = list(read_record(job.record))
    disk, told, at = Disk(job.root), Told(job.start_us), 0
    for number in range(job.states):
        rng = random.Random(f"{job.seed} {number}")
        cut = 1 + int((number + rng.random()) * len(operations) / job.states)
        for operation in operations[at:cut]:
            if operation.kind == "A":
                told.hear(operation.data)
            else:
                disk.apply(operation)
        at = cut
        name, choice = choose(rng, disk.open_operations() or [0])
        if number >= job.done:
            yield f"{number} after operation {at} of {len(operations)}, {name}: "
            shutil.rmtree(job.work, ignore_errors=True)
            job.work.mkdir()
            disk.build(job.work / "data", choice)
            yield judge(job.work, told.copy()) + "\n"


def judge(work: Path, told: Told) -> str:
    try:
        asyncio.run(verify(work / "data", told, work / "replay"))
    except Exception as error:  # noqa: BLE001 - whatever it is, it is found
        where = traceback.extract_tb(error.__traceback__)[-1]
        return f"{type(error).__name__}: {error} ({where.name})".replace("\n", " ")
    return "ok"


def main() -> None:
    paths, numbers = map(Path, sys.argv[1:4]), map(int, sys.argv[4:])
    for text in look(Job(*paths, *numbers)):
        sys.stdout.write(text)
        sys.stdout.flush()


if __name__ == "__main__":
    main()
