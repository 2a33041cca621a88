"""Wire formats: JSON and msgpack in and out by Content-Type and Accept, bounded, errors named.

Bodies over 64 KiB are decoded off the loop.  numpy values and NaN: JSON carries bare NaN and
Infinity, as Python's json and the Open Inference Protocol's clients do; msgpack carries float64.
Bytes are bytes in msgpack, text in JSON: `0x` and two hex digits each, both ways.
"""

import asyncio
import json
import os
import time
from collections.abc import Mapping
from typing import IO, Any

import msgpack
import numpy as np
from aiohttp import web

from mlpd.core.deadlines import too_late
from mlpd.core.errors import (
    InvalidRequestError,
    MlpdError,
    TooLargeError,
    UnavailableError,
    ValidationError,
)
from mlpd.core.media import JSON, MSGPACK, OCTETS
from mlpd.http.admission import enter, note_patience
from mlpd.http.encoding import encode_in_turns, encode_json, encode_msgpack
from mlpd.http.shapes import Shape
from mlpd.serving.oip_metadata import error_document

_MSGPACK_NAMES = (MSGPACK, "application/x-msgpack", "application/vnd.msgpack")

BY = "x-mlpd-by"
"""Header that names who asks for a change."""

BY_CHARS_MAX = 100

DEADLINE = "x-deadline-ms"
"""Header that says how long the caller will wait, from the arrival of the headers on."""

OFF_LOOP_BYTES = 64 * 1024
"""A JSON body of this size takes about 0.5 ms to decode."""

FILE_PART_BYTES = 256 * 1024
"""Of a file in memory, per answer."""

BODY_BYTES_MAX = web.AppKey("body_bytes_max", int)
"""Where a server keeps `[server] body_bytes_max`."""

_ITEMS_MAX = 4_000_000


async def read_body(request: web.Request) -> bytes:
    """Return the whole body, inflated if it was compressed; from then on the request is at work.

    Raises OverloadedError if it has no place in its crowd (`admission`),
    TooLargeError(code="body_too_large") as soon as it is over the limit, streamed or not,
    and ValidationError(code="malformed_body") for one that can't be unchunked or inflated.
    """
    check_length(request)
    bytes_max = request.app[BODY_BYTES_MAX]
    parts, size = [], 0
    try:
        async for part in request.content.iter_any():
            size += len(part)
            if size > bytes_max:
                raise _too_large(bytes_max)
            parts.append(part)
    except web.RequestPayloadError as error:
        raise unreadable(error) from None
    await enter(request)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def unreadable(error: web.RequestPayloadError) -> ValidationError:
    """Return the error for a body that can't be unchunked or inflated."""
    return ValidationError(
        f"the body can't be read: {' '.join(str(error).split())[:200]}",
        code="malformed_body",
        hint="Check its Transfer-Encoding and Content-Encoding.",
    )


def check_length(request: web.Request) -> None:
    """Raise TooLargeError if the body says itself that it is over the limit."""
    declared, bytes_max = request.content_length, request.app[BODY_BYTES_MAX]
    if declared is not None and declared > bytes_max:
        raise _too_large(bytes_max)


async def read_fields(request: web.Request, shape: Shape) -> dict[str, Any]:
    """Return the fields of a body of this shape; raises as `read_value` and `Shape.read`."""
    body = await read_body(request)
    if len(body) > OFF_LOOP_BYTES:
        return await asyncio.to_thread(_read_shape, body, request.content_type, shape)
    return _read_shape(body, request.content_type, shape)


def _read_shape(body: bytes, content_type: str, shape: Shape) -> dict[str, Any]:
    return shape.read(decode(body, content_type) if body else None)


async def read_value(request: web.Request) -> Any:
    """Return the decoded JSON or msgpack body; no body is None.

    Raises ValidationError(code="malformed_body"), InvalidRequestError(
    code="unsupported_media_type") or TooLargeError(code="body_too_large").
    """
    body = await read_body(request)
    if not body:
        return None
    if len(body) > OFF_LOOP_BYTES:
        return await asyncio.to_thread(decode, body, request.content_type)
    return decode(body, request.content_type)


def decode(body: bytes, content_type: str) -> Any:
    """Return the value of a JSON or msgpack body."""
    try:
        if content_type in _MSGPACK_NAMES:
            return msgpack.unpackb(
                body,
                strict_map_key=True,
                max_array_len=_ITEMS_MAX,
                max_map_len=10_000,
                max_bin_len=len(body),
                max_str_len=len(body),
                max_ext_len=0,
            )
        if content_type in (JSON, OCTETS, "text/json"):
            return json.loads(body)
    except (ValueError, RecursionError, msgpack.UnpackException) as error:
        raise ValidationError(
            f"the body is not valid {content_type}: {str(error)[:200]}",
            code="malformed_body",
            hint="Check the Content-Type: application/json or application/msgpack.",
        ) from None
    raise InvalidRequestError(
        f"the Content-Type {content_type!r} is not understood here",
        code="unsupported_media_type",
        hint=f"Send {JSON} or {MSGPACK}.",
    )


