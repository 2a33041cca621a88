"""Versions on disk: a version's files and lineage into blobs, and verified back out of them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from mlpd.core.errors import InternalError, MlpdError, NotFoundError, TooLargeError, ValidationError
from mlpd.registry.descriptors import Descriptor
from mlpd.registry.lineage import Lineage
from mlpd.registry.manifest import (
    CONFIG_TYPE,
    LINEAGE_FILE,
    MODEL_FILE,
    Manifest,
    build_config,
    layer,
    media_type_of,
    ordered,
)
from mlpd.registry.origin import Origin, decode_lineage
from mlpd.registry.records import ModelVersion
from mlpd.storage.blobs import Blob, BlobStore

T = TypeVar("T")

MAX_FILE_BYTES = 2 << 30
"""Upper bound of one file: a protobuf message, and so an ONNX model, can't be larger."""

_DAMAGE_CODES = ("unknown_blob", "blob_corrupt", "invalid_manifest", "invalid_lineage")


class VersionDamagedError(InternalError):
    """A version's blobs are missing or differ from what its manifest says."""

    default_code = "version_corrupt"


@dataclass(frozen=True, slots=True)
class LoadedVersion:
    """A version in memory, every byte verified: `files` by name, lineage.json among them."""

    version: ModelVersion
    manifest: Manifest
    files: Mapping[str, bytes]
    lineage: Lineage | Origin


class VersionStore:
    """Versions over the blobs of one layout; every method blocks."""

    def __init__(self, blobs: BlobStore) -> None:
        self._blobs = blobs

    def publish(
        self, name: str, files: Mapping[str, bytes | Path], lineage: Lineage | Origin
    ) -> Blob:
        """Store a version durably and return its manifest's digest and size; no number yet.

        Everything that the manifest points to is on disk before the manifest is.
        """
        contents = {**files, LINEAGE_FILE: lineage.encode()}
        layers = {n: layer(n, *self._blobs.put(contents[n])) for n in ordered(contents)}
        revision = lineage.git_commit if isinstance(lineage, Lineage) else None
        config = self._blobs.put(build_config(name, layers, revision))
        manifest = Manifest(name, Descriptor(CONFIG_TYPE, *config), layers)
        return self._blobs.put(manifest.encode())

    def adopt(self, pointer: Descriptor, source: BlobStore) -> Blob:
        """Store the version that `pointer` leads to in another store, digests and all."""
        encoded = source.get(pointer.digest, pointer.size_bytes)
        for needed in Manifest.decode(encoded).blobs:
            with source.open(needed.digest, needed.size_bytes) as content:
                self._blobs.put(content)
        return self._blobs.put(encoded)

    def load(self, version: ModelVersion) -> LoadedVersion:
        """Return the version with all its files; raises VersionDamagedError."""
        return self.guarded(version, lambda: self._load(version))

    def load_manifest(self, version: ModelVersion) -> Manifest:
        """Return the version's manifest; raises VersionDamagedError."""
        return self.guarded(version, lambda: self._load_manifest(version))

    def load_file(self, version: ModelVersion, filename: str) -> bytes:
        """Return one file; raises VersionDamagedError, NotFoundError(code="unknown_file")."""
        descriptor = self.load_manifest(version).files.get(filename)
        if descriptor is None:
            raise NotFoundError(
                f"version {version.reference} has no file {filename!r}",
                code="unknown_file",
                hint="Its manifest lists its files.",
            )
        return self.guarded(version, lambda: self._get(descriptor))

    def _load(self, version: ModelVersion) -> LoadedVersion:
        manifest = self._load_manifest(version)
        self._get(manifest.config)
        files = {name: self._get(descriptor) for name, descriptor in manifest.files.items()}
        return LoadedVersion(version, manifest, files, decode_lineage(files[LINEAGE_FILE]))

    def _load_manifest(self, version: ModelVersion) -> Manifest:
        return Manifest.decode(self._blobs.get(version.digest, version.size_bytes))

    def _get(self, descriptor: Descriptor) -> bytes:
        return self._blobs.get(descriptor.digest, descriptor.size_bytes)

    def guarded(self, version: ModelVersion, read: Callable[[], T]) -> T:
        """Return what `read` does; damage that it meets becomes the version's."""
        try:
            return read()
        except MlpdError as error:
            if error.code not in _DAMAGE_CODES:
                raise
            raise VersionDamagedError(
                f"version {version.reference} is damaged: {error.message}",
                hint="Roll its alias back and register the model again: that mends its files.",
                details={"version": version.reference},
            ) from error


def check_files(files: Mapping[str, bytes | Path]) -> None:
    """Raise ValidationError or TooLargeError unless `files` may make up a version."""
    if MODEL_FILE not in files:
        raise ValidationError(
            f"a model version needs the file {MODEL_FILE}",
            code="missing_file",
            hint="Export the model to ONNX and register it under this name.",
        )
    for filename, content in files.items():
        media_type_of(filename)
        if filename == LINEAGE_FILE:
            raise ValidationError(
                f"{LINEAGE_FILE} is written from the lineage",
                code="unknown_file",
                hint="Pass the lineage as a mapping instead of a file.",
            )
        _check_content(filename, content)


def _check_content(filename: str, content: bytes | Path) -> None:
    if isinstance(content, Path) and not content.is_file():
        raise ValidationError(
            f"{filename} of the version: {content} is not a file",
            code="missing_file",
            hint="Write the file before registering the version.",
        )
    size_bytes = content.stat().st_size if isinstance(content, Path) else len(content)
    if size_bytes > MAX_FILE_BYTES:
        raise TooLargeError(
            f"{filename} has {size_bytes} bytes, over the limit of {MAX_FILE_BYTES}",
            code="file_too_large",
            hint="Train a smaller model.",
        )
