"""What is compiled together, and its cache key: everything that could change the machine code."""

import functools
import hashlib
import importlib.metadata
import os
import platform
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from mlpd.core.errors import InternalError
from mlpd.core.kernels.declare import Signature, declared_kernels, is_native
from mlpd.core.kernels.source import KernelSource, parse_source

FORMAT = 1
"""Raised whenever the compile child or the meaning of a cached file changes."""


@dataclass(frozen=True, slots=True)
class ModuleUnit:
    """The kernels that an imported module declares."""

    module: ModuleType
    boundscheck: bool

    @property
    def name(self) -> str:
        """The module's dotted name, for messages."""
        return self.module.__name__

    @property
    def kernels(self) -> dict[str, Signature]:
        """The entries by name."""
        return declared_kernels(self.module)

    def describe(self) -> dict[str, Any]:
        """Return what the compile child needs to build this unit again, as JSON."""
        return {"module": self.name, "boundscheck": self.boundscheck}

    def content(self) -> Iterator[bytes]:
        """Yield the sources and the imported constants of every module that takes part."""
        for module in native_modules(self.module):
            if module.__file__ is None:
                raise InternalError(f"kernel module '{module.__name__}' has no source file")
            yield module.__name__.encode()
            yield Path(module.__file__).read_bytes()
            yield from _constants(module)


@dataclass(frozen=True, slots=True)
class SourceUnit:
    """Source text of plain functions; it sees `math` and `np` alone."""

    text: str
    source: KernelSource
    name: str
    boundscheck: bool

    @property
    def kernels(self) -> dict[str, Signature]:
        """The entries by name."""
        return self.source.kernels

    def describe(self) -> dict[str, Any]:
        """Return what the compile child needs to build this unit again, as JSON."""
        kernels = {
            name: {
                "arguments": [parameter.name for parameter in signature.parameters],
                "types": signature.types,
                "returns": signature.returns,
            }
            for name, signature in self.kernels.items()
        }
        return {
            "text": self.text,
            "name": self.name,
            "kernels": kernels,
            "boundscheck": self.boundscheck,
        }

    def content(self) -> Iterator[bytes]:
        """Yield the text and the signatures."""
        yield self.text.encode()
        for name, signature in sorted(self.kernels.items()):
            yield f"{name}{signature}".encode()


def source_unit(
    text: str, name: str, kernels: Mapping[str, Signature], *, boundscheck: bool
) -> SourceUnit:
    """Return the unit of `text`; raises DefinitionError as parse_source does."""
    return SourceUnit(text, parse_source(text, name, kernels), name, boundscheck=boundscheck)


Unit = ModuleUnit | SourceUnit


def native_modules(module: ModuleType) -> list[ModuleType]:
    """Return `module` and, transitively, the modules whose native functions it imports."""
    found = {module.__name__: module}
    queue = [module]
    while queue:
        for value in vars(queue.pop()).values():
            if is_native(value) and value.__module__ not in found:
                owner = sys.modules[value.__module__]
                found[owner.__name__] = owner
                queue.append(owner)
    return [found[name] for name in sorted(found)]


def _constants(module: ModuleType) -> Iterator[bytes]:
    """Yield the module's constants: numba freezes them, also those another module defines."""
    for name, value in sorted(vars(module).items()):
        if name.startswith("__"):
            continue
        if isinstance(value, bool | int | float | str | bytes | tuple | np.generic):
            yield f"{name}={value!r}".encode()
        elif isinstance(value, np.ndarray):
            yield f"{name}={value.dtype}{value.shape}".encode() + value.tobytes()
        elif isinstance(value, type) and issubclass(value, Enum):
            yield f"{name}={[(member.name, member.value) for member in value]}".encode()


def cache_key(unit: Unit) -> str:
    """Return 32 hex digits naming the unit's code for this compiler and this processor."""
    digest = hashlib.blake2b(digest_size=16)
    for part in (*_toolchain(), str(unit.boundscheck).encode(), *unit.content()):
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()


@functools.cache
def _toolchain() -> tuple[bytes, ...]:
    """Return what all units share: versions, the machine, and how we compile and call."""
    packages = ("numba", "llvmlite", "numpy")
    versions = [importlib.metadata.version(package) for package in packages]
    here = Path(__file__).parent
    ours = [(here / name).read_bytes() for name in ("compile.py", "call.py")]
    return repr((FORMAT, sys.version_info[:2], versions)).encode(), host_cpu(), *ours


def host_cpu() -> bytes:
    """Return the processor's model and features; numba compiles for exactly this one."""
    wanted = (b"vendor_id", b"cpu family", b"model", b"stepping", b"flags", b"Features", b"CPU ")
    try:
        with Path("/proc/cpuinfo").open("rb", buffering=4096) as lines:
            first = iter(lines.readline, b"\n")  # the first processor ends with an empty line
            return b"".join(line for line in first if line.startswith(wanted))
    except FileNotFoundError:
        return f"{platform.machine()} {platform.processor()}".encode()


def default_cache_dir() -> Path:
    """Return `$MLPD_CACHE_DIR`, `$XDG_CACHE_HOME/mlpd` or `~/.cache/mlpd`, the first that is set.

    For built-in kernels, which every data directory of this user shares.
    """
    if own := os.environ.get("MLPD_CACHE_DIR"):
        return Path(own)
    if shared := os.environ.get("XDG_CACHE_HOME"):
        return Path(shared) / "mlpd"
    return Path.home() / ".cache" / "mlpd"
