"""Transforms: users' functions of features, checked by an allow-list and compiled by numba.

The functions of a catalog become one generated module, compiled in a child process and loaded as
machine code; one row online and a million rows offline run the same code, so the results are equal
to the bit.  A null input makes the result null; NaN is an ordinary float.
"""

import ast
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlpd.core.columns import DType
from mlpd.core.errors import DefinitionError
from mlpd.core.kernels import compile_sources, parse_signature
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
_ENTRY = parse_signature(
    "run_",
    ("words_", "reals_", "valid_", "steps_", "n_"),
    "i8[], f8[], u1[], const i8[], i8",
    None,
)
"""The entry: a block's words twice, as int64 and as float64, its validity, the steps one behind the
other (a transform's number, the rows of its arguments, that of its result), the values in a row."""

Steps = NDArray[np.int64]
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
        functions = {name: check_source(spec) for name, spec in sorted(specs.items())}
        self._numbers = {name: number for number, name in enumerate(functions)}
        self._entry: Any = None
        if functions:
            parts = [_part(function, specs[n], inputs[n]) for n, function in functions.items()]
            parts.append(_dispatch([(n, len(inputs[n]) + 2) for n in functions]))
            kernels = compile_sources("\n\n".join(parts), kernels={"run_": _ENTRY}, cache_dir=cache)
            self._entry = kernels["run_"]

    def steps(self, order: Iterable[tuple[str, Sequence[int]]]) -> Steps:
        """Return what `run` takes: each transform with its arguments' rows and, last, its own."""
        words = [word for name, rows in order for word in (self._numbers[name], *rows)]
        return np.array(words, np.int64)

    def run(self, steps: Steps, block: Block) -> None:
        """Compute transforms over a block, in order; about 4 us and 5 ns per value.

        Raises KernelError as the code does.
        """
        if len(steps):
            words = words_of(block.words)
            self._entry.raw(*words, *words, *words_of(block.valid, steps), block.words.shape[1])


def _part(function: ast.FunctionDef, spec: TransformSpec, inputs: Sequence[DType]) -> str:
    """Return the user's function and what runs it over a block, as source text.

    A value is read through the view of its kind: all arguments valid, then the function runs.
    """
    function.name = f"user_{spec.name}"
    places = [f"steps_[at_ + {k + 1}] * n_ + i_" for k in range(len(inputs))]
    values = [_READ[dtype].format(place) for dtype, place in zip(inputs, places, strict=True)]
    known = " and ".join(f"valid_[{place}] != 0" for place in places) or "True"
    call = f"user_{spec.name}({', '.join(values)})"
    return "\n".join(
        [
            ast.unparse(function),
            f"def run_{spec.name}(words_, reals_, valid_, steps_, at_, n_):",
            "    for i_ in range(n_):",
            f"        to_ = steps_[at_ + {len(inputs) + 1}] * n_ + i_",
            f"        valid_[to_] = {known}",
            "        if valid_[to_] != 0:",
            f"            {_WRITE[spec.output].format(call)}",
            "        else:",
            "            words_[to_] = 0",
        ]
    )


def _dispatch(transforms: Sequence[tuple[str, int]]) -> str:
    """Return the entry as source text; `transforms`: names by number, with their steps' widths."""
    lines = [
        "def run_(words_, reals_, valid_, steps_, n_):",
        "    at_ = 0",
        "    while at_ < len(steps_):",
        "        number_ = steps_[at_]",
    ]
    for number, (name, width) in enumerate(transforms):
        lines += [
            f"        {'elif' if number else 'if'} number_ == {number}:",
            f"            run_{name}(words_, reals_, valid_, steps_, at_, n_)",
            f"            at_ += {width}",
        ]
    return "\n".join(lines)


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
