"""A full or failing disk under a real daemon: reads go on, writes are refused whole, it heals."""

import contextlib
import errno
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from mlpd.client import Client
from mlpd.core.errors import StorageFullError
from mlpd.core.time import system_clock
from mlpd.registry.fsck import check as fsck
from mlpd.storage.check import check, check_pages
from mlpd.storage.environment import Environment
from mlpd.storage.files import DataDirectory
from mlpd.storage.segments import load_manifests
from tests.conftest import Process, make_data_directory
from tests.storage.powercut.live import BY, DOCUMENT, LINEAGE, opened
from tests.storage.powercut.shim import Shim

WAIT_S = 40.0
TMPFS_BYTES = 24 << 20
COMPACTING = """
[storage]
compact_rows = 100
compact_interval = "100ms"
"""


@contextmanager
def served(
    directory: Path, shim: Shim | None = None, options: tuple[str, ...] = ()
) -> Iterator[Client]:
    """A daemon in a process of its own, stopped at the end, and a client of it."""
    environment = None if shim is None else shim.environment()
    process = Process(directory, options=options, environment=environment).start()
    try:
        with Client(process.url) as client:
            client.apply(DOCUMENT)
            yield client
        process.stop()
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.process.kill()
        process._reap()


def send(client: Client, count: int) -> int:
    now_us = time.time_ns() // 1000
    rows = [{"at": now_us, "user": "u1", "x": 1.0, "n": i, "text": "t" * 50} for i in range(count)]
    done = client.events.send("clicks", rows)
    assert done["accepted"] == count
    return count


def counted(client: Client) -> list[Any]:
    """The features that count the rows: of both windows, and their sum."""
    columns = client.read_features("s", entities=[{"user": "u1"}])["columns"]
    return [columns[f"load.{name}"][0] for name in ("count_6h", "count_30d", "sum_30d")]


def refused(client: Client) -> None:
    with pytest.raises(StorageFullError) as caught:
        send(client, 3)
    assert caught.value.status == 507


def wait_until(condition: Callable[[], Any], what: str) -> None:
    deadline_s = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline_s, f"never happened: {what}"
        time.sleep(0.05)


def check_directory(directory: Path, rows: int) -> None:
    """Everything is whole, and the log holds the rows and the definitions."""
    data = DataDirectory(directory)
    with Environment.open(data.lmdb, clock=system_clock, readonly=True) as environment:
        assert check(environment, data) == []
        with environment.snapshot() as snapshot:
            assert snapshot.sequence == rows + 1
    assert check_pages(data) == []


FAILURES = {
    "disk full": {"error": errno.ENOSPC, "path": "/lmdb/"},
    "pages fail": {"error": errno.EIO, "kinds": "W", "path": "/lmdb/"},
    "flush fails": {"error": errno.EIO, "kinds": "S", "path": "/lmdb/"},
    "meta page fails": {"error": errno.EIO, "kinds": "W", "path": "/lmdb/", "synchronous": True},
    "meta page full": {"error": errno.ENOSPC, "kinds": "W", "path": "/lmdb/", "synchronous": True},
}


@pytest.mark.parametrize("failure", list(FAILURES))
def test_writes_are_refused_reads_go_on_and_it_heals(
    failure: str, daemon_directory: Path, tmp_path: Path
) -> None:
    with (
        Shim(daemon_directory, tmp_path / "shim") as shim,
        served(daemon_directory, shim) as client,
    ):
        rows = send(client, 10)
        for _ in range(2):
            shim.fail(**FAILURES[failure])
            for _ in range(4):
                refused(client)
                assert counted(client) == [rows, rows, rows]
            assert client.status()["ready"]
            shim.mend()
            rows += send(client, 5)  # the first write after it, without a restart
            assert counted(client) == [rows, rows, rows]
        assert shim.control.failed > 0
    check_directory(daemon_directory, rows)


