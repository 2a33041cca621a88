"""Child of the kills: for each line on stdin a process that writes until it is killed.

    python -m tests.storage.powercut.kill_child ROOT START_US

A line holds the number of a life, the kind and number of acknowledgements after which it is
killed, and how many seconds later.  What was acknowledged comes out as lines of JSON, and then
`end`.  Everything is imported here once and each life is forked from it,
before any environment is open: so a life begins within milliseconds.
"""

import asyncio
import itertools
import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import polars as pl  # noqa: F401 - so that no life has to import it

from tests.storage.powercut.live import DOCUMENT, LATER, Store, Tell, batches, opened

LIFE_NUMBERS = 100_000
"""Numbers of events that a life has for itself."""


async def ingest(store: Store, first: int, start_us: int, tell: Tell) -> None:
    for numbers in batches(first, sys.maxsize, most=5):
        await store.send(numbers, start_us, tell)
        await asyncio.sleep(0.001)  # what there is to look at afterwards stays small


async def apply(store: Store, life: int, tell: Tell) -> None:
    for turn in itertools.count(life):
        await store.apply(tell, LATER if turn % 2 else DOCUMENT)
        await asyncio.sleep(0.01)


async def compact(store: Store, tell: Tell) -> None:
    while True:
        if await store.compactor.run():
            tell({"compacted": 1})
        await asyncio.sleep(0.005)


async def live(store: Store, life: int, start_us: int, tell: Tell) -> None:
    await store.compactor.start()
    if store.state.catalog.version == 0:
        await store.apply(tell)
    first = life * LIFE_NUMBERS
    async with asyncio.TaskGroup() as group:
        group.create_task(apply(store, life, tell))
        group.create_task(ingest(store, first, start_us, tell))
        group.create_task(ingest(store, first + LIFE_NUMBERS // 2, start_us, tell))
        group.create_task(compact(store, tell))


def run(root: Path, life: int, start_us: int, pipe: int) -> None:
    def tell(fact: dict[str, Any]) -> None:
        os.write(pipe, json.dumps(fact).encode() + b"\n")

    try:
        with opened(root, rows_max=300) as store:
            asyncio.run(live(store, life, start_us, tell))
    except BaseException:  # noqa: BLE001 - this process ends here, whatever it is
        traceback.print_exc()
    finally:
        os._exit(1)


def kill(pid: int, pipe: int, kind: bytes, count: int, more_s: float) -> bytes:
    """Kill a life at its time; return all that it said was acknowledged."""
    said, wanted = [], b'{"%s"' % kind
    with os.fdopen(pipe, "rb") as stream:
        while count:
            said.append(stream.readline())
            count -= said[-1].startswith(wanted)
            if not said[-1]:
                break
        time.sleep(more_s)
        os.kill(pid, signal.SIGKILL)
        said += stream.readlines()
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL, "a life ended by itself"
    return b"".join(line for line in said if line.endswith(b"\n"))


def main() -> None:
    root, start_us = Path(sys.argv[1]), int(sys.argv[2])
    for line in sys.stdin:
        life, kind, count, more_s = line.split()
        read_end, write_end = os.pipe()
        pid = os.fork()
        if pid == 0:
            run(root, int(life), start_us, write_end)
        os.close(write_end)
        said = kill(pid, read_end, kind.encode(), int(count), float(more_s))
        sys.stdout.buffer.write(said + b"end\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
