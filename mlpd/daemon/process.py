"""Parent side of a child process: spawn, read messages, cancel, reap; nothing is left behind."""

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import AsyncIterator, Coroutine, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import msgpack

from mlpd.core.errors import InternalError, MlpdError, error_classes
from mlpd.daemon.child import LENGTH

MESSAGE_BYTES_MAX = 256 * 1024 * 1024
TERMINATE_S = 10.0
"""Seconds between SIGTERM and SIGKILL to a child's group."""

_LOG_TAIL_BYTES = 2000


class Child:
    """One child process as an async context manager; leaving it stops the whole group.

    `request` must be msgpack types.  `log`: file for the child's stdout and stderr; None discards.
    `idle`: it gets only the processor time that nobody else wants; where the system has no such
    class (it is Linux's), and otherwise, `nice` tells its share.
    """

    def __init__(
        self,
        entry: str,
        request: Mapping[str, Any],
        *,
        nice: int = 5,
        idle: bool = False,
        memory_bytes_max: int = 8 * 1024**3,
        log: Path | None = None,
        threads: int = 1,
    ) -> None:
        guards = {"parent_pid": os.getpid(), "memory_bytes_max": memory_bytes_max}
        guards |= {"nice": nice, "idle": idle}
        self._entry = entry
        self._request = msgpack.packb({**request, **guards})
        self._log = log
        self._threads = threads
        self._process: asyncio.subprocess.Process | None = None

    @property
    def pid(self) -> int:
        """Process id; also the id of its process group."""
        assert self._process is not None
        return self._process.pid

    async def __aenter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            stderr: Any = asyncio.subprocess.DEVNULL
            if self._log is not None:
                stderr = stack.enter_context(self._log.open("ab"))
            self._process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-P", "-m", "mlpd.daemon.child", self._entry),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=stderr,
                env=self._environment(),
                # A group of its own to be ended by, but no session: where Linux groups sessions for
                # their shares of the processors (sched_autogroup_enabled), niceness counts within
                # a session alone, and the child would weigh as much as the daemon.
                process_group=0,
            )
        stdin = self._process.stdin
        assert stdin is not None
        try:
            with contextlib.suppress(ConnectionError):  # its end is heard when reading
                stdin.write(self._request)
                await stdin.drain()
        except BaseException:
            await _to_the_end(self.stop())
            raise
        stdin.close()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await _to_the_end(self.stop())

    async def messages(self) -> AsyncIterator[dict[str, Any]]:
        """Yield messages up to and including "done"; raises the error that the child reports.

        A child that ends without a word (killed, out of memory) raises InternalError(
        code="child_died").
        """
        assert self._process is not None
        stdout = self._process.stdout
        assert stdout is not None
        while True:
            try:
                (size,) = LENGTH.unpack(await stdout.readexactly(LENGTH.size))
                if size > MESSAGE_BYTES_MAX:
                    raise InternalError(f"child {self._entry!r} sent {size} bytes at once")
                message = msgpack.unpackb(await stdout.readexactly(size), strict_map_key=False)
            except asyncio.IncompleteReadError:
                raise await self._died() from None
            if message["kind"] == "error":
                raise _error_of(message)
            yield message
            if message["kind"] == "done":
                return

    async def result(self) -> Any:
        """Return what the child's entry returned, passing over its other messages."""
        async for message in self.messages():
            if message["kind"] == "done":
                return message["result"]
        raise await self._died()

    async def stop(self) -> None:
        """End the group: SIGTERM, up to 10 s, SIGKILL; returns when the child is reaped."""
        process = self._process
        if process is None:
            return
        self._signal(signal.SIGTERM)
        try:
            await asyncio.wait_for(process.wait(), TERMINATE_S)
        except TimeoutError:
            self._signal(signal.SIGKILL)
            await process.wait()
        self._signal(signal.SIGKILL)  # helpers that outlived the child
        transport = getattr(process, "_transport", None)
        if transport is not None:
            transport.close()

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, number)

    def _environment(self) -> dict[str, str]:
        threads = str(self._threads)
        path = os.pathsep.join(entry for entry in sys.path if entry)
        limits = {
            "OMP_NUM_THREADS": threads,
            "OMP_WAIT_POLICY": "PASSIVE",  # idle OpenMP threads must not spin on serving's cores
            "POLARS_MAX_THREADS": threads,
        }
        return {**os.environ, **limits, "PYTHONPATH": path}

    async def _died(self) -> MlpdError:
        assert self._process is not None
        status = await self._process.wait()
        return InternalError(
            f"child {self._entry!r} ended with status {status} and no answer",
            code="child_died",
            hint="Its log tells more; status -9 may be the kernel's out-of-memory killer.",
            details={"status": status, "log": self._log_tail()},
        )

    def _log_tail(self) -> str:
        if self._log is None or not self._log.exists():
            return ""
        return self._log.read_bytes()[-_LOG_TAIL_BYTES:].decode(errors="replace")


async def _to_the_end(work: Coroutine[Any, Any, None]) -> None:
    """Return when `work` has ended, however often that is cancelled meanwhile; then raise so.

    A request whose client has gone is cancelled, and again when the daemon stops: who left at the
    second time would leave a process behind that nobody reaps.
    """
    task, cancelled = asyncio.ensure_future(work), None
    while not task.done():
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        raise cancelled


def _error_of(message: Mapping[str, Any]) -> MlpdError:
    """Return the child's error in its own class, found by its code's status."""
    classes = error_classes()
    cls = classes.get(str(message.get("type", "")), InternalError)
    return cls(
        str(message["message"]),
        code=str(message["code"]),
        hint=str(message.get("hint", "")),
        details=message.get("details") or {},
    )
