"""Nodes: real daemons, with their real stores and handlers, on a disk that is slow and crashes."""

import asyncio
import functools
import shutil
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

from greenlet import getcurrent
from multidict import CIMultiDict

from mlpd.client.requests import Answer, Request
from mlpd.core import shards as core_shards
from mlpd.core.config import Config
from mlpd.core.errors import MlpdError, UnavailableError
from mlpd.core.names import TimeUs
from mlpd.daemon import app
from mlpd.daemon.app import Daemon
from mlpd.daemon.ownership import Ownership
from mlpd.http import api
from mlpd.http.events import EventHandlers
from mlpd.http.features import FeatureHandlers
from mlpd.http.operation import OperationHandlers
from mlpd.http.server import error_response
from mlpd.http.wire import BODY_BYTES_MAX
from mlpd.storage import environment
from mlpd.storage.groups import Entry
from mlpd.storage.map_store import MAP_FILE
from mlpd.storage.transactions import WriteTransaction
from mlpd.storage.writer import Writer
from tests.cluster.clock import Turns

SOURCE = "sales"
Disk = Callable[[], float]
"""Returns how many seconds the next step of a disk takes."""


class SimulatedWriter(Writer):
    """The writer without its thread: groups are run, wait for the disk, and are committed.

    A crash in the wait leaves nothing of the group.
    """

    acknowledges_early = False
    """A planted bug: callers are answered before the commit."""

    def __init__(self, environment: Any, **how: Any) -> None:
        with mock.patch.object(threading.Thread, "start"):
            super().__init__(environment, **how)
        self._queue = SimpleNamespace(qsize=lambda: len(self._waiting), put=self._put)  # type: ignore[assignment]
        self._waiting: deque[Entry] = deque()
        self._task: asyncio.Task[None] | None = None
        self.disk_s: Disk = lambda: 0.0

    def crash(self) -> None:
        self._closed = True
        self._waiting.clear()
        if self._task is not None:
            self._task.cancel()

    def write_blocking(self, op: Any, *, size_bytes: int = 0) -> Any:
        """Of a daemon that is being built."""
        entry = Entry(op, None, size_bytes)
        self._committer.commit([entry])
        if entry.error is not None:
            raise entry.error
        return entry.result

    def _put(self, entry: Entry | None) -> None:
        assert entry is not None
        self._waiting.append(entry)
        if self._task is None or self._task.done():
            self._task = asyncio.get_running_loop().create_task(self._drain())

    async def _drain(self) -> None:
        while self._waiting:
            await asyncio.sleep(self.disk_s())
            group = [entry for entry in self._waiting if not entry.is_cancelled]
            self._waiting.clear()
            await _Commit(self, group).to_end()
            for entry in [*group, *self._take_watchers()]:
                entry.resolve()


class _Commit(Turns):
    """The real code of a group, which waits for the disk where it commits."""

    def __init__(self, writer: SimulatedWriter, group: list[Entry]) -> None:
        super().__init__(functools.partial(writer._committer.commit, group))
        self.writer, self.group = writer, group


class SlowTransaction(WriteTransaction):
    """A write transaction whose commit takes as long as the disk does."""

    __slots__ = ()

    def commit(self) -> None:
        turns = getcurrent()
        if isinstance(turns, _Commit):
            if turns.writer.acknowledges_early:
                for entry in turns.group:
                    entry.resolve()
            Turns.wait(lambda: asyncio.sleep(turns.writer.disk_s()))
        super().commit()


class WatchedOwnership(Ownership):
    """Tells whenever what the daemon answers for changes."""

    watcher: Callable[[], None] = staticmethod(lambda: None)

    def go_by(self, moves: Any) -> None:
        super().go_by(moves)
        self.watcher()


class Arrived:
    """A request as handlers see it."""

    def __init__(self, request: Request, match_info: dict[str, str]) -> None:
        self.method, self.path = request.method, request.path
        self.headers = CIMultiDict({**request.headers, "Accept": request.accept})
        self.content_type = request.content_type
        self.match_info, self.query = match_info, dict[str, str]()
        self.app = {BODY_BYTES_MAX: 32 << 20}
        self._body = b"" if request.body is None else request.body
        self.content_length = len(self._body)
        self.content = self

    def get(self, key: Any, default: Any = None) -> Any:  # noqa: ARG002 - it has no permit
        return default

    async def iter_any(self) -> Any:
        yield self._body


