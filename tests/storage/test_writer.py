"""The writer: durable groups, failing operations, bounds, graceful close."""

import asyncio
import threading
import time
from typing import Any

import pytest

from mlpd.core.errors import (
    InternalError,
    OverloadedError,
    StorageFullError,
    UnavailableError,
    ValidationError,
)
from mlpd.storage.environment import Environment
from mlpd.storage.tables import Table
from mlpd.storage.transactions import WriteTransaction
from mlpd.storage.writer import Writer


def put(key: bytes, value: bytes = b"v") -> Any:
    def op(txn: WriteTransaction) -> bytes:
        txn.put(Table.ROUTES, key, value)
        return key

    return op


def keys(environment: Environment) -> list[bytes]:
    with environment.snapshot() as snapshot:
        return [key for key, _ in snapshot.scan(Table.ROUTES)]


class Gate:
    """Holds the writer inside an operation until it is opened."""

    def __init__(self, writer: Writer) -> None:
        self._opened, self._entered = threading.Event(), threading.Event()
        assert writer.post(self._wait)
        assert self._entered.wait(40)

    def _wait(self, _txn: WriteTransaction) -> None:
        self._entered.set()
        assert self._opened.wait(40)

    def open(self) -> None:
        self._opened.set()


async def test_awaited_write_is_visible_and_returns_the_result(
    environment: Environment, writer: Writer
) -> None:
    assert await writer.write(put(b"a")) == b"a"
    assert keys(environment) == [b"a"]


async def test_waiting_writes_share_one_commit(writer: Writer) -> None:
    gate = Gate(writer)
    tasks = [asyncio.create_task(writer.write(put(b"%d" % i))) for i in range(50)]
    await asyncio.sleep(0)
    gate.open()
    assert await asyncio.gather(*tasks) == [b"%d" % i for i in range(50)]
    assert writer.stats.groups == 2


async def test_failing_operation_gets_its_error_and_leaves_no_trace_in_its_group(
    environment: Environment, writer: Writer, events: Any
) -> None:
    def fails(txn: WriteTransaction) -> None:
        txn.put(Table.ROUTES, b"half", b"")
        txn.take_sequences(7)
        raise ValidationError("no", code="mine")

    gate = Gate(writer)
    tasks = [
        asyncio.create_task(writer.write(op)) for op in (events(1), fails, put(b"z"), events(2))
    ]
    await asyncio.sleep(0)
    gate.open()
    first, failed, put_key, last = await asyncio.gather(*tasks, return_exceptions=True)
    assert (first, put_key, last) == ((1, 1), b"z", (2, 2))
    assert isinstance(failed, ValidationError)
    assert failed.code == "mine"
    assert keys(environment) == [b"z"]
    assert writer.stats.operation_failures == 1


async def test_lmdb_error_of_one_operation_is_its_own(writer: Writer) -> None:
    results = await asyncio.gather(
        writer.write(put(b"x" * 512)), writer.write(put(b"fine")), return_exceptions=True
    )
    assert isinstance(results[0], InternalError)
    assert results[1] == b"fine"


async def test_full_queue_refuses_with_retry_after(environment: Environment) -> None:
    writer = Writer(environment, queue_entries_max=3)
    gate = Gate(writer)
    tasks = [asyncio.create_task(writer.write(put(b"%d" % i))) for i in range(3)]
    await asyncio.sleep(0)
    with pytest.raises(OverloadedError) as caught:
        await writer.write(put(b"refused"))
    assert caught.value.details["retry_after_s"] > 0
    assert not writer.post(put(b"refused"))
    gate.open()
    await asyncio.gather(*tasks)
    writer.close()
    assert keys(environment) == [b"0", b"1", b"2"]
    assert (writer.stats.rejected, writer.stats.post_failures) == (2, 1)


