"""A data directory with everything in it, made once; each test damages a copy of its own."""

import asyncio
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from mlpd.client import Client
from mlpd.core.kernels import precompile
from mlpd.core.time import system_clock
from mlpd.daemon.app import KERNEL_MODULES
from mlpd.storage.environment import Environment
from mlpd.storage.files import DataDirectory
from mlpd.storage.tables import Table
from mlpd.storage.transactions import WriteTransaction
from mlpd.storage.writer import Writer
from tests.http import edge as edges


def pytest_collection_finish() -> None:
    """Compile kernels before any test's clock runs: on a new machine it takes up to a minute."""
    precompile(KERNEL_MODULES)


def live_rows(count: int, user: str = "a") -> list[dict[str, Any]]:
    """Clicks of just now."""
    now_us = time.time_ns() // 1000
    return [{"event_time": now_us - i, "user": user, "amount": 0.25 * i} for i in range(count)]


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Definitions, segments and a log's tail, a model, a route, predictions with labels."""
    directory = tmp_path_factory.mktemp("template") / "data"
    with edges.serve(directory) as running:
        edges.fill(running)
        with Client(running.url) as client:
            compact(running)
            for number in range(20):
                client.events.send("clicks", live_rows(number + 1, f"live-{number}"))
            answer = client.predict("risk", [{"user": "a", "age": 0.1 * i} for i in range(30)])
            labels = [
                {"prediction_id": p["prediction_id"], "label": i % 2}
                for i, p in enumerate(answer["predictions"])
            ]
            client.feedback(labels)
    return directory


def compact(running: Any) -> None:
    """Compact the log of a daemon that runs on a loop of its own."""
    done = asyncio.run_coroutine_threadsafe(running.daemon.compactor.run(), running.loop)
    done.result(50)


@pytest.fixture
def data(template: Path, tmp_path: Path) -> DataDirectory:
    """A copy of the template that a test may damage."""
    root = tmp_path / "data"
    shutil.copytree(template, root, ignore=shutil.ignore_patterns("*.sock"))
    return DataDirectory(root)


@contextmanager
def opened(data: DataDirectory) -> Iterator[Environment]:
    """The environment of a stopped data directory."""
    with Environment.open(data.lmdb, clock=system_clock) as environment:
        yield environment


def write(data: DataDirectory, op: Callable[[WriteTransaction], Any]) -> None:
    """Run one write operation on a stopped data directory."""
    with opened(data) as environment:
        writer = Writer(environment)
        try:
            writer.write_blocking(op)
        finally:
            writer.close()


def rows_of(data: DataDirectory, table: Table) -> list[tuple[bytes, bytes]]:
    """Return a table's rows."""
    with opened(data) as environment, environment.snapshot() as snapshot:
        return [*snapshot.scan(table)]


def flip(path: Path, offset: int) -> None:
    """Flip one bit of one byte, whatever the file's mode; breaks hard links."""
    content, mode = bytearray(path.read_bytes()), path.stat().st_mode
    content[offset] ^= 0x10
    path.unlink()
    path.write_bytes(content)
    path.chmod(mode)


@pytest.fixture(scope="session")
def tools() -> ModuleType:
    """This module, for what tests do to data directories."""
    return sys.modules[__name__]
