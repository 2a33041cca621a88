"""Getting compiled kernels: from the cache, or from the compile child on a miss."""

import json
import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path
from typing import Any

from mlpd.core.errors import DefinitionError, InternalError, MlpdError
from mlpd.core.kernels import elf, mcjit
from mlpd.core.kernels.cache import fetch, symbol_of
from mlpd.core.kernels.call import Kernel
from mlpd.core.kernels.declare import Signature
from mlpd.core.kernels.unit import (
    ModuleUnit,
    SourceUnit,
    Unit,
    cache_key,
    default_cache_dir,
    source_unit,
)

_log = logging.getLogger(__name__)

COMPILE_TIMEOUT_S = 600.0
"""A module takes 25 s on a quiet machine, minutes on a crowded one."""
NUMBA_SWITCHES = {
    "NUMBA_DISABLE_INTEL_SVML": "1",  # exp and its like come from libm, as in Python
    "NUMBA_DISABLE_ERROR_MESSAGE_HIGHLIGHTING": "1",
}
OUTPUT_BYTES_MAX = 64 * 1024
"""How much of the child's stdout and of its stderr is read."""


class Kernels:
    """The kernels of one module or source: an attribute, and an item, for each by name."""

    def __init__(self, name: str, kernels: Mapping[str, Kernel]) -> None:
        self._name = name
        self._kernels = dict(kernels)
        vars(self).update(kernels)  # found without __getattr__, in 30 ns

    def __getattr__(self, name: str) -> Kernel:
        known = ", ".join(self._kernels)
        raise AttributeError(f"'{self._name}' has no kernel '{name}'; it has {known}")

    def __getitem__(self, name: str) -> Kernel:
        return self._kernels[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._kernels)


def load_kernels(
    module_name: str, *, cache_dir: Path | None = None, boundscheck: bool | None = None
) -> Kernels:
    """Return the native kernels of a module; about 1 ms from the cache.

    On a miss this blocks for the seconds of a compile in a child process: call it at start or
    from a thread, never on the loop.  `boundscheck` makes a wrong index raise KernelError instead
    of reading foreign memory; by default `$MLPD_BOUNDSCHECK` decides, and production has it off.
    Raises InternalError for a module that doesn't compile.
    """
    unit = _module_unit(module_name, boundscheck)
    return _load(unit, cache_dir or default_cache_dir())


def precompile(
    groups: Iterable[Sequence[str]],
    *,
    cache_dir: Path | None = None,
    boundscheck: bool | None = None,
) -> None:
    """Fill the cache for groups of modules, as many groups at a time as there are processors.

    A group is compiled by one child, which compiles helpers that its modules share once.
    """
    directory = cache_dir or default_cache_dir()
    units = [[_module_unit(name, boundscheck) for name in group] for group in groups]
    missing = [[u for u in group if fetch(directory, cache_key(u)) is None] for group in units]
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for done in [pool.submit(_compile, group, directory) for group in missing if group]:
            done.result()


def compile_sources(
    source: str,
    *,
    kernels: Mapping[str, Signature],
    cache_dir: Path | None = None,
    what: str = "transforms",
    boundscheck: bool = True,
) -> Kernels:
    """Return the native kernels of source text, in which `math` and `np` are all that is known.

    `kernels` names the entries, with signatures from parse_signature.  At the text's top level
    stand undecorated functions and literal constants; nothing of it ever runs in this process.
    Blocks on a cache miss, as load_kernels does.  Raises DefinitionError("transform_compile")
    whose details hold the `function` and the `line` in it, counted from 1 at its `def`.
    `what` names the text in messages.
    """
    unit = source_unit(source, what, kernels, boundscheck=boundscheck)
    return _load(unit, cache_dir or default_cache_dir())


def _module_unit(module_name: str, boundscheck: bool | None) -> ModuleUnit:
    if boundscheck is None:
        boundscheck = os.environ.get("MLPD_BOUNDSCHECK", "0") not in {"", "0"}
    return ModuleUnit(import_module(module_name), boundscheck=boundscheck)


def _load(unit: Unit, cache_dir: Path) -> Kernels:
    if not unit.kernels:
        raise DefinitionError(f"{unit.name} declares no @kernel", code="kernel_signature")
    key = cache_key(unit)
    data = fetch(cache_dir, key)
    if data is None:
        _compile([unit], cache_dir)
        data = fetch(cache_dir, key)
    if data is None:
        raise _child_failed("its object isn't in the cache; did the source change meanwhile?")
    image = _map(data, unit)
    return Kernels(unit.name, {n: Kernel(n, s, image) for n, s in unit.kernels.items()})


def _map(data: bytes, unit: Unit) -> elf.Image:
    if elf.is_host_supported():
        return elf.load(data)
    return mcjit.load(data, map(symbol_of, unit.kernels))


def _compile(units: Sequence[Unit], cache_dir: Path) -> None:
    """Compile into the cache, in a child; raises the first error found."""
    _log.info("compiling %s: once per machine and version", ", ".join(u.name for u in units))
    request = {"cache_dir": str(cache_dir), "units": [unit.describe() for unit in units]}
    answers = json.loads(_run_child(json.dumps(request)))
    for unit, answer in zip(units, answers, strict=True):
        if "message" in answer:
            raise _compile_error(unit, answer)


def _run_child(request: str) -> bytes:
    command = [sys.executable, "-P", "-m", "mlpd.core.kernels.compile"]
    with tempfile.TemporaryFile() as answers, tempfile.TemporaryFile() as complaints:
        try:
            done = subprocess.run(  # noqa: S603  our own module, no shell
                command,
                input=request.encode(),
                stdout=answers,
                stderr=complaints,
                env=_child_environment(),
                timeout=COMPILE_TIMEOUT_S,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise _child_failed(f"it took longer than {COMPILE_TIMEOUT_S:g} s") from error
        if done.returncode != 0:
            complaint = _tail(complaints).decode(errors="replace")
            raise _child_failed(f"it ended with status {done.returncode}", complaint)
        return _tail(answers)


def _tail(file: Any) -> bytes:
    file.seek(max(0, file.seek(0, os.SEEK_END) - OUTPUT_BYTES_MAX))
    return bytes(file.read())


def _child_environment() -> dict[str, str]:
    """Return this environment with this process's import path, and without numba's switches."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("NUMBA_")}
    path = os.pathsep.join(entry for entry in sys.path if entry)
    return kept | {"PYTHONPATH": path} | NUMBA_SWITCHES


def _child_failed(reason: str, complaint: str = "") -> InternalError:
    return InternalError(
        f"the kernel compiler failed: {reason}",
        code="kernel_compiler",
        hint="its complaint is in the details",
        details={"stderr": complaint},
    )


def _compile_error(unit: Unit, answer: Mapping[str, Any]) -> MlpdError:
    details = {"function": answer["function"], "line": answer["line"]}
    line = f", line {answer['line']}" if answer["line"] else ""
    message = f"{unit.name}: '{answer['function']}'{line}: {answer['message']}"
    if isinstance(unit, SourceUnit):
        return DefinitionError(message, code="transform_compile", details=details)
    return InternalError(message, code="kernel_compile", details=details)
