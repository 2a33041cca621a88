"""Requests as values and answers as values: what both clients share, without any I/O."""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any
from urllib.parse import quote, urlencode

import msgpack
import numpy as np

from mlpd.core.errors import (
    ConflictError,
    DeadlineExceededError,
    ForbiddenError,
    InternalError,
    InvalidRequestError,
    MlpdError,
    NotFoundError,
    OverloadedError,
    StorageFullError,
    TooLargeError,
    UnauthorizedError,
    UnavailableError,
    ValidationError,
)
from mlpd.core.time import parse_time

MSGPACK = "application/msgpack"
ARROW = "application/vnd.apache.arrow.stream"

Rows = Sequence[Mapping[str, Any]]
ColumnData = Mapping[str, Sequence[Any] | np.ndarray[Any, Any]]
Data = Rows | ColumnData | Any
"""Rows as a list of mappings, columns as a mapping of sequences or arrays, or a polars frame."""


@dataclass(frozen=True, slots=True)
class Request:
    """One call, ready to send; `path` is encoded, with its query.

    `repeatable`: sending it twice does what sending it once does, so it may be retried.
    `timeout_s`: what the call may take at least, whatever the client's timeout.
    """

    method: str
    path: str
    body: bytes | None = None
    content_type: str = MSGPACK
    accept: str = MSGPACK
    headers: Mapping[str, str] = field(default_factory=dict)
    repeatable: bool = True
    timeout_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back: `headers` by lower-case name."""

    status: int
    headers: Mapping[str, str]
    body: bytes


def get(*path: str, **query: Any) -> Request:
    """Return a GET; query parameters that are None are left out."""
    return Request("GET", build_path(path, query))


def call(
    method: str,
    *path: str,
    fields: Mapping[str, Any] | None = None,
    repeatable: bool = True,
    timeout_s: float = 0.0,
) -> Request:
    """Return a request with a body of `fields`; those that are None are left out."""
    body = None
    if fields is not None:
        body = pack({name: value for name, value in fields.items() if value is not None})
    where = build_path(path)
    return Request(method, where, body, repeatable=repeatable, timeout_s=timeout_s)


def build_path(parts: Iterable[str], query: Mapping[str, Any] | None = None) -> str:
    """Return the path of parts, each quoted whole, and the query of what isn't None."""
    path = "/" + "/".join([quote(part, safe="") for part in parts])
    given = {name: _query_text(v) for name, v in (query or {}).items() if v is not None}
    return f"{path}?{urlencode(given)}" if given else path


def batch(*path: str, data: Data, fields: Mapping[str, Any], repeatable: bool = True) -> Request:
    """Return a POST of rows, columns, or a frame (then as Arrow, with `fields` in the query).

    Rows go under `rows`, columns under `columns`.
    """
    if is_frame(data):
        query = build_path(path, fields)
        return Request("POST", query, arrow_bytes(data), ARROW, repeatable=repeatable)
    name = "columns" if isinstance(data, Mapping) else "rows"
    return call("POST", *path, fields={name: plain_table(data), **fields}, repeatable=repeatable)


def with_idempotency_key(request: Request, key: str | None) -> Request:
    """Return the request under `key`, or a new random one: it may then be repeated safely."""
    headers = {**request.headers, "Idempotency-Key": key or os.urandom(16).hex()}
    return replace(request, headers=headers, repeatable=True)


def pack(value: Any) -> bytes:
    """Return msgpack; numpy arrays become lists, aware datetimes microseconds.

    Raises ValidationError(code="wrong_type") for what has no wire form.
    """
    try:
        packed: bytes = msgpack.packb(value, default=_plain)
    except (TypeError, OverflowError, ValueError) as error:
        raise ValidationError(
            f"a value can't be sent: {error}",
            code="wrong_type",
            hint="Send numbers, texts, bytes, aware datetimes, None, and lists and dicts of them.",
        ) from None
    return packed


def plain_table(data: Data) -> Any:
    """Return rows as a list, columns (a frame's too) as lists by name."""
    frame: Any = data
    table = frame.to_dict(as_series=False) if is_frame(data) else data
    if isinstance(table, Mapping):
        return {name: plain_column(values) for name, values in table.items()}
    return table if isinstance(table, list) else list(table)


