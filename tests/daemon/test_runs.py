"""States of runs: whoever meets whom, no transition is lost and no run is carried out twice."""

import asyncio
import dataclasses
import os
import signal
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from mlpd.core.config import Config, TrainingConfig
from mlpd.core.errors import ConflictError, StorageFullError
from mlpd.daemon.app import Daemon
from mlpd.daemon.runs import store_run
from mlpd.features.ingest import parse_batch
from mlpd.registry.records import Cause
from mlpd.training.runs import Run, RunState

DEADLINE_S = 40


@contextmanager
def writer_held(daemon: Daemon) -> Iterator[None]:
    """Keep the writer thread busy: what is written meanwhile waits, in order."""
    reached, release = threading.Event(), threading.Event()

    def hold(_: Any) -> None:
        reached.set()
        release.wait(DEADLINE_S)

    daemon.writer.post(hold)
    reached.wait(DEADLINE_S)
    try:
        yield
    finally:
        release.set()


def training_children(parent: int) -> list[int]:
    """Return the ids of a process's training children."""
    found = []
    for task in Path(f"/proc/{parent}/task").glob("*/children"):
        for pid in task.read_text().split():
            command = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            if b"train" in command:
                found.append(int(pid))
    return found


async def queue_unseen(daemon: Daemon, job: str) -> Run:
    """Store a queued run that no worker has been told of."""
    run = daemon.runs.build(job, trigger="test")
    await daemon.writer.write(lambda txn: store_run(txn, run))
    return run


async def prepare(daemon: Daemon, document: dict[str, Any], columns: dict[str, Any]) -> None:
    """Apply the definitions and store the events that their jobs train on."""
    await daemon.definitions.apply(document)
    source = daemon.state.catalog.definitions.source("clicks")
    batch = parse_batch(source, columns, now_us=daemon.clock())
    assert (await daemon.ingest.ingest([batch])).accepted == len(columns["user"])


@pytest.fixture
def until_finished(until: Any) -> Callable[[Daemon, str], Awaitable[Run]]:
    """Wait until a run ended, and its worker is free again; returns it."""

    async def wait(daemon: Daemon, run_id: str) -> Run:
        await until(lambda: daemon.runs.get(run_id).state.finished and not daemon.runs.busy)
        return daemon.runs.get(run_id)

    return wait


@pytest.mark.parametrize("first", ["worker", "cancel"])
async def test_a_cancel_that_meets_the_start_wins(
    daemon: Daemon, trainable: Any, click_columns: Any, first: str, until: Any
) -> None:
    await prepare(daemon, trainable, click_columns)
    run = await queue_unseen(daemon, "quick")
    with writer_held(daemon):
        if first == "worker":
            daemon.runs.notify()
            await until(lambda: daemon.writer.queued_entries >= 1)
            cancelling = asyncio.create_task(daemon.runs.cancel(run.run_id))
        else:
            cancelling = asyncio.create_task(daemon.runs.cancel(run.run_id))
            await until(lambda: daemon.writer.queued_entries >= 1)
            daemon.runs.notify()
        await until(lambda: daemon.writer.queued_entries >= 2)
    assert (await cancelling).state is RunState.CANCELLED
    await until(lambda: not daemon.runs.busy)
    assert daemon.runs.get(run.run_id).state is RunState.CANCELLED
    assert not daemon.registry.models()


async def test_two_workers_never_take_the_same_run(
    open_daemon: Any, trainable: Any, click_columns: Any, until: Any
) -> None:
    config = Config(training=TrainingConfig(threads=1, nice=0, concurrency=2))
    async with open_daemon(config=config) as daemon:
        await prepare(daemon, trainable, click_columns)
        run = await queue_unseen(daemon, "quick")
        with writer_held(daemon):
            daemon.runs.notify()
            await until(lambda: daemon.writer.queued_entries >= 1)
            await asyncio.sleep(0)  # the other worker has looked, too
        children: set[int] = set()

        def ended() -> bool:
            children.update(training_children(os.getpid()))
            return daemon.runs.get(run.run_id).state.finished and not daemon.runs.busy

        await until(ended)
        assert daemon.runs.get(run.run_id).state is RunState.SUCCEEDED
        assert len(children) == 1
        assert [version.number for version in daemon.registry.versions("quick")] == [1]


