"""Signatures: who signed which digest, kept with the version, asked for where keys are trusted."""

import hashlib
import io
import json
import os
import stat
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from mlpd.core.errors import ConflictError, ValidationError
from mlpd.core.time import DAY_US, system_clock
from mlpd.registry.archive import read_archive
from mlpd.registry.collect import Policy
from mlpd.registry.fsck import check
from mlpd.registry.models import Registry
from mlpd.registry.records import Cause, VersionState
from mlpd.registry.referrers import REF_NAME, SIGNATURE_TYPE, SIGNATURES_MAX
from mlpd.registry.signing import TrustPolicy, create_key, sign, verify
from mlpd.storage.blobs import BlobStore
from mlpd.storage.environment import Environment
from mlpd.storage.writer import Writer

BY = Cause("tester", "because")
Files = dict[str, bytes | Path]
DIGEST = "sha256:" + "ab" * 32


@pytest.fixture
def keys(tmp_path: Path) -> dict[Path, str]:
    """Two private keys with their public ones."""
    paths = tmp_path / "first.key", tmp_path / "second.key"
    return {path: create_key(path) for path in paths}


def code_of(error: type[Exception], call: Any, *arguments: Any) -> str:
    with pytest.raises(error) as caught:
        call(*arguments)
    code: str = caught.value.code  # type: ignore[attr-defined]
    return code


def test_a_signature_holds_for_one_key_and_one_digest(keys: dict[Path, str]) -> None:
    (first, public), (_, other) = keys.items()
    key, signature = sign(first, DIGEST)
    assert key == public
    assert verify(key, signature, DIGEST)
    assert not verify(other, signature, DIGEST)
    assert not verify(key, signature, DIGEST[:-1] + "c")
    assert not verify(key, "00" * 64, DIGEST)
    assert not verify("ff" * 32, signature, DIGEST)
    assert sign(first, DIGEST) == (key, signature)


def test_a_private_key_is_its_owners_and_is_never_written_over(keys: dict[Path, str]) -> None:
    path = next(iter(keys))
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    before = path.read_bytes()
    with pytest.raises(FileExistsError):
        create_key(path)
    assert path.read_bytes() == before


def test_what_is_no_key_or_signature_is_refused_by_name(
    keys: dict[Path, str], tmp_path: Path
) -> None:
    key = next(iter(keys.values()))
    for wrong in ("", "ab", key.upper(), key + "\n"):
        assert code_of(ValidationError, verify, wrong, "00" * 64, DIGEST) == "invalid_key"
        assert code_of(ValidationError, TrustPolicy, (wrong,)) == "invalid_key"
    for wrong in ("", "00", "g" * 128):
        assert code_of(ValidationError, verify, key, wrong, DIGEST) == "invalid_signature"
    path = tmp_path / "other.pem"
    foreign = ec.generate_private_key(ec.SECP256R1()).private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    for content in (b"", b"junk", foreign):
        path.write_bytes(content)
        assert code_of(ValidationError, sign, path, DIGEST) == "invalid_key"


async def test_signatures_are_kept_exported_and_part_of_the_history(
    registry: Registry,
    env: Environment,
    root: Path,
    files: Files,
    lineage: dict[str, Any],
    keys: dict[Path, str],
    tmp_path: Path,
) -> None:
    version = await registry.register("clf", files, lineage, BY)
    signed = dict(sign(path, version.digest) for path in keys)
    for key, signature in signed.items():
        for _ in range(2):  # once is enough
            await registry.sign("clf", 1, key, signature, BY)
    assert registry.signatures(version) == signed
    assert [event.kind for event in registry.history("clf")] == ["signed", "signed", "registered"]
    assert check(env, root).ok
    with pytest.raises(ValidationError) as caught:
        await registry.sign("clf", 1, next(iter(signed)), "00" * 64, BY)
    assert caught.value.code == "invalid_signature"
    file = io.BytesIO()
    await registry.export("clf", 1, file)
    (tmp_path / "v.tar").write_bytes(file.getvalue())
    pointer, _, found = read_archive(tmp_path / "v.tar", BlobStore(tmp_path / "unpacked"))
    assert (pointer.digest, found) == (version.digest, signed)


