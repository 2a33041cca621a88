"""States of runs: whoever meets whom, no transition is lost and no run is carried out twice."""

import asyncio
import dataclasses
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mlpd.core.config import Config, TrainingConfig
from mlpd.core.errors import ConflictError, StorageFullError
from mlpd.daemon.app import Daemon
from mlpd.daemon.train import cut_log
from mlpd.registry.records import Cause
from mlpd.training.runs import Run, RunState
from tests.conftest import until
from tests.daemon.quick import prepare, run_job, until_ended

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
    found: list[int] = []
    for task in Path(f"/proc/{parent}/task").glob("*/children"):
        with suppress(OSError):  # a thread that has ended meanwhile
            found += [int(pid) for pid in task.read_text().split() if trains(pid)]
    return found


def trains(pid: str) -> bool:
    try:
        return b"train" in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:  # it has ended
        return False


def threads_of(pid: int) -> list[int]:
    return [int(task.name) for task in Path(f"/proc/{pid}/task").iterdir()]


async def queue_unseen(daemon: Daemon, job: str) -> Run:
    """Store a queued run that no worker has been told of."""
    run = daemon.runs.build(job, trigger="test")
    await daemon.writer.write(lambda txn: daemon.runs.store(txn, run))
    return run


@pytest.mark.parametrize("first", ["worker", "cancel"])
async def test_a_cancel_that_meets_the_start_wins(
    daemon: Daemon, trainable: Any, click_columns: Any, first: str
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
    open_daemon: Any, trainable: Any, click_columns: Any
) -> None:
    config = Config(training=TrainingConfig(threads=1, idle=False, nice=0, concurrency=2))
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
    open_daemon: Any, trainable: Any, click_columns: Any
) -> None:
    """The daemon dies after the version is registered and before the run's end is stored."""
    async with open_daemon() as daemon:
        await prepare(daemon, trainable, click_columns)
        first = await run_job(daemon)
        lost = dataclasses.replace(first, state=RunState.RUNNING, finished_us=None, result=None)
        await daemon.writer.write(lambda txn: daemon.runs.store(txn, lost))
    async with open_daemon() as daemon:
        again = await until_ended(daemon, lost)
        assert (again.state, again.attempt) == (RunState.SUCCEEDED, 2)
        assert again.result == first.result
        assert [version.number for version in daemon.registry.versions("quick")] == [1]
        assert len(daemon.registry.history("quick", alias="champion")) == 1


async def test_a_rollback_is_not_undone_by_the_repeated_run(
    open_daemon: Any, trainable: Any, click_columns: Any
) -> None:
    async with open_daemon() as daemon:
        await prepare(daemon, trainable, click_columns)
        _, second = [await run_job(daemon) for _ in range(2)]
        await daemon.registry.rollback("quick", "champion", Cause("somebody"))
        lost = dataclasses.replace(second, state=RunState.RUNNING, finished_us=None, result=None)
        await daemon.writer.write(lambda txn: daemon.runs.store(txn, lost))
    async with open_daemon() as daemon:
        assert (await until_ended(daemon, lost)).state is RunState.SUCCEEDED
        assert {alias.version for alias in daemon.registry.aliases("quick")} == {1}