async def test_what_a_lost_run_had_registered_is_published_once(
    open_daemon: Any, trainable: Any, click_columns: Any, until_finished: Any
) -> None:
    """The daemon dies after the version is registered and before the run's end is stored."""
    async with open_daemon() as daemon:
        await prepare(daemon, trainable, click_columns)
        run = await daemon.runs.enqueue("quick", trigger="test")
        first = await until_finished(daemon, run.run_id)
        lost = dataclasses.replace(first, state=RunState.RUNNING, finished_us=None, result=None)
        await daemon.writer.write(lambda txn: store_run(txn, lost))
    async with open_daemon() as daemon:
        again = await until_finished(daemon, run.run_id)
        assert (again.state, again.attempt) == (RunState.SUCCEEDED, 2)
        assert again.result == first.result
        assert [version.number for version in daemon.registry.versions("quick")] == [1]
        assert len(daemon.registry.history("quick", alias="champion")) == 1


async def test_a_rollback_is_not_undone_by_the_repeated_run(
    open_daemon: Any, trainable: Any, click_columns: Any, until_finished: Any
) -> None:
    async with open_daemon() as daemon:
        await prepare(daemon, trainable, click_columns)
        runs = [await daemon.runs.enqueue("quick", trigger="test") for _ in range(2)]
        ended = [await until_finished(daemon, run.run_id) for run in runs]
        await daemon.registry.rollback("quick", "champion", Cause("somebody"))
        lost = dataclasses.replace(ended[1], state=RunState.RUNNING, finished_us=None, result=None)
        await daemon.writer.write(lambda txn: store_run(txn, lost))
    async with open_daemon() as daemon:
        assert (await until_finished(daemon, lost.run_id)).state is RunState.SUCCEEDED
        assert {alias.version for alias in daemon.registry.aliases("quick")} == {1}


async def test_a_cancel_between_two_attempts_is_not_lost(
    daemon: Daemon, trainable: Any, click_columns: Any, until: Any
) -> None:
    """The child is killed just before the cancel: the run would go back to the queue."""
    await prepare(daemon, trainable, click_columns)
    run = await daemon.runs.enqueue("endless", trigger="test")
    await until(lambda: training_children(os.getpid()))
    with writer_held(daemon):
        os.kill(training_children(os.getpid())[0], signal.SIGKILL)
        await until(lambda: daemon.writer.queued_entries >= 1)  # the worker wants to put it back
        cancelling = asyncio.create_task(daemon.runs.cancel(run.run_id))
        await until(lambda: daemon.writer.queued_entries >= 2)
    assert (await cancelling).state is RunState.CANCELLED
    await until(lambda: not daemon.runs.busy)
    assert daemon.runs.get(run.run_id).state is RunState.CANCELLED


async def test_the_end_of_a_run_is_stored_once_the_disk_takes_it(
    daemon: Daemon, trainable: Any, monkeypatch: pytest.MonkeyPatch, until_finished: Any
) -> None:
    await daemon.definitions.apply(trainable)
    refusals = 3
    write = daemon.writer.write

    async def refuse(*arguments: Any, **named: Any) -> Any:
        nonlocal refusals
        if daemon.runs.busy and refusals:
            refusals -= 1
            raise StorageFullError("the disk is full")
        return await write(*arguments, **named)

    monkeypatch.setattr(daemon.writer, "write", refuse)
    monkeypatch.setattr("mlpd.daemon.runs.STORAGE_RETRY_S", 0.01)
    run = await daemon.runs.enqueue("quick", trigger="test")
    ended = await until_finished(daemon, run.run_id)
    assert (ended.state, (ended.error or {})["code"]) == (RunState.FAILED, "no_rows")
    assert refusals == 0


async def test_a_finished_run_is_not_cancelled(
    daemon: Daemon, trainable: Any, until_finished: Any
) -> None:
    await daemon.definitions.apply(trainable)
    run = await daemon.runs.enqueue("quick", trigger="test")
    await until_finished(daemon, run.run_id)
    with pytest.raises(ConflictError) as refused:
        await daemon.runs.cancel(run.run_id)
    assert refused.value.code == "run_finished"
