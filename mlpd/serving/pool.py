"""Loads sessions in a thread, one at a time, each once, and gives their memory back."""

import asyncio
import weakref
from concurrent.futures import ThreadPoolExecutor

from mlpd.core.allocator import find_trim, heap_bytes
from mlpd.core.errors import UnavailableError
from mlpd.serving.graphs import read_signature
from mlpd.serving.package import ModelPackage
from mlpd.serving.sessions import Session

TINY_MODEL = (
    b'\x08\x08:3\n\x10\n\x01x\x12\x01y"\x08Identity\x12\x01gZ\r\n\x01x\x12\x08\n\x06\x08\x0b'
    b"\x12\x02\n\x00b\r\n\x01y\x12\x08\n\x06\x08\x0b\x12\x02\n\x00B\x04\n\x00\x10\r"
)
"""y = Identity(x), double, opset 13: the least that onnxruntime loads."""

TRIM_DELAY_S = 0.5
"""Trimming takes some milliseconds of the thread that loads: not after every version."""

_HEAP_PER_FILE = 7
"""Memory of a session over the size of its file, for trees and where nothing can be measured."""

_Key = tuple[str, str]


class SessionPool:
    """Finds a loaded version or loads it; all methods belong to the loop.

    A session lives as long as somebody refers to it: a swapped-out one serves the requests that
    hold it and is freed with the last of them; then `malloc_trim` returns its pages (freeing alone
    returned none of them).
    """

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="mlpd-load")
        self._sessions: weakref.WeakValueDictionary[_Key, Session] = weakref.WeakValueDictionary()
        self._loading: dict[_Key, asyncio.Task[Session]] = {}
        self._trim_due = False
        self._closed = False

    async def start(self) -> None:
        """Pay for the process's first session, 20 to 40 ms, before a request has to."""
        await asyncio.get_running_loop().run_in_executor(self._executor, read_signature, TINY_MODEL)

    def get(self, package: ModelPackage) -> Session | None:
        """Return the package's session if it's loaded."""
        return self._sessions.get(_key(package))

    async def load(self, package: ModelPackage) -> Session:
        """Return the package's session, loaded, warm and checked against its golden rows.

        However many ask at once, it's loaded once; a caller's cancellation doesn't stop it.
        Raises what `Session` and `Session.verify` raise, UnavailableError after `close`.
        """
        if self._closed:
            raise UnavailableError("the server is stopping", code="stopping")
        key = _key(package)
        session = self._sessions.get(key)
        if session is not None:
            return session
        task = self._loading.get(key)
        if task is None:
            task = self._loading[key] = asyncio.create_task(self._load(package))
            task.add_done_callback(lambda done: self._forget(key, done))
        return await asyncio.shield(task)

    async def close(self) -> None:
        """Wait for loads under way and refuse new ones; loaded sessions stay usable."""
        self._closed = True
        await asyncio.gather(*self._loading.values(), return_exceptions=True)
        self._executor.shutdown()

    async def _load(self, package: ModelPackage) -> Session:
        # Not as the future's result: run_in_executor leaves that in a reference cycle, and the
        # session's memory would wait for the garbage collector.
        loaded: list[Session] = []
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(self._executor, lambda: loaded.append(load_session(package)))
        session = loaded.pop()
        self._sessions[_key(package)] = session
        weakref.finalize(session, self._freed, loop).atexit = False
        return session

    def _forget(self, key: _Key, done: "asyncio.Task[Session]") -> None:
        del self._loading[key]
        if not done.cancelled():
            done.exception()  # the waiters have it; without any, asyncio would complain

    def _freed(self, loop: asyncio.AbstractEventLoop) -> None:
        """Trim in a while, once for all that is freed until then; any thread may drop the last."""
        if not self._closed and not self._trim_due:
            self._trim_due = True
            loop.call_soon_threadsafe(loop.call_later, TRIM_DELAY_S, self._trim)

    def _trim(self) -> None:
        self._trim_due = False
        if not self._closed:
            self._executor.submit(trim_memory)


def load_session(package: ModelPackage) -> Session:
    """Return a session that reproduced its golden rows, which gave it a first idea of its cost.

    Blocks for tens of milliseconds.  Its memory is what the allocator gave out meanwhile, so what
    other threads took then counts as well.  Raises what `Session` and `Session.verify` raise.
    """
    before = heap_bytes()
    session = Session(package)
    session.verify()
    after = heap_bytes()
    if before is None or after is None:
        session.memory_bytes += _HEAP_PER_FILE * len(package.onnx)
    else:
        session.memory_bytes += max(0, after - before)
    return session


def trim_memory() -> None:
    """Return free heap pages to the system, where the C library can (glibc); a few ms."""
    trim = find_trim()
    if trim is not None:
        trim(0)


def _key(package: ModelPackage) -> _Key:
    return package.reference, package.digest
