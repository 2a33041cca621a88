"""Tensors as bytes: the binary extension of the Open Inference Protocol, little-endian.

A body is JSON and then the bytes of its tensors, one after the other; each says its
`binary_data_size` in the JSON.  A BYTES tensor is, per value, its length as u32 and its UTF-8.
"""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlpd.core.errors import ValidationError
from mlpd.serving.datatypes import DATATYPES

_LENGTH_BYTES = 4


class Blobs:
    """The bytes after a request's JSON, taken in the order of its inputs."""

    def __init__(self, data: bytes | memoryview = b"") -> None:
        self._rest = memoryview(data)

    def take(self, size: object, what: str) -> memoryview:
        """Return the next `size` bytes, which share memory with the body.

        Raises ValidationError(code="invalid_tensor") if there aren't as many.
        """
        if type(size) is not int or not 0 <= size <= len(self._rest):
            raise ValidationError(
                f"{what} has the binary_data_size {str(size)[:40]}, but {len(self._rest)} bytes "
                "are left of the body",
                code="invalid_tensor",
                hint="Send the tensors' bytes after the JSON, in the order of `inputs`, and the "
                "length of the JSON as Inference-Header-Content-Length.",
            )
        taken, self._rest = self._rest[:size], self._rest[size:]
        return taken

    def check_empty(self) -> None:
        """Raise ValidationError(code="invalid_request") for bytes that belong to no tensor."""
        if self._rest:
            raise ValidationError(
                f"{len(self._rest)} bytes of the body belong to no input",
                code="invalid_request",
                hint="Give every binary input its binary_data_size.",
            )


def read_values(data: memoryview, shape: tuple[int, ...], datatype: str, what: str) -> NDArray[Any]:
    """Return the values of a tensor, flat, as a new array of the datatype's dtype.

    Raises ValidationError: `wrong_count`, or `wrong_value` for a BOOL that is neither 0 nor 1 and
    for BYTES that are no UTF-8.
    """
    count = math.prod(shape)
    if datatype == "BYTES":
        return _read_texts(data, count, shape, what)
    dtype = DATATYPES[datatype]
    if len(data) != count * dtype.itemsize:
        raise _wrong_count(f"{len(data)} bytes", count * dtype.itemsize, shape, what)
    if datatype == "BOOL":
        return _read_flags(data, what)
    # A copy: the bytes stand anywhere in the body, and onnxruntime wants them aligned.
    return np.frombuffer(data, dtype.newbyteorder("<")).astype(dtype)


def write_values(values: NDArray[Any]) -> bytes:
    """Return the bytes of a tensor in row-major order; texts (objects) with their lengths."""
    if values.dtype == object:
        parts: list[bytes] = []
        for value in values.ravel().tolist():
            text = value if isinstance(value, bytes) else str(value).encode()
            parts += (len(text).to_bytes(_LENGTH_BYTES, "little"), text)
        return b"".join(parts)
    return values.astype(values.dtype.newbyteorder("<"), copy=False).tobytes()


def _read_flags(data: memoryview, what: str) -> NDArray[np.bool_]:
    numbers = np.frombuffer(data, np.uint8)
    if numbers.size and numbers.max() > 1:
        index = int(np.argmax(numbers > 1))
        raise _wrong_value(f"{what} takes BOOL, got {numbers[index]} at index {index}", index)
    return numbers.astype(np.bool_)


def _read_texts(
    data: memoryview, count: int, shape: tuple[int, ...], what: str
) -> NDArray[np.object_]:
    texts: list[str] = []
    at = 0
    while at < len(data) and len(texts) <= count:
        start = at + _LENGTH_BYTES
        at = start + int.from_bytes(data[at:start], "little")
        if at > len(data):
            raise _wrong_value(f"{what} is cut off in value {len(texts)}", len(texts))
        try:
            texts.append(str(data[start:at], "utf-8"))
        except UnicodeDecodeError:
            index = len(texts)
            raise _wrong_value(f"{what} has no UTF-8 at index {index}", index) from None
    if len(texts) != count:
        found = f"more than {count}" if len(texts) > count else str(len(texts))
        raise _wrong_count(f"{found} values", count, shape, what)
    values = np.empty(count, object)
    values[:] = texts
    return values


def _wrong_count(found: str, expected: int, shape: tuple[int, ...], what: str) -> ValidationError:
    return ValidationError(
        f"{what} has {found}, but its shape {list(shape)} takes {expected}",
        code="wrong_count",
        hint="Send the values in row-major order, little-endian.",
    )


def _wrong_value(problem: str, index: int) -> ValidationError:
    return ValidationError(
        problem,
        code="wrong_value",
        hint="BOOL is one byte, 0 or 1; BYTES is u32 length and UTF-8 for each value.",
        details={"index": index},
    )
