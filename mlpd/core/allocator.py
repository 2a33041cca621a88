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


def heap_bytes() -> int | None:
    """Return what the C library's allocator has given out, in 10 to 40 us; None without glibc 2.33.

    Unlike resident memory it moves by what was asked for, at once.
    """
    ask = _c_function("mallinfo2")
    if ask is None:
        return None
    ask.restype = _MallInfo  # type: ignore[attr-defined]  # it is a ctypes function
    found: _MallInfo = ask()
    return int(found.uordblks + found.hblkhd)


class _MallInfo(ctypes.Structure):
    """glibc's `struct mallinfo2`."""

    _fields_ = tuple(  # type: ignore[mutable-override]  # how ctypes wants it
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    )


def _c_function(name: str) -> Callable[..., Any] | None:
    function: Callable[..., Any] | None = getattr(ctypes.CDLL(None), name, None)
    return function
