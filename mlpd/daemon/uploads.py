"""Verb uploads: files from outside become versions once a child process has looked at them."""

import asyncio
import math
import secrets
import shutil
import tempfile
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import IO, Any, TypeVar

from mlpd.core.config import RegistryConfig
from mlpd.core.errors import (
    InternalError,
    MlpdError,
    OverloadedError,
    StorageFullError,
    ValidationError,
)
from mlpd.core.hashing import canonical_json
from mlpd.core.names import check_name
from mlpd.daemon.process import Child
from mlpd.registry.descriptors import Descriptor
from mlpd.registry.manifest import MODEL_FILE
from mlpd.registry.models import Registry
from mlpd.registry.origin import Origin
from mlpd.registry.records import Cause, ModelVersion
from mlpd.registry.referrers import MANIFEST_TYPE
from mlpd.storage.blobs import UPLOAD_PREFIX, BlobStore

T = TypeVar("T")

MODEL, GOLDEN, ARCHIVE = MODEL_FILE, "golden.json", "archive.tar"
"""Names of the files in an upload's folder."""

UPLOADS_MAX = 4
"""Uploads under way; each may fill `upload_bytes_max` of the disk, an archive twice that."""

_NICE = 10
_STARTING_S = 10
"""Processor time for starting and importing, on a slow machine."""


class Uploads:
    """Takes ONNX files and archives; every method belongs to the loop.  Looks at one at a time."""

    def __init__(self, registry: Registry, temporary: Path, config: RegistryConfig) -> None:
        self._registry = registry
        self._temporary = temporary
        self._config = config
        self._count = 0
        self._looking = asyncio.Lock()

    @property
    def bytes_max(self) -> int:
        """The largest file that is taken."""
        return self._config.upload_bytes_max

    @asynccontextmanager
    async def folder(self) -> AsyncIterator[Path]:
        """A folder for one upload's files, removed afterwards; OverloadedError for too many."""
        if self._count >= UPLOADS_MAX:
            raise OverloadedError(
                f"{UPLOADS_MAX} uploads are under way",
                hint="Try again shortly.",
                details={"retry_after_s": 5.0},
            )
        self._count += 1
        directory = self._temporary / f"{UPLOAD_PREFIX}{secrets.token_hex(8)}"
        try:
            await _on_disk(directory.mkdir, 0o700)
            yield directory
        finally:
            self._count -= 1
            await asyncio.shield(asyncio.to_thread(shutil.rmtree, directory, ignore_errors=True))

    def open_temporary(self) -> IO[bytes]:
        """Return a file without a name on the registry's disk; it goes when it is closed."""
        return tempfile.TemporaryFile(dir=self._temporary)

    async def register(self, name: str, directory: Path, cause: Cause) -> ModelVersion:
        """Register the ONNX file in the folder, with its golden rows if there are any.

        Raises ValidationError with the codes of `serving.check.check_model`, or
        `model_check_failed` when the file crashes what looks at it, or is beyond its limits.
        """
        check_name(name, "model")
        found = await self._look_at("onnx", directory)
        files: dict[str, bytes | Path] = {
            MODEL: directory / MODEL,
            "signature.json": canonical_json(found["signature"]),
        }
        if (directory / GOLDEN).exists():
            files[GOLDEN] = directory / GOLDEN
        return await self._registry.register(name, files, Origin.decode(found["origin"]), cause)

    async def adopt(self, directory: Path, cause: Cause) -> ModelVersion:
        """Register the version in the folder's archive under its own name and digest.

        Raises ValidationError(code="invalid_archive"), and as `register`.
        """
        found = await self._look_at("archive", directory)
        pointer = Descriptor(MANIFEST_TYPE, found["digest"], found["size_bytes"])
        blobs = await _on_disk(BlobStore, directory)
        version = await self._registry.adopt(pointer, blobs, cause)
        for key, signature in found["signatures"].items():
            await self._registry.sign(version.name, version.number, key, signature, cause)
        return version

    async def _look_at(self, kind: str, directory: Path) -> dict[str, Any]:
        timeout_s = self._config.check_timeout_us / 1e6
        request = {
            "kind": kind,
            "directory": str(directory),
            "cpu_s": math.ceil(timeout_s) + _STARTING_S,
            "file_bytes_max": self.bytes_max,
        }
        memory_bytes_max = self._config.check_memory_bytes_max
        async with self._looking:
            try:
                async with (
                    asyncio.timeout(timeout_s),
                    Child("model", request, nice=_NICE, memory_bytes_max=memory_bytes_max) as child,
                ):
                    found: dict[str, Any] = await child.result()
            except TimeoutError:
                raise _failed(f"it took longer than {timeout_s:.3g} s") from None
            except InternalError as error:
                raise _failed(_why(error)) from error
        return found


async def _on_disk(act: Callable[..., T], *arguments: Any) -> T:
    """Return what `act` does in a thread; a disk that fails raises StorageFullError."""
    try:
        return await asyncio.to_thread(act, *arguments)
    except OSError as error:
        raise StorageFullError(
            f"the upload could not be stored: {error}; nothing was kept",
            hint="Free space or mend the disk, then send it again.",
        ) from error


def _why(error: MlpdError) -> str:
    if error.code == "child_died":
        return f"the process that looked at it died with status {error.details['status']}"
    return error.message


def _failed(why: str) -> ValidationError:
    return ValidationError(
        f"the upload was refused: {why}",
        code="model_check_failed",
        hint="[registry] check_timeout and check_memory_bytes_max are the limits of the check.",
    )
