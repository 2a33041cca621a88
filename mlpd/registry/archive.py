"""Archive: one version as an OCI archive, a tar of an image layout, written and read back.

Reading trusts nothing: names are not used as paths, every blob is hashed, what the manifest doesn't
name is left out.  Still, do it in a child process: tar headers may claim any size.
"""

import io
import json
import re
import tarfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO

from mlpd.core.errors import MlpdError, ValidationError
from mlpd.registry.descriptors import Descriptor
from mlpd.registry.layout import LAYOUT_FILE
from mlpd.registry.manifest import (
    ARTIFACT_TYPE,
    Manifest,
    build_index,
    read_signatures,
    referrers_of,
)
from mlpd.registry.records import ModelVersion
from mlpd.registry.referrers import check_count, is_referrer, read_referrers
from mlpd.storage.blobs import BlobStore

MEMBERS_MAX = 100
"""A version has at most 27 blobs, and 34 of signatures; `skopeo` adds entries for folders."""

MANIFEST_BYTES_MAX = 1 << 20

_BLOB = re.compile(r"blobs/sha256/([0-9a-f]{64})")
_FOLDERS = ("", ".", "blobs", "blobs/sha256")
_TEXTS = ("oci-layout", "index.json")


def write_archive(
    file: IO[bytes],
    version: ModelVersion,
    signatures: Mapping[str, str],
    manifest: Manifest,
    blobs: BlobStore,
) -> None:
    """Write the version to `file`, every blob verified; equal versions give equal bytes.

    Raises what `BlobStore.open` does.
    """
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        _add(tar, "oci-layout", io.BytesIO(LAYOUT_FILE), len(LAYOUT_FILE))
        index = build_index([(version, signatures)])
        _add(tar, "index.json", io.BytesIO(index), len(index))
        for referrers in referrers_of([(version, signatures)]):
            for digest, data in referrers.blobs.items():
                _add(tar, _member(digest), io.BytesIO(data), len(data))
        own = Descriptor("", version.digest, version.size_bytes)
        for pointer in {p.digest: p for p in (own, *manifest.blobs)}.values():
            with blobs.open(pointer.digest, pointer.size_bytes) as content:
                _add(tar, _member(pointer.digest), content, pointer.size_bytes)


def read_archive(path: Path, blobs: BlobStore) -> tuple[Descriptor, Manifest, Mapping[str, str]]:
    """Put the blobs of the one version in the archive into `blobs`; return what they make up.

    That is its pointer, its manifest and its signatures by key, which nobody has verified: those
    that refer to it and, in archives of before, those that its entry is annotated with.

    Raises ValidationError(code="invalid_archive"): no tar, more than a version, a blob that is
    missing or differs from its name; and what `Manifest.decode` and `read_referrers` raise.
    """
    try:
        index = _unpack(path, blobs)
    except (tarfile.TarError, ValueError, EOFError, OverflowError) as error:
        raise _invalid(f"it is no tar file: {' '.join(str(error).split())[:200]}") from error
    entries = _entries(index)
    pointer = _only_version(entries)
    try:
        manifest = Manifest.decode(blobs.get(pointer.digest, pointer.size_bytes))
        for needed in manifest.blobs:
            blobs.verify(needed.digest, needed.size_bytes)
    except MlpdError as error:
        raise _invalid(error.message) from error
    signatures = read_signatures(pointer.annotations) | read_referrers(entries, pointer, blobs)
    check_count(signatures)
    return pointer, manifest, signatures


def _member(digest: str) -> str:
    return f"blobs/sha256/{digest.removeprefix('sha256:')}"


def _add(tar: tarfile.TarFile, name: str, content: IO[bytes], size_bytes: int) -> None:
    member = tarfile.TarInfo(name)
    member.size, member.mode = size_bytes, 0o644
    tar.addfile(member, content)


def _unpack(path: Path, blobs: BlobStore) -> bytes:
    index = b""
    with tarfile.open(path, "r:") as tar:
        for member, name in _members(tar):
            content = tar.extractfile(member)
            assert content is not None  # regular files have one
            if name == "index.json":
                index = content.read(MANIFEST_BYTES_MAX)
            elif (match := _BLOB.fullmatch(name)) and (
                blobs.put(content).digest != f"sha256:{match[1]}"
            ):
                raise _invalid(f"the blob {name} differs from its name")
    return index


def _members(tar: tarfile.TarFile) -> Iterator[tuple[tarfile.TarInfo, str]]:
    """Yield the regular files with their names; anything else but the layout's folders raises."""
    for count, member in enumerate(tar, 1):
        name = member.name.removeprefix("./")
        if count > MEMBERS_MAX:
            raise _invalid(f"it has more than {MEMBERS_MAX} entries")
        if member.isdir() and name in _FOLDERS:
            continue
        if not member.isreg() or member.issparse() or not (name in _TEXTS or _BLOB.fullmatch(name)):
            raise _invalid(f"the entry {member.name[:200]!r} is no part of an image layout")
        yield member, name


def _entries(index: bytes) -> list[object]:
    try:
        document = json.loads(index)
    except (ValueError, RecursionError):
        document = None
    match document:
        case {"manifests": [*entries]}:
            return entries
    return []


def _only_version(entries: list[object]) -> Descriptor:
    """Return the one entry that refers to nothing else."""
    match [entry for entry in entries if not is_referrer(entry)]:
        case [form]:
            return Descriptor.parse(form, "the entry of index.json")
    raise _invalid(f"its index.json doesn't name exactly one manifest of type {ARTIFACT_TYPE}")


def _invalid(problem: str) -> ValidationError:
    return ValidationError(
        f"the archive can't be imported: {problem}",
        code="invalid_archive",
        hint="Make it with mlpd models export, or with skopeo copy oci:... oci-archive:...",
    )
