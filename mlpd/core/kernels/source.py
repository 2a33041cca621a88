"""Kernel source text, such as users' transforms: read as a syntax tree, never run here."""

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from mlpd.core.errors import DefinitionError
from mlpd.core.kernels.declare import Signature


@dataclass(frozen=True, slots=True)
class KernelSource:
    """A checked text: its syntax tree, and the entries among its functions."""

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


def parse_source(text: str, name: str, kernels: Mapping[str, Signature]) -> KernelSource:
    """Return what `text` defines: plain functions and literal constants, the entries among them.

    Raises DefinitionError("transform_compile") for anything else at the top level, so that
    executing the tree runs nothing of the author's.  `name` is for messages.
    """
    try:
        tree = ast.parse(text, name)
    except (SyntaxError, ValueError, RecursionError) as error:
        raise _refused(name, str(error), getattr(error, "lineno", None) or 0) from None
    for statement in tree.body:
        if not _is_harmless(statement):
            message = "only plain functions and literal constants may stand here"
            raise _refused(name, message, statement.lineno)
    source = KernelSource(tree, dict(kernels))
    for kernel_name, signature in kernels.items():
        _check_entry(source, name, kernel_name, signature)
    return source


def _is_harmless(statement: ast.stmt) -> bool:
    if isinstance(statement, ast.FunctionDef):
        arguments = statement.args
        runs = (
            *statement.decorator_list,
            *arguments.defaults,
            *filter(None, arguments.kw_defaults),
        )
        return not runs
    return isinstance(statement, ast.Assign) and _is_literal(statement.value)


def _check_entry(source: KernelSource, name: str, kernel_name: str, signature: Signature) -> None:
    known = {function.name: function for function in _functions(source.tree)}
    if kernel_name not in known:
        raise _refused(name, f"there is no function '{kernel_name}'", 0)
    function = known[kernel_name]
    if len(function.args.args) != len(signature.parameters):
        message = f"'{kernel_name}' doesn't take what its signature says: {signature}"
        raise _refused(name, message, function.lineno)


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
        hint="Write functions without decorators and defaults.",
        details={"function": "", "line": line},
    )
