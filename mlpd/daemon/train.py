"""Verb train: one run carried out; a child trains, then the publisher publishes what it made."""

import asyncio
from collections.abc import Callable, Coroutine, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from mlpd.core.config import TrainingConfig
from mlpd.core.time import Clock
from mlpd.daemon.offline import offline_request
from mlpd.daemon.process import Child
from mlpd.daemon.publish import Publisher
from mlpd.daemon.state import CatalogState
from mlpd.storage.environment import Environment
from mlpd.storage.files import DataDirectory
from mlpd.training.runs import Run

T = TypeVar("T")

Told = Callable[[dict[str, Any]], None]
"""Called on the loop with every progress that a child tells."""


class Train:
    """Carries out runs; as many at once as are asked for, each in a child of its own."""

    def __init__(
        self,
        environment: Environment,
        state: CatalogState,
        publisher: Publisher,
        paths: DataDirectory,
        config: TrainingConfig,
        clock: Clock,
    ) -> None:
        self._environment = environment
        self._state = state
        self._publisher = publisher
        self._paths = paths
        self._config = config
        self._clock = clock

    def log_path(self, run_id: str) -> Path:
        """Return where the child's log is; it may not be there yet."""
        return self._paths.runs / run_id / "log.txt"

    async def run(self, run: Run, told: Told) -> dict[str, Any]:
        """Train and publish; returns the run's result.

        What an earlier attempt published is not trained again.  Cancelling ends the child; from
        the first write to the registry on it has no effect.  Raises the child's error, TimeoutError
        for a child that is silent or works for too long, and what publishing refuses.
        """
        job = self._state.catalog.definitions.job(run.job)
        version = await self._publisher.find(run, job) if run.attempt > 1 else None
        if version is not None:
            return await _whole(self._publisher.finish(run, job, version))
        log = self.log_path(run.run_id)
        out = log.parent / "out"
        await asyncio.to_thread(partial(out.mkdir, parents=True, exist_ok=True))
        with self._environment.snapshot() as snapshot:
            through = snapshot.sequence
            catalog = self._state.read_catalog(snapshot)
        request = {
            **offline_request(self._paths, catalog, through),
            "job": run.job,
            "run_id": run.run_id,
            "as_of_us": int(self._clock()),
            "out": str(out),
            "threads": self._config.threads,
        }
        async with asyncio.timeout(self._config.timeout_us / 1e6):
            trained = await self._train(request, log, told)
        return await _whole(self._publisher.publish(run, job, trained, out))

    async def _train(self, request: Mapping[str, Any], log: Path, told: Told) -> dict[str, Any]:
        config = self._config
        async with Child(
            "train",
            request,
            nice=config.nice,
            memory_bytes_max=config.memory_bytes_max,
            log=log,
            threads=config.threads,
        ) as child:
            messages = child.messages()
            while True:
                async with asyncio.timeout(config.silence_timeout_us / 1e6):
                    message = await anext(messages)
                if message["kind"] == "done":
                    result: dict[str, Any] = message["result"]
                    return result
                told({k: v for k, v in message.items() if k != "kind"})


async def _whole(publishing: Coroutine[Any, Any, T]) -> T:
    """Await what must not be cut in half: a cancellation waits for its end and is dropped."""
    task = asyncio.create_task(publishing)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        return await task
