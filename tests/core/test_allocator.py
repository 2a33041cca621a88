"""What is freed goes back to the system, in a process of its own: the bounds hold for all of it."""

import subprocess
import sys

import pytest

from mlpd.core.allocator import find_trim

CHILD = """
import sys
import numpy as np
from mlpd.core.allocator import set_up_allocator

def anonymous_mb():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) >> 10 for line in status if line.startswith("RssAnon"))

if sys.argv[1] == "fixed":
    set_up_allocator()
for size in range(1 << 20, 24 << 20, 1 << 20):  # freed blocks would raise the bound
    np.ones(size, np.uint8)
before = anonymous_mb()
blocks, kept = [], []
for _ in range(32):
    blocks.append(np.ones(8 << 20, np.uint8))
    kept.append(np.ones(64 << 10, np.uint8))  # stays in the heap, above the block if that is in it
blocks.clear()
print(anonymous_mb() - before)
"""


@pytest.mark.skipif(find_trim() is None, reason="the C library is not glibc")
@pytest.mark.parametrize(("bounds", "goes_back"), [("fixed", True), ("moving", False)])
def test_freed_blocks_go_back_to_the_system(bounds: str, goes_back: bool) -> None:
    done = subprocess.run(
        [sys.executable, "-c", CHILD, bounds], capture_output=True, text=True, check=True
    )
    assert (int(done.stdout) < 64) == goes_back  # of 256 MB
