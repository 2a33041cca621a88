"""Child entry `backup`: copies LMDB, then places exactly the files that the copy names."""

import errno
from pathlib import Path
from typing import Any

from mlpd import __version__
from mlpd.core.errors import ConflictError, MlpdError, StorageFullError
from mlpd.core.time import format_time, system_clock
from mlpd.daemon.child import Send
from mlpd.daemon.served_files import load_files
from mlpd.registry import rows
from mlpd.registry.exports import export
from mlpd.registry.layout import Layout
from mlpd.registry.records import VersionState
from mlpd.registry.versions import VersionDamagedError, VersionStore
from mlpd.storage.backup import (
    CONFIG_FILE,
    BackupFile,
    BackupManifest,
    describe,
    finish_backup,
    place,
)
from mlpd.storage.blobs import BlobStore
from mlpd.storage.environment import Environment
from mlpd.storage.files import DataDirectory, make_dirs, write_durably
from mlpd.storage.map_store import MAP_FILE, FileMapStore
from mlpd.storage.segments import MANIFESTS, load_manifests

_DISK_FULL = frozenset((errno.ENOSPC, errno.EDQUOT, errno.EFBIG))


def run(request: dict[str, Any], send: Send) -> dict[str, Any]:
    """Write a backup of `directory` to `destination`, an empty folder; return its figures.

    `link`: whether files may be hard links.  `config`: TOML.  What it wrote stays when it fails.
    """
    source = DataDirectory(Path(request["directory"]))
    target = DataDirectory(Path(request["destination"]))
    try:
        return _Backup(source, target, link=request["link"]).write(request["config"], send)
    except OSError as error:
        full = error.errno in _DISK_FULL
        raise (StorageFullError if full else ConflictError)(
            f"the backup could not be written: {error}",
            code="backup_failed",
            hint="Free space there, or choose another destination; nothing of it was kept.",
        ) from error


class _Backup:
    """One backup: the parts in order, each adding its files."""

    def __init__(self, source: DataDirectory, target: DataDirectory, *, link: bool) -> None:
        self._source, self._target, self._link = source, target, link
        self._files: list[BackupFile] = []
        self._linked_bytes = 0

    def write(self, config: str, send: Send) -> dict[str, Any]:
        """Write everything, the manifest last."""
        send({"kind": "progress", "section": "lmdb"})
        with Environment.open(self._source.lmdb, clock=system_clock, readonly=True) as environment:
            environment.copy(self._target.lmdb)
        time = format_time(system_clock())
        send({"kind": "progress", "section": "files"})
        with Environment.open(self._target.lmdb, clock=system_clock, readonly=True) as copied:
            with copied.snapshot() as snapshot:
                sequence = int(snapshot.sequence)
            segments = self._place_segments(copied)
            self._place_predictions(copied)
            blobs = self._place_blobs(copied)
            self._write_layout(copied)
        (self._target.lmdb / "lock.mdb").unlink(missing_ok=True)
        write_durably(self._target.root / CONFIG_FILE, config.encode())
        for path in (self._target.lmdb / "data.mdb", self._target.root / CONFIG_FILE):
            self._files.append(describe(self._target.root, path))
        self._write_map()
        files = tuple(sorted(self._files, key=lambda file: file.path))
        manifest = BackupManifest(__version__, time, sequence, files)
        finish_backup(self._target.root, manifest)
        return {
            "destination": str(self._target.root),
            "time": time,
            "sequence": sequence,
            "files": len(files),
            "segments": segments,
            "blobs": blobs,
            "size_bytes": manifest.size_bytes,
            "linked_bytes": self._linked_bytes,
        }

    def _write_map(self) -> None:
        """Write the map of a member of several shards: without it the copy would own everything."""
        member = FileMapStore(self._source.root).load()
        if member is not None:
            path = self._target.root / MAP_FILE
            write_durably(path, member.encode())
            self._files.append(describe(self._target.root, path))

    def _place_segments(self, copied: Environment) -> int:
        with copied.snapshot() as snapshot:
            manifests = load_manifests(snapshot)
        segments = [segment for manifest in manifests for segment in manifest.segments]
        for segment in segments:
            self._place(Path("segments") / segment.path, segment.digest)
        copies = self._target.segments / MANIFESTS
        make_dirs(copies)
        for manifest in manifests:
            write_durably(copies / manifest.name, manifest.encode())
            self._files.append(describe(self._target.root, copies / manifest.name))
        return len(segments)

    def _place_predictions(self, copied: Environment) -> None:
        with copied.snapshot() as snapshot:
            files = load_files(snapshot)
        for file in files:
            self._place(Path("predictions") / file.path, file.digest)

    def _place_blobs(self, copied: Environment) -> int:
        blobs = BlobStore(self._source.registry)
        digests = _needed_blobs(copied, blobs)
        for digest in digests:
            self._place(blobs.path(digest).relative_to(self._source.root), digest)
        return len(digests)

    def _write_layout(self, copied: Environment) -> None:
        """Write oci-layout, index.json and the journal as the copy has it: the source may be on."""
        layout = Layout(self._target.registry)
        layout.prepare()
        export(copied, layout)
        (layout.root / ".mlpd" / "lock").unlink()
        for name in ("oci-layout", "index.json", ".mlpd/journal"):
            if (layout.root / name).exists():
                self._files.append(describe(self._target.root, layout.root / name))

    def _place(self, relative: Path, digest: str) -> None:
        target = self._target.root / relative
        linked = place(self._source.root / relative, target, digest, link=self._link)
        size_bytes = target.stat().st_size
        self._linked_bytes += size_bytes if linked else 0
        self._files.append(BackupFile(relative.as_posix(), size_bytes, digest))


def _needed_blobs(copied: Environment, blobs: BlobStore) -> list[str]:
    """Return the digests of all versions' manifests, configs and files, without repetition.

    What a quarantined version lacks stays away; any other raises VersionDamagedError.
    """
    store, found = VersionStore(blobs), dict[str, None]()
    with copied.snapshot() as snapshot:
        versions = [version for version in rows.all_versions(snapshot) if not version.is_deleted]
    for version in versions:
        quarantined = version.state is VersionState.QUARANTINED
        try:
            manifest = store.load_manifest(version)
        except VersionDamagedError:
            if not quarantined:
                raise
            continue
        digests = [version.digest, *(descriptor.digest for descriptor in manifest.blobs)]
        found |= dict.fromkeys(d for d in digests if not quarantined or _is_whole(blobs, d))
    return list(found)


def _is_whole(blobs: BlobStore, digest: str) -> bool:
    try:
        blobs.verify(digest)
    except MlpdError:
        return False
    return True
