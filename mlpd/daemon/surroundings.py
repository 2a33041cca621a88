"""What a training ran on, as far as it may show in the numbers: packages and the processor."""

import platform
from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import mlpd

_PACKAGES = ("lightgbm", "numba", "numpy", "onnx", "onnxruntime", "polars")


def packages(more: Sequence[str] = ()) -> dict[str, str]:
    """Return the versions of what computes features, trees and scores, Python's among them.

    `more`: distributions that a trainer used; one that isn't installed is left out.
    """
    found = {}
    for name in (*_PACKAGES, *more):
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found | {"mlpd": mlpd.__version__, "python": platform.python_version()}


def cpu_flags() -> list[str]:
    """Return the processor's vector extensions, which decide how floats are summed."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    flags = next((line.partition(":")[2].split() for line in lines if line[:5] == "flags"), [])
    return sorted(flag for flag in flags if flag.startswith(("avx", "sse", "fma")))
