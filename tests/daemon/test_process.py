"""Children of a daemon: whoever leaves one, and however, leaves nothing of it behind."""

import asyncio
import os
import signal
from pathlib import Path

import pytest

from mlpd.daemon import process
from mlpd.daemon.process import Child
from tests.conftest import until


def stopped(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


async def test_a_child_is_reaped_though_whoever_has_it_is_cancelled_twice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Once as its client has gone, once as the daemon stops, while the child is still ending."""
    monkeypatch.setattr(process, "TERMINATE_S", 0.5)
    child, entered = Child("home", {}), asyncio.Event()

    async def work() -> None:
        async with child:
            os.kill(child.pid, signal.SIGSTOP)  # it hears of SIGTERM no more: SIGKILL is needed
            # Of two signals that wait, Linux would deliver SIGTERM first.
            await until(lambda: stopped(child.pid))
            entered.set()
            await asyncio.Event().wait()

    task = asyncio.ensure_future(work())
    await entered.wait()
    for _ in range(2):
        task.cancel()
        await asyncio.sleep(0.05)
    with pytest.raises(asyncio.CancelledError):
        await task
    assert child._process is not None
    assert child._process.returncode == -signal.SIGKILL


async def test_a_child_is_reaped_though_its_start_is_cancelled() -> None:
    child = Child("home", {"more": bytes(16 << 20)})  # than a pipe takes before it is read

    async def work() -> None:
        async with child:
            raise AssertionError("it has started")

    task = asyncio.ensure_future(work())
    await until(lambda: child._process is not None)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert child._process is not None
    assert child._process.returncode is not None
