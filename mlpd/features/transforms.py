"""Transforms: users' functions of features, checked by an allow-list and compiled by numba.

The functions of a catalog become one generated module, compiled in a child process and loaded as
machine code; one row online and a million rows offline run the same code, so the results are equal
to the bit.  A null input makes the result null; NaN is an ordinary float.
"""

import ast
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlpd.core.columns import DType
from mlpd.core.errors import DefinitionError
from mlpd.core.kernels import address_of, compile_sources, parse_signature
from mlpd.core.specs import TransformSpec
from mlpd.features.block import Block, words_of

_READ = {
    DType.BOOL: "words_[{}] != 0",
    DType.INT64: "words_[{}]",
    DType.TIMESTAMP: "words_[{}]",
    DType.FLOAT32: "np.float32(reals_[{}])",
    DType.FLOAT64: "reals_[{}]",
}
_WRITE = {
    DType.BOOL: "words_[to_] = bool({})",
    DType.INT64: "words_[to_] = {}",
    DType.TIMESTAMP: "words_[to_] = {}",
    DType.FLOAT32: "reals_[to_] = np.float32({})",
    DType.FLOAT64: "reals_[to_] = {}",
}
_ENTRY = ("words_", "reals_", "valid_", "at_", "n_")
_ENTRY_TYPES = "i8[], f8[], u1[], const i8[], i8"
"""Arguments of a transform's entry: a block's words twice, as int64 and as float64, its validity,
the rows of the arguments and the result, the number of values in a row."""
_ALLOWED = (
    *(ast.FunctionDef, ast.arguments, ast.arg, ast.Return, ast.Assign, ast.AugAssign, ast.If),
    *(ast.Pass, ast.Expr, ast.Constant, ast.Name, ast.Load, ast.Store, ast.BinOp, ast.UnaryOp),
    *(ast.BoolOp, ast.Compare, ast.IfExp, ast.Call, ast.Attribute),
    *(ast.operator, ast.unaryop, ast.boolop, ast.cmpop),
)
# No loops: a transform runs on the request path, so its time must be bounded by its text.
_BUILTINS = {"abs", "min", "max", "round", "int", "float", "bool"}
_MODULES = {"math", "np"}


def check_source(spec: TransformSpec) -> ast.FunctionDef:
    """Return the syntax tree of a transform that stays inside the allow-list.

    Raises DefinitionError(code="transform_not_allowed") naming line and construct.
    """
    try:
        body = ast.parse(spec.source).body
    except (SyntaxError, ValueError, RecursionError) as error:
        line = getattr(error, "lineno", None) or 1
        raise _refused(spec, line, f"it does not parse: {error}") from None
    if len(body) != 1 or not isinstance(body[0], ast.FunctionDef):
        raise _refused(spec, 1, "the source must be one function")
    function = body[0]
    _check_signature(spec, function)
    for node in ast.walk(function):
        _check_node(spec, node)
    return function


class TransformSet:
    """All transforms of a catalog as machine code; immutable, any thread."""

    def __init__(
        self, specs: Mapping[str, TransformSpec], inputs: Mapping[str, Sequence[DType]], cache: Path
    ) -> None:
        """Compile `specs`; `inputs` gives the types of each one's arguments.

        Blocks for seconds on a cache miss (a child process compiles), about 2 ms on a hit.
        """
        parts = [
            _module_part(check_source(spec), spec, inputs[name])
            for name, spec in sorted(specs.items())
        ]
        entries = [f"run_{name}" for name in specs]
        signatures = {name: parse_signature(name, _ENTRY, _ENTRY_TYPES, None) for name in entries}
        self._kernels: Any = None
        if parts:
            self._kernels = compile_sources("\n\n".join(parts), kernels=signatures, cache_dir=cache)

    def run(self, steps: Sequence[tuple[str, NDArray[np.int64]]], block: Block) -> None:
        """Compute transforms over a block, in order; about 3 us each and 5 ns per value.

        `steps`: each a name, and the rows of its arguments and, last, of its result.  Raises
        KernelError as the code does.
        """
        words = words_of(block.words)
        block_words = (*words, *words, *words_of(block.valid))
        for name, rows in steps:
            entry = self._kernels[f"run_{name}"]
            entry.raw(*block_words, address_of(rows), len(rows), block.words.shape[1])


def _module_part(function: ast.FunctionDef, spec: TransformSpec, inputs: Sequence[DType]) -> str:
    """Return the user's function and the entry that runs it over a block, as source text.

    A value is read through the view of its kind: all arguments valid, then the function runs.
    """
    function.name = f"user_{spec.name}"
    places = [f"at_[{k}] * n_ + i_" for k in range(len(inputs))]
    values = [_READ[dtype].format(place) for dtype, place in zip(inputs, places, strict=True)]
    known = " and ".join(f"valid_[{place}] != 0" for place in places) or "True"
    call = f"user_{spec.name}({', '.join(values)})"
    return "\n".join(
        [
            ast.unparse(function),
            f"def run_{spec.name}(words_, reals_, valid_, at_, n_):",
            "    for i_ in range(n_):",
            f"        to_ = at_[{len(inputs)}] * n_ + i_",
            f"        valid_[to_] = {known}",
            "        if valid_[to_] != 0:",
            f"            {_WRITE[spec.output].format(call)}",
            "        else:",
            "            words_[to_] = 0",
        ]
    )


def _check_signature(spec: TransformSpec, function: ast.FunctionDef) -> None:
    arguments = function.args
    extra = (arguments.posonlyargs, arguments.kwonlyargs, arguments.defaults)
    if any(extra) or arguments.vararg or arguments.kwarg or function.decorator_list:
        raise _refused(spec, function.lineno, "only plain positional arguments are allowed")
    names = [arg.arg for arg in arguments.args]
    if names != [name for name, _ in spec.inputs]:
        raise _refused(spec, function.lineno, f"its arguments {names} are not its inputs")


def _check_node(spec: TransformSpec, node: ast.AST) -> None:
    line = getattr(node, "lineno", 1)
    if not isinstance(node, _ALLOWED):
        raise _refused(spec, line, f"{type(node).__name__} is not allowed")
    if isinstance(node, ast.Name | ast.arg):
        name = node.id if isinstance(node, ast.Name) else node.arg
        if "__" in name or name.endswith("_"):
            raise _refused(spec, line, f"the name {name!r} is reserved")
    if isinstance(node, ast.Attribute):
        owner = node.value.id if isinstance(node.value, ast.Name) else ""
        if owner not in _MODULES or node.attr.startswith("_"):
            raise _refused(spec, line, "attributes are allowed of math and np only")
    if isinstance(node, ast.Call):
        _check_call(spec, node, line)


def _check_call(spec: TransformSpec, node: ast.Call, line: int) -> None:
    plain = isinstance(node.func, ast.Name) and node.func.id in _BUILTINS
    if not plain and not isinstance(node.func, ast.Attribute):
        raise _refused(spec, line, f"call {ast.unparse(node.func)!r} is not allowed")
    if node.keywords:
        raise _refused(spec, line, "keyword arguments are not allowed in calls")


def _refused(spec: TransformSpec, line: int, reason: str) -> DefinitionError:
    return DefinitionError(
        f"transform {spec.name!r}, line {line}: {reason}",
        code="transform_not_allowed",
        hint="A transform takes and returns scalars; it may use arithmetic, if, math.*, np.* "
        f"and {', '.join(sorted(_BUILTINS))}.",
        details={"line": line},
    )
