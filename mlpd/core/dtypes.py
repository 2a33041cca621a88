"""Types of columns: scalars, lists and fixed vectors, by the texts that users write in a schema."""

import re
from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np

from mlpd.core.errors import ValidationError

MAX_VECTOR_LENGTH = 8192
"""Elements of a vector: 64 KiB of float64, which `lists.MAX_LIST_BYTES` allows a value."""

_LIST = re.compile(r"list\[\s*([a-z0-9]+)\s*\]")
_VECTOR = re.compile(r"vector\[\s*(float32|float64)\s*,\s*([1-9][0-9]{0,4})\s*\]")


class DType(str):
    """Type of a column, equal to its text: `int64`, `list[string]`, `vector[float32, 128]`.

    Equal types are one object, so `is` compares them.  `numpy`: the dtype of a column's `values`.
    `element`: the type of a list's or vector's elements, None for scalars.  `length`: a vector's
    number of elements, None for the others.

    >>> DType("vector[float32,8]") is DType("vector[float32, 8]")
    True
    """

    __slots__ = ("element", "is_numeric", "length", "numpy")

    BOOL: ClassVar["DType"]
    INT64: ClassVar["DType"]
    FLOAT32: ClassVar["DType"]
    FLOAT64: ClassVar["DType"]
    STRING: ClassVar["DType"]
    BYTES: ClassVar["DType"]
    TIMESTAMP: ClassVar["DType"]
    """int64 microseconds UTC"""

    numpy: np.dtype[Any]
    is_numeric: bool
    """Whether the values are fixed-width and convert to float64; the others are objects."""
    element: "DType | None"
    length: int | None

    def __new__(cls, text: str) -> "DType":  # noqa: PYI034 - there are no subclasses
        """Return the type that `text` names; raises ValueError if there is none."""
        return _KNOWN.get(text) or _intern(text)

    @classmethod
    def parse(cls, text: object, what: str) -> "DType":
        """Return the type that `text` names, else raise ValidationError(code="unknown_type")."""
        try:
            if isinstance(text, str):
                return cls(text)
        except ValueError:
            pass
        raise ValidationError(
            f"{what} has the unknown type {text!r:.80}",
            code="unknown_type",
            hint=f"Known types: {', '.join(SCALARS)}, list[any of these], "
            f"vector[float32 or float64, 1 to {MAX_VECTOR_LENGTH}].",
        )


_KNOWN: dict[str, DType] = {}
"""Every type seen, by its text; as many as can be written, since equal ones share an entry."""


def list_of(element: DType) -> DType:
    """Return the type of lists of a scalar type."""
    return DType(f"list[{element}]")


def _intern(text: str) -> DType:
    if found := _LIST.fullmatch(text):
        element, length, name = _KNOWN.get(found[1]), None, f"list[{found[1]}]"
    elif found := _VECTOR.fullmatch(text):
        element, length = _KNOWN[found[1]], int(found[2])
        name = f"vector[{element}, {length}]"
    else:
        element, length, name = None, None, ""
    if element is None or (length or 0) > MAX_VECTOR_LENGTH:
        raise ValueError(f"{text!r:.80} is no type")
    return _KNOWN.get(name) or _add(name, np.dtype(object), element=element, length=length)


def _add(
    name: str, numpy: np.dtype[Any], *, element: DType | None = None, length: int | None = None
) -> DType:
    dtype = str.__new__(DType, name)
    dtype.numpy, dtype.element, dtype.length = numpy, element, length
    dtype.is_numeric = numpy != np.dtype(object)
    return _KNOWN.setdefault(name, dtype)  # one call: another thread may have been faster


def _scalars() -> Iterator[DType]:
    for name, numpy in (
        ("bool", np.bool_),
        ("int64", np.int64),
        ("float32", np.float32),
        ("float64", np.float64),
        ("string", object),
        ("bytes", object),
        ("timestamp", np.int64),
    ):
        dtype = _add(name, np.dtype(numpy))
        setattr(DType, name.upper(), dtype)
        yield dtype


SCALARS = tuple(_scalars())