def test_compaction_on_a_full_disk_tries_again_and_leaves_nothing_behind(
    daemon_directory: Path, tmp_path: Path
) -> None:
    (tmp_path / "config.toml").write_text(COMPACTING)
    options = ("--config", str(tmp_path / "config.toml"))
    segments = DataDirectory(daemon_directory).segments
    with (
        Shim(daemon_directory, tmp_path / "shim") as shim,
        served(daemon_directory, shim, options) as client,
    ):
        shim.fail(errno.ENOSPC, kinds="W", path="/segments/")
        rows = send(client, 200)
        wait_until(lambda: shim.control.failed >= 8, "compactions that fail")
        rows += send(client, 5)  # the log takes what segments can't
        assert counted(client) == [rows, rows, rows]
        # One may be under way; those before it have been cleaned up.
        assert len([p for p in segments.rglob("*") if p.is_file()]) <= 1
        shim.mend()
        wait_until(lambda: client.status()["log_tail_rows"] < 100, "a compaction that works")
        assert counted(client) == [rows, rows, rows]
    check_directory(daemon_directory, rows)
    assert manifests(daemon_directory) >= 1


def manifests(directory: Path) -> int:
    data = DataDirectory(directory)
    with (
        Environment.open(data.lmdb, clock=system_clock, readonly=True) as environment,
        environment.snapshot() as snapshot,
    ):
        return len(load_manifests(snapshot))


@contextmanager
def small_disk(directory: Path) -> Iterator[Path]:
    """A real file system of `TMPFS_BYTES`; skips where none may be mounted."""
    directory.mkdir()
    options = ("-t", "tmpfs", "-o", f"size={TMPFS_BYTES}", "tmpfs", str(directory))
    try:
        done = subprocess.run(["mount", *options], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("a small disk can't be made here: there is no mount command")
    if done.returncode != 0:
        pytest.skip(f"a small disk can't be made here: {done.stderr.strip()} (needs root)")
    try:
        yield directory
    finally:
        subprocess.run(["umount", "--lazy", str(directory)], check=True)


def fill(disk: Path) -> Path:
    """Fill the disk to the last byte; return the file that does."""
    ballast = disk / "ballast"
    with ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))
    return ballast


def test_a_disk_that_is_really_full_refuses_writes_and_heals(
    tmp_path: Path, transform_cache: Path
) -> None:
    with small_disk(tmp_path / "disk") as disk:
        directory = make_data_directory(disk / "data", transform_cache)
        with served(directory) as client:
            rows = send(client, 10)
            for _ in range(3):
                ballast = fill(disk)
                with contextlib.suppress(StorageFullError):
                    while True:  # the file has some pages to use again
                        rows += send(client, 500)
                for _ in range(3):
                    with pytest.raises(StorageFullError) as caught:
                        send(client, 2000)
                    assert caught.value.status == 507
                    assert counted(client) == [rows, rows, rows]
                ballast.unlink()
                rows += send(client, 500)
                assert counted(client) == [rows, rows, rows]
        check_directory(directory, rows)


async def test_a_model_that_the_disk_has_no_room_for_is_not_published(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk") as disk, opened(disk / "data") as store:
        await store.register(1, lambda _: None)
        ballast = fill(disk)
        files: dict[str, bytes | Path] = {"model.onnx": os.urandom(2 << 20)}
        lineage = {**LINEAGE, "seed": 2}
        for _ in range(3):
            with pytest.raises(StorageFullError):
                await store.registry.register("clf", files, lineage, BY)
            assert [v.number for v in store.registry.versions("clf")] == [1]
            assert (await store.registry.load("clf")).files["model.onnx"]
        assert fsck(store.environment, store.data.registry).problems == ()
        assert list((store.data.registry / ".mlpd" / "tmp").iterdir()) == []
        ballast.unlink()
        assert (await store.registry.register("clf", files, lineage, BY)).number == 2
        assert fsck(store.environment, store.data.registry).problems == ()