async def test_a_cancel_between_two_attempts_is_not_lost(
    daemon: Daemon, trainable: Any, click_columns: Any
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
    daemon: Daemon, trainable: Any, monkeypatch: pytest.MonkeyPatch
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
    run = await run_job(daemon)
    assert (run.state, (run.error or {})["code"]) == (RunState.FAILED, "no_rows")
    assert refusals == 0


async def test_a_finished_run_is_not_cancelled(daemon: Daemon, trainable: Any) -> None:
    await daemon.definitions.apply(trainable)
    run = await run_job(daemon)
    with pytest.raises(ConflictError) as refused:
        await daemon.runs.cancel(run.run_id)
    assert refused.value.code == "run_finished"


@pytest.mark.parametrize("limit", ["timeout_us", "silence_timeout_us"])
async def test_a_run_that_takes_too_long_is_ended_and_not_repeated(
    open_daemon: Any, trainable: Any, click_columns: Any, limit: str
) -> None:
    limits: dict[str, Any] = {limit: 20_000}  # less than a child takes to say its first word
    config = Config(training=TrainingConfig(threads=1, idle=False, nice=0, **limits))
    async with open_daemon(config=config) as daemon:
        await prepare(daemon, trainable, click_columns)
        run = await run_job(daemon, "endless")
        assert (run.state, run.attempt) == (RunState.FAILED, 1)
        assert (run.error or {})["code"] == "run_timeout"
        assert not training_children(os.getpid())


@pytest.mark.parametrize("idle", [True, False])
async def test_a_run_stays_out_of_the_way_of_serving(
    open_daemon: Any, trainable: Any, click_columns: Any, idle: bool
) -> None:
    """In the daemon's session: where Linux groups sessions, its niceness is void in another one."""
    config = Config(training=TrainingConfig(threads=2, idle=idle, nice=7))
    async with open_daemon(config=config) as daemon:
        await prepare(daemon, trainable, click_columns)
        run = await daemon.runs.enqueue("endless", trigger="test")
        await until(lambda: daemon.runs.get(run.run_id).progress.get("round"))
        [child] = training_children(os.getpid())
        assert os.getsid(child) == os.getsid(0)
        assert os.getpgid(child) == child != os.getpgid(0)
        threads = threads_of(child)
        assert len(threads) > 1
        policy = os.SCHED_IDLE if idle else os.SCHED_OTHER
        assert {os.sched_getscheduler(thread) for thread in threads} == {policy}
        assert {os.getpriority(os.PRIO_PROCESS, thread) for thread in threads} == {7}
        await daemon.runs.cancel(run.run_id)


async def test_a_run_whose_child_was_killed_waits_before_it_is_tried_again(
    daemon: Daemon, trainable: Any, click_columns: Any
) -> None:
    await prepare(daemon, trainable, click_columns)
    run = await daemon.runs.enqueue("endless", trigger="test")
    await until(lambda: training_children(os.getpid()))
    os.kill(training_children(os.getpid())[0], signal.SIGKILL)
    await until(lambda: daemon.runs.get(run.run_id).attempt == 2)
    waiting = daemon.runs.get(run.run_id)
    assert waiting.state is RunState.QUEUED
    await until(lambda: daemon.runs.get(run.run_id).state is RunState.RUNNING)
    again = daemon.runs.get(run.run_id)
    assert (again.started_us or 0) >= waiting.not_before_us >= daemon.clock() - 60_000_000
    await daemon.runs.cancel(run.run_id)


async def test_a_run_that_waits_behind_a_thousand_newer_ones_is_not_missed(
    open_daemon: Any,
    trainable: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with open_daemon() as daemon:
        await daemon.definitions.apply(trainable)
        old = daemon.runs.build("quick", trigger="test")
        ended = [
            replace(old, run_id=f"99990101-000000-{n:06x}", state=RunState.FAILED)
            for n in range(1_000)
        ]
        await daemon.writer.write(lambda txn: [daemon.runs.store(txn, run) for run in ended])
        decode, read = Run.decode, list[str]()

        def watched(value: bytes) -> Run:
            run = decode(value)
            read.append(run.run_id)
            return run

        monkeypatch.setattr(Run, "decode", watched)
        run = await daemon.runs.enqueue("quick", trigger="test")
        assert (await until_ended(daemon, run)).state is RunState.FAILED  # has no rows
        assert set(read) == {run.run_id}  # what has ended is not read
        lost = replace(run, run_id="20200101-000000-000000", state=RunState.RUNNING)
        await daemon.writer.write(lambda txn: daemon.runs.store(txn, lost))
        assert lost.run_id not in {run.run_id for run in daemon.runs.list()}
    async with open_daemon() as daemon:
        again = await until_ended(daemon, lost)
        assert (again.state, again.attempt) == (RunState.FAILED, 2)
        assert daemon.runs.unsettled() == []


async def test_runs_whose_write_failed_are_not_waited_for(
    daemon: Daemon, trainable: dict[str, Any]
) -> None:
    await daemon.definitions.apply(trainable)
    failed = [daemon.runs.build("quick", trigger="test") for _ in range(100)]

    def fail(txn: Any) -> None:
        daemon.runs.admit(txn, failed)
        raise ConflictError("no")

    with pytest.raises(ConflictError, match="no"):
        await daemon.writer.write(fail)
    run = await daemon.runs.enqueue("quick", trigger="test")
    await until_ended(daemon, run)
    assert daemon.runs.unsettled() == []


async def test_a_hundred_runs_wait_at_most(daemon: Daemon, trainable: dict[str, Any]) -> None:
    await daemon.definitions.apply(trainable)
    runs = [daemon.runs.build("quick", trigger="test") for _ in range(100)]
    await daemon.writer.write(lambda txn: [daemon.runs.store(txn, run) for run in runs])
    with pytest.raises(ConflictError) as caught:
        await daemon.runs.enqueue("quick", trigger="test")
    assert caught.value.code == "queue_full"


def leftovers(daemon: Daemon) -> list[str]:
    return [path.name for path in daemon.paths.runs.glob("*/*") if path.name != "log.txt"]


async def test_a_run_leaves_its_log_alone(
    open_daemon: Any, trainable: Any, click_columns: Any
) -> None:
    async with open_daemon() as daemon:
        await prepare(daemon, trainable, click_columns)
        run = await run_job(daemon)
        assert run.state is RunState.SUCCEEDED
        assert leftovers(daemon) == []
        endless = await daemon.runs.enqueue("endless", trigger="test")
        await until(lambda: daemon.runs.get(endless.run_id).progress.get("step") == "train")
        assert leftovers(daemon) == ["out"]
        await daemon.runs.cancel(endless.run_id)
        assert leftovers(daemon) == []
        killed = daemon.paths.runs / run.run_id / "out"  # as if the daemon had been
        killed.mkdir()
        (killed / "model.onnx").write_bytes(b"half of it")
    async with open_daemon() as daemon:
        assert leftovers(daemon) == []


def test_a_long_log_keeps_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlpd.daemon.train.LOG_BYTES_MAX", 1_000)
    monkeypatch.setattr("mlpd.daemon.train.LOG_BYTES_KEPT", 100)
    log = tmp_path / "log.txt"
    cut_log(log)  # there is none yet
    with log.open("ab") as writing:
        writing.write(b"a" * 1_000)
        writing.flush()
        cut_log(log)
        assert log.stat().st_size == 1_000
        writing.write(b"b" * 50)
        writing.flush()
        cut_log(log)
        assert log.read_bytes() == b"[950 bytes were here]\n" + b"a" * 50 + b"b" * 50
        writing.write(b"c")  # the child goes on where the log ends now
    assert log.read_bytes().endswith(b"bc")
