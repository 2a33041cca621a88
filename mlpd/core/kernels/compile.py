"""The compile child, `python -m mlpd.core.kernels.compile`: the one place that imports numba.

Reads one JSON request from stdin, writes compiled units into the cache directory, answers with
JSON on stdout.  It lives for one request, so that the daemon pays neither for numba (0.4 s and
130 MB) nor for its compiler, which holds the GIL for up to 67 ms at a time.
"""

import __future__

import importlib
import json
import math
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from types import FunctionType
from typing import Any

import numba
import numpy as np
from llvmlite import binding as llvm  # type: ignore[import-untyped]  # it ships no types
from llvmlite import ir
from numba.core import types as numba_types
from numba.core.dispatcher import Dispatcher
from numba.core.registry import cpu_target
from numba.extending import intrinsic
from numba.np import arrayobj as numba_arrays

from mlpd.core.kernels import elf
from mlpd.core.kernels.cache import store, symbol_of
from mlpd.core.kernels.declare import (
    Parameter,
    Signature,
    is_inlined,
    is_native,
    parse_signature,
)
from mlpd.core.kernels.unit import (
    ModuleUnit,
    SourceUnit,
    Unit,
    cache_key,
    native_modules,
    source_unit,
)

types: Any = numba_types
array_view: Any = numba_arrays.get_cfarray_intrinsic
"""Numba is untyped: what it gives is Any here."""

MESSAGE_CHARS_MAX = 4000

NUMBA_TYPES = {
    "f8": types.float64,
    "f4": types.float32,
    "i8": types.int64,
    "i4": types.int32,
    "u8": types.uint64,
    "u4": types.uint32,
    "u1": types.uint8,
    "b1": types.boolean,
}

Namespace = dict[str, Any]


class CompileError(Exception):
    """Why a unit doesn't compile: the function, and the line in it from its `def`; 0 unknown."""

    def __init__(self, message: str, function: str, line: int = 0) -> None:
        super().__init__(message)
        self.message, self.function, self.line = message, function, line


def main() -> None:
    """Answer the request on stdin; what user code prints goes to stderr."""
    request = json.load(sys.stdin)
    answers, sys.stdout = sys.stdout, sys.stderr
    cache_dir = Path(request["cache_dir"])
    json.dump([_answer(unit, cache_dir) for unit in request["units"]], answers)


def _answer(described: Mapping[str, Any], cache_dir: Path) -> dict[str, Any]:
    try:
        unit = _unit(described)
        key = cache_key(unit)
        store(cache_dir, key, compile_unit(unit))
    except CompileError as error:
        return {
            "message": error.message[:MESSAGE_CHARS_MAX],
            "function": error.function,
            "line": error.line,
        }
    return {"key": key}


def _unit(described: Mapping[str, Any]) -> Unit:
    boundscheck = described["boundscheck"]
    if "module" in described:
        return ModuleUnit(importlib.import_module(described["module"]), boundscheck=boundscheck)
    kernels = {
        name: parse_signature(name, entry["arguments"], entry["types"], entry["returns"])
        for name, entry in described["kernels"].items()
    }
    return source_unit(described["text"], described["name"], kernels, boundscheck=boundscheck)


def compile_unit(unit: Unit) -> bytes:
    """Return one native object with a symbol for each of the unit's kernels.

    Raises CompileError for what numba can't type, and for code that allocates or needs Python.
    """
    namespace = _jit_modules(unit) if isinstance(unit, ModuleUnit) else _jit_source(unit)
    modules = []
    for name, signature in unit.kernels.items():
        modules.append(_compile_entry(unit, name, signature, namespace[name]))
        _check_symbols(modules[-1], name)
    first, *others = modules
    for other in others:
        first.link_in(other, preserve=True)
    return _emit(first)


def _emit(module: Any) -> bytes:
    codegen: Any = cpu_target.target_context.codegen()
    return bytes(codegen._tm.emit_object(module))  # noqa: SLF001  numba has no public way


