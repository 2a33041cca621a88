"""Blobs: immutable files named by the SHA-256 of their content, as in an OCI image layout."""

import hashlib
import os
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator
from contextlib import suppress
from io import BufferedReader
from pathlib import Path
from typing import IO, NamedTuple

from mlpd.core.errors import InternalError, NotFoundError, ValidationError
from mlpd.storage.files import fsync_dir, make_dirs

CHUNK_BYTES = 1 << 20
UPLOAD_PREFIX = "upload-"
"""What folders of uploads in `temporary` are called; a start removes those that a crash left."""
_DIGEST = re.compile(r"sha256:([0-9a-f]{64})")
_HEX = re.compile(r"[0-9a-f]{64}")


class Blob(NamedTuple):
    """What identifies a blob: `sha256:<64 hex digits>` and its length."""

    digest: str
    size_bytes: int


class BlobStore:
    """The files `root`/blobs/sha256/<hex>; every method blocks, so call it off the loop.

    `temporary` lies on the same filesystem and takes files being written; what a crash leaves
    there is removed at the next start.  Any number of threads and processes may use one store.
    """

    def __init__(self, root: Path, temporary: Path | None = None) -> None:
        self._directory = root / "blobs" / "sha256"
        self._temporary = temporary or root / ".mlpd" / "tmp"
        make_dirs(self._directory)
        make_dirs(self._temporary)

    def path(self, digest: str) -> Path:
        """Return where the blob is or would be; a malformed digest raises ValidationError."""
        match = _DIGEST.fullmatch(digest)
        if match is None:
            raise ValidationError(
                f"{digest!r} is not a digest",
                code="invalid_digest",
                hint="A digest is sha256: and 64 lower-case hex digits.",
            )
        return self._directory / match[1]

    def put(self, content: bytes | Path | IO[bytes]) -> Blob:
        """Store the content durably and return what it is called now; idempotent.

        A path is copied; a stream is read to its end in chunks, so its size is not bound by memory.
        """
        if isinstance(content, Path):
            with content.open("rb") as stream:
                return self._put(_chunks(stream))
        return self._put(iter((content,)) if isinstance(content, bytes) else _chunks(content))

    def _put(self, chunks: Iterator[bytes]) -> Blob:
        temporary = self._temporary / f"blob-{os.getpid()}-{secrets.token_hex(8)}"
        try:
            blob = _write(temporary, chunks)
            target = self.path(blob.digest)
            if self._holds(target, blob):
                return blob
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)
        fsync_dir(self._directory)
        return blob

    @staticmethod
    def _holds(target: Path, blob: Blob) -> bool:
        """Tell whether the blob is there and whole: a damaged one is replaced."""
        try:
            with target.open("rb") as file:
                return _identify(file) == blob
        except FileNotFoundError:
            return False

    def holds(self, content: bytes) -> bool:
        """Tell whether a blob of this content is there, and whole."""
        digest = f"sha256:{hashlib.sha256(content).hexdigest()}"
        return self._holds(self.path(digest), Blob(digest, len(content)))

    def exists(self, digest: str) -> bool:
        """Tell whether the blob is there, without reading it."""
        return self.path(digest).is_file()

    def open(self, digest: str, size_bytes: int | None = None) -> BufferedReader:
        """Return the blob opened at its start, digest and size verified; the caller closes it.

        Raises NotFoundError(code="unknown_blob") or InternalError(code="blob_corrupt").  Reads the
        whole content once, about 1 ms per MB.
        """
        try:
            file = self.path(digest).open("rb")
        except FileNotFoundError:
            raise NotFoundError(
                f"there is no blob {digest}",
                code="unknown_blob",
                hint="Run mlpd fsck: it lists what refers to it.",
            ) from None
        try:
            _check(file, digest, size_bytes)
        except BaseException:
            file.close()
            raise
        return file

    def get(self, digest: str, size_bytes: int | None = None) -> bytes:
        """Return the content, digest and size verified; errors as for `open`."""
        with self.open(digest, size_bytes) as file:
            return file.read()

    def verify(self, digest: str, size_bytes: int | None = None) -> Path:
        """Return the path of the blob after verifying digest and size; errors as for `open`."""
        self.open(digest, size_bytes).close()
        return self.path(digest)

    def delete(self, digests: Iterable[str]) -> int:
        """Remove the blobs that are there, durably, in this order; return how many were."""
        count = 0
        for digest in digests:
            with suppress(FileNotFoundError):
                self.path(digest).unlink()
                count += 1
        if count:
            fsync_dir(self._directory)
        return count

    def __iter__(self) -> Iterator[str]:
        """Yield the digest of every blob, in no order; other files in the directory are skipped."""
        for path in self._directory.iterdir():
            if _HEX.fullmatch(path.name):
                yield f"sha256:{path.name}"

    def remove_temporary(self) -> int:
        """Remove what crashed writers left behind, return how many; only at start."""
        left = [*self._temporary.glob("blob-*"), *self._temporary.glob(f"{UPLOAD_PREFIX}*")]
        for path in left:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        return len(left)


def _chunks(stream: IO[bytes]) -> Iterator[bytes]:
    while chunk := stream.read(CHUNK_BYTES):
        yield chunk


def _write(path: Path, chunks: Iterator[bytes]) -> Blob:
    """Write, hash and flush a new read-only file."""
    digest, size_bytes = hashlib.sha256(), 0
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o444)
    with os.fdopen(descriptor, "wb") as file:
        for chunk in chunks:
            digest.update(chunk)
            size_bytes += len(chunk)
            file.write(chunk)
        file.flush()
        os.fsync(descriptor)
    return Blob(f"sha256:{digest.hexdigest()}", size_bytes)


def _identify(file: BufferedReader) -> Blob:
    digest = hashlib.file_digest(file, "sha256")
    return Blob(f"sha256:{digest.hexdigest()}", file.tell())


def _check(file: BufferedReader, digest: str, size_bytes: int | None) -> None:
    found = _identify(file)
    if found.digest != digest or size_bytes not in (None, found.size_bytes):
        raise InternalError(
            f"the blob {digest} holds {found.size_bytes} bytes with digest {found.digest}",
            code="blob_corrupt",
            hint="Run mlpd fsck; restore the file from a backup or import the model again.",
            details={"expected_size_bytes": size_bytes},
        )
    file.seek(0)
