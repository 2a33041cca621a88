import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mlpd.cli.demo.memory import MemoryWatch, memory_bytes

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")

MIB = 1024 * 1024
HOLD = "import sys, time; data = bytes(range(256)) * (4096 * 40); print(1, flush=True); "


def test_memory_counts_children_and_theirs() -> None:
    inner = repr(f"{HOLD}sys.stdin.read()")
    nested = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {inner}])"
    before = memory_bytes(os.getpid())
    with subprocess.Popen(
        [sys.executable, "-c", nested], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        assert child.stdout is not None
        child.stdout.readline()  # the grandchild holds 40 MiB now
        assert memory_bytes(os.getpid()) - before > 35 * MIB
        child.communicate(b"")
    assert memory_bytes(child.pid) == 0


def test_watch_keeps_the_peak() -> None:
    with MemoryWatch(os.getpid()) as watch:
        deadline_s = time.monotonic() + 20
        while not watch.peak_bytes and time.monotonic() < deadline_s:
            time.sleep(0.05)
    assert watch.peak_bytes > MIB
