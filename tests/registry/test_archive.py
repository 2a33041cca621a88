"""Archives: a version there and back, and tars that mean harm."""

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mlpd.core.errors import ConflictError, InternalError, ValidationError
from mlpd.registry.archive import MEMBERS_MAX, read_archive
from mlpd.registry.fsck import check
from mlpd.registry.models import Registry
from mlpd.registry.records import Cause, VersionState
from mlpd.storage.blobs import BlobStore
from mlpd.storage.environment import Environment
from mlpd.storage.writer import Writer

BY = Cause("tester")
Files = dict[str, bytes | Path]
Entries = dict[str, bytes]


@pytest.fixture
async def archive(registry: Registry, files: Files, lineage: dict[str, Any]) -> bytes:
    await registry.register("clf", files, lineage, BY)
    file = io.BytesIO()
    await registry.export("clf", 1, file)
    return file.getvalue()


def entries(archive: bytes) -> Entries:
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        return {m.name: tar.extractfile(m).read() for m in tar}  # type: ignore[union-attr]


def packed(content: Entries, *more: tuple[tarfile.TarInfo, bytes]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, data in content.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
        for member, data in more:
            tar.addfile(member, io.BytesIO(data))
    return file.getvalue()


async def test_a_version_comes_back_under_the_same_digest(
    archive: bytes, registry: Registry, tmp_path: Path, files: Files
) -> None:
    (tmp_path / "a.tar").write_bytes(archive)
    with Environment.open(tmp_path / "other", clock=lambda: 1, map_bytes=64 << 20) as env:  # type: ignore[arg-type,return-value]
        writer = Writer(env)
        try:
            other = Registry.open(env, writer, tmp_path / "there")
            blobs = BlobStore(tmp_path / "unpacked")
            pointer, _, _ = read_archive(tmp_path / "a.tar", blobs)
            first = await other.adopt(pointer, blobs, BY)
            assert (first.reference, first.state) == ("clf@1", VersionState.READY)
            assert first.digest == registry.get("clf", 1).digest
            assert (await other.adopt(pointer, blobs, BY)).number == 1
            loaded = await other.load("clf", 1)
            assert {n: loaded.files[n] for n in files} == files
            assert check(env, tmp_path / "there").ok
        finally:
            writer.close()


async def test_equal_versions_give_equal_archives(archive: bytes, registry: Registry) -> None:
    file = io.BytesIO()
    await registry.export("clf", 1, file)
    assert file.getvalue() == archive


@pytest.mark.usefixtures("archive")
async def test_a_damaged_version_is_not_exported_but_quarantined(
    registry: Registry, root: Path
) -> None:
    manifest = await registry.load_manifest("clf", 1)
    path = root / "blobs" / "sha256" / manifest.files["model.txt"].digest[7:]
    path.chmod(0o644)
    path.write_bytes(b"other")
    with pytest.raises(InternalError) as caught:
        await registry.export("clf", 1, io.BytesIO())
    assert caught.value.code == "version_corrupt"
    with pytest.raises(ConflictError) as refused:
        await registry.export("clf", 1, io.BytesIO())
    assert refused.value.code == "version_quarantined"


def member(name: str, kind: bytes = tarfile.REGTYPE, **fields: Any) -> tarfile.TarInfo:
    made = tarfile.TarInfo(name)
    made.type = kind
    for field, value in fields.items():
        setattr(made, field, value)
    return made


def blob_of(content: Entries) -> str:
    return next(name for name in content if name.startswith("blobs/"))


def index_with(content: Entries, count: int) -> Entries:
    index = json.loads(content["index.json"])
    return {**content, "index.json": json.dumps({"manifests": index["manifests"] * count}).encode()}


HARM: dict[str, Callable[[Entries], bytes]] = {
    "nothing": lambda _: b"",
    "no tar": lambda _: b"x" * 5000,
    "no index": lambda c: packed({n: d for n, d in c.items() if n != "index.json"}),
    "empty index": lambda c: packed(index_with(c, 0)),
    "two versions": lambda c: packed(index_with(c, 2)),
    "index is no json": lambda c: packed({**c, "index.json": b"["}),
    "index is deep": lambda c: packed({**c, "index.json": b"[" * 100_000}),
    "a blob lacks": lambda c: packed({n: d for n, d in c.items() if n != blob_of(c)}),
    "a blob differs": lambda c: packed({**c, blob_of(c): b"other"}),
    "upwards": lambda c: packed({**c, "../evil": b"x"}),
    "upwards in blobs": lambda c: packed({**c, "blobs/sha256/../../evil": b"x"}),
    "absolute": lambda c: packed({**c, "/etc/passwd": b"x"}),
    "a link": lambda c: packed(
        c, (member("blobs/sha256/" + "0" * 64, tarfile.SYMTYPE, linkname="/etc/passwd"), b"")
    ),
    "a hard link": lambda c: packed(
        c, (member("blobs/sha256/" + "0" * 64, tarfile.LNKTYPE, linkname="oci-layout"), b"")
    ),
    "a device": lambda c: packed(c, (member("blobs/sha256/" + "0" * 64, tarfile.CHRTYPE), b"")),
    "a pipe": lambda c: packed(c, (member("index.json", tarfile.FIFOTYPE), b"")),
    "a folder": lambda c: packed(c, (member("etc", tarfile.DIRTYPE), b"")),
    "too many": lambda c: packed(c, *[(member("blobs", tarfile.DIRTYPE), b"")] * MEMBERS_MAX),
    "compressed": lambda _: b"\x1f\x8b\x08" + b"\0" * 2000,
}


@pytest.mark.parametrize("harm", HARM)
def test_a_tar_that_means_harm_is_refused_and_writes_nothing_else(
    archive: bytes, harm: str, tmp_path: Path
) -> None:
    path = tmp_path / "evil.tar"
    path.write_bytes(HARM[harm](entries(archive)))
    before = {p for p in tmp_path.rglob("*") if "unpacked" not in p.parts}
    with pytest.raises(ValidationError) as caught:
        read_archive(path, BlobStore(tmp_path / "unpacked"))
    assert caught.value.code == "invalid_archive"
    assert {p for p in tmp_path.rglob("*") if "unpacked" not in p.parts} == before
    kinds = {p for p in (tmp_path / "unpacked").rglob("*") if not p.is_dir() and not p.is_file()}
    assert kinds == set()


@pytest.mark.parametrize("length", [100, 512, 1000, 1536, 2000, 5000])
def test_a_truncated_archive_is_refused(archive: bytes, length: int, tmp_path: Path) -> None:
    (tmp_path / "cut.tar").write_bytes(archive[:length])
    with pytest.raises(ValidationError) as caught:
        read_archive(tmp_path / "cut.tar", BlobStore(tmp_path / "unpacked"))
    assert caught.value.code == "invalid_archive"
