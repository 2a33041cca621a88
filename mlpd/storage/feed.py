"""The feed: the newest commits, each with all that it changed, for whoever keeps a copy.

A record is written before its commit and cut off again if that fails, so that after a kill -9 the
feed ends with the newest commit; docs/formats/feed.md has the bytes.  It isn't flushed: after a
power cut it may end earlier, and then begins anew.
"""

import logging
import os
import struct
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgpack
from xxhash import xxh64_intdigest

from mlpd.core.errors import InternalError
from mlpd.storage.tables import Head, Table

Op = tuple[Table, bytes, bytes | None]
"""What was put under a key of a table; None: it was deleted."""

FILE_BYTES = 64 << 20
"""A file is followed by another one when it has so many."""
READ_BYTES = 1 << 20
"""What is read at once, or one record."""
_HEADER = struct.Struct("<IQ32s32s")
"""Bytes of the payload, checksum of what follows, head of the commit before, head."""
_CHECKED_FROM = 12
_PLACES_MAX = 32
_TABLES = tuple(Table)
_NUMBERS = {table: number for number, table in enumerate(_TABLES)}

_log = logging.getLogger("mlpd.storage")


@dataclass(frozen=True, slots=True)
class Commit:
    """A commit of the environment that the feed is of: the heads before and after it."""

    previous: Head
    head: Head
    ops: Sequence[Op]


def encode_commit(commit: Commit) -> bytes:
    """Return a commit as a record."""
    flat: list[object] = []
    for table, key, value in commit.ops:
        flat += (_NUMBERS[table], key, value)
    payload = msgpack.packb(flat)
    heads = commit.previous.encode() + commit.head.encode()
    checksum = xxh64_intdigest(heads + payload)
    return _HEADER.pack(len(payload), checksum, heads[:32], heads[32:]) + payload


def decode_commits(data: bytes) -> Iterator[Commit]:
    """Yield the commits of whole records; raises InternalError(code="feed_damaged")."""
    offset = 0
    while offset < len(data):
        body = offset + _HEADER.size
        if body > len(data):
            raise _damaged()
        size, checksum, previous, head = _HEADER.unpack_from(data, offset)
        end = body + size
        if end > len(data) or xxh64_intdigest(data[offset + _CHECKED_FROM : end]) != checksum:
            raise _damaged()
        flat = msgpack.unpackb(data[body:end], use_list=False)
        ops = [(_TABLES[flat[i]], flat[i + 1], flat[i + 2]) for i in range(0, len(flat), 3)]
        yield Commit(Head.decode(previous), Head.decode(head), ops)
        offset = end


def _damaged() -> InternalError:
    return InternalError(
        "a record of the feed is damaged: its checksum does not match",
        code="feed_damaged",
        hint="A follower asks for it again, or starts again from a backup of its owner.",
    )


