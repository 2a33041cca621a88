"""Uploads: bodies written to files as they come, each with a limit; nothing is held in memory."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Mapping
from pathlib import Path
from typing import TypeVar

from aiohttp import BodyPartReader, web

from mlpd.core.errors import (
    InvalidRequestError,
    StorageFullError,
    TooLargeError,
    ValidationError,
)
from mlpd.http.wire import unreadable

T = TypeVar("T")

MULTIPART, TAR = "multipart/form-data", "application/x-tar"

CHUNK_BYTES = 1 << 20
FORM_BYTES_MAX = 1 << 16
"""What a form may take beside the content of its parts."""

MODEL_HINT = "Raise [registry] upload_bytes_max if the model really is that large."

STALL_S = 30.0
"""An upload of which nothing comes for so long is given up."""


async def receive_body(
    request: web.Request, path: Path, bytes_max: int, *, hint: str = MODEL_HINT
) -> None:
    """Write the whole body to `path`; `hint` is for one over the limit.

    Raises TooLargeError(code="body_too_large"), ValidationError(code="malformed_body" or
    "upload_stalled"), StorageFullError.
    """
    _check_length(request, bytes_max, hint)

    async def pieces() -> AsyncIterator[bytes]:
        while piece := await request.content.readany():
            yield piece

    await _write(pieces(), path, bytes_max, hint)


async def receive_parts(
    request: web.Request, directory: Path, parts: Mapping[str, tuple[str, int]], *, required: str
) -> None:
    """Write the parts of a form to files: `parts` gives file name and limit by the field's name.

    Raises as `receive_body`, and ValidationError: `unknown_field` for a part that isn't among them
    or comes twice, `missing_field` without the `required` one.
    """
    _check_length(request, FORM_BYTES_MAX + sum(bytes_max for _, bytes_max in parts.values()))
    try:
        reader = await request.multipart()
        while (part := await _waiting(reader.next())) is not None:
            if not isinstance(part, BodyPartReader) or part.name not in parts:
                raise _unknown(part.name if isinstance(part, BodyPartReader) else None, parts)
            filename, bytes_max = parts[part.name or ""]
            if (directory / filename).exists():
                raise _unknown(part.name, parts)
            await _write(_pieces_of(part), directory / filename, bytes_max)
    except (ValueError, AssertionError) as error:
        raise ValidationError(
            f"the form can't be read: {' '.join(str(error).split())[:200]}",
            code="malformed_body",
            hint="Send multipart/form-data, as curl -F model=@model.onnx does.",
        ) from None

    if not (directory / parts[required][0]).exists():
        raise ValidationError(
            f"the form has no part {required!r}",
            code="missing_field",
            hint=f"Send the file as curl -F {required}=@FILE does.",
        )


async def _pieces_of(part: BodyPartReader) -> AsyncIterator[bytes]:
    while piece := await part.read_chunk(CHUNK_BYTES):
        yield bytes(piece)


async def _write(
    pieces: AsyncIterator[bytes], path: Path, bytes_max: int, hint: str = MODEL_HINT
) -> None:
    """Write in steps of about CHUNK_BYTES, each in a thread."""
    size, waiting, waiting_bytes = 0, list[bytes](), 0
    try:
        file = await asyncio.to_thread(path.open, "xb")
        try:
            while (piece := await _waiting(anext(pieces, b""))) != b"":
                size += len(piece)
                if size > bytes_max:
                    raise _too_large(bytes_max, hint)
                waiting.append(piece)
                waiting_bytes += len(piece)
                if waiting_bytes >= CHUNK_BYTES:
                    await asyncio.to_thread(file.writelines, waiting)
                    waiting, waiting_bytes = [], 0
            await asyncio.to_thread(file.writelines, waiting)
        finally:
            await asyncio.to_thread(file.close)
    except web.RequestPayloadError as error:
        raise unreadable(error) from None
    except OSError as error:
        if isinstance(error, ConnectionError):
            raise
        raise StorageFullError(
            f"the upload could not be stored: {error.strerror}; nothing was kept",
            hint="Free space or mend the disk, then send it again.",
        ) from error


async def _waiting(step: Awaitable[T]) -> T:
    """Return what `step` gives, unless nothing comes for STALL_S."""
    try:
        async with asyncio.timeout(STALL_S):
            return await step
    except TimeoutError:
        raise ValidationError(
            f"nothing of the upload came for {STALL_S:.0f} s",
            code="upload_stalled",
            hint="Send it again.",
        ) from None


def _check_length(request: web.Request, bytes_max: int, hint: str = MODEL_HINT) -> None:
    """Refuse a body that says itself that it is too large, before any of it is read."""
    if (request.content_length or 0) > bytes_max:
        raise _too_large(bytes_max, hint)


def _too_large(bytes_max: int, hint: str) -> TooLargeError:
    return TooLargeError(
        f"the upload is over the limit of {bytes_max} bytes",
        code="body_too_large",
        hint=hint,
    )


def _unknown(name: str | None, parts: Mapping[str, tuple[str, int]]) -> InvalidRequestError:
    return ValidationError(
        f"the form has the part {name!r}, or has it twice",
        code="unknown_field",
        hint=f"Parts: {', '.join(parts)}.",
    )
