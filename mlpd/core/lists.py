"""Values of lists and vectors: each is held, sent between processes and stored as packed bytes.

Numbers and timestamps are their little-endian bytes one after the other, a bool is one byte, texts
and binaries are a msgpack array (docs/formats/columns.md).  A column of them is handled like one of
bytes until someone asks for elements: nothing is converted on the way from a request to the disk.
"""

from collections.abc import Sequence
from itertools import chain, pairwise
from typing import Any

import msgpack
import numpy as np
from numpy.typing import NDArray

from mlpd.core.dtypes import DType

MAX_LIST_BYTES = 65_536
"""Bytes of one packed value: 8,192 numbers of 8 bytes take about 1 ms to write as JSON."""


def pack_lists(element: DType, flat: NDArray[Any], lengths: NDArray[np.int64]) -> list[bytes]:
    """Return lists of `lengths` as packed values; `flat`: their elements, one list after the other.

    About 0.2 us per list of numbers.
    """
    bounds = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
    if element.is_numeric:
        raw = flat.tobytes()
        ends = (bounds * flat.itemsize).tolist()
        return [raw[start:end] for start, end in pairwise(ends)]
    texts = flat.tolist()
    return [msgpack.packb(texts[start:end]) for start, end in pairwise(bounds.tolist())]


def unpack_lists(element: DType, values: Sequence[bytes]) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """Return (elements, lengths) of packed values: what `pack_lists` takes."""
    if element.is_numeric:
        flat = np.frombuffer(b"".join(values), element.numpy)
        sizes = np.fromiter(map(len, values), np.int64, len(values))
        return flat, sizes // element.numpy.itemsize
    lists = [msgpack.unpackb(value) for value in values]
    lengths = np.fromiter(map(len, lists), np.int64, len(lists))
    texts = np.empty(int(lengths.sum()), object)
    texts[:] = list(chain.from_iterable(lists))
    return texts, lengths


def unpack_list(dtype: DType, value: bytes) -> list[Any]:
    """Return the elements of one packed value of a list or vector type; about 0.5 us."""
    element = dtype.element
    if element is not None and element.is_numeric:
        numbers: list[Any] = np.frombuffer(value, element.numpy).tolist()
        return numbers
    texts: list[Any] = msgpack.unpackb(value)
    return texts


def list_fault(dtype: DType, value: bytes) -> str:
    """Return why bytes can't be a value of a list or vector type, empty if they can."""
    element = dtype.element
    if element is None or len(value) > MAX_LIST_BYTES:
        return f"it has {len(value)} bytes"
    if not element.is_numeric:
        return _texts_fault(element, value)
    length, rest = divmod(len(value), element.numpy.itemsize)
    if rest or dtype.length not in (None, length):
        return f"{len(value)} bytes are no {dtype}"
    if element is DType.BOOL and value.strip(b"\x00\x01"):
        return "a byte of it is neither 0 nor 1"
    return ""


def _texts_fault(element: DType, value: bytes) -> str:
    try:
        found = msgpack.unpackb(value)
    except (ValueError, msgpack.UnpackException):
        return "it is not msgpack"
    kind = str if element is DType.STRING else bytes
    fits = isinstance(found, list) and all(type(item) is kind for item in found)
    return "" if fits else f"it is no array of {element}"
