"""Files of another daemon, fetched part by part, whole by their digest or not at all."""

import asyncio
import hashlib
import os
import secrets
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from mlpd.client import AsyncClient
from mlpd.core.errors import ConflictError, StorageFullError, ValidationError
from mlpd.storage.files import fsync_dir, make_dirs

_BLOBS = "registry/blobs/"
_BLOB_MODE, _FILE_MODE = 0o444, 0o600


async def fetch_file(
    client: AsyncClient, path: str, digest: str, root: Path, *, snapshot: str | None = None
) -> int:
    """Fetch a file to `root`/path, durably; return its size.

    Raises NotFoundError(code="unknown_file") if the daemon has it no more, ConflictError(
    code="file_differs"), StorageFullError, and what asking raises; nothing is left of it then.
    """
    if PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts:
        raise ValidationError(f"{path!r:.200} is no file of a daemon", code="invalid_path")
    target = root / path
    part = target.with_name(f".{target.name}.{secrets.token_hex(4)}.part")
    mode = _BLOB_MODE if path.startswith(_BLOBS) else _FILE_MODE
    try:
        await asyncio.to_thread(make_dirs, target.parent)
        file = await asyncio.to_thread(_create, part, mode)
        with file:
            size_bytes = await _fetch(client, path, digest, file, snapshot)
        await asyncio.to_thread(part.replace, target)
    except OSError as error:
        raise StorageFullError(
            f"{path} could not be written: {error.strerror or error}",
            hint="Free some space on the follower's disk; it tries again.",
        ) from error
    finally:
        part.unlink(missing_ok=True)
    await asyncio.to_thread(fsync_dir, target.parent)
    return size_bytes


def _create(path: Path, mode: int) -> BinaryIO:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    return os.fdopen(descriptor, "wb")


async def _fetch(
    client: AsyncClient, path: str, digest: str, file: BinaryIO, snapshot: str | None
) -> int:
    found, offset = hashlib.sha256(), 0
    while True:
        part = await client.cluster.file(path, offset, snapshot=snapshot)
        data: bytes = part["data"]
        await asyncio.to_thread(_write, file, found, data)
        offset += len(data)
        if offset >= part["size_bytes"] or not data:
            break
    if f"sha256:{found.hexdigest()}" != digest:
        raise ConflictError(
            f"{path} came with another digest than {digest}",
            code="file_differs",
            hint="It is fetched again; if that doesn't help, run mlpd fsck at the owner.",
        )
    await asyncio.to_thread(_flush, file)
    return offset


def _write(file: BinaryIO, digest: "hashlib._Hash", data: bytes) -> None:
    digest.update(data)
    file.write(data)


def _flush(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
