"""Kernel source text, such as users' transforms: read as a syntax tree, never run here."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass

from mlpd.core.errors import DefinitionError
from mlpd.core.kernels.declare import Signature, parse_signature


@dataclass(frozen=True, slots=True)
class KernelSource:
    """A checked text: its functions without their decorators, and the entries among them."""

    tree: ast.Module
    kernels: dict[str, Signature]

    def function_at(self, line: int) -> tuple[str, int]:
        """Return the function around `line`, and the line counted from 1 at its `def`.

        Outside every function: an empty name, and the line itself.
        """
        for function in _functions(self.tree):
            if function.lineno <= line <= (function.end_lineno or line):
                return function.name, line - function.lineno + 1
        return "", line

    def line_of_name(self, name: str) -> int:
        """Return the first line that reads the variable `name`, or 0."""
        nodes = ast.walk(self.tree)
        lines = [node.lineno for node in nodes if isinstance(node, ast.Name) and node.id == name]
        return min(lines, default=0)


def parse_source(text: str, name: str) -> KernelSource:
    """Return what `text` declares: functions under `@device` or `@kernel(...)`, literal constants.

    Raises DefinitionError("transform_compile") for anything else at the top level, so that
    executing the tree runs nothing of the author's.  `name` is for messages.
    """
    try:
        tree = ast.parse(text, name)
    except (SyntaxError, ValueError, RecursionError) as error:
        raise _refused(name, str(error), getattr(error, "lineno", None) or 0) from None
    kernels: dict[str, Signature] = {}
    for statement in tree.body:
        if isinstance(statement, ast.FunctionDef):
            signature = _take_signature(statement, name)
            if signature is not None:
                kernels[statement.name] = signature
        elif not (isinstance(statement, ast.Assign) and _is_literal(statement.value)):
            raise _refused(
                name, "only functions and literal constants may stand here", statement.lineno
            )
    return KernelSource(tree, kernels)


def _take_signature(function: ast.FunctionDef, name: str) -> Signature | None:
    """Remove the function's decorator and return what `@kernel` says, or None."""
    decorators, function.decorator_list = function.decorator_list, []
    if function.args.defaults or any(function.args.kw_defaults):
        raise _refused(
            name, f"'{function.name}' has defaults: native code has none", function.lineno
        )
    match decorators:
        case [] | [ast.Name("device")]:
            return None
        case [ast.Call(ast.Name("kernel"), [ast.Constant(str(types))], keywords)]:
            arguments = tuple(argument.arg for argument in function.args.args)
            return parse_signature(function.name, arguments, types, _returns(keywords))
        case _:
            message = f"'{function.name}' has decorators other than @device and @kernel(...)"
            raise _refused(name, message, function.lineno)


def _returns(keywords: list[ast.keyword]) -> str | None:
    match keywords:
        case [ast.keyword("returns", ast.Constant(str(code)))]:
            return code
        case _:
            return None


def _is_literal(value: ast.expr) -> bool:
    try:
        ast.literal_eval(value)
    except (ValueError, TypeError):
        return False
    return True


def _functions(tree: ast.Module) -> Iterator[ast.FunctionDef]:
    return (node for node in tree.body if isinstance(node, ast.FunctionDef))


def _refused(name: str, reason: str, line: int) -> DefinitionError:
    return DefinitionError(
        f"{name}, line {line}: {reason}",
        code="transform_compile",
        hint="Write plain functions under @device or @kernel(...).",
        details={"function": "", "line": line},
    )
