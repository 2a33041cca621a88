"""Blobs, the daemon lock and atomic files."""

import errno
import fcntl
import hashlib
import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlpd.core.errors import InternalError, NotFoundError, UnavailableError, ValidationError
from mlpd.storage import files
from mlpd.storage.blobs import Blob, BlobStore
from mlpd.storage.files import atomic_write, make_dirs
from mlpd.storage.lock import DaemonLock, read_holder


def digest(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


@settings(max_examples=30)
@given(contents=st.lists(st.binary(max_size=3000), max_size=5))
def test_blobs_are_what_was_put(tmp_path_factory: Any, contents: list[bytes]) -> None:
    store = BlobStore(tmp_path_factory.mktemp("blobs"))
    for content in contents:
        assert store.put(content) == Blob(digest(content), len(content))
    assert sorted(store) == sorted({digest(c) for c in contents})
    for content in contents:
        assert store.get(digest(content), len(content)) == content


def test_bytes_paths_and_streams_give_the_same_read_only_file(tmp_path: Path) -> None:
    store = BlobStore(tmp_path / "store")
    content = os.urandom(3 << 20)
    (tmp_path / "file").write_bytes(content)
    blobs = {store.put(c) for c in (content, tmp_path / "file", io.BytesIO(content))}
    (blob,) = blobs
    path = store.path(blob.digest)
    assert path.parent == tmp_path / "store" / "blobs" / "sha256"
    assert path.stat().st_mode & 0o777 == 0o444
    assert list((tmp_path / "store" / ".mlpd" / "tmp").iterdir()) == []


def test_damaged_blob_is_refused_and_put_mends_it(tmp_path: Path) -> None:
    store = BlobStore(tmp_path)
    blob = store.put(b"content")
    path = store.path(blob.digest)
    path.chmod(0o600)
    path.write_bytes(b"CONTENT")
    with pytest.raises(InternalError) as caught:
        store.get(blob.digest)
    assert caught.value.code == "blob_corrupt"
    store.put(b"content")
    assert store.get(blob.digest) == b"content"


def test_wrong_size_is_refused(tmp_path: Path) -> None:
    store = BlobStore(tmp_path)
    blob = store.put(b"content")
    with pytest.raises(InternalError):
        store.open(blob.digest, 3)


def test_missing_blob_and_malformed_digest(tmp_path: Path) -> None:
    store = BlobStore(tmp_path)
    with pytest.raises(NotFoundError):
        store.get(digest(b"never"))
    for bad in ("sha256:../../etc/passwd", "md5:00", "sha256:" + "A" * 64, ""):
        with pytest.raises(ValidationError):
            store.path(bad)


def test_deleted_blob_is_gone(tmp_path: Path) -> None:
    store = BlobStore(tmp_path)
    blob = store.put(b"content")
    assert store.delete([blob.digest]) == 1
    assert store.delete([blob.digest]) == 0
    assert not store.exists(blob.digest)
    assert list(store) == []


def test_failing_stream_leaves_nothing_behind(tmp_path: Path) -> None:
    class Broken(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            if self.tell():
                raise ConnectionError("gone")
            return super().read(min(size or 5, 5))

    store = BlobStore(tmp_path)
    with pytest.raises(ConnectionError):
        store.put(Broken(b"0123456789"))
    assert list(store) == []
    assert store.remove_temporary() == 0


def test_leftovers_of_a_crash_are_removed(tmp_path: Path) -> None:
    store = BlobStore(tmp_path)
    (tmp_path / ".mlpd" / "tmp" / "blob-1-ab").write_bytes(b"half")
    assert store.remove_temporary() == 1


def test_atomic_write_replaces_the_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    atomic_write(path, b"a long first content")
    atomic_write(path, b"second")
    assert path.read_bytes() == b"second"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_names_of_existing_folders_are_flushed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = tmp_path / "old"  # of a process that was killed before it could
    old.mkdir()
    flushed: list[Path] = []
    monkeypatch.setattr(files, "fsync_dir", flushed.append)
    make_dirs(old)
    make_dirs(old / "a" / "b")
    assert flushed == [tmp_path, tmp_path, old, old / "a"]


def test_unreadable_parents_are_no_obstacle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path) -> None:
        raise PermissionError(errno.EACCES, "no", path)

    monkeypatch.setattr(files, "fsync_dir", refuse)
    make_dirs(tmp_path)
    with pytest.raises(PermissionError):
        make_dirs(tmp_path / "new")


def test_second_daemon_is_told_who_holds_the_directory(tmp_path: Path, clock: Any) -> None:
    path = tmp_path / "data" / "daemon.lock"
    with DaemonLock(path, clock) as lock:
        lock.announce("http://127.0.0.1:7000")
        with pytest.raises(UnavailableError) as caught:
            DaemonLock(path, clock)
        assert caught.value.code == "data_directory_in_use"
        assert str(os.getpid()) in caught.value.message
        assert "http://127.0.0.1:7000" in caught.value.message
        holder = read_holder(path)
        assert holder is not None
        assert holder["started"] == "2023-11-14T22:13:20Z"
    assert read_holder(path) is None
    DaemonLock(path, clock).close()


def test_a_daemon_starts_while_somebody_asks_who_holds_the_directory(
    tmp_path: Path, clock: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "daemon.lock"
    path.touch()
    asking = os.open(path, os.O_RDONLY)
    fcntl.flock(asking, fcntl.LOCK_SH)  # as read_holder, which has its answer when we wait
    monkeypatch.setattr(time, "sleep", lambda _: os.close(asking))
    with DaemonLock(path, clock):
        assert read_holder(path) is not None


def test_lock_of_a_killed_daemon_is_free(tmp_path: Path, clock: Any) -> None:
    path = tmp_path / "daemon.lock"
    code = (
        "import sys, time; from pathlib import Path; from mlpd.storage.lock import DaemonLock;"
        "from mlpd.core.time import system_clock;"
        "lock = DaemonLock(Path(sys.argv[1]), system_clock, url='u');"
        "print('held', flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", code, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        with pytest.raises(UnavailableError):
            DaemonLock(path, clock)
        child.send_signal(signal.SIGKILL)
    assert path.stat().st_size > 0
    DaemonLock(path, clock).close()
