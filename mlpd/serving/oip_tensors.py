"""Tensors of the Open Inference Protocol between JSON values and numpy, every value checked.

JSON carries bare NaN and Infinity; null reads as NaN in a floating-point tensor.  Data is flat in
row-major order or nested to its shape, or bytes after the JSON (`oip_binary`).
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mlpd.core.errors import ValidationError
from mlpd.serving.datatypes import DATATYPES
from mlpd.serving.oip_binary import Blobs, read_values, write_values

DIMENSIONS_MAX = 8
SHAPE_MAX = 2**48
"""Largest product of a shape's sizes, zeros aside: numpy can't make every empty array either."""

BINARY_SIZE = "binary_data_size"
_FLOATS = frozenset({"FP16", "FP32", "FP64"})


class Tensor(NamedTuple):
    """A tensor as it was sent: `values` has the dtype of `datatype` (BYTES: objects, all str)."""

    datatype: str
    values: NDArray[Any]


def parse_tensor(document: object, blobs: Blobs) -> tuple[str, Tensor]:
    """Return the name and the tensor of one element of `inputs`; a binary one takes its bytes.

    About 0.1 us per value of JSON.  Raises ValidationError: `invalid_tensor`, `unknown_datatype`,
    `wrong_count`, `wrong_value`, `shared_memory_unsupported`; the message names the tensor.
    """
    if not isinstance(document, Mapping):
        raise _invalid("an input is not an object", "{name, shape, datatype, data}")
    name = document.get("name")
    if not isinstance(name, str) or not name:
        raise _invalid(f"an input has the name {name!r}", "a string")
    what = f"input {name!r}"
    size = _binary_size(document.get("parameters"), what)
    datatype = _parse_datatype(document.get("datatype"), what)
    shape = _parse_shape(document.get("shape"), what)
    data = document.get("data")
    if size is not None and data is None:
        values = read_values(blobs.take(size, what), shape, datatype, what)
    elif size is None and isinstance(data, list):
        values = _values(_flatten(data, shape, what), datatype, what)
    else:
        raise _invalid(
            f"{what} has {'no data' if size is None else 'data of two kinds'}",
            f"a list under `data` or, after the JSON, as many bytes as {BINARY_SIZE} says",
        )
    return name, Tensor(datatype, values.reshape(shape))


def build_tensor(
    name: str, values: NDArray[Any], datatype: str, *, binary: bool = False
) -> tuple[dict[str, Any], bytes]:
    """Return one element of `outputs` and its bytes; as JSON its data is flat, without bytes."""
    document = {"name": name, "datatype": datatype, "shape": list(values.shape)}
    if binary:
        data = write_values(values)
        return {**document, "parameters": {BINARY_SIZE: len(data)}}, data
    flat = values.ravel().tolist()
    if datatype == "BYTES":
        flat = [v.decode("utf-8", "replace") if isinstance(v, bytes) else v for v in flat]
    return {**document, "data": flat}, b""


def rank_classes(values: NDArray[Any], count: int) -> NDArray[np.object_]:
    """Return the `count` largest of each row, as text "value:index", largest first.

    Equal values stand in the order of their index.  A 1-d output is one row.
    """
    rows = values.reshape(-1, values.shape[-1])
    order = np.argsort(-rows, axis=1, kind="stable")[:, :count]
    found = np.take_along_axis(rows, order, axis=1)
    pairs = zip(found.ravel().tolist(), order.ravel().tolist(), strict=True)
    texts = np.array([f"{value!r}:{index}" for value, index in pairs], object)
    return texts.reshape(*values.shape[:-1], order.shape[1])


def _parse_datatype(datatype: object, what: str) -> str:
    if isinstance(datatype, str) and datatype in DATATYPES:
        return datatype
    raise ValidationError(
        f"{what} has the unknown datatype {datatype!r}",
        code="unknown_datatype",
        hint=f"Known: {', '.join(DATATYPES)}.",
    )


def _parse_shape(shape: object, what: str) -> tuple[int, ...]:
    if (
        isinstance(shape, list)
        and len(shape) <= DIMENSIONS_MAX
        and all(type(size) is int and size >= 0 for size in shape)
        and math.prod(size or 1 for size in shape) <= SHAPE_MAX
    ):
        return tuple(shape)
    raise _invalid(
        f"{what} has the shape {str(shape)[:60]}",
        f"a list of at most {DIMENSIONS_MAX} sizes of at least 0, at most {SHAPE_MAX} together",
    )


def _binary_size(parameters: object, what: str) -> object | None:
    """Return the tensor's `binary_data_size` as it was sent, None for JSON."""
    if parameters is None:
        return None
    if not isinstance(parameters, Mapping):
        raise _invalid(f"the parameters of {what} are no object", "an object")
    refuse_shared_memory(parameters, what)
    return parameters.get(BINARY_SIZE)


