"""Real daemons for every area's tests, and the check that a test leaves nothing behind."""

import asyncio
import contextlib
import inspect
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hypothesis
import pytest

from mlpd.core.config import Config, ServerConfig, ServingConfig, StorageConfig, TrainingConfig
from mlpd.core.kernels import default_cache_dir
from mlpd.core.names import TimeUs
from mlpd.core.time import Clock, system_clock
from mlpd.daemon.app import Daemon
from mlpd.http.api import build_routes
from mlpd.http.server import HttpServer
from mlpd.storage.lock import read_holder

PROFILE = os.environ.get("HYPOTHESIS_PROFILE", "default")
"""How much is tried: "default", "ci" before a merge, or "nightly"."""

for profile, examples in (("default", 100), ("ci", 100), ("nightly", 10_000)):
    hypothesis.settings.register_profile(
        profile, deadline=None, print_blob=True, max_examples=examples
    )
hypothesis.settings.load_profile(PROFILE)

os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
# Tests start some thousand processes: each would compile the same 250 modules, 0.6 s of it.

START_US = 1_700_000_000_000_000
LEAK_GRACE_S = 20.0
"""Threads and children may take this long to end after a test."""

MEMORY = "/dev/shm" if Path("/dev/shm").is_dir() else None
"""Where tests that make many stores put them: fsync costs nothing there."""

SHARED_DAEMONS = {"edge", "shop", "trio", "routed", "spread"}
"""Fixtures of wider scope whose daemon works, and opens things, between tests."""
SHARED_DAEMON = "shared daemon"
"""The name of their threads: while there is one, sockets say nothing of the test that runs."""

SMALL = Config(
    server=ServerConfig(port=0),
    storage=StorageConfig(map_bytes=1 << 30, compact_rows=10_000_000),
    serving=ServingConfig(rows_max=2_000, queue_rows_max=5_000, prediction_log_rows_max=5_000),
    training=TrainingConfig(threads=1, idle=False, nice=0),
)
"""A daemon with small limits, which compacts when a test says so."""

OpenDaemon = Callable[..., AbstractAsyncContextManager[Daemon]]


@dataclass
class ManualClock:
    """A clock that stands still until a test moves it, either way."""

    now_us: int = START_US

    def __call__(self) -> TimeUs:
        return TimeUs(self.now_us)


@dataclass
class ShiftedClock:
    """The system's clock, which a test makes jump, either way."""

    shift_us: int = 0

    def __call__(self) -> TimeUs:
        return TimeUs(system_clock() + self.shift_us)

    def to_next(self, step_us: int) -> None:
        """Jump to the next whole multiple of a step."""
        self.shift_us += step_us - self() % step_us


async def until(reached: Callable[[], Any], seconds: float = 40.0) -> None:
    """Wait for what nothing tells of; a loaded machine takes its time."""
    async with asyncio.timeout(seconds):
        while not reached():  # noqa: ASYNC110 - no event tells
            await asyncio.sleep(0.005)


@pytest.fixture(scope="session")
def transform_cache() -> Path:
    """Transforms that tests compile, kept from run to run as the kernels are."""
    directory = default_cache_dir() / "tests"
    directory.mkdir(parents=True, exist_ok=True)
    return directory


@pytest.fixture
def daemon_directory(tmp_path: Path, transform_cache: Path) -> Path:
    """An empty data directory whose compiled transforms are shared with other tests."""
    return make_data_directory(tmp_path / "data", transform_cache)


def make_data_directory(root: Path, transform_cache: Path) -> Path:
    (root / "cache").mkdir(parents=True)
    (root / "cache" / "kernels").symlink_to(transform_cache)
    return root


@pytest.fixture
def open_daemon(daemon_directory: Path) -> OpenDaemon:
    """Open a started daemon on the test's data directory; again and again, to restart it."""

    @asynccontextmanager
    async def opened(
        directory: Path = daemon_directory, config: Config = SMALL, clock: Clock = system_clock
    ) -> AsyncIterator[Daemon]:
        daemon = await asyncio.to_thread(Daemon, directory, config, clock)
        try:
            await daemon.start()
            yield daemon
        finally:
            await daemon.stop()

    return opened


@pytest.fixture
async def daemon(open_daemon: OpenDaemon) -> AsyncIterator[Daemon]:
    """A started daemon without HTTP."""
    async with open_daemon() as running:
        yield running


@dataclass
class Served:
    """A daemon behind its HTTP server, on the test's own loop."""

    daemon: Daemon
    url: str


@pytest.fixture
async def served(daemon: Daemon) -> AsyncIterator[Served]:
    """The same daemon with its route table on a free port."""
    server = HttpServer(daemon.config.server, build_routes(daemon), daemon.monitor.observe_request)
    await server.start(daemon.paths.socket)
    yield Served(daemon, server.url)
    await server.stop()


