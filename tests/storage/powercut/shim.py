"""The preloaded shim: compiles it, starts processes under it, reads what it recorded."""

import ctypes
import functools
import hashlib
import mmap
import os
import shutil
import struct
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import pytest

from mlpd.core.kernels import default_cache_dir

SOURCE = Path(__file__).with_name("shim.c")
FLAGS = ("-O1", "-U_FORTIFY_SOURCE", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror")
_HEAD = struct.Struct("<IIIIQQq")


@functools.cache
def compile_shim() -> Path:
    """Return the shared library, compiled once per version of its source; else skip the test."""
    version = hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:16]
    library = default_cache_dir() / "tests" / f"powercut-{version}.so"
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        made = library.with_suffix(f".{os.getpid()}")
        command = [_compiler(), *FLAGS, "-o", str(made), str(SOURCE)]
        subprocess.run(command, check=True, capture_output=True, text=True)
        made.replace(library)
    return library


def _compiler() -> str:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler (cc, gcc): the power cut's shim can't be built; install gcc")
    return compiler


@dataclass(frozen=True, slots=True)
class Operation:
    """One recorded operation; `kind` is the letter of shim.c."""

    kind: str
    inode: int
    thread: int
    offset: int
    path: str
    second: str
    data: bytes


def read_record(path: Path) -> Iterator[Operation]:
    """Yield the operations in the order in which they happened."""
    record, at = path.read_bytes() if path.exists() else b"", 0
    while at < len(record):
        size, kind, first, second, inode, thread, offset = _HEAD.unpack_from(record, at)
        names = at + _HEAD.size
        data = names + first + second
        yield Operation(
            chr(kind),
            inode,
            thread,
            offset,
            record[names : names + first].decode(),
            record[names + first : data].decode(),
            record[data : at + size],
        )
        at += size


class Control(ctypes.Structure):
    """The C struct that a running process looks at before each operation; see shim.c."""

    _fields_ = (
        ("operations", ctypes.c_int64),
        ("kill_at", ctypes.c_int64),
        ("kill_after", ctypes.c_int64),
        ("passes", ctypes.c_int64),
        ("armed", ctypes.c_int64),
        ("torn", ctypes.c_int64),
        ("error", ctypes.c_int64),
        ("synchronous", ctypes.c_int64),
        ("failed", ctypes.c_int64),
        ("kinds", ctypes.c_char * 32),
        ("path", ctypes.c_char * 256),
        ("seen", ctypes.c_ubyte * 4096),
        ("lock", ctypes.c_char * 128),  # the shim's own
    )


def map_file(path: Path) -> mmap.mmap:
    """Return the shared map of a whole file."""
    with path.open("r+b") as file:
        return mmap.mmap(file.fileno(), 0)


class Shim:
    """The shim for processes that work below `root`; its own files lie in `scratch`."""

    def __init__(self, root: Path, scratch: Path, *, recording: bool = False) -> None:
        scratch.mkdir(parents=True, exist_ok=True)
        self.record = scratch / "record"
        self.told = scratch / "told"
        self._control = scratch / "control"
        self._control.write_bytes(bytes(ctypes.sizeof(Control)))
        self._recording = recording
        self._root = root.resolve()
        self._library = compile_shim()
        self._map = map_file(self._control)
        self.control = Control.from_buffer(self._map)

    @property
    def control_path(self) -> Path:
        """Where the control is: a child may map it, too."""
        return self._control

    def environment(self) -> dict[str, str]:
        """Return the environment that puts a process, and its children, under the shim."""
        found = dict(os.environ)
        found |= {
            "LD_PRELOAD": str(self._library),
            "POWERCUT_ROOT": str(self._root),
            "POWERCUT_TOLD": str(self.told),
            "POWERCUT_CONTROL": str(self._control),
        }
        if self._recording:
            found["POWERCUT_RECORD"] = str(self.record)
        return found

    def fail(
        self, error: int, *, kinds: str = "CWTMR", path: str = "", synchronous: bool = False
    ) -> None:
        """Let operations of `kinds` on paths that contain `path` fail with `error` from now on."""
        self.control.kinds = kinds.encode()
        self.control.path = path.encode()
        self.control.synchronous = synchronous
        self.control.error = error

    def mend(self) -> None:
        """Let no operation fail any more."""
        self.control.error = 0

    def kill_at(self, operation: int) -> None:
        """End the process group before the n-th operation from now on."""
        self.control.operations = 0
        self.control.kill_at = operation

    def kill_after(self, kind: str, passes: int) -> None:
        """End the process group before what follows an operation of this kind; some may pass."""
        self.control.armed = 0
        self.control.passes = passes
        self.control.kill_after = ord(kind)

    def close(self) -> None:
        """Unmap the control; idempotent."""
        del self.control
        self._map.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
