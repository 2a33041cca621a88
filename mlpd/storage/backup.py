"""Backups on disk: files linked or copied, a manifest written last; docs/formats/backup.md."""

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from mlpd.core.errors import ConflictError, NotFoundError
from mlpd.storage.files import atomic_write, fsync_dir, make_dirs

FORMAT = 1
MANIFEST_FILE = "backup.json"
CONFIG_FILE = "config.toml"
CHUNK_BYTES = 4 << 20
"""Copied and flushed together, so that a backup never fills the page cache with dirty pages that
the daemon's own fsync would then have to wait for (bench: backup)."""

_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_CANNOT_LINK = frozenset((errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP, errno.EACCES))


@dataclass(frozen=True, slots=True)
class BackupFile:
    """One file of a backup; `path` is relative, with slashes."""

    path: str
    size_bytes: int
    digest: str


@dataclass(frozen=True, slots=True)
class BackupManifest:
    """What a backup consists of: the state up to and including `sequence`."""

    version: str
    """Of the mlpd that made it."""
    time: str
    """When its LMDB was copied, RFC 3339."""
    sequence: int
    files: tuple[BackupFile, ...]

    @property
    def size_bytes(self) -> int:
        """Bytes of all files, whether linked or copied."""
        return sum(file.size_bytes for file in self.files)

    def encode(self) -> bytes:
        """Return the bytes that `decode_backup` reads."""
        fields = {"format": FORMAT, **asdict(self)}
        return _dump({**fields, "checksum": _checksum(fields)})


def decode_backup(data: bytes) -> BackupManifest:
    """Return the manifest; ConflictError(code="backup_damaged") unless every byte is as written."""
    try:
        fields = json.loads(data)
        checksum, form = fields.pop("checksum"), fields.pop("format")
        files = tuple(_decode_file(file) for file in fields.pop("files"))
        manifest = BackupManifest(**fields, files=files)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(f"{MANIFEST_FILE} can't be read: {error!r}") from None
    if form != FORMAT:
        raise ConflictError(
            f"{MANIFEST_FILE} has format {form!r}, this version reads {FORMAT}",
            code="unknown_format",
            hint="Restore it with the version of mlpd that wrote it.",
        )
    if manifest.encode() != data:
        raise _damaged(f"{MANIFEST_FILE} is not what its checksum {checksum!r} says")
    return manifest


def load_backup(directory: Path) -> BackupManifest:
    """Return the manifest of the backup in `directory`.

    Raises NotFoundError(code="no_backup") without one, ConflictError(code="backup_damaged").
    """
    path = directory / MANIFEST_FILE
    try:
        data = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise NotFoundError(
            f"{directory} is no backup: there is no {MANIFEST_FILE} in it",
            code="no_backup",
            hint="The file is written last: without it a backup was not finished. Take another.",
        ) from None
    return decode_backup(data)


def find_damage(directory: Path, manifest: BackupManifest) -> Iterator[str]:
    """Yield what is wrong with the backup's files; reads everything, about 1 s per GB."""
    for file in manifest.files:
        path = directory / file.path
        if not path.is_file():
            yield f"{file.path} is missing"
        elif (size := path.stat().st_size) != file.size_bytes:
            yield f"{file.path} has {size} bytes instead of {file.size_bytes}"
        elif (digest := digest_of(path)) != file.digest:
            yield f"{file.path} has the digest {digest} instead of {file.digest}"


def digest_of(path: Path) -> str:
    """Return the SHA-256 of a file as manifests write it."""
    with path.open("rb") as file:
        return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"


def describe(root: Path, path: Path) -> BackupFile:
    """Return the entry of a file that lies below `root`."""
    return BackupFile(path.relative_to(root).as_posix(), path.stat().st_size, digest_of(path))


def place(source: Path, target: Path, digest: str, *, link: bool) -> bool:
    """Put an immutable file's content at `target`; return whether as a hard link.

    A link where that is wanted and possible, else a durable copy with the same mode.  Raises
    ConflictError(code="file_differs") unless the content has the digest.
    """
    make_dirs(target.parent)
    if link and _link(source, target):
        found, linked = digest_of(target), True
    else:
        found, linked = copy_durably(source, target), False
    if found != digest:
        target.unlink()
        raise ConflictError(
            f"{source} has the digest {found} instead of {digest}",
            code="file_differs",
            hint="The data directory is damaged: run mlpd fsck; restore it from a backup.",
        )
    return linked


def copy_durably(source: Path, target: Path) -> str:
    """Copy a file with its mode, flushed as it is written; return the digest of what was read."""
    digest = hashlib.sha256()
    with source.open("rb") as reader, target.open("xb") as writer:
        _copy(reader, writer, digest)
    shutil.copymode(source, target)
    return f"sha256:{digest.hexdigest()}"


def _copy(reader: BinaryIO, writer: BinaryIO, digest: Any) -> None:
    while chunk := reader.read(CHUNK_BYTES):
        digest.update(chunk)
        writer.write(chunk)
        writer.flush()
        os.fdatasync(writer.fileno())
    os.fsync(writer.fileno())


def _link(source: Path, target: Path) -> bool:
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno in _CANNOT_LINK:
            return False
        raise
    return True


def finish_backup(directory: Path, manifest: BackupManifest) -> None:
    """Flush every folder, then give the manifest its name: from here on it is a backup."""
    sync_folders(directory)
    atomic_write(directory / MANIFEST_FILE, manifest.encode())
    fsync_dir(directory.parent)


def sync_folders(root: Path) -> None:
    """Make the names of all files below `root` durable, deepest folders first."""
    for folder, _, _ in os.walk(root, topdown=False):
        fsync_dir(Path(folder))


def _decode_file(fields: dict[str, Any]) -> BackupFile:
    file = BackupFile(**fields)
    path = PurePosixPath(file.path)
    if path.is_absolute() or ".." in path.parts or str(path) != file.path or not path.parts:
        raise ValueError(f"{file.path!r} is no path inside a backup")
    if not _DIGEST.fullmatch(file.digest):
        raise ValueError(f"{file.digest!r} is no digest")
    return file


def _checksum(fields: dict[str, Any]) -> str:
    return f"sha256:{hashlib.sha256(_dump(fields)).hexdigest()}"


def _dump(fields: dict[str, Any]) -> bytes:
    return (json.dumps(fields, indent=1, sort_keys=True) + "\n").encode()


def _damaged(reason: str) -> ConflictError:
    return ConflictError(
        f"the backup is damaged: {reason}",
        code="backup_damaged",
        hint="Take another backup; nothing was restored.",
    )
