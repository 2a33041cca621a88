"""Debian's skopeo reads the registry directory: it inspects and copies versions by their tags."""

import hashlib
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from mlpd.registry.archive import read_archive
from mlpd.registry.models import Registry
from mlpd.registry.records import Cause, ModelVersion
from mlpd.registry.signing import create_key, sign
from mlpd.storage.blobs import BlobStore

pytestmark = pytest.mark.skipif(
    shutil.which("skopeo") is None,
    reason="skopeo is not installed (Debian: apt-get install skopeo)",
)


def skopeo(*arguments: str) -> bytes:
    command = ["skopeo", "--insecure-policy", *arguments]
    done = subprocess.run(command, capture_output=True, timeout=30, check=False)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout


@pytest.fixture
async def version(
    registry: Registry, files: dict[str, bytes | Path], lineage: dict[str, Any]
) -> ModelVersion:
    await registry.register("a-v1.b_c", files, lineage, Cause("tester"))
    return await registry.register("a-v1.b_c", files, lineage | {"seed": 8}, Cause("tester"))


def test_inspect_shows_the_manifest_of_a_tag(version: ModelVersion, root: Path) -> None:
    raw = skopeo("inspect", "--raw", f"oci:{root}:{version.tag}")
    assert f"sha256:{hashlib.sha256(raw).hexdigest()}" == version.digest
    manifest = json.loads(raw)
    assert manifest["artifactType"] == "application/vnd.cncf.model.manifest.v1+json"
    config = json.loads(skopeo("inspect", "--raw", "--config", f"oci:{root}:{version.tag}"))
    assert config["descriptor"]["name"] == "a-v1.b_c"


def test_copy_keeps_every_digest(version: ModelVersion, root: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    skopeo("copy", f"oci:{root}:{version.tag}", f"oci:{elsewhere}:{version.tag}")
    assert version.tag == "a-v1.b_c-v2"
    index = json.loads((elsewhere / "index.json").read_bytes())
    assert [m["digest"] for m in index["manifests"]] == [version.digest]
    manifest = json.loads((root / "blobs/sha256" / version.digest[7:]).read_bytes())
    wanted = {version.digest, *(d["digest"] for d in (manifest["config"], *manifest["layers"]))}
    copied = {f"sha256:{path.name}": path for path in (elsewhere / "blobs/sha256").iterdir()}
    assert copied.keys() == wanted
    for digest, path in copied.items():
        assert path.read_bytes() == (root / "blobs/sha256" / digest[7:]).read_bytes()


def test_a_copy_to_an_archive_and_back_keeps_the_digest(
    version: ModelVersion, root: Path, tmp_path: Path
) -> None:
    archive, back = f"oci-archive:{tmp_path}/v.tar:{version.tag}", f"oci:{tmp_path}/back:again"
    skopeo("copy", f"oci:{root}:{version.tag}", archive)
    skopeo("copy", archive, back)
    raw = skopeo("inspect", "--raw", back)
    assert f"sha256:{hashlib.sha256(raw).hexdigest()}" == version.digest


async def test_signatures_are_found_by_tag_and_hinder_nobody(
    registry: Registry, version: ModelVersion, root: Path, tmp_path: Path
) -> None:
    key = create_key(tmp_path / "k.pem")
    signed = sign(tmp_path / "k.pem", version.digest)
    await registry.sign(version.name, version.number, *signed, Cause("tester"))
    tag = version.digest.replace(":", "-")
    referrers = json.loads(skopeo("inspect", "--raw", f"oci:{root}:{tag}"))
    (entry,) = referrers["manifests"]
    assert entry["annotations"] == {"vnd.mlpd.signature.key": key}
    skopeo("copy", f"oci:{root}:{version.tag}", f"oci:{tmp_path}/there:again")
    with (tmp_path / "ours.tar").open("wb") as file:
        await registry.export(version.name, version.number, file)
    raw = skopeo("inspect", "--raw", f"oci-archive:{tmp_path}/ours.tar:{version.tag}")
    assert f"sha256:{hashlib.sha256(raw).hexdigest()}" == version.digest


async def test_our_own_archive_is_read_by_skopeo(
    registry: Registry, version: ModelVersion, tmp_path: Path
) -> None:
    with (tmp_path / "ours.tar").open("wb") as file:
        await registry.export(version.name, version.number, file)
    archive = f"oci-archive:{tmp_path}/ours.tar:{version.tag}"
    raw = skopeo("inspect", "--raw", archive)
    assert f"sha256:{hashlib.sha256(raw).hexdigest()}" == version.digest
    skopeo("copy", archive, f"oci:{tmp_path}/there:again")
    assert (tmp_path / "there/blobs/sha256" / version.digest[7:]).exists()


async def test_skopeos_archive_is_imported_with_its_digest(
    registry: Registry, version: ModelVersion, root: Path, tmp_path: Path
) -> None:
    skopeo("copy", f"oci:{root}:{version.tag}", f"oci-archive:{tmp_path}/v.tar:{version.tag}")
    blobs = BlobStore(tmp_path / "unpacked")
    pointer, manifest, _ = read_archive(tmp_path / "v.tar", blobs)
    assert (pointer.digest, manifest.name) == (version.digest, version.name)
    await registry.delete(version.name, version.number, Cause("tester"))
    again = await registry.adopt(pointer, blobs, Cause("tester"))
    assert (again.number, again.digest) == (version.number + 1, version.digest)


def test_a_copy_to_a_plain_folder_holds_the_manifest_and_every_blob(
    version: ModelVersion, root: Path, tmp_path: Path
) -> None:
    skopeo("copy", f"oci:{root}:{version.tag}", f"dir:{tmp_path}/plain")
    raw = (tmp_path / "plain" / "manifest.json").read_bytes()
    assert f"sha256:{hashlib.sha256(raw).hexdigest()}" == version.digest
    manifest = json.loads(raw)
    for pointer in (manifest["config"], *manifest["layers"]):
        content = (tmp_path / "plain" / pointer["digest"].removeprefix("sha256:")).read_bytes()
        assert f"sha256:{hashlib.sha256(content).hexdigest()}" == pointer["digest"]
        assert len(content) == pointer["size"]
