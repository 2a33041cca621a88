"""The C library's allocator, kept from holding on to memory that was freed."""

import ctypes
from collections.abc import Callable
from typing import Any

MMAP_BYTES = 1 << 20
"""Blocks of this size and more get pages of their own, which go back when they are freed."""

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h


def set_up_allocator() -> None:
    """Fix the bounds that glibc would move; does nothing where there is no glibc.  Once, at start.

    By default glibc raises them to the largest block freed so far, up to 32 MiB, and takes such
    blocks from its heaps from then on.  Batches of 20,000 events then tore the heaps: importing
    513,000 events left the daemon with 90 MB or with 1,450 MB, by luck; with fixed bounds it is 72
    to 78 MB, and no slower.
    """
    mallopt = _c_function("mallopt")
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, MMAP_BYTES)
        mallopt(_M_TRIM_THRESHOLD, MMAP_BYTES)


def find_trim() -> Callable[[int], Any] | None:
    """Return glibc's `malloc_trim`, which gives freed pages back; None where there is none."""
    return _c_function("malloc_trim")


def _c_function(name: str) -> Callable[..., Any] | None:
    function: Callable[..., Any] | None = getattr(ctypes.CDLL(None), name, None)
    return function