async def test_queue_is_bounded_in_bytes_but_takes_one_big_operation(
    environment: Environment,
) -> None:
    writer = Writer(environment, queue_bytes_max=10_000)
    gate = Gate(writer)
    big = asyncio.create_task(writer.write(put(b"big"), size_bytes=50_000))
    await asyncio.sleep(0)
    with pytest.raises(OverloadedError):
        await writer.write(put(b"small"), size_bytes=1)
    gate.open()
    assert await big == b"big"
    assert writer.queued_bytes == 0
    writer.close()


async def test_cancelled_before_its_group_is_not_executed(
    environment: Environment, writer: Writer
) -> None:
    gate = Gate(writer)
    task = asyncio.create_task(writer.write(put(b"cancelled")))
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    gate.open()
    await writer.write(put(b"kept"))
    assert keys(environment) == [b"kept"]


def test_close_writes_what_is_queued_and_refuses_more(
    environment: Environment, writer: Writer
) -> None:
    gate = Gate(writer)
    for i in range(5):
        assert writer.post(put(b"%d" % i))
    gate.open()
    writer.close()
    writer.close()
    assert len(keys(environment)) == 5
    with pytest.raises(UnavailableError):
        writer.write_blocking(put(b"late"))
    assert not writer.post(put(b"late"))


def test_failing_post_is_counted_and_logged(
    writer: Writer, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(_txn: WriteTransaction) -> None:
        raise ValueError("broken post")

    assert writer.post(fails)
    writer.write_blocking(put(b"after"))
    assert writer.stats.post_failures == 1
    assert "broken post" in caplog.text


async def test_who_posts_is_told_what_is_on_disk_and_of_no_failure(
    environment: Environment, writer: Writer
) -> None:
    told: list[str] = []

    def fails(_: WriteTransaction) -> str:
        raise ValueError("no")

    def works(txn: WriteTransaction) -> str:
        put(b"there")(txn)
        return "done"

    assert writer.post(fails, done=told.append)
    assert writer.post(works, done=told.append)
    await writer.write(lambda _: None)
    await asyncio.sleep(0)
    assert (told, keys(environment)) == (["done"], [b"there"])
    assert writer.stats.post_failures == 1


def test_full_map_fails_the_write_alone(tmp_path: Any, clock: Any) -> None:
    with Environment.open(tmp_path / "small", clock=clock, map_bytes=1 << 20) as environment:
        writer = Writer(environment)
        with pytest.raises(StorageFullError) as caught:
            writer.write_blocking(put(b"huge", b"x" * (2 << 20)))
        assert caught.value.code == "map_full"
        assert writer.write_blocking(put(b"small")) == b"small"
        writer.close()
        assert keys(environment) == [b"small"]


def take(count: int) -> Any:
    def op(txn: WriteTransaction) -> int:
        return int(txn.take_sequences(count)) + count - 1

    return op


async def test_reach_waits_for_the_commit_of_a_sequence(writer: Writer) -> None:
    gate = Gate(writer)
    waiting = [asyncio.create_task(writer.reach(sequence)) for sequence in (1, 3, 4)]
    first = asyncio.create_task(writer.write(take(1)))
    await asyncio.sleep(0.05)
    assert not any(task.done() for task in waiting)
    gate.open()
    assert await first == 1
    assert await waiting[0]
    assert not waiting[1].done()
    assert await asyncio.to_thread(writer.write_blocking, take(2)) == 3
    assert await waiting[1]
    assert not await waiting[2]  # after a second
    assert await writer.reach(3)
    assert await writer.reach(0)


async def test_reach_gives_up_at_its_deadline_and_when_cancelled(writer: Writer) -> None:
    started = time.monotonic()
    assert not await writer.reach(1, deadline_s=started + 0.02)
    assert not await writer.reach(1, deadline_s=started - 1.0)
    task = asyncio.create_task(writer.reach(1))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not writer._watchers
    assert await writer.write(take(1)) == 1


async def test_reach_survives_groups_that_fail(writer: Writer) -> None:
    def fail(_txn: WriteTransaction) -> None:
        raise ValidationError("no", code="no")

    task = asyncio.create_task(writer.reach(1))
    with pytest.raises(ValidationError):
        await writer.write(fail)
    assert not task.done()
    await writer.write(take(1))
    assert await task