def plain_column(values: Any) -> Any:
    """Return a column as a list: NaT is None, datetime64 microseconds."""
    if not isinstance(values, np.ndarray):
        return values if isinstance(values, list) else list(values)
    if values.dtype.kind != "M":
        return values.tolist()
    times = values.astype("datetime64[us]")
    listed: list[int | None] = times.astype(np.int64).tolist()
    missing = np.isnat(times)
    if missing.any():
        return [None if gone else t for t, gone in zip(listed, missing.tolist(), strict=True)]
    return listed


def is_frame(data: Any) -> bool:
    """Tell whether `data` is a polars frame, without importing polars."""
    return hasattr(data, "write_ipc_stream")


def arrow_bytes(frame: Any) -> bytes:
    """Return a polars frame as an Arrow IPC stream."""
    import io  # noqa: PLC0415 - with frames alone

    buffer = io.BytesIO()
    frame.write_ipc_stream(buffer)
    return buffer.getvalue()


def read_answer(answer: Answer) -> Any:
    """Return the value of a good answer by its media type; raise the error of another.

    msgpack and JSON: the value; Arrow: a polars frame; text: str.
    """
    if answer.status >= 400:  # noqa: PLR2004 - the statuses of errors
        raise read_error(answer)
    kind = answer.headers.get("content-type", "").partition(";")[0]
    if kind == MSGPACK:
        return msgpack.unpackb(answer.body, strict_map_key=False)
    if kind == "application/json":
        return json.loads(answer.body)
    if kind == ARROW:
        import polars as pl  # noqa: PLC0415 - with frames alone

        return pl.read_ipc_stream(answer.body)
    return answer.body.decode("utf-8", "replace")


def read_error(answer: Answer) -> MlpdError:
    """Return the error of an answer, in the class of its status, with its code and hint."""
    shape = _error_shape(answer)
    error = _class_of(answer.status, shape["details"])(
        shape["message"], code=shape["code"], hint=shape["hint"], details=shape["details"]
    )
    retry_after = answer.headers.get("retry-after", "")
    if retry_after.isdecimal():
        error.details.setdefault("retry_after_s", float(retry_after))
    return error


def pack_time(value: Any) -> int | None:
    """Return a moment in microseconds UTC from what `parse_time` takes; None stays None."""
    return None if value is None else parse_time(value)


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return plain_column(value)
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, datetime):
        return parse_time(value)
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, Sequence):
        return list(value)
    raise TypeError(f"{type(value).__name__} {value!r:.60} has no wire form")


def _query_text(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list | tuple):
        return ",".join(map(str, value))
    return str(parse_time(value)) if isinstance(value, datetime) else str(value)


def _error_shape(answer: Answer) -> dict[str, Any]:
    """Return code, message, hint and details; also of answers that aren't ours."""
    try:
        found = json.loads(answer.body)["error"]
    except (ValueError, KeyError, TypeError):
        found = answer.body[:200].decode("utf-8", "replace")
    if not isinstance(found, dict):
        found = {"message": str(found)}
    details = found.get("details")
    return {
        "code": str(found.get("code", f"http_{answer.status}")),
        "message": str(found.get("message", f"the daemon answered {answer.status}")),
        "hint": str(found.get("hint", "")),
        "details": details if isinstance(details, dict) else {},
    }


_CLASSES: Mapping[int, type[MlpdError]] = {
    error.status: error
    for error in (
        *(InvalidRequestError, UnauthorizedError, ForbiddenError, NotFoundError, ConflictError),
        *(TooLargeError, DeadlineExceededError, StorageFullError, InternalError, UnavailableError),
    )
}


def _class_of(status: int, details: Mapping[str, Any]) -> type[MlpdError]:
    if status == OverloadedError.status and "retry_after_s" in details:
        return OverloadedError
    client_error = status < InternalError.status
    return _CLASSES.get(status, InvalidRequestError if client_error else InternalError)
