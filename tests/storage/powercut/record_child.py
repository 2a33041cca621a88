"""Child of the power cuts: everything that a daemon writes, under the shim.

    python -m tests.storage.powercut.record_child ROOT TOLD START_US FAULT LIFE

Events, a definition, model versions and compactions, several at once.  With a planted fault (see
faults.py) compaction runs in this process, so that the fault reaches it.
"""

import asyncio
import sys
from pathlib import Path

from tests.storage.powercut.faults import FAULTS
from tests.storage.powercut.live import LATER, Store, Tell, batches, opened, teller


async def ingest(store: Store, first: int, count: int, start_us: int, tell: Tell) -> None:
    for numbers in batches(first, count):
        await store.send(numbers, start_us, tell)


async def live(store: Store, start_us: int, first: int, tell: Tell) -> None:
    await store.compactor.start()
    await store.apply(tell)
    await ingest(store, first, 4, start_us, tell)
    async with asyncio.TaskGroup() as group:
        group.create_task(ingest(store, first + 1_000, 6, start_us, tell))
        group.create_task(ingest(store, first + 2_000, 6, start_us, tell))
        group.create_task(store.register(first + 1, tell))
    for turn in range(2):
        async with asyncio.TaskGroup() as group:
            group.create_task(store.compactor.run())
            group.create_task(ingest(store, first + 3_000 + turn * 1_000, 5, start_us, tell))
            group.create_task(store.register(first + 2 + turn, tell))
    async with asyncio.TaskGroup() as group:  # a view that is built from the log meanwhile
        group.create_task(store.apply(tell, LATER))
        group.create_task(ingest(store, first + 8_000, 3, start_us, tell))
    await store.compactor.run()
    await ingest(store, first + 9_000, 2, start_us, tell)


def main() -> None:
    root, told, start_us, fault, life = sys.argv[1:]
    FAULTS[fault]()
    with opened(Path(root), in_process=fault != "none", rows_max=150) as store:
        asyncio.run(live(store, int(start_us), int(life) * 100_000, teller(told)))


if __name__ == "__main__":
    main()
