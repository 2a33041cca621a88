"""Calling native kernels: arguments are checked in Python, the code runs without the GIL."""

import ctypes
import operator
import re
import struct
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Final

import numpy as np
import numpy.typing as npt

from mlpd.core.errors import InternalError
from mlpd.core.kernels.cache import symbol_of
from mlpd.core.kernels.declare import C_TYPES, Parameter, Signature
from mlpd.core.kernels.elf import Image

_C_CONTIGUOUS, _ALIGNED, _WRITEABLE = 0x1, 0x100, 0x400  # numpy's NPY_ARRAY_* flags
_DATA_OFFSET = object.__basicsize__  # PyArrayObject's data pointer follows the object header
_BYTES_OFFSET = bytes.__basicsize__ - 1  # the last byte of the basic size is the closing 0
_RAISED = 1  # numba's status for an exception; see numba/core/callconv.py
_Array = np.ndarray  # a global is found quicker than an attribute, on the hot path
_word_at = ctypes.c_size_t.from_address


class KernelError(InternalError):
    """A kernel raised: an index out of bounds, a failed assertion, a `raise` in a transform."""

    default_code = "kernel_failed"


def address_of(array: npt.NDArray[Any]) -> int:
    """Return the address of the first element: as `array.ctypes.data`, in an eighth of its time."""
    return _word_at(id(array) + _DATA_OFFSET).value


MEMORY: Final = (0, 1 << 60)
"""Address and length of all memory, as an array of words: for values that are read in place."""


def word_numbers(values: Sequence[bytes | None]) -> npt.NDArray[np.int64]:
    """Return where each value begins in MEMORY; None and empty values must not be read.

    Hold the values until the call is over.  0.05 us each, where joining them copies every byte.
    """
    found = np.fromiter(map(id, values), np.int64, len(values))
    found += _BYTES_OFFSET
    found >>= 3  # objects lie at multiples of 16, their bytes 32 behind
    return found


def _prove_layout() -> None:
    probe = np.zeros(3)[1:]
    if address_of(probe) != probe.ctypes.data:
        raise InternalError("this numpy doesn't keep its data pointer where its ABI says")
    value = struct.pack("<q", -2)
    if ctypes.c_int64.from_address(int(word_numbers([value])[0]) << 3).value != -2:  # noqa: PLR2004
        raise InternalError("this Python doesn't keep bytes where its ABI says")


_prove_layout()


class Kernel:
    """One native entry; any thread may call it, and the GIL is free while it runs."""

    __slots__ = ("_checks", "_entry", "_frame", "_image", "address", "name", "signature")

    def __init__(self, name: str, signature: Signature, image: Image) -> None:
        self.name: Final = name
        self.signature: Final = signature
        self.address: Final = image.symbols[symbol_of(name)]
        self._image = image  # keeps the code mapped
        self._frame = _frame_type(signature)
        prototype = ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.POINTER(self._frame))
        self._entry: Callable[[ctypes.Structure], int] = prototype(self.address)
        self._checks = tuple(_check(parameter) for parameter in signature.parameters)

    def __call__(self, *values: Any) -> Any:
        """Run on 1-d C-contiguous arrays of the declared dtypes, and on ints, floats and bools.

        Raises TypeError for a wrong argument, KernelError when the kernel raises.
        """
        if len(values) != len(self._checks):
            raise self._mistake(f"takes {len(self._checks)} arguments, not {len(values)}")
        words: list[Any] = [0, None]
        put = words.append
        for (dtype, flags, scalar), value in zip(self._checks, values, strict=False):
            if scalar is not None:
                put(scalar(value))
            elif (
                type(value) is _Array
                and (value.dtype is dtype or value.dtype == dtype)
                and value.ndim == 1
                and value.flags.num & flags == flags
            ):
                put(_word_at(id(value) + _DATA_OFFSET).value)
                put(value.size)
            else:
                raise self._wrong_array(values)
        return self._run(self._frame(*words))

    def raw(self, *words: float) -> Any:
        """Run on plain words: each array as its address and its length, scalars as they are.

        For callers that keep their arrays and prepare the words once.  Nothing is checked: a
        wrong address ends the process.  Raises KernelError when the kernel raises.
        """
        return self._run(self._frame(0, None, *words))

    def _run(self, frame: Any) -> Any:
        if self._entry(frame) >= _RAISED:
            raise KernelError(f"kernel '{self.name}' raised {_exception_name(frame.failure)}")
        return frame.result

    def _mistake(self, what: str) -> TypeError:
        return TypeError(f"kernel '{self.name}' {what}; it is declared {self.signature}")

    def _wrong_array(self, values: tuple[Any, ...]) -> TypeError:
        problems = (
            f"wants {parameter} for '{parameter.name}' but got {problem}"
            for parameter, check, value in zip(
                self.signature.parameters, self._checks, values, strict=True
            )
            if parameter.is_array and (problem := _problem(value, *check[:2]))
        )
        return self._mistake(next(problems))


def _frame_type(signature: Signature) -> Any:
    """Return the structure that a call passes by address: what comes out, then the words.

    The compile child lays out the same structure for LLVM; both follow C's natural alignment.
    """
    fields = [
        ("result", C_TYPES[signature.returns] if signature.returns else ctypes.c_void_p),
        ("failure", ctypes.c_void_p),
    ]
    for index, parameter in enumerate(signature.parameters):
        if parameter.is_array:
            fields += ((f"address{index}", ctypes.c_size_t), (f"size{index}", ctypes.c_int64))
        else:
            fields.append((f"value{index}", C_TYPES[parameter.code]))
    return type("Frame", (ctypes.Structure,), {"_fields_": fields})


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
    if type(value) is not _Array:
        return f"a {type(value).__name__}"
    if value.ndim != 1:
        return f"an array of {value.ndim} dimensions"
    if value.dtype != dtype:
        return f"an array of {value.dtype}"
    missing = flags & ~value.flags.num
    flaws = {_C_CONTIGUOUS: "strided", _ALIGNED: "unaligned", _WRITEABLE: "read-only"}
    found = " and ".join(flaw for flag, flaw in flaws.items() if missing & flag)
    return found and f"an array that is {found}"


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
