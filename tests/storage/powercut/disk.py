"""A disk as a power cut may leave it: every choice that the recorded operations leave open.

What was flushed is there.  Of everything else each sector may hold any version that was written to
it since, whatever became of its neighbours; a file any of the sizes that it had; a name any of the
files that it meant since its folder was flushed.  That is more than real disks do: file systems
keep some order, this model keeps none.
"""

import os
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from tests.storage.powercut.shim import Operation

SECTOR_BYTES = 512
_ZEROS = bytes(SECTOR_BYTES)
V = TypeVar("V")


@dataclass
class Versions(Generic[V]):
    """What of one thing is flushed, and what was written since, with the operation that did it."""

    flushed: V
    later: list[tuple[int, V]] = field(default_factory=list)

    @property
    def newest(self) -> V:
        return self.later[-1][1] if self.later else self.flushed

    def write(self, operation: int, version: V) -> None:
        self.later.append((operation, version))

    def flush(self, before: int) -> None:
        """Take what operations before this one wrote as flushed; later ones stay open."""
        while self.later and self.later[0][0] < before:
            self.flushed = self.later.pop(0)[1]


class File:
    """Sectors by number, and sizes; `mapped`: written through a map, so nothing is known of it."""

    def __init__(self, mode: int) -> None:
        self.mode = mode
        self.mapped = False
        self.size: Versions[int] = Versions(0)
        self.sectors: dict[int, Versions[bytes]] = {}

    def write(self, operation: int, offset: int, data: bytes) -> None:
        at = 0
        while at < len(data):
            number, start = divmod(offset + at, SECTOR_BYTES)
            part = data[at : at + SECTOR_BYTES - start]
            sector = self._sector(number)
            old = sector.newest
            sector.write(operation, old[:start] + part + old[start + len(part) :])
            at += len(part)
        self.size.write(operation, max(self.size.newest, offset + len(data)))

    def resize(self, operation: int, size: int) -> None:
        whole, rest = divmod(size, SECTOR_BYTES)
        for number, sector in self.sectors.items():
            if number > whole or (number == whole and not rest):
                sector.write(operation, _ZEROS)
            elif number == whole:
                sector.write(operation, sector.newest[:rest] + _ZEROS[rest:])
        self.size.write(operation, size)

    def flush(self, before: int, offset: int = 0, size: int | None = None) -> None:
        """Flush all of the file, or only what lies in a range (a synchronous write)."""
        self.size.flush(before)
        last = None if size is None else (offset + size - 1) // SECTOR_BYTES
        for number, sector in self.sectors.items():
            if last is None or offset // SECTOR_BYTES <= number <= last:
                sector.flush(before)

    def _sector(self, number: int) -> Versions[bytes]:
        return self.sectors.setdefault(number, Versions(_ZEROS))

    def content(self, place: int, choice: "Choice") -> bytes:
        size = choice.size(place, self.size)
        if self.mapped:
            return random.Random(size).randbytes(size)
        found = bytearray(size)
        for number, sector in self.sectors.items():
            start = number * SECTOR_BYTES
            if start < size:
                wanted = choice.sector(place, number, sector) if sector.later else sector.flushed
                found[start : start + SECTOR_BYTES] = wanted[: size - start]
        return bytes(found)


class Folder:
    """Names and what they mean: places of files and folders, None where nothing is."""

    def __init__(self) -> None:
        self.names: dict[str, Versions[int | None]] = {}

    def write(self, operation: int, name: str, place: int | None) -> None:
        self.names.setdefault(name, Versions(None)).write(operation, place)

    def flush(self, before: int) -> None:
        for versions in self.names.values():
            versions.flush(before)


class Choice(Protocol):
    """One way in which everything that is open was decided."""

    def sector(self, place: int, number: int, versions: Versions[bytes]) -> bytes: ...
    def size(self, place: int, versions: Versions[int]) -> int: ...
    def name(self, place: int, name: str, versions: Versions[int | None]) -> int | None: ...