def _options(unit: Unit) -> dict[str, Any]:
    """Numba's options; fastmath stays off, so nothing is fused or reassociated.

    Without its runtime (`_nrt`) numba can't allocate, and counts no references.
    """
    return {
        "_nrt": False,
        "no_cpython_wrapper": True,
        "no_cfunc_wrapper": True,
        "error_model": "numpy",
        "fastmath": False,
        "boundscheck": unit.boundscheck,
    }


_dispatchers: dict[int, Any] = {}  # by the function's id; the dispatcher keeps the function alive


def _jit(function: Any, unit: Unit) -> Any:
    """Return the dispatcher for `function`, the same one wherever the function is imported."""
    if isinstance(function, Dispatcher):
        return function
    if id(function) not in _dispatchers:
        jit = numba.njit(forceinline=is_inlined(function), **_options(unit))
        _dispatchers[id(function)] = jit(function)
    return _dispatchers[id(function)]


def _jit_modules(unit: ModuleUnit) -> Namespace:
    for module in native_modules(unit.module):
        for name, value in list(vars(module).items()):
            if is_native(value):
                setattr(module, name, _jit(value, unit))
    return vars(unit.module)


def _jit_source(unit: SourceUnit) -> Namespace:
    """Run the text's definitions in a namespace of `math` and `np`, without builtins.

    Numba itself knows the builtins that have native code: abs, min, max, range, round and so on.
    There is no `__name__` because numba would import the module of that name.
    """
    namespace: Namespace = {"math": math, "np": np, "__builtins__": {}}
    postponed = __future__.annotations.compiler_flag  # annotations are never evaluated
    try:
        code = compile(unit.source.tree, unit.name, "exec", flags=postponed, dont_inherit=True)
    except (RecursionError, MemoryError) as error:
        raise CompileError("it is nested too deeply", "") from error
    exec(code, namespace)  # noqa: S102  holds functions and literals alone, see parse_source
    for name, value in list(namespace.items()):
        if isinstance(value, FunctionType):
            namespace[name] = _jit(value, unit)
    return namespace


@intrinsic
def _as_const(_context: Any, array: Any) -> tuple[Any, Any]:
    """Type an array read-only, so that numba refuses to write to it."""

    def generate(_context: Any, _builder: Any, _signature: Any, args: Any) -> Any:
        return args[0]

    return array.copy(readonly=True)(array), generate


def _compile_entry(unit: Unit, name: str, signature: Signature, kernel: Any) -> Any:
    """Return the LLVM module of the entry, which takes words and hands numpy arrays on."""
    scope = {"kernel": kernel, "view": array_view("C", None), "const": _as_const}
    exec(_entry_source(signature), scope)  # noqa: S102  our own text, from a parsed signature
    arguments = [kind for parameter in signature.parameters for kind in _machine_types(parameter)]
    returns = NUMBA_TYPES[signature.returns] if signature.returns else types.none
    try:
        entry: Any = numba.njit(returns(*arguments), **_options(unit))(scope["entry"])
    except Exception as error:  # numba refuses code with NumbaError, but not with it alone
        _check_return(name, signature, kernel)  # says the same more plainly
        raise _located(error, unit, name) from error
    _check_return(name, signature, kernel)
    return _framed(name, entry.overloads[entry.signatures[0]])


def _framed(name: str, compiled: Any) -> Any:
    """Return the entry's LLVM module with `int32 mlpd.<name>(frame*)` added, which calls it.

    The frame is {result, exception, arguments...}: to ctypes one pointer costs a third of what
    ten arguments cost, and nobody else need know numba's calling convention.
    """
    convention, signature = compiled.target_context.call_conv, compiled.signature
    callee_type = convention.get_function_type(signature.return_type, signature.args)
    result, failure, *words = callee_type.args
    frame_type = ir.LiteralStructType([result.pointee, failure.pointee, *words])
    module = ir.Module()
    callee = ir.Function(module, callee_type, compiled.fndesc.llvm_func_name)
    framed = ir.Function(
        module, ir.FunctionType(callee_type.return_type, [frame_type.as_pointer()]), symbol_of(name)
    )
    build = ir.IRBuilder(framed.append_basic_block())
    zero, indices = ir.IntType(32)(0), map(ir.IntType(32), range(len(callee_type.args)))
    fields = [build.gep(framed.args[0], [zero, index]) for index in indices]
    build.ret(build.call(callee, [*fields[:2], *map(build.load, fields[2:])]))
    linked = compiled.library._final_module  # noqa: SLF001  numba has no public way to emit
    linked.link_in(llvm.parse_assembly(str(module)))
    return linked


