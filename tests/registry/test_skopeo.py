"""Debian's skopeo reads the registry directory: it inspects and copies versions by their tags."""

import hashlib
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from mlpd.registry.models import Registry
from mlpd.registry.records import Cause, ModelVersion

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
