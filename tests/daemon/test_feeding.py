"""Feeding followers: what an owner answers between a commit and the feed's count of it."""

import asyncio
import threading
from typing import Any

import pytest

from mlpd.daemon.app import Daemon
from mlpd.storage.tables import Head, Table
from tests.conftest import until


async def test_a_commit_that_the_feed_has_yet_to_count_is_not_gone(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    await daemon.writer.write(lambda _: daemon.feed.start())

    async def put(value: bytes) -> None:
        await daemon.writer.write(lambda txn: txn.put(Table.META, b"a test", value))

    def newest() -> Head:
        with daemon.environment.snapshot() as snapshot:
            return snapshot.head

    async def ask(after: Head) -> bytes:
        found = await daemon.feeding.commits(after, "http://follower", None, wait=False)
        records: bytes = found["commits"]
        return records

    await put(b"1")
    before, counted, end = newest(), threading.Event(), daemon.feed.end

    def late(head: Head, **how: Any) -> None:
        assert counted.wait(30)
        end(head, **how)

    monkeypatch.setattr(daemon.feed, "end", late)
    putting = asyncio.ensure_future(put(b"2"))
    await until(lambda: newest() != before)
    assert await ask(before) == b""
    counted.set()
    await putting
    assert await ask(before)
