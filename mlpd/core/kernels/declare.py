"""How a module declares native code: `@kernel` for entries, `@device` for their helpers."""

import ctypes
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType, ModuleType
from typing import Any, TypeVar

from mlpd.core.errors import DefinitionError

Function = TypeVar("Function", bound=Callable[..., Any])

C_TYPES: Mapping[str, type[Any]] = MappingProxyType(
    {
        "f8": ctypes.c_double,
        "f4": ctypes.c_float,
        "i8": ctypes.c_int64,
        "i4": ctypes.c_int32,
        "u8": ctypes.c_uint64,
        "u4": ctypes.c_uint32,
        "u1": ctypes.c_uint8,
        "b1": ctypes.c_bool,
    }
)
"""Type codes (numpy's kind and item size) and what they are to C."""

_SIGNATURE = "__mlpd_kernel__"
_DEVICE = "__mlpd_device__"


@dataclass(frozen=True, slots=True)
class Parameter:
    """One parameter of an entry: a scalar, or a 1-d C-contiguous array (`const`: read only)."""

    name: str
    code: str
    is_array: bool
    is_const: bool

    def __str__(self) -> str:
        return "const " * self.is_const + self.code + "[]" * self.is_array


@dataclass(frozen=True, slots=True)
class Signature:
    """The machine types of one entry; `returns` is a scalar type code or None."""

    parameters: tuple[Parameter, ...]
    returns: str | None

    @property
    def types(self) -> str:
        """The parameters' types as `@kernel` takes them."""
        return ", ".join(map(str, self.parameters))

    def __str__(self) -> str:
        return f"({self.types}) -> {self.returns}"


def parse_signature(
    name: str, argument_names: Sequence[str], types: str, returns: str | None
) -> Signature:
    """Return the signature of kernel `name` from its written types, `"const f8[], i8"`.

    Raises DefinitionError for an unknown type, or when the types don't match the arguments.
    """
    written = [part.strip() for part in types.split(",")] if types.strip() else []
    if len(written) != len(argument_names):
        raise DefinitionError(
            f"kernel '{name}' has {len(argument_names)} arguments but {len(written)} types",
            code="kernel_signature",
            hint=f"write one type for each of: {', '.join(argument_names)}",
        )
    if returns is not None:
        _check_code(name, returns)
    pairs = zip(argument_names, written, strict=True)
    return Signature(tuple(_parse_parameter(name, *pair) for pair in pairs), returns)


def _parse_parameter(kernel_name: str, name: str, written: str) -> Parameter:
    body = written.removeprefix("const ")
    code = body.removesuffix("[]")
    _check_code(kernel_name, code)
    is_array, is_const = body.endswith("[]"), body != written
    if is_const and not is_array:
        raise DefinitionError(
            f"kernel '{kernel_name}': 'const' is for arrays, and '{name}' is a scalar",
            code="kernel_signature",
        )
    return Parameter(name, code, is_array, is_const)


def _check_code(kernel_name: str, code: str) -> None:
    if code not in C_TYPES:
        raise DefinitionError(
            f"kernel '{kernel_name}' has the unknown type '{code}'",
            code="kernel_signature",
            hint=f"use one of {', '.join(C_TYPES)}, 'T[]' for an array, 'const T[]' to only read",
        )


def kernel(types: str, *, returns: str | None = None) -> Callable[[Function], Function]:
    """Mark a function as an entry into native code; in Python it stays an ordinary function.

    `types` has one type for each argument, comma-separated: a scalar `f8 f4 i8 i4 u8 u4 u1 b1`,
    or `T[]` for a 1-d C-contiguous array that the kernel may write, `const T[]` for one that it
    only reads (then a read-only array is welcome, and writing to it is a compile error).
    The body is numba's nopython subset without allocation: no `np.empty`, no lists, no strings.

        @kernel("const f8[], f8[], i8", returns="i8")
        def running_sum(values, out, n): ...
    """

    def mark(function: Function) -> Function:
        names = tuple(inspect.signature(function).parameters)
        vars(function)[_SIGNATURE] = parse_signature(function.__name__, names, types, returns)
        return function

    return mark


def device(function: Function) -> Function:
    """Mark a function as callable from kernels, where it is inlined; unchanged in Python."""
    vars(function)[_DEVICE] = True
    return function


def routine(function: Function) -> Function:
    """Mark a helper that kernels call, and don't inline: for much code that runs seldom.

    Inlined wherever it may be needed, such code slows down what surrounds it, and the compiler
    sees it once more at every level of calls.  A call takes about 5 ns.
    """
    vars(function)[_DEVICE] = False
    return function


def is_inlined(function: Callable[..., Any]) -> bool:
    """Tell whether kernels inline `function`: all but routines."""
    return bool(vars(function).get(_DEVICE, True))


def signature_of(value: object) -> Signature | None:
    """Return the signature `@kernel` gave to `value`, or None if it isn't an entry."""
    return getattr(value, _SIGNATURE, None) if callable(value) else None


def is_native(value: object) -> bool:
    """Tell whether `value` carries `@kernel` or `@device`."""
    return callable(value) and (hasattr(value, _SIGNATURE) or hasattr(value, _DEVICE))


def declared_kernels(module: ModuleType) -> dict[str, Signature]:
    """Return the entries that `module` itself declares, by name (not those it imports)."""
    found: dict[str, Signature] = {}
    for name, value in vars(module).items():
        signature = signature_of(value)
        if signature is not None and value.__module__ == module.__name__:
            found[name] = signature
    return found
