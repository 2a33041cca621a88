"""Files that survive a crash: atomic replacement, fsync; and the places in a data directory."""

import errno
import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class DataDirectory:
    """The places inside one daemon's data directory `root`."""

    root: Path

    @property
    def lmdb(self) -> Path:
        """The LMDB environment: the truth."""
        return self.root / "lmdb"

    @property
    def segments(self) -> Path:
        """Parquet segments: the compacted part of the log."""
        return self.root / "segments"

    @property
    def predictions(self) -> Path:
        """Parquet files: vectors and requests of served rows that left LMDB."""
        return self.root / "predictions"

    @property
    def registry(self) -> Path:
        """The OCI image layout with all models."""
        return self.root / "registry"

    @property
    def runs(self) -> Path:
        """Logs and pictures of training runs, by run id."""
        return self.root / "runs"

    @property
    def cache(self) -> Path:
        """Compiled kernels and binary data sets; may be deleted at any time."""
        return self.root / "cache"

    @property
    def joins(self) -> Path:
        """Files of joins under way, a folder each."""
        return self.cache / "joins"

    @property
    def moves(self) -> Path:
        """History of slots that leave, on its way."""
        return self.cache / "moves"

    @property
    def feed(self) -> Path:
        """The newest commits, for followers; not there while nobody follows."""
        return self.root / "feed"

    @property
    def snapshots(self) -> Path:
        """Backups that followers start from, while they fetch them."""
        return self.cache / "snapshots"

    @property
    def restoring(self) -> Path:
        """There while a restore fills the directory: nobody may start on it."""
        return self.root / ".restoring"

    @property
    def lock_file(self) -> Path:
        """Held by the daemon that owns the directory."""
        return self.root / "daemon.lock"

    @property
    def socket(self) -> Path:
        """The daemon's unix socket."""
        return self.root / "mlpd.sock"


def fsync_dir(directory: Path) -> None:
    """Make the names inside `directory` durable: call it after create, rename and unlink."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_file(path: Path) -> None:
    """Make the content of an already written file durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_dirs(directory: Path, mode: int = 0o700) -> None:
    """Create `directory` and its missing parents durably.

    The name of an existing folder is made durable too: the process that made it may have been
    killed before it could, and what is then written into it would go with the name.
    """
    if directory.is_dir():
        _fsync_name(directory)
        return
    make_dirs(directory.parent, mode)
    directory.mkdir(mode=mode, exist_ok=True)
    fsync_dir(directory.parent)


_NOT_OURS = frozenset((errno.EACCES, errno.EPERM, errno.EROFS, errno.EINVAL))
"""What flushing a folder answers where this process can't have made the name in it."""


def _fsync_name(directory: Path) -> None:
    try:
        fsync_dir(directory.parent)
    except OSError as error:
        if error.errno not in _NOT_OURS:
            raise


def atomic_write(path: Path, data: bytes, mode: int = 0o600) -> None:
    """Replace `path` by `data`: after a crash it holds all of the old or all of the new.

    The temporary file `.<name>.tmp` lies beside it; one writer per path at a time.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        write_durably(temporary, data, mode)
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    fsync_dir(path.parent)


def write_durably(path: Path, data: bytes, mode: int = 0o600) -> None:
    """Write `data` to `path` and fsync it (the name itself is not yet durable: `fsync_dir`)."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(descriptor)
