"""Served rows as polars frames and back, bit for bit; for child processes alone."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mlpd.daemon.predictions import Prediction

if TYPE_CHECKING:
    import polars as pl

POSITION, SERVED = "position", "served_time"
_PLAIN = (
    *("prediction_id", "sequence", "route", "arm", "model", "version", "score", "unit"),
    *("propensity", "experiment", "phase", "chosen", "share"),
)
_BYTES, _FLOAT = "$bytes", "$float"
"""Keys of what JSON has no form for, in `request`."""

Placed = tuple[bytes, Prediction]
"""A prediction with the key of the row of SERVED that lists it."""


def schema() -> "dict[str, pl.DataType]":
    """Return the columns of a file, in order."""
    import polars as pl  # noqa: PLC0415 - not in the daemon

    text, whole, number = pl.String(), pl.Int64(), pl.Float64()
    time = pl.Datetime("us", "UTC")
    types = (text, whole, text, text, text, whole, number, text, number, text, whole, whole, number)
    return {
        POSITION: pl.Binary(),
        SERVED: time,
        "time": time,
        **dict(zip(_PLAIN, types, strict=True)),
        "vector": pl.List(pl.Float64()),
        "request": pl.String(),
    }


def plain_columns(frame: "pl.DataFrame") -> dict[str, list[Any]]:
    """Return a frame as plain values, times in microseconds UTC, positions in hex."""
    import polars as pl  # noqa: PLC0415 - not in the daemon

    times, position = pl.selectors.datetime().to_physical(), pl.col(POSITION).bin.encode("hex")
    return frame.with_columns(times, position).to_dict(as_series=False)


def to_frame(rows: Sequence[Placed]) -> "pl.DataFrame":
    """Return rows as a frame, in their order."""
    import polars as pl  # noqa: PLC0415 - not in the daemon

    types = schema()
    positions = [position for position, _ in rows]
    predictions = [prediction for _, prediction in rows]
    columns: dict[str, Any] = {
        POSITION: positions,
        SERVED: [int.from_bytes(position[:8], "big") for position in positions],
        "time": [p.t_us for p in predictions],
        **{name: [getattr(p, name) for p in predictions] for name in _PLAIN},
        "request": [encode_request(p.given) for p in predictions],
    }
    found = [
        _list_series([p.vector for p in predictions])
        if name == "vector"
        else pl.Series(name, columns[name], dtype=dtype)
        for name, dtype in types.items()
    ]
    return pl.DataFrame(found)


def from_frame(frame: "pl.DataFrame") -> Iterator[Prediction]:
    """Yield the predictions of a frame."""
    cuts = np.cumsum(frame["vector"].list.len().to_numpy())
    flat = frame["vector"].explode(empty_as_null=False).to_numpy()
    vectors = np.split(flat, cuts[:-1]) if len(frame) else []
    plain = frame.select(*_PLAIN, frame["time"].to_physical(), "request")
    for vector, row in zip(vectors, plain.iter_rows(named=True), strict=True):
        t_us, request = row.pop("time"), row.pop("request")
        yield Prediction(**row, t_us=t_us, vector=vector, given=decode_request(request))


def encode_request(given: Mapping[str, Any]) -> str:
    """Return key columns and request fields as JSON that `decode_request` reads back exactly."""
    return json.dumps({k: _plain(v) for k, v in given.items()}, ensure_ascii=False)


def decode_request(text: str) -> dict[str, Any]:
    """Return what `encode_request` was given."""
    return {name: _value(value) for name, value in json.loads(text).items()}


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return {_BYTES: value.hex()}
    if isinstance(value, float) and not math.isfinite(value):
        return {_FLOAT: repr(value)}
    return [_plain(element) for element in value] if isinstance(value, list | tuple) else value


def _value(value: Any) -> Any:
    if isinstance(value, list):
        return [_value(element) for element in value]
    if not isinstance(value, dict):
        return value
    return bytes.fromhex(value[_BYTES]) if _BYTES in value else float(value[_FLOAT])


def _list_series(vectors: Sequence[NDArray[np.float64]]) -> "pl.Series":
    """Return vectors of several widths as a series of lists, without an object per element."""
    import polars as pl  # noqa: PLC0415 - not in the daemon

    dtype = pl.List(pl.Float64())
    widths = np.array([len(vector) for vector in vectors], np.int64)
    parts, places = [pl.Series("vector", [], dtype=dtype)], [np.empty(0, np.int64)]
    for width in np.unique(widths).tolist():
        rows = np.flatnonzero(widths == width)
        places.append(rows)
        if width:
            matrix = np.stack([vectors[row] for row in rows.tolist()])
            parts.append(pl.Series("vector", matrix).cast(dtype))
        else:
            parts.append(pl.Series("vector", [[]] * len(rows), dtype=dtype))
    return pl.concat(parts)[np.argsort(np.concatenate(places))]
