"""Spines in and joined frames out: rows, columns, Arrow, Parquet; off the loop."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

from mlpd.core.columns import Column, Columns, DType
from mlpd.core.convert import column_of
from mlpd.core.errors import InvalidRequestError, ValidationError
from mlpd.core.specs import Closure
from mlpd.daemon.history_child import EVENT_TIME, SEQUENCE
from mlpd.http.batches import read_arrow, read_series
from mlpd.http.shapes import Rows
from mlpd.http.wire import ARROW, JSON, MSGPACK, PARQUET, encode

FORMATS = (ARROW, PARQUET, JSON, MSGPACK)


def read_spine(closure: Closure, rows: Rows) -> Columns:
    """Return the typed columns of a spine's rows; null is allowed, absence is not."""
    names = dict.fromkeys(name for row in rows for name in row) if rows else _types(closure)
    values = {name: [row.get(name) for row in rows] for name in _checked(closure, names)}
    return _convert(closure, values)


def read_arrow_spine(closure: Closure, body: bytes) -> Columns:
    """Return the typed columns of a spine in an Arrow IPC stream; call it in a thread."""
    frame = read_arrow(body)
    types = _types(closure)
    names = _checked(closure, dict.fromkeys(frame.columns))
    return _convert(closure, {name: read_series(frame[name], types[name]) for name in names})


def choose_frame_format(accept: str) -> str:
    """Return the media type that an Accept header asks for; Arrow when it doesn't matter.

    Raises InvalidRequestError(code="not_acceptable").
    """
    wanted = [part.partition(";")[0].strip() for part in accept.split(",")]
    for name in wanted:
        if name in FORMATS:
            return name
    if accept and not {"*/*", "application/*"} & set(wanted):
        raise InvalidRequestError(
            f"frames don't come as {accept[:100]!r}",
            code="not_acceptable",
            hint=f"Accept one of {', '.join(FORMATS)}.",
        )
    return ARROW


def encode_frame(stream: bytes, kind: str) -> bytes:
    """Return an Arrow IPC stream in one of `FORMATS`; blocks.

    JSON and msgpack: `{"columns": {name: values}}`, times in microseconds UTC.
    """
    if kind == ARROW:
        return stream
    frame = read_arrow(stream)
    if kind == PARQUET:
        buffer = io.BytesIO()
        frame.write_parquet(buffer)
        return buffer.getvalue()
    columns = {s.name: s.to_physical().to_list() for s in frame}
    return encode({"columns": columns}, kind)


def _types(closure: Closure) -> dict[str, DType]:
    fixed = {EVENT_TIME: DType.TIMESTAMP, SEQUENCE: DType.INT64}
    return {**fixed, **closure.key_columns, **closure.service.request}


def _checked(closure: Closure, names: Mapping[str, Any]) -> Mapping[str, Any]:
    known = _types(closure)
    for name in names:
        if name not in known:
            raise ValidationError(
                f"the spine has the unknown column {name!r}",
                code="unknown_column",
                hint=f"It takes {', '.join(known)}; the answer keeps its order.",
            )
    return names


def _convert(closure: Closure, values: Mapping[str, Sequence[Any] | Column]) -> Columns:
    types = _types(closure)
    return {
        name: value if isinstance(value, Column) else column_of(types[name], value, name)
        for name, value in values.items()
    }