class Disk:
    """The folder below `root`, empty at first, after the operations that `apply` was given."""

    def __init__(self, root: Path) -> None:
        self._root = str(root.resolve())
        self._places: list[File | Folder] = [Folder()]
        self._inodes: dict[int, int] = {root.stat().st_ino: 0}
        self._flushing: dict[tuple[int, int], int] = {}
        self._mapped: set[str] = set()
        self.count = 0
        self._changes: dict[str, Callable[[Operation], None]] = {
            "C": self._create,
            "M": self._make_folder,
            "W": self._write,
            "D": self._durable,
            "T": self._resize,
            "S": self._begin_flush,
            "E": self._end_flush,
            "R": self._rename,
            "L": self._link,
            "U": self._unlink,
            "P": self._map,
        }

    def apply(self, operation: Operation) -> None:
        self.count += 1
        self._changes[operation.kind](operation)

    def open_operations(self) -> list[int]:
        """Return the numbers of the operations whose effect is not all flushed."""
        return sorted({number for versions in self._all() for number, _ in versions.later})

    def mapped_paths(self) -> set[str]:
        """Return the files that were written through a shared map."""
        return self._mapped

    def build(self, target: Path, choice: Choice) -> None:
        """Write the disk as `choice` leaves it to the new folder `target`."""
        self._build(0, target, choice)

    def _all(self) -> Iterator[Versions[Any]]:
        for place in self._places:
            if isinstance(place, Folder):
                yield from place.names.values()
            else:
                yield place.size
                yield from place.sectors.values()

    def _build(self, place: int, target: Path, choice: Choice) -> None:
        thing = self._places[place]
        if isinstance(thing, File):
            descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, thing.mode)
            with os.fdopen(descriptor, "wb") as file:
                file.write(thing.content(place, choice))
            return
        target.mkdir()
        for name, versions in thing.names.items():
            found = choice.name(place, name, versions) if versions.later else versions.flushed
            if found is not None:
                self._build(found, target / name, choice)

    def _file(self, inode: int) -> File:
        found = self._places[self._inodes[inode]]
        assert isinstance(found, File)
        return found

    def _folder(self, path: str) -> tuple[Folder, str]:
        """Return the folder that holds a path, and the name in it."""
        *parents, name = path[len(self._root) + 1 :].split("/")
        found = self._places[0]
        for part in parents:
            assert isinstance(found, Folder)
            place = found.names[part].newest
            assert place is not None
            found = self._places[place]
        assert isinstance(found, Folder)
        return found, name

    def _set_name(self, path: str, place: int | None) -> None:
        folder, name = self._folder(path)
        folder.write(self.count, name, place)

    def _add(self, operation: Operation, thing: File | Folder) -> None:
        self._places.append(thing)
        self._inodes[operation.inode] = len(self._places) - 1
        self._set_name(operation.path, len(self._places) - 1)

    def _create(self, operation: Operation) -> None:
        self._add(operation, File(operation.offset))

    def _make_folder(self, operation: Operation) -> None:
        self._add(operation, Folder())

    def _write(self, operation: Operation) -> None:
        self._file(operation.inode).write(self.count, operation.offset, operation.data)

    def _resize(self, operation: Operation) -> None:
        self._file(operation.inode).resize(self.count, operation.offset)

    def _durable(self, operation: Operation) -> None:
        file = self._file(operation.inode)
        file.flush(self.count, operation.offset, len(operation.data))

    def _begin_flush(self, operation: Operation) -> None:
        self._flushing[operation.thread, operation.inode] = self.count

    def _end_flush(self, operation: Operation) -> None:
        begun = self._flushing.pop((operation.thread, operation.inode))
        self._places[self._inodes[operation.inode]].flush(begun)

    def _rename(self, operation: Operation) -> None:
        self._set_name(operation.path, None)
        self._set_name(operation.second, self._inodes[operation.inode])

    def _link(self, operation: Operation) -> None:
        self._set_name(operation.second, self._inodes[operation.inode])

    def _unlink(self, operation: Operation) -> None:
        self._set_name(operation.path, None)

    def _map(self, operation: Operation) -> None:
        self._file(operation.inode).mapped = True
        self._mapped.add(operation.path)
