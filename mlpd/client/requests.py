"""Requests as values and answers as values: what both clients share, without any I/O."""

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

import msgpack
import numpy as np

from mlpd.core.errors import MlpdError, StorageFullError, ValidationError
from mlpd.core.media import ARROW, JSON, MSGPACK, OCTETS, PARQUET
from mlpd.core.remote import error_of
from mlpd.core.time import parse_time
from mlpd.core.trace import TRACEPARENT

TAR = "application/x-tar"
SVG = "image/svg+xml"
DEADLINE = "x-deadline-ms"

LONG_S = 900.0
"""What calls that start a process, or build views from history, may take at least."""

Rows = Sequence[Mapping[str, Any]]
ColumnData = Mapping[str, Sequence[Any] | np.ndarray[Any, Any]]
Data = Rows | ColumnData | Any
"""Rows as a list of mappings, columns as a mapping of sequences or arrays, or a polars frame."""


Told = Callable[[str, int, int], None]
"""Called with "sent" or "received", the bytes so far and all there are, while a file is."""


@dataclass(frozen=True, slots=True)
class FileBody:
    """A body that lies in a file and is never in memory as a whole."""

    path: Path
    size_bytes: int

    def __len__(self) -> int:
        return self.size_bytes


@dataclass(frozen=True, slots=True)
class Request:
    """One call, ready to send; `path` is encoded, with its query.

    `repeatable`: sending it twice does what sending it once does, so it may be retried.
    `timeout_s`: what the call may take at least, whatever the client's timeout.  `to`: the file
    that a good answer's body goes to, under its name when it is whole.  `deadline_s`: how long the
    caller waits, from the first attempt on; the daemon is told what is left of it.
    """

    method: str
    path: str
    body: bytes | FileBody | None = None
    content_type: str = MSGPACK
    accept: str = MSGPACK
    headers: Mapping[str, str] = field(default_factory=dict)
    repeatable: bool = True
    timeout_s: float = 0.0
    to: Path | None = None
    told: Told | None = None
    deadline_s: float | None = None


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back: `headers` by lower-case name; `saved`: where the body is instead."""

    status: int
    headers: Mapping[str, str]
    body: bytes
    saved: Path | None = None


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


def form(*path: str, parts: Mapping[str, bytes], **query: Any) -> Request:
    """Return a POST of files, by field name, as multipart/form-data."""
    # Drawn from the content: a file can't hold its own digest, and equal calls are equal requests.
    digest = hashlib.sha256()
    for content in parts.values():
        digest.update(content)
    boundary = f"mlpd-{digest.hexdigest()}"
    body = bytearray()
    for name, content in parts.items():
        body += (
            f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"; filename="{name}"\r\n'
            "Content-Type: application/octet-stream\r\n\r\n"
        ).encode()
        body += content + b"\r\n"
    body += f"--{boundary}--\r\n".encode()
    kind = f"multipart/form-data; boundary={boundary}"
    return Request("POST", build_path(path, query), bytes(body), kind, timeout_s=LONG_S)


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


Traceparent = Callable[[], str | None]
"""Gives the W3C header of the caller's trace at the time of a call, None outside of one."""


def with_trace(request: Request, traceparent: Traceparent | None) -> Request:
    """Return the request with the W3C header that `traceparent` gives now, if it gives one."""
    found = None if traceparent is None else traceparent()
    if not found:
        return request
    return replace(request, headers={**request.headers, TRACEPARENT: found})


def with_deadline(request: Request, waited_s: float) -> Request:
    """Return the request with the header that tells the daemon how long the caller still waits.

    A deadline that has passed is told as such: the daemon answers it like any other.
    """
    if request.deadline_s is None:
        return request
    left_ms = max(request.deadline_s - waited_s, 0.0) * 1000.0
    return replace(request, headers={**request.headers, DEADLINE: f"{left_ms:.3f}"})


def time_left(request: Request, began_s: float, until_s: float) -> float:
    """Return the seconds left on `time.monotonic()` of a call: of its timeout and its deadline."""
    now_s = time.monotonic()
    if request.deadline_s is None:
        return until_s - now_s
    return min(until_s, began_s + request.deadline_s) - now_s


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


def file_body(path: Path) -> FileBody:
    """Return a file as a body; raises ValidationError(code="unreadable_file")."""
    try:
        with path.open("rb") as file:
            return FileBody(path, os.fstat(file.fileno()).st_size)
    except OSError as error:
        raise ValidationError(
            f"{path} can't be read: {error.strerror}", code="unreadable_file"
        ) from None


@contextmanager
def saving(to: Path) -> Iterator[Callable[[bytes], None]]:
    """Yield what writes to a file beside `to`, which takes its name at the end.

    After an error nothing is left of it.  Raises StorageFullError(code="unwritable_file").
    """
    part = to.with_name(f".{to.name}.{os.getpid()}.part")
    try:
        with _writing(to), part.open("wb") as file:

            def write(data: bytes) -> None:
                with _writing(to):
                    file.write(data)

            yield write
        with _writing(to):
            part.replace(to)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


@contextmanager
def _writing(to: Path) -> Iterator[None]:
    """Tell the errors of this machine's disk from those of the connection."""
    try:
        yield
    except OSError as error:
        if isinstance(error, ConnectionError | TimeoutError):
            raise
        raise StorageFullError(
            f"{to} can't be written: {error.strerror or error}",
            code="unwritable_file",
            hint="Check that its folder is there, may be written to, and has room.",
        ) from None


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

    msgpack and JSON: the value; Arrow: a polars frame; tar and other files: bytes; text: str.
    """
    if answer.status >= 400:  # noqa: PLR2004 - the statuses of errors
        raise read_error(answer)
    if answer.saved is not None:
        return {
            "path": str(answer.saved),
            "rows": int(answer.headers.get("x-mlpd-rows", 0)),
            "size_bytes": answer.saved.stat().st_size,
        }
    kind = answer.headers.get("content-type", "").partition(";")[0]
    if kind == MSGPACK:
        return msgpack.unpackb(answer.body, strict_map_key=False)
    if kind == JSON:
        return json.loads(answer.body)
    if kind in (TAR, OCTETS, PARQUET):
        return answer.body
    if kind == ARROW:
        import polars as pl  # noqa: PLC0415 - with frames alone

        return pl.read_ipc_stream(answer.body)
    return answer.body.decode("utf-8", "replace")


def read_error(answer: Answer) -> MlpdError:
    """Return the error of an answer, in the class of its status, with its code and hint."""
    return error_of(answer.status, answer.body, answer.headers.get("retry-after", ""))


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