class Feed:
    """The feed of one environment in the folder `directory`; off until `start`.

    `begin` and `end` are the writer thread's; any thread may read.
    """

    def __init__(self, directory: Path, bytes_max: int, newest: Head) -> None:
        self._directory = directory
        self._bytes_max = bytes_max
        self._file_bytes = min(FILE_BYTES, max(1, bytes_max // 8))
        self._lock = threading.Lock()  # guards what follows
        self._files: list[tuple[int, Path]] = []
        """Ascending: arrival time of the commit before the first one of a file, its path."""
        self._sizes: dict[Path, int] = {}
        """What of each file is committed, bytes."""
        self._places: dict[bytes, tuple[Path, int]] = {}
        """Where what follows a head begins, for those that were read up to lately."""
        self._descriptor: int | None = None
        self._pending = 0
        self.is_on = directory.is_dir()
        if self.is_on:
            self._recover(newest)

    @property
    def size_bytes(self) -> int:
        """Bytes of all files."""
        with self._lock:
            return sum(self._sizes.values())

    def start(self) -> None:
        """Note commits from the next one on; on the writer thread.  Idempotent."""
        if not self.is_on:
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            self.is_on = True

    def stop(self) -> None:
        """Note nothing more, and remove all files; on the writer thread.  Idempotent."""
        self.is_on = False
        with self._lock:
            self._forget()
        if self._directory.is_dir():
            self._directory.rmdir()

    def begin(self, commit: Commit) -> None:
        """Write a commit that is about to be made; `end` follows.

        A full disk ends the feed and not the commit: followers start again.
        """
        record = encode_commit(commit)
        try:
            path, descriptor = self._current(commit.previous)
            os.pwrite(descriptor, record, self._sizes[path])
        except OSError as error:
            _log.error("the feed for followers has ended, it can't be written: %s", error)
            self.stop()
            return
        self._pending = len(record)

    def end(self, head: Head, *, committed: bool) -> None:
        """Say what became of the commit that was begun."""
        pending, self._pending = self._pending, 0
        if not self._files or not pending:
            return
        path = self._files[-1][1]
        with self._lock:
            if committed:
                self._sizes[path] += pending
                self._keep_place(head.encode(), path, self._sizes[path])
            elif self._descriptor is not None:
                os.ftruncate(self._descriptor, self._sizes[path])
            if committed:
                self._remove_old()

    def read(self, after: Head, bytes_max: int = READ_BYTES) -> bytes | None:
        """Return records of the commits that follow a head, empty if none does yet; blocks.

        At least one, however large; else about `bytes_max`.  None: the feed doesn't reach back so
        far, or the head is none of this history.
        """
        key = after.encode()
        with self._lock:
            place = self._places.get(key)
            files, sizes = list(self._files), dict(self._sizes)
        try:
            found = place or _find(files, sizes, after)
            if found is None:
                return None
            path, offset = found
            if offset >= sizes.get(path, 0):
                path, offset = _next_file(files, path) or (path, offset)
            data = _read_records(path, offset, sizes.get(path, 0), bytes_max)
        except FileNotFoundError:  # it has just become too old
            return None
        if data:
            with self._lock:
                self._keep_place(_last_head(data), path, offset + len(data))
        return data

    def close(self) -> None:
        """Close the file; idempotent."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _current(self, previous: Head) -> tuple[Path, int]:
        """Return the file that the next record goes to, open."""
        if self._files and self._sizes[self._files[-1][1]] < self._file_bytes:
            path = self._files[-1][1]
        else:
            self.close()
            number = max(0, previous.group_us)
            path = self._directory / f"{number:020d}.feed"
            with self._lock:
                self._files.append((number, path))
                self._sizes[path] = 0
        if self._descriptor is None:
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        return path, self._descriptor

    def _keep_place(self, head: bytes, path: Path, offset: int) -> None:
        self._places.pop(head, None)
        self._places[head] = path, offset
        while len(self._places) > _PLACES_MAX:
            self._places.pop(next(iter(self._places)))

    def _remove_old(self) -> None:
        while len(self._files) > 1 and sum(self._sizes.values()) > self._bytes_max:
            _, path = self._files.pop(0)
            del self._sizes[path]
            self._places = {h: place for h, place in self._places.items() if place[0] != path}
            path.unlink(missing_ok=True)

    def _forget(self) -> None:
        self.close()
        for _, path in self._files:
            path.unlink(missing_ok=True)
        self._files, self._sizes, self._places = [], {}, {}

    def _recover(self, newest: Head) -> None:
        """Find what a former process wrote; begin anew if it doesn't end with the newest commit."""
        paths = sorted(self._directory.glob("*.feed"))
        self._files = [(int(path.stem), path) for path in paths]
        self._sizes = {path: path.stat().st_size for path in paths}
        if not paths:
            return
        last, end = b"", 0
        while self._files and not end:
            path = self._files[-1][1]
            for offset, _, head in _scan(path, self._sizes[path]):
                if Head.decode(head).group_us > newest.group_us:
                    break  # it was written, and never committed
                last, end = head, offset
            if end:
                self._sizes[path] = end
                os.truncate(path, end)
            else:
                self._files.pop()
                del self._sizes[path]
                path.unlink()
        if last != newest.encode():
            _log.warning("the feed for followers begins anew: it doesn't end with the last commit")
            self._forget()


def _scan(path: Path, size: int, offset: int = 0) -> Iterator[tuple[int, bytes, bytes]]:
    """Yield (where it ends, head before, head) of each whole record of a file."""
    with path.open("rb") as file:
        while offset + _HEADER.size <= size:
            file.seek(offset)
            payload, _, previous, head = _HEADER.unpack(file.read(_HEADER.size))
            offset += _HEADER.size + payload
            if offset > size:
                return
            yield offset, previous, head


def _find(
    files: Sequence[tuple[int, Path]], sizes: dict[Path, int], after: Head
) -> tuple[Path, int] | None:
    """Return where what follows a head begins; some milliseconds for each 10 MiB of a file."""
    key = after.encode()
    older = [path for number, path in files if number <= max(0, after.group_us)]
    for path in older[-1:]:
        start = 0
        for end, previous, head in _scan(path, sizes[path]):
            if previous == key:
                return path, start
            if head == key:
                return path, end
            start = end
    return None


def _next_file(files: Sequence[tuple[int, Path]], path: Path) -> tuple[Path, int] | None:
    later = [one for number, one in files if one.name > path.name]
    return (later[0], 0) if later else None


def _read_records(path: Path, offset: int, size: int, bytes_max: int) -> bytes:
    """Return whole records from an offset on."""
    end = offset
    for stop, _, _ in _scan(path, size, offset):
        if end > offset and stop - offset > bytes_max:
            break
        end = stop
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(end - offset)


def _last_head(data: bytes) -> bytes:
    offset, head = 0, b""
    while offset < len(data):
        size, _, _, head = _HEADER.unpack_from(data, offset)
        offset += _HEADER.size + size
    return head