async def test_where_keys_are_trusted_only_what_they_signed_gets_an_alias(
    env: Environment,
    writer: Writer,
    root: Path,
    files: Files,
    lineage: dict[str, Any],
    keys: dict[Path, str],
) -> None:
    (first, trusted), (second, _) = keys.items()
    registry = Registry.open(env, writer, root, TrustPolicy((trusted,)))
    version = await registry.register("clf", files, lineage, BY)

    async def refused() -> str:
        with pytest.raises(ConflictError) as caught:
            await registry.move_alias("clf", "champion", 1, BY, expected="any")
        return caught.value.code

    assert await refused() == "signature_required"
    await registry.sign("clf", 1, *sign(second, version.digest), BY)
    assert await refused() == "signature_required"
    await registry.sign("clf", 1, *sign(first, version.digest), BY)
    assert (await registry.move_alias("clf", "champion", 1, BY, expected="any")).version == 1
    assert registry.is_trusted(version)
    assert Registry.open(env, writer, root).is_trusted(version)


def test_without_the_package_it_says_what_to_install() -> None:
    code = (
        "import sys; sys.modules['cryptography'] = None\n"
        "from mlpd.core.errors import UnavailableError\n"
        "from mlpd.registry.signing import TrustPolicy\n"
        "TrustPolicy()\n"
        "try: TrustPolicy(('ab' * 32,))\n"
        "except UnavailableError as error: print(error.code, error.hint)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, env=environment, check=True
    )
    assert done.stdout.decode() == "missing_extra pip install 'mlpd[signing]'\n"


def blob(root: Path, digest: str) -> Path:
    return root / "blobs" / "sha256" / digest.removeprefix("sha256:")


def read(root: Path, entry: dict[str, Any]) -> Any:
    """Return what a descriptor points to, once its digest and size hold."""
    data = blob(root, entry["digest"]).read_bytes()
    assert f"sha256:{hashlib.sha256(data).hexdigest()}" == entry["digest"]
    assert len(data) == entry["size"]
    return json.loads(data)


def listed(root: Path, digest: str) -> list[dict[str, Any]]:
    """Return the referrers of a digest by the tag schema of the OCI distribution specification."""
    entries = json.loads((root / "index.json").read_bytes())["manifests"]
    tag = digest.replace(":", "-")
    found = [e for e in entries if e["annotations"].get(REF_NAME) == tag]
    return [referrer for entry in found for referrer in read(root, entry)["manifests"]]


async def test_a_signature_refers_to_its_subject(
    registry: Registry,
    root: Path,
    files: Files,
    lineage: dict[str, Any],
    keys: dict[Path, str],
) -> None:
    version = await registry.register("clf", files, lineage, BY)
    assert listed(root, version.digest) == []
    signed = dict(sign(path, version.digest) for path in keys)
    for key, signature in signed.items():
        await registry.sign("clf", 1, key, signature, BY)
    found = {}
    for entry in listed(root, version.digest):
        manifest = read(root, entry)
        assert entry["artifactType"] == manifest["artifactType"] == SIGNATURE_TYPE
        assert entry["annotations"] == manifest["annotations"]
        subject = manifest["subject"]
        assert (subject["digest"], subject["size"]) == (version.digest, version.size_bytes)
        assert read(root, manifest["config"]) == {}
        (layer,) = manifest["layers"]
        content = read(root, layer)
        found[content["key"]] = content["signature"]
    assert found == signed
    entries = json.loads((root / "index.json").read_bytes())["manifests"]
    assert [e for e in entries if e.get("artifactType") == SIGNATURE_TYPE] == listed(
        root, version.digest
    )


