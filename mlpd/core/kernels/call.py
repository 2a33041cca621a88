"""Calling native kernels: arguments are checked in Python, the code runs without the GIL."""

import ctypes
import operator
import re
from collections.abc import Callable
from typing import Any, ClassVar, Final

import numpy as np
import numpy.typing as npt

from mlpd.core.errors import InternalError
from mlpd.core.kernels.cache import symbol_of
from mlpd.core.kernels.declare import C_TYPES, Parameter, Signature
from mlpd.core.kernels.elf import Image

_C_CONTIGUOUS, _ALIGNED, _WRITEABLE = 0x1, 0x100, 0x400  # numpy's NPY_ARRAY_* flags
_DATA_OFFSET = object.__basicsize__  # PyArrayObject's data pointer follows the object header
_RAISED = 1  # numba's status for an exception; see numba/core/callconv.py
_word_at = ctypes.c_size_t.from_address


class KernelError(InternalError):
    """A kernel raised: an index out of bounds, a failed assertion, a `raise` in a transform."""

    default_code = "kernel_failed"


def address_of(array: npt.NDArray[Any]) -> int:
    """Return the address of the first element: as `array.ctypes.data`, in an eighth of its time."""
    return _word_at(id(array) + _DATA_OFFSET).value


def _prove_layout() -> None:
    probe = np.zeros(3)[1:]
    if address_of(probe) != probe.ctypes.data:
        raise InternalError("this numpy doesn't keep its data pointer where its ABI says")


_prove_layout()


class Kernel:
    """One native entry; any thread may call it, and the GIL is free while it runs."""

    __slots__ = ("_checks", "_entry", "_image", "_slot", "address", "name", "signature")

    def __init__(self, name: str, signature: Signature, image: Image) -> None:
        self.name: Final = name
        self.signature: Final = signature
        self.address: Final = image.symbols[symbol_of(name)]
        self._image = image  # keeps the code mapped
        self._slot = _slot_type(signature.returns)
        self._entry = _prototype(signature)(self.address)
        self._checks = tuple(_check(parameter) for parameter in signature.parameters)

    def __call__(self, *values: Any) -> Any:
        """Run on 1-d C-contiguous arrays of the declared dtypes, and on ints, floats and bools.

        Raises TypeError for a wrong argument, KernelError when the kernel raises.
        """
        if len(values) != len(self._checks):
            raise self._mistake(f"takes {len(self._checks)} arguments, not {len(values)}")
        words: list[Any] = []
        for (dtype, flags, scalar), value in zip(self._checks, values, strict=True):
            if scalar is not None:
                words.append(scalar(value))
            elif (
                type(value) is np.ndarray
                and value.ndim == 1
                and value.dtype == dtype
                and value.flags.num & flags == flags
            ):
                words += _word_at(id(value) + _DATA_OFFSET).value, value.size
            else:
                raise self._wrong_array(values)
        return self.raw(*words)

    def raw(self, *words: float) -> Any:
        """Run on plain words: each array as its address and its length, scalars as they are.

        For callers that keep their arrays and prepare the words once.  Nothing is checked: a
        wrong address ends the process.  Raises KernelError when the kernel raises.
        """
        slot = self._slot()
        status = self._entry(_byref(slot), _byref(slot, 8), *words)
        if status >= _RAISED:
            raise KernelError(f"kernel '{self.name}' raised {_exception_name(slot.failure)}")
        return slot.result

    def _mistake(self, what: str) -> TypeError:
        return TypeError(f"kernel '{self.name}' {what}; it is declared {self.signature}")

    def _wrong_array(self, values: tuple[Any, ...]) -> TypeError:
        for parameter, (dtype, flags, _), value in zip(
            self.signature.parameters, self._checks, values, strict=True
        ):
            if parameter.is_array and (problem := _problem(value, dtype, flags)):
                return self._mistake(f"wants {parameter} for '{parameter.name}', not {problem}")
        return self._mistake("got wrong arguments")


_byref = ctypes.byref


def _slot_type(returns: str | None) -> type[ctypes.Structure]:
    """Return the structure a call writes to: its result, and what it raised."""
    result = C_TYPES[returns] if returns else ctypes.c_void_p

    class Slot(ctypes.Structure):
        _fields_: ClassVar[Any] = (("result", result), ("failure", ctypes.c_void_p))

    if Slot.failure.offset != 8:  # noqa: PLR2004  every result has at most eight bytes
        raise InternalError("a kernel's result must have at most eight bytes")
    return Slot


def _prototype(signature: Signature) -> Callable[[int], Callable[..., int]]:
    types: list[Any] = [ctypes.c_void_p, ctypes.c_void_p]
    for parameter in signature.parameters:
        array = (ctypes.c_void_p, ctypes.c_int64)
        types += array if parameter.is_array else (C_TYPES[parameter.code],)
    return ctypes.CFUNCTYPE(ctypes.c_int32, *types)


def _check(parameter: Parameter) -> tuple[Any, int, Callable[[Any], Any] | None]:
    """Return what one argument must be: dtype and flags of an array, or a scalar's converter."""
    dtype = np.dtype(parameter.code)
    if not parameter.is_array:
        return dtype, 0, _converter(dtype)
    return dtype, _C_CONTIGUOUS | _ALIGNED | (0 if parameter.is_const else _WRITEABLE), None


def _converter(dtype: Any) -> Callable[[Any], Any]:
    if dtype.kind == "f":
        return _real
    if dtype.kind == "b":
        return _truth
    low, high = int(np.iinfo(dtype).min), int(np.iinfo(dtype).max)

    def integer(value: Any) -> int:
        number = operator.index(value)
        if not low <= number <= high:
            raise TypeError(f"{number} doesn't fit into {dtype.name}")
        return number

    return integer


def _real(value: Any) -> float:
    if isinstance(value, float | int | np.floating | np.integer):
        return float(value)
    raise TypeError(f"expected a float, not {type(value).__name__}")


def _truth(value: Any) -> bool:
    if isinstance(value, bool | np.bool):
        return bool(value)
    raise TypeError(f"expected a bool, not {type(value).__name__}")


def _problem(value: Any, dtype: Any, flags: int) -> str:
    """Return what is wrong with an array argument, or nothing."""
    if type(value) is not np.ndarray:
        return type(value).__name__
    if value.ndim != 1:
        return f"{value.ndim} dimensions"
    if value.dtype != dtype:
        return f"dtype {value.dtype}"
    missing = flags & ~value.flags.num
    names = {_C_CONTIGUOUS: "strided", _ALIGNED: "unaligned", _WRITEABLE: "read-only"}
    return " and ".join(f"a {text} array" for flag, text in names.items() if missing & flag)


class _Failure(ctypes.Structure):
    """Numba's excinfo: the raised exception as bytes, which are never unpickled here."""

    _fields_: ClassVar[Any] = (("content", ctypes.c_void_p), ("content_bytes", ctypes.c_int32))


def _exception_name(address: int | None) -> str:
    if not address:
        return "an exception"
    failure = _Failure.from_address(address)
    content = ctypes.string_at(failure.content or 0, failure.content_bytes)
    found = re.search(rb"[A-Z]\w*(Error|Exception)", content)
    return found.group().decode() if found else "an exception"
