"""The compile child, `python -m mlpd.core.kernels.compile`: the one place that imports numba.

Reads one JSON request from stdin, writes compiled units into the cache directory, answers with
JSON on stdout.  It lives for one request, so that the daemon pays neither numba's import (0.5 s,
115 MB) nor the seconds in which its compiler holds the GIL.
"""

import __future__

import ast
import importlib
import json
import linecache
import math
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

import numba
import numpy as np
from numba.core import types as numba_types
from numba.core.dispatcher import Dispatcher
from numba.core.errors import NumbaError
from numba.core.registry import cpu_target
from numba.extending import intrinsic
from numba.np import arrayobj as numba_arrays

from mlpd.core.kernels import elf
from mlpd.core.kernels.cache import store, symbol_of
from mlpd.core.kernels.declare import Parameter, Signature, is_native, parse_signature
from mlpd.core.kernels.unit import (
    SOURCE_NAME,
    ModuleUnit,
    SourceUnit,
    Unit,
    cache_key,
    native_modules,
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


@dataclass
class CompileError(Exception):
    """Why a unit doesn't compile; `line` counts from 1 in its source, 0 when unknown."""

    message: str
    function: str = ""
    line: int = 0


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
        name: parse_signature(name, tuple(names), types, returns)
        for name, (names, types, returns) in described["kernels"].items()
    }
    return SourceUnit(described["source"], kernels, boundscheck=boundscheck)


def compile_unit(unit: Unit) -> bytes:
    """Return one native object with a symbol for each of the unit's kernels.

    Raises CompileError for what numba can't type, and for code that allocates or needs Python.
    """
    namespace = _jit_modules(unit) if isinstance(unit, ModuleUnit) else _jit_source(unit)
    modules = {
        name: _compile_entry(unit, name, signature, namespace)
        for name, signature in unit.kernels.items()
    }
    data = _emit(modules.values())
    _check_symbols(data, modules)
    return data


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


_dispatchers: dict[tuple[int, bool], Any] = {}


def _jit(function: Any, unit: Unit) -> Any:
    """Return the dispatcher for `function`, the same one wherever the function is imported."""
    if isinstance(function, Dispatcher):
        return function
    key = (id(function), unit.boundscheck)  # the dispatcher keeps the function, hence its id, alive
    if key not in _dispatchers:
        _dispatchers[key] = numba.njit(forceinline=True, **_options(unit))(function)
    return _dispatchers[key]


def _jit_modules(unit: ModuleUnit) -> Namespace:
    for module in native_modules(unit.module):
        for name, value in list(vars(module).items()):
            if is_native(value):
                setattr(module, name, _jit(value, unit))
    return vars(unit.module)


def _jit_source(unit: SourceUnit) -> Namespace:
    """Run the source's definitions in a namespace of `math` and `np`, without builtins.

    Numba itself knows the few builtins that have native code (abs, min, max, range, ...).
    """
    linecache.cache[SOURCE_NAME] = (len(unit.source), None, unit.source.splitlines(True), "")
    namespace: Namespace = {"math": math, "np": np, "__builtins__": {}, "__name__": SOURCE_NAME}
    try:
        tree = ast.parse(unit.source, SOURCE_NAME)
    except SyntaxError as error:
        raise CompileError(error.msg, line=error.lineno or 0) from error
    for statement in tree.body:
        _check_statement(statement)
    exec(_without_annotations(tree), namespace)  # noqa: S102  checked above, without builtins
    for name, value in list(namespace.items()):
        if isinstance(value, FunctionType):
            namespace[name] = _jit(value, unit)
    return namespace


def _check_statement(statement: ast.stmt) -> None:
    """Let only functions and literal constants through: nothing runs when the source is read."""
    if isinstance(statement, ast.FunctionDef):
        plain = not statement.decorator_list and not statement.args.defaults
        allowed = plain and not statement.args.kw_defaults
    else:
        allowed = isinstance(statement, ast.Assign) and _is_literal(statement.value)
    if not allowed:
        message = "only plain functions and literal constants may stand at the top level"
        raise CompileError(message, line=statement.lineno)


def _is_literal(value: ast.expr) -> bool:
    try:
        ast.literal_eval(value)
    except ValueError:
        return False
    return True


def _without_annotations(tree: ast.Module) -> CodeType:
    flags = __future__.annotations.compiler_flag  # annotations stay text and are never evaluated
    code: CodeType = compile(tree, SOURCE_NAME, "exec", flags=flags, dont_inherit=True)
    return code


@intrinsic
def _as_const(_context: Any, array: Any) -> tuple[Any, Any]:
    """Type an array read-only, so that numba refuses to write to it."""

    def generate(_context: Any, _builder: Any, _signature: Any, args: Any) -> Any:
        return args[0]

    return array.copy(readonly=True)(array), generate


def _compile_entry(unit: Unit, name: str, signature: Signature, namespace: Namespace) -> Any:
    """Return the LLVM module of the entry, which takes words and hands numpy arrays on."""
    if name not in namespace:
        raise CompileError(f"there is no function '{name}'", function=name)
    kernel = namespace[name]
    scope = {"kernel": kernel, "view": array_view("C", None), "const": _as_const}
    exec(_entry_source(signature), scope)  # noqa: S102  our own text, from a parsed signature
    arguments = [kind for parameter in signature.parameters for kind in _machine_types(parameter)]
    returns = NUMBA_TYPES[signature.returns] if signature.returns else types.none
    try:
        entry: Any = numba.njit(returns(*arguments), **_options(unit))(scope["entry"])
    except NumbaError as error:
        raise _located(error, unit, name) from error
    _check_return(name, signature, kernel)
    compiled: Any = entry.overloads[entry.signatures[0]]
    module = compiled.library._final_module  # noqa: SLF001  numba has no public way to emit
    module.get_function(compiled.fndesc.llvm_func_name).name = symbol_of(name)
    return module


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
            raise CompileError(message, function=name)


def _emit(modules: Iterable[Any]) -> bytes:
    """Return the native object of all LLVM modules, linked into the first."""
    first, *others = modules
    for other in others:
        first.link_in(other, preserve=True)
    codegen: Any = cpu_target.target_context.codegen()
    return bytes(codegen._tm.emit_object(first))  # noqa: SLF001  the machine numba compiles for


def _check_symbols(data: bytes, names: Iterable[str]) -> None:
    refused = elf.refused_symbols(elf.parse(data).undefined_symbols())
    if refused:
        raise CompileError(
            f"{', '.join(names)}: needs {', '.join(refused)} at run time; a kernel can't allocate, "
            "print, format text or raise errors with computed arguments"
        )


_PLACES = re.compile(r'File "([^"]+)", line (\d+)')


def _located(error: NumbaError, unit: Unit, name: str) -> CompileError:
    """Return numba's error with the last place in the unit's own source that it mentions."""
    text = str(error)
    file = SOURCE_NAME if isinstance(unit, SourceUnit) else Path(str(unit.module.__file__)).name
    lines = [int(line) for path, line in _PLACES.findall(text) if path.endswith(file)]
    return CompileError(text, function=name, line=lines[-1] if lines else 0)


if __name__ == "__main__":
    main()