async def test_a_signature_is_collected_with_its_subject_and_not_before(
    registry: Registry,
    env: Environment,
    root: Path,
    files: Files,
    lineage: dict[str, Any],
    keys: dict[Path, str],
) -> None:
    path = next(iter(keys))
    version = await registry.register("clf", files, lineage, BY)
    await registry.sign("clf", 1, *sign(path, version.digest), BY)
    [entry] = listed(root, version.digest)
    signature, subject = blob(root, entry["digest"]), blob(root, version.digest)
    later = Policy(now_us=system_clock() + DAY_US, grace_us=1)
    await registry.collect(later, BY, dry_run=False)
    assert signature.exists()
    assert not check(env, root).orphans
    long_ago = (0, 0)  # only the deletion is young
    for found in (signature, subject):
        os.utime(found, long_ago)
    await registry.delete("clf", 1, BY)
    young = Policy(now_us=system_clock(), grace_us=DAY_US)
    await registry.collect(young, BY, dry_run=False)
    assert signature.exists()
    assert subject.exists()
    assert check(env, root).ok
    await registry.collect(later, BY, dry_run=False)
    assert not signature.exists()
    assert not subject.exists()
    assert check(env, root).ok
    assert listed(root, version.digest) == []


@pytest.mark.parametrize("how", ["removed", "damaged"])
async def test_a_lost_referrer_is_found_and_made_again(
    registry: Registry,
    env: Environment,
    writer: Writer,
    root: Path,
    files: Files,
    lineage: dict[str, Any],
    keys: dict[Path, str],
    how: str,
) -> None:
    version = await registry.register("clf", files, lineage, BY)
    await registry.sign("clf", 1, *sign(next(iter(keys)), version.digest), BY)
    [entry] = listed(root, version.digest)
    path = blob(root, entry["digest"])
    path.unlink()
    if how == "damaged":
        path.write_bytes(b"junk")
    kinds = {problem.kind for problem in check(env, root).problems}
    assert kinds == {"dangling_pointer"} | ({"blob_corrupt"} if how == "damaged" else set())
    Registry.open(env, writer, root)
    assert check(env, root).ok
    assert listed(root, version.digest) == [entry]


async def test_a_layout_from_before_gets_its_referrers_and_its_archives_are_read(
    registry: Registry,
    env: Environment,
    writer: Writer,
    root: Path,
    files: Files,
    lineage: dict[str, Any],
    keys: dict[Path, str],
    tmp_path: Path,
) -> None:
    version = await registry.register("clf", files, lineage, BY)
    key, signature = sign(next(iter(keys)), version.digest)
    # As it was: the signature is an annotation of the version's entry, and no blob.
    index = json.loads((root / "index.json").read_bytes())
    index["manifests"][0]["annotations"][f"vnd.mlpd.signature.{key}"] = signature
    with tarfile.open(tmp_path / "old.tar", "w") as tar:
        for name in ("oci-layout", "blobs"):
            tar.add(root / name, name)
        member = tarfile.TarInfo("index.json")
        member.size = len(data := json.dumps(index).encode())
        tar.addfile(member, io.BytesIO(data))
    _, _, found = read_archive(tmp_path / "old.tar", BlobStore(tmp_path / "unpacked"))
    assert found == {key: signature}
    await registry.sign("clf", 1, key, signature, BY)
    for entry in listed(root, version.digest):
        blob(root, entry["digest"]).unlink()
    (root / "index.json").write_text(json.dumps(index))
    again = Registry.open(env, writer, root, TrustPolicy((key,)))
    assert again.is_trusted(version)
    assert len(listed(root, version.digest)) == 1
    assert check(env, root).ok


