"""The data directory's lock: one daemon at a time, and it says who."""

import fcntl
import json
import os
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from mlpd.core.errors import UnavailableError
from mlpd.core.time import Clock, format_time
from mlpd.storage.files import make_dirs

_TRIES, _APART_S = 11, 0.005


class DaemonLock:
    """Holds `path` (flock) until `close`; the file tells pid, url and start time as JSON.

    The kernel drops the lock when the process ends, however it ends: a file left behind by
    kill -9 is in nobody's way.  Child processes don't inherit it (close-on-exec).
    """

    def __init__(self, path: Path, clock: Clock, *, url: str = "") -> None:
        make_dirs(path.parent)
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        self._started = format_time(clock())
        if not _take(self._descriptor):
            os.close(self._descriptor)
            raise _in_use(path)
        self._closed = False
        self.announce(url)

    def announce(self, url: str) -> None:
        """Write `url` into the file, once the port is known."""
        holder = {"pid": os.getpid(), "url": url, "started": self._started}
        data = json.dumps(holder).encode()
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, data, 0)

    def close(self) -> None:
        """Empty the file and drop the lock; idempotent."""
        if not self._closed:
            self._closed = True
            os.ftruncate(self._descriptor, 0)
            os.close(self._descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def read_holder(path: Path) -> dict[str, Any] | None:
    """Return pid, url and started of the daemon that holds `path`, None if nobody does."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return _read(path)
    finally:
        os.close(descriptor)
    return None


def _take(descriptor: int) -> bool:
    """Tell whether the lock could be had, in 50 ms: who asks for its holder shares it for 20 us."""
    for tries_left in reversed(range(_TRIES)):
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if tries_left:
                time.sleep(_APART_S)
        else:
            return True
    return False


def _read(path: Path) -> dict[str, Any]:
    try:
        holder = json.loads(path.read_bytes())
    except ValueError:  # caught between truncation and write
        holder = {}
    found: dict[str, Any] = {"pid": None, "url": "", "started": ""} | holder
    return found


def _in_use(path: Path) -> UnavailableError:
    holder = _read(path)
    return UnavailableError(
        f"the data directory {path.parent} is in use by the daemon with pid {holder['pid']} "
        f"at {holder['url'] or 'an address not yet known'}",
        code="data_directory_in_use",
        hint="Talk to that daemon, stop it, or choose another data directory.",
        details=holder,
    )
