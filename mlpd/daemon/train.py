"""Verb train: one run carried out; a child trains, then the publisher publishes what it made."""

import asyncio
import logging
import os
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from mlpd.core.config import PluginsConfig, TrainingConfig
from mlpd.core.specs import JobSpec
from mlpd.core.time import Clock
from mlpd.daemon.gathering import Gathering
from mlpd.daemon.offline import offline_request
from mlpd.daemon.plugins import Plugins
from mlpd.daemon.process import Child
from mlpd.daemon.publish import Publisher
from mlpd.daemon.state import CatalogState
from mlpd.storage.environment import Environment
from mlpd.storage.files import DataDirectory
from mlpd.training.runs import Run

OUT = "out"
LOG_BYTES_MAX, LOG_BYTES_KEPT = 16 * 1024**2, 1024**2
"""A log that grows beyond the first is cut to the last part of the second size."""
LOG_LOOK_S = 2.0

T = TypeVar("T")

Told = Callable[[dict[str, Any]], None]
"""Called on the loop with every progress that a child tells."""

_log = logging.getLogger("mlpd.runs")


class Train:
    """Carries out runs; as many at once as are asked for, each in a child of its own."""

    def __init__(
        self,
        environment: Environment,
        state: CatalogState,
        publisher: Publisher,
        gathering: Gathering,
        spread: Callable[[], Awaitable[None]],
        paths: DataDirectory,
        config: TrainingConfig,
        plugins: PluginsConfig,
        clock: Clock,
    ) -> None:
        self._environment = environment
        self._state = state
        self._publisher = publisher
        self._gathering = gathering
        self._spread = spread
        self._paths = paths
        self._config = config
        self._plugins = plugins
        self._clock = clock
        self._pins: dict[str, str] = {}

    def pins(self) -> list[tuple[str, str]]:
        """Return the runs under way, each with the hash of the service that it trains on."""
        return [(f"run {run_id}", found) for run_id, found in self._pins.copy().items()]

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
            return await _whole(self._published(self._publisher.finish(run, job, version)))
        async with self._folder(run.run_id) as out:
            return await self._train_in(out, run, job, told)

    def sweep(self) -> None:
        """Remove what runs that a crash ended were about to publish; at start, in a thread."""
        for out in self._paths.runs.glob(f"*/{OUT}"):
            shutil.rmtree(out, ignore_errors=True)

    @asynccontextmanager
    async def _folder(self, run_id: str) -> AsyncIterator[Path]:
        """Give a folder for what the child makes; it goes as the block ends.

        What counts of it is in the registry then, and another attempt makes it anew.
        """
        out = self.log_path(run_id).parent / OUT
        await asyncio.to_thread(partial(out.mkdir, parents=True, exist_ok=True))
        try:
            yield out
        finally:
            await asyncio.to_thread(partial(shutil.rmtree, out, ignore_errors=True))

    async def _train_in(self, out: Path, run: Run, job: JobSpec, told: Told) -> dict[str, Any]:
        plugins = await asyncio.to_thread(Plugins.find, self._plugins)
        with self._environment.snapshot() as snapshot:
            through = snapshot.sequence
            catalog = self._state.read_catalog(snapshot)
        closure = catalog.closures[job.service]
        sources = {catalog.views[view].view.source for view in closure.view_features}
        gathered = await self._gathering.gather(
            catalog, {job.spine_source, *sources}, out / "events"
        )
        request = {
            **offline_request(self._paths, catalog, through),
            "gathered": gathered,
            "job": run.job,
            "run_id": run.run_id,
            "as_of_us": int(self._clock()),
            "out": str(out),
            "threads": self._config.threads,
            "plugins": plugins.to_request(),
            "champion": await self._publisher.champion(job),
        }
        # What it publishes must find its features served, whatever is applied meanwhile.
        with self._pin(run.run_id, closure.hash):
            async with asyncio.timeout(self._config.timeout_us / 1e6):
                trained = await self._train(request, self.log_path(run.run_id), told)
            return await _whole(self._published(self._publisher.publish(run, job, trained, out)))

    async def _published(self, publishing: Coroutine[Any, Any, T]) -> T:
        """Await what is published; the members that follow have it then."""
        result = await publishing
        await self._spread()
        return result

    @contextmanager
    def _pin(self, run_id: str, service_hash: str) -> Iterator[None]:
        self._pins[run_id] = service_hash
        try:
            yield
        finally:
            del self._pins[run_id]

    async def _train(self, request: Mapping[str, Any], log: Path, told: Told) -> dict[str, Any]:
        config = self._config
        async with (
            Child(
                "train",
                request,
                nice=config.nice,
                idle=config.idle,
                memory_bytes_max=config.memory_bytes_max,
                log=log,
                threads=config.threads,
            ) as child,
            _bounded(log),
        ):
            messages = child.messages()
            while True:
                async with asyncio.timeout(config.silence_timeout_us / 1e6):
                    message = await anext(messages)
                if message["kind"] == "done":
                    result: dict[str, Any] = message["result"]
                    return result
                told({k: v for k, v in message.items() if k != "kind"})


@asynccontextmanager
async def _bounded(log: Path) -> AsyncIterator[None]:
    """Keep a log short while a child writes it inside the block."""
    task = asyncio.create_task(_cut_forever(log))
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await asyncio.to_thread(cut_log, log)


async def _cut_forever(log: Path) -> None:
    while True:
        await asyncio.sleep(LOG_LOOK_S)
        await asyncio.to_thread(cut_log, log)


def cut_log(log: Path) -> None:
    """Leave of a long log its end; the child appends, so it goes on behind that.

    Lines that it writes in between are lost.
    """
    try:
        with log.open("r+b") as file:
            size_bytes = file.seek(0, os.SEEK_END)
            if size_bytes <= LOG_BYTES_MAX:
                return
            file.seek(size_bytes - LOG_BYTES_KEPT)
            kept = file.read()
            file.truncate(0)
        with log.open("ab") as file:
            file.write(b"[%d bytes were here]\n" % (size_bytes - len(kept)) + kept)
    except OSError as error:  # a full disk: the next look tries again
        _log.warning("%s could not be cut: %s", log, error)


async def _whole(publishing: Coroutine[Any, Any, T]) -> T:
    """Await what must not be cut in half: a cancellation waits for its end and is dropped."""
    task = asyncio.create_task(publishing)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        return await task