async def test_one_content_twice_has_one_list_of_referrers(
    registry: Registry,
    env: Environment,
    root: Path,
    files: Files,
    lineage: dict[str, Any],
    keys: dict[Path, str],
) -> None:
    first = await registry.register("clf", files, lineage, BY)
    await registry.set_state("clf", 1, VersionState.QUARANTINED, BY)
    second = await registry.register("clf", files, lineage, BY)
    assert (second.number, second.digest) == (2, first.digest)
    for number, path in zip((1, 2), keys, strict=True):
        await registry.sign("clf", number, *sign(path, first.digest), BY)
    found = {entry["annotations"]["vnd.mlpd.signature.key"] for entry in listed(root, first.digest)}
    assert found == set(keys.values())
    assert check(env, root).ok


async def test_a_foreign_signature_in_an_archive_is_refused(
    registry: Registry,
    root: Path,
    files: Files,
    lineage: dict[str, Any],
    keys: dict[Path, str],
    tmp_path: Path,
) -> None:
    versions = [await registry.register(name, files, lineage, BY) for name in ("clf", "other")]
    for version in versions:
        await registry.sign(version.name, 1, *sign(next(iter(keys)), version.digest), BY)
    index = json.loads((root / "index.json").read_bytes())
    mine = [e for e in index["manifests"] if e["digest"] == versions[0].digest]
    with tarfile.open(tmp_path / "mixed.tar", "w") as tar:
        tar.add(root / "blobs", "blobs")
        data = json.dumps({"manifests": mine + listed(root, versions[1].digest)}).encode()
        member = tarfile.TarInfo("index.json")
        member.size = len(data)
        tar.addfile(member, io.BytesIO(data))
    with pytest.raises(ValidationError, match="it signs sha256") as caught:
        read_archive(tmp_path / "mixed.tar", BlobStore(tmp_path / "unpacked"))
    assert caught.value.code == "invalid_signature"


async def test_so_many_keys_sign_and_no_more(
    registry: Registry, files: Files, lineage: dict[str, Any], tmp_path: Path
) -> None:
    version = await registry.register("clf", files, lineage, BY)
    paths = [tmp_path / f"{n}.key" for n in range(SIGNATURES_MAX + 1)]
    for path in paths:
        create_key(path)
    for path in paths[:-1]:
        await registry.sign("clf", 1, *sign(path, version.digest), BY)
    await registry.sign("clf", 1, *sign(paths[0], version.digest), BY)
    with pytest.raises(ConflictError) as caught:
        await registry.sign("clf", 1, *sign(paths[-1], version.digest), BY)
    assert caught.value.code == "too_many"
    file = io.BytesIO()
    await registry.export("clf", 1, file)
    (tmp_path / "v.tar").write_bytes(file.getvalue())
    _, _, found = read_archive(tmp_path / "v.tar", BlobStore(tmp_path / "unpacked"))
    assert len(found) == SIGNATURES_MAX


async def test_an_archive_with_more_signatures_than_a_version_has_room_for_is_refused_whole(
    registry: Registry, files: Files, lineage: dict[str, Any], tmp_path: Path
) -> None:
    version = await registry.register("clf", files, lineage, BY)
    for n in range(SIGNATURES_MAX):
        create_key(tmp_path / f"{n}.key")
        await registry.sign("clf", 1, *sign(tmp_path / f"{n}.key", version.digest), BY)
    exported, changed = io.BytesIO(), tmp_path / "v.tar"
    await registry.export("clf", 1, exported)
    exported.seek(0)
    with tarfile.open(fileobj=exported) as old, tarfile.open(changed, "w") as new:
        for member in old:
            content = old.extractfile(member)
            assert content is not None
            data = content.read()
            if member.name == "index.json":  # one more, as archives of before had them
                index = json.loads(data)
                index["manifests"][0]["annotations"][f"vnd.mlpd.signature.{'ab' * 32}"] = "00" * 64
                data = json.dumps(index).encode()
                member.size = len(data)
            new.addfile(member, io.BytesIO(data))
    with pytest.raises(ValidationError, match="there are 17; a version has at most 16") as caught:
        read_archive(changed, BlobStore(tmp_path / "unpacked"))
    assert caught.value.code == "invalid_signature"
