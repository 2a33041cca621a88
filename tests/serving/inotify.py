"""Which files of a folder anybody opened or read, as the kernel tells it."""

import ctypes
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_ACCESS, _OPEN = 0x1, 0x20
_EVENT = struct.Struct("iIII")


@contextmanager
def watched(folder: Path) -> Iterator[list[str]]:
    """Collect the names of files in `folder` that are opened during the block, by any process."""
    libc = ctypes.CDLL(None, use_errno=True)
    descriptor = libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
    assert descriptor >= 0, os.strerror(ctypes.get_errno())
    opened: list[str] = []
    try:
        watch = libc.inotify_add_watch(descriptor, os.fsencode(folder), _ACCESS | _OPEN)
        assert watch >= 0, os.strerror(ctypes.get_errno())
        yield opened
        opened += _names(descriptor)
    finally:
        os.close(descriptor)


def _names(descriptor: int) -> Iterator[str]:
    while True:
        try:
            data = os.read(descriptor, 1 << 16)
        except BlockingIOError:
            return
        while data:
            *_, length = _EVENT.unpack_from(data)
            name = data[_EVENT.size : _EVENT.size + length].rstrip(b"\0").decode()
            data = data[_EVENT.size + length :]
            if name:  # the folder itself has none
                yield name