class Node:
    """A member: `start` it, ask it by `handle`, `crash` it; what was on disk is there again."""

    forgets_map = False
    """A planted bug: the map of the last start is what a crash leaves."""

    def __init__(self, name: str, directory: Path, clock: Callable[[], TimeUs], disk: Disk) -> None:
        self.name, self.url = name, f"http://{name}:1"
        self.directory, self._clock, self._disk = directory, clock, disk
        self.daemon: Daemon | None = None
        self._tasks: set[asyncio.Task[Answer]] = set()
        self._first_map = b""

    @property
    def ownership(self) -> Ownership:
        assert self.daemon is not None
        return self.daemon.ownership

    def start(self) -> None:
        assert self.daemon is None
        path = self.directory / MAP_FILE
        self._first_map = path.read_bytes() if path.exists() else b""
        daemon = Daemon(self.directory, _CONFIG, self._clock)
        daemon.writer.disk_s = self._disk  # type: ignore[attr-defined]
        self._ways: dict[tuple[str, str], Any] = {
            **{(one.method, one.path): one.handler for one in api._build_cluster(daemon)},
            ("POST", f"/v1/events/{SOURCE}"): EventHandlers(daemon).send,
            ("POST", "/v1/features/read"): FeatureHandlers(daemon).read,
            ("GET", "/v1/status"): OperationHandlers(daemon).status,
        }
        self.daemon = daemon

    def crash(self) -> None:
        """End at once: requests under way are lost, and so is what isn't on disk."""
        assert self.daemon is not None
        for task in self._tasks:
            task.cancel()
        daemon, self.daemon = self.daemon, None
        daemon.writer.crash()  # type: ignore[attr-defined]
        asyncio.get_running_loop().call_soon(daemon.environment.close)
        daemon.lock.close()
        if self.forgets_map:
            (self.directory / MAP_FILE).write_bytes(self._first_map)

    def begin_anew(self, template: Path) -> None:
        """Put another daemon in its place, on a directory like `template`."""
        if self.daemon is not None:
            self.crash()
        shutil.rmtree(self.directory, ignore_errors=True)
        shutil.copytree(template, self.directory)
        self.start()

    def handle(self, request: Request) -> "asyncio.Task[Answer]":
        """Return the task that answers; it goes on whoever waits, as a daemon's does."""
        task = asyncio.get_running_loop().create_task(self._answer(request))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _answer(self, request: Request) -> Answer:
        handler = self._ways[request.method, request.path]
        try:
            response = await handler(Arrived(request, {"source": SOURCE}))
        except MlpdError as error:
            response = error_response(error)
        headers = {name.lower(): value for name, value in response.headers.items()}
        return Answer(response.status, headers, response.body)


def lost(why: str) -> UnavailableError:
    return UnavailableError(why, code="connection_lost", hint="In the simulation.")


_CONFIG = Config()


@contextmanager
def lighter() -> Iterator[None]:
    """Build daemons with a simulated writer, and what is the same for all of them once."""
    app.precompile(app.KERNEL_MODULES)
    with ExitStack() as stack:

        def patch(where: Any, name: str, value: Any) -> None:
            stack.enter_context(mock.patch.object(where, name, value))

        patch(app, "precompile", lambda _: None)
        patch(app, "load_feature_kernels", functools.cache(app.load_feature_kernels))
        patch(app, "load_kernels", functools.cache(app.load_kernels))
        patch(app, "Writer", SimulatedWriter)
        patch(environment, "WriteTransaction", SlowTransaction)
        patch(app, "Ownership", WatchedOwnership)
        patch(core_shards, "_decode_owners", _once(core_shards._decode_owners, _content))
        patch(core_shards, "_slots_by_name", _once(core_shards._slots_by_name, _identity))
        yield


_KNOWN_MAX = 256


def _once(compute: Callable[..., Any], key_of: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function of maps that computes what it has seen once: 16,384 slots take 1 ms."""
    known: dict[Any, Any] = {}

    def found(*args: Any) -> Any:
        key = key_of(*args)
        if key not in known:
            if len(known) == _KNOWN_MAX:
                known.clear()
            known[key] = compute(*args), args  # which keeps them, so that their ids stay theirs
        return known[key][0]

    return found


def _content(shards: Any, slots: Any) -> Any:
    return shards, tuple(sorted(slots.items()))


def _identity(shard_map: Any, *name: str) -> Any:
    return id(shard_map.owners), shard_map.shards, *name
