"""How much memory a process and all its descendants take, watched while they work."""

import os
import threading
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Final, Self

_PERIOD_S: Final = 0.5


class MemoryWatch:
    """Samples a process and its descendants in a thread while the block runs; `peak_bytes`.

    0 on systems without /proc.
    """

    def __init__(self, pid: int) -> None:
        self.peak_bytes = 0
        self._pid = pid
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="demo-memory", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stopping.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stopping.wait(_PERIOD_S):
            self.peak_bytes = max(self.peak_bytes, memory_bytes(self._pid))


def memory_bytes(pid: int) -> int:
    """Return the memory of a process and all its descendants, pages they share counted once.

    Linux's proportional set size, or the resident set where the kernel doesn't tell; 0 for
    processes that have ended, and on systems without /proc.
    """
    return sum(_pss_bytes(process) for process in _family(pid))


def _family(pid: int) -> Iterator[int]:
    yield pid
    try:
        threads = list(Path(f"/proc/{pid}/task").iterdir())
    except OSError:
        return  # it has ended
    for thread in threads:
        for child in _read(f"{thread}/children").split():
            yield from _family(int(child))


def _pss_bytes(pid: int) -> int:
    for file, key in (("smaps_rollup", "Pss:"), ("status", "VmRSS:")):
        for line in _read(f"/proc/{pid}/{file}").splitlines():
            if line.startswith(key):
                return int(line.split()[1]) * 1024
    return 0


def _read(path: str) -> str:
    """Return a file of /proc, empty if the process has ended or isn't ours."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return ""
    try:
        with os.fdopen(descriptor, encoding="utf-8") as file:
            return file.read()
    except OSError:
        return ""