async def respond(
    request: web.Request,
    value: Any,
    *,
    status: int = 200,
    headers: Mapping[str, str] | None = None,
    large: bool | None = None,
) -> web.Response:
    """Return `value` in the form that the request accepts; msgpack only when it is asked for.

    `large`: whether it is encoded in a thread; guessed when not given.
    """
    kind = accepted(request)
    if _is_large(value) if large is None else large:
        body = await asyncio.to_thread(encode_in_turns, value, as_msgpack=kind == MSGPACK)
    else:
        body = encode(value, kind)
    return web.Response(body=body, status=status, content_type=kind, headers=headers)


def accepted(request: web.Request) -> str:
    """Return msgpack if the Accept header names it before JSON, else JSON."""
    accept = request.headers.get("Accept", "")
    if any(name in accept for name in _MSGPACK_NAMES):
        return MSGPACK
    return JSON


def encode(value: Any, kind: str) -> bytes:
    """Return the bytes of `value`; numpy arrays become lists."""
    return encode_msgpack(value) if kind == MSGPACK else encode_json(value)


def encode_error(error: MlpdError, *, plain: bool) -> tuple[bytes, dict[str, str]]:
    """Return body and headers of an error's answer.

    The body is `{"error": {...}}`, or as the inference protocol has it, `{"error": "text"}`, when
    `plain`.
    """
    document: dict[str, Any] = error_document(error) if plain else {"error": error.to_dict()}
    headers = {"Content-Type": JSON}
    if error.status == UnavailableError.status:
        headers["Retry-After"] = str(max(1, round(error.details.get("retry_after_s", 1))))
    return encode(document, JSON), headers


async def send_file(
    request: web.Request, file: IO[bytes], kind: str, headers: Mapping[str, str]
) -> web.StreamResponse:
    """Answer with an open file of media type `kind`, read as fast as the client takes it."""
    try:
        response = web.StreamResponse(headers={**headers, "Content-Type": kind})
        response.content_length = size = os.fstat(file.fileno()).st_size
        await response.prepare(request)
        # Nothing is read after the last byte: a client that has it may go.
        for start in range(0, size, FILE_PART_BYTES):
            part = min(FILE_PART_BYTES, size - start)
            await response.write(await asyncio.to_thread(_read_exactly, file, part))
        await response.write_eof()
    except OSError as error:
        # Whoever reads can't be told any more: the length tells that the rest is missing.
        raise ConnectionResetError(str(error)) from error
    return response


def _read_exactly(file: IO[bytes], size: int) -> bytes:
    part = file.read(size)
    if len(part) != size:
        raise OSError("the file was cut short")
    return part


def _is_large(value: Any) -> bool:
    """Guess from the longest column or list; a wrong guess costs a millisecond, not a result."""
    limit = 2_000
    if isinstance(value, Mapping):
        return any(isinstance(v, list | np.ndarray) and len(v) > limit for v in value.values())
    return isinstance(value, list) and len(value) > limit


def _too_large(bytes_max: int) -> TooLargeError:
    return TooLargeError(
        f"the body is over the limit of {bytes_max} bytes",
        code="body_too_large",
        hint="Send it in parts, or raise [server] body_bytes_max.",
    )


def read_by(request: web.Request) -> str:
    """Return who changes something, as they name themselves in `x-mlpd-by`; for histories."""
    return request.headers.get(BY, "").strip()[:BY_CHARS_MAX] or "somebody over HTTP"


def read_deadline(request: web.Request) -> float | None:
    """Return the `time.monotonic()` second by which the caller wants its answer, or None.

    Raises InvalidRequestError(code="invalid_deadline"), or DeadlineExceededError for 0.
    """
    text = request.headers.get(DEADLINE)
    if text is None:
        return None
    try:
        wait_ms = float(text)
    except ValueError:
        wait_ms = -1.0
    if not 0.0 <= wait_ms < float("inf"):
        raise InvalidRequestError(
            f"{DEADLINE} is {text[:40]!r}, not a number of milliseconds",
            code="invalid_deadline",
            hint="Send how long you will wait, for example 50.",
        )
    if wait_ms == 0.0:
        raise too_late("it arrived")
    note_patience(request, wait_ms / 1000.0)
    return time.monotonic() + wait_ms / 1000.0