@dataclass
class Process:
    """`mlpd serve` as a process of its own; `url` once it said that it is ready."""

    directory: Path
    process: "subprocess.Popen[str]" = field(init=False)
    url: str = ""
    options: tuple[str, ...] = ()
    environment: dict[str, str] | None = None

    def start(self) -> "Process":
        """Start and wait until it is ready."""
        command = [sys.executable, "-m", "mlpd", "serve"]
        self.process = subprocess.Popen(
            [*command, "--data-dir", str(self.directory), "--port", "0", *self.options],
            stdout=subprocess.PIPE,
            env=self.environment,
            text=True,
        )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert "ready at http://" in line, line
        holder = read_holder(self.directory / "daemon.lock")
        assert holder is not None
        assert holder["pid"] == self.process.pid
        self.url = holder["url"]
        return self

    def kill(self) -> None:
        """End it as a power cut would."""
        self.process.kill()
        self._reap()

    def stop(self) -> None:
        """End it gracefully and check that nothing is left of it."""
        children = children_of(self.process.pid)
        self.process.send_signal(signal.SIGTERM)
        self._reap()
        assert self.process.returncode == 0
        assert read_holder(self.directory / "daemon.lock") is None
        assert not (self.directory / "mlpd.sock").exists()
        assert not [pid for pid in children if Path(f"/proc/{pid}").exists()]

    def _reap(self) -> None:
        self.process.wait(40)
        assert self.process.stdout is not None
        self.process.stdout.close()


@pytest.fixture
def serve_process(daemon_directory: Path) -> Iterator[Process]:
    """`mlpd serve` on a free port; a test may kill it and start it again."""
    running = Process(daemon_directory).start()
    try:
        yield running
        if running.process.poll() is None:
            running.stop()
    finally:
        with contextlib.suppress(ProcessLookupError):
            running.process.kill()
        running._reap()


def children_of(pid: int) -> set[int]:
    """Return the ids of a process's children, whichever thread started them."""
    found: set[int] = set()
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            found.update(int(child) for child in task.read_text().split())
    return found


def children_with(argument: str) -> set[int]:
    """Return the ids of this process's children that have this argument."""
    found = set()
    for pid in children_of(os.getpid()):
        with contextlib.suppress(OSError):  # it has just ended
            if argument.encode() in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0"):
                found.add(pid)
    return found


def open_files() -> set[tuple[str, str]]:
    """Return (number, target) of this process's descriptors: files, pipes and sockets.

    Anonymous inodes are not counted: polars keeps an event loop of its own once it was used.
    """
    found = set()
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            found.add((entry.name, str(entry.readlink())))
    passed_over = ("anon_inode:", f"/proc/{os.getpid()}/fd")
    return {(number, target) for number, target in found if not target.startswith(passed_over)}


def leftovers(
    threads: set[threading.Thread], children: set[int], files: set[tuple[str, str]]
) -> list[str]:
    """Return what is there beyond what was there before.

    The idle threads of a loop's own executor end with the loop, after the test's fixtures.
    """
    started = [t.name for t in set(threading.enumerate()) - threads]
    opened = open_files() - files
    if any(thread.name == SHARED_DAEMON for thread in threads):
        opened = {(number, target) for number, target in opened if not target.startswith("socket:")}
    return [
        *(f"thread {name}" for name in started if not name.startswith("asyncio_")),
        *(f"child process {pid}" for pid in children_of(os.getpid()) - children),
        *(f"descriptor {number}: {target}" for number, target in opened),
    ]


@pytest.fixture(autouse=True)
def leaves_nothing(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail a test that leaves a thread, a child process or an open file behind; about 0.2 ms."""
    if sys.platform != "linux" or SHARED_DAEMONS & set(request.fixturenames):
        yield
        return
    before = set(threading.enumerate()), children_of(os.getpid()), open_files()
    yield
    deadline_s = time.monotonic() + LEAK_GRACE_S
    while (left := leftovers(*before)) and time.monotonic() < deadline_s:
        time.sleep(0.02)
    assert not left, f"the test left behind: {', '.join(left)}"


@pytest.fixture
async def leaves_no_task() -> AsyncIterator[None]:
    """Fail an async test whose fixtures and body left a task running."""
    before = asyncio.all_tasks()
    yield
    left = asyncio.all_tasks() - before - {asyncio.current_task()}
    assert not left, f"the test left tasks behind: {left}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give every async test `leaves_no_task`, set up before its other fixtures."""
    for item in items:
        if isinstance(item, pytest.Function) and inspect.iscoroutinefunction(item.function):
            item.fixturenames.insert(0, "leaves_no_task")
