"""Layout: the registry directory as an OCI image layout, its lock and its derived index.json.

oci-layout                the layout's version
index.json                the tags, derived from LMDB
blobs/sha256/<hex>        manifests, configs, files, signatures: immutable, 0444
.mlpd/tmp/                files being written, on the same filesystem as the blobs
.mlpd/lock                held (flock) while index.json or the journal is written
.mlpd/collect             held (flock): shared while a version is published, alone by a collection
.mlpd/journal             every event, see `journal.py`
"""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mlpd.core.errors import ConfigurationError, StorageFullError
from mlpd.registry.journal import Journal
from mlpd.storage.blobs import BlobStore
from mlpd.storage.files import atomic_write, fsync_dir

LAYOUT_FILE = b'{"imageLayoutVersion":"1.0.0"}'
"""Content of `oci-layout`, as the OCI image specification fixes it."""


class Layout:
    """The directory `root`, whose parts `prepare` makes.  All methods block."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.blobs = BlobStore(root)
        self.journal = Journal(root / ".mlpd" / "journal")

    def prepare(self) -> None:
        """Write what is missing of an empty layout, durably.

        Raises ConfigurationError(code="unknown_layout") for a directory of another version.
        """
        found = self.read("oci-layout")
        if found is None:
            atomic_write(self.root / "oci-layout", LAYOUT_FILE, 0o644)
        elif found != LAYOUT_FILE:
            raise ConfigurationError(
                f"{self.root}/oci-layout names another version of the OCI image layout",
                code="unknown_layout",
                hint="Point the registry at a directory that mlpd made, or at an empty one.",
            )

    def sync_blobs(self) -> None:
        """Make the names of all blobs durable, also of those that another thread just wrote."""
        fsync_dir(self.root / "blobs" / "sha256")

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the layout's lock, across threads and processes, for the `with` block."""
        with self._flock("lock", fcntl.LOCK_EX):
            yield

    @contextmanager
    def publishing(self) -> Iterator[None]:
        """Keep collections away from the first blob of a version to its record, for the block.

        Any number of threads and processes may publish at once.  Raises StorageFullError.
        """
        with self._flock("collect", fcntl.LOCK_SH):
            yield

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Be alone with the blobs for the block: nothing that is being published lacks a record."""
        with self._flock("collect", fcntl.LOCK_EX):
            yield

    @contextmanager
    def _flock(self, filename: str, operation: int) -> Iterator[None]:
        path = self.root / ".mlpd" / filename
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise StorageFullError(
                f"the lock {path} can't be opened: {error}",
                hint="Free space or mend the disk, then try again; nothing was changed.",
            ) from error
        try:
            fcntl.flock(descriptor, operation)
            yield
        finally:
            os.close(descriptor)

    def read(self, filename: str) -> bytes | None:
        """Return the bytes of `oci-layout` or `index.json`, None if there is none."""
        path = self.root / filename
        return path.read_bytes() if path.exists() else None

    def write_index(self, data: bytes) -> None:
        """Replace index.json unless it is equal already; the caller holds the lock."""
        if self.read("index.json") != data:
            atomic_write(self.root / "index.json", data, 0o644)