def _entry_source(signature: Signature) -> str:
    names, values = [], []
    for index, parameter in enumerate(signature.parameters):
        value = f"a{index}"
        names.append(value)
        if parameter.is_array:
            names.append(f"n{index}")
            value = f"view(a{index}, (n{index},))"
        values.append(f"const({value})" if parameter.is_const else value)
    return f"def entry({', '.join(names)}):\n    return kernel({', '.join(values)})\n"


def _machine_types(parameter: Parameter) -> tuple[Any, ...]:
    scalar = NUMBA_TYPES[parameter.code]
    return (types.CPointer(scalar), types.int64) if parameter.is_array else (scalar,)


def _check_return(name: str, signature: Signature, kernel: Any) -> None:
    """Refuse a result that would silently change its kind, as a float cut to an integer."""
    declared = signature.returns[0] if signature.returns else "n"
    for compiled in kernel.overloads.values():
        actual = types.unliteral(compiled.signature.return_type)
        kind = {"float": "f", "int": "i", "uint": "u", "bool": "b", "none": "n"}.get(
            str(actual).rstrip("0123456789"), "?"
        )
        if kind != declared and {kind, declared} != {"i", "u"}:
            message = f"returns {actual} but is declared to return {signature.returns}"
            raise CompileError(message, name)


def _check_symbols(module: Any, name: str) -> None:
    if refused := elf.refused_symbols(_undefined_symbols(module)):
        raise CompileError(
            f"it needs {', '.join(refused)} at run time: a kernel can't allocate, print, "
            "format text, or call what has no plain native code",
            name,
        )


def _undefined_symbols(module: Any) -> list[str]:
    if elf.is_host_supported():  # the object also tells what LLVM itself calls, memcpy and such
        return elf.parse(_emit(module)).undefined_symbols()
    declared = [value for value in module.functions if value.is_declaration]
    return [value.name for value in declared if not value.name.startswith("llvm.")]


_ALLOCATES = ("NRT required but not enabled", "Only accept returning of array passed")
_PLACE = re.compile(r'(?:File "(?P<file>[^"]+)", line |(?:at|from) (?P<at>\S+) \()(?P<line>\d+)')
_UNDEFINED_NAME = re.compile(r"name '(\w+)' is not defined")


def _located(error: Exception, unit: Unit, kernel_name: str) -> CompileError:
    """Return numba's error in one line, with the innermost place in the unit's own source."""
    text = str(error)
    own = unit.name if isinstance(unit, SourceUnit) else Path(str(unit.module.__file__)).name
    places = [
        int(match["line"])
        for match in _PLACE.finditer(text)
        if Path(match["file"] or match["at"]).name == own
    ]
    line = places[0] if places else 0
    if not isinstance(unit, SourceUnit):
        return CompileError(_reason(text), kernel_name, line)
    if unknown := _UNDEFINED_NAME.search(text):
        line = unit.source.line_of_name(unknown[1])
    function, line = unit.source.function_at(line)
    return CompileError(_reason(text), function or kernel_name, line)


def _reason(text: str) -> str:
    """Return the first line of numba's message that tells something, and the call it's about."""
    told = [line.strip() for line in text.splitlines()]
    reason = next((line for line in told if line and not line.startswith("Failed in")), text)
    call = next((line for line in told if line.startswith(">>> ")), "")
    lowered = next((line for line in told if line.startswith("During: lowering")), "")
    cause = call.removeprefix(">>> ") or lowered.removeprefix("During: lowering ") or reason
    if any(sign in text for sign in _ALLOCATES):
        reason = f"it allocates memory, which a kernel can't do: {cause}"
    elif call:
        reason = f"{reason} {call.removeprefix('>>> ')}"
    return reason


if __name__ == "__main__":
    main()