def refuse_shared_memory(parameters: Mapping[str, Any], what: str) -> None:
    """Raise ValidationError(code="shared_memory_unsupported") for a tensor that lies in one."""
    if parameters.get("shared_memory_region") is not None:
        raise ValidationError(
            f"{what} lies in shared memory, which this server doesn't map",
            code="shared_memory_unsupported",
            hint="Send it in the body: with tritonclient, set_data_from_numpy.",
        )


def _flatten(data: list[Any], shape: tuple[int, ...], what: str) -> list[Any]:
    """Return the values in row-major order; their number is that of the shape."""
    nested = bool(data) and isinstance(data[0], list)
    values = _unnest(data, shape, what) if nested else data
    wanted = math.prod(shape)
    if len(values) != wanted:
        raise ValidationError(
            f"{what} has {len(values)} values, but its shape {list(shape)} takes {wanted}",
            code="wrong_count",
            hint="Send the values flat in row-major order, or nested to the shape.",
        )
    return values


def _unnest(data: list[Any], shape: tuple[int, ...], what: str) -> list[Any]:
    level: list[Any] = [data]
    for depth, size in enumerate(shape):
        for part in level:
            if not isinstance(part, list) or len(part) != size:
                found = f"{len(part)} elements" if isinstance(part, list) else "no list"
                raise ValidationError(
                    f"{what} has {found} at nesting depth {depth}, but its shape {list(shape)} "
                    f"takes {size}",
                    code="wrong_count",
                    hint="Nest the data exactly as the shape says, or send it flat.",
                )
        level = [value for part in level for value in part]
    return level


def _values(flat: list[Any], datatype: str, what: str) -> NDArray[Any]:
    if datatype in _FLOATS:
        return _float_values(flat, datatype, what)
    kind = {"BOOL": bool, "BYTES": str}.get(datatype, int)
    _check_types(flat, (kind,), datatype, what)
    dtype = DATATYPES[datatype]
    if datatype == "BYTES":
        texts = np.empty(len(flat), dtype)
        texts[:] = flat
        return texts
    try:
        return np.array(flat, dtype)
    except OverflowError:
        low, high = np.iinfo(dtype).min, np.iinfo(dtype).max
        index = next(i for i, value in enumerate(flat) if not low <= value <= high)
        raise _wrong_value(flat[index], index, datatype, what) from None


def _float_values(flat: list[Any], datatype: str, what: str) -> NDArray[Any]:
    _check_types(flat, (float, int, type(None)), datatype, what)
    dtype = DATATYPES[datatype]
    try:
        exact = np.array(flat, np.float64)  # None becomes NaN
    except OverflowError:
        index = next(i for i, v in enumerate(flat) if isinstance(v, int) and abs(v) >= 2**1024)
        raise _wrong_value(flat[index], index, datatype, what) from None
    with np.errstate(over="ignore"):
        values = exact.astype(dtype)
    lost = np.isinf(values) & ~np.isinf(exact)
    if lost.any():
        index = int(np.flatnonzero(lost)[0])
        raise _wrong_value(flat[index], index, datatype, what)
    return values


def _check_types(flat: list[Any], allowed: tuple[type, ...], datatype: str, what: str) -> None:
    if set(map(type, flat)) <= set(allowed):
        return
    index = next(i for i, value in enumerate(flat) if type(value) not in allowed)
    raise _wrong_value(flat[index], index, datatype, what)


def _wrong_value(value: object, index: int, datatype: str, what: str) -> ValidationError:
    return ValidationError(
        f"{what} takes {datatype}, got {type(value).__name__} {repr(value)[:40]} at index {index}",
        code="wrong_value",
        hint=f"Send values that {datatype} holds exactly in kind and range.",
        details={"index": index},
    )


def _invalid(problem: str, expected: str) -> ValidationError:
    return ValidationError(
        f"{problem}, expected {expected}",
        code="invalid_tensor",
        hint="An input is {name, shape, datatype, data}.",
    )
