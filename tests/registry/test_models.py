"""The registry on a real directory and a real LMDB: register, load, aliases, what damage does."""

import asyncio
import json
import threading
from pathlib import Path
from typing import Any

import pytest

from mlpd.core.errors import (
    ConflictError,
    InternalError,
    MlpdError,
    NotFoundError,
    StorageFullError,
    ValidationError,
)
from mlpd.core.hashing import sha256_digest
from mlpd.registry.fsck import check
from mlpd.registry.models import Registry
from mlpd.registry.records import Cause, VersionState
from mlpd.storage.environment import Environment
from mlpd.storage.writer import Writer

BY = Cause("tester", "because")
Files = dict[str, bytes | Path]


def tags(root: Path) -> dict[str, str]:
    index = json.loads((root / "index.json").read_bytes())
    assert index["schemaVersion"] == 2
    name = "org.opencontainers.image.ref.name"
    return {m["annotations"][name]: m["digest"] for m in index["manifests"]}


def blob_path(root: Path, digest: str) -> Path:
    return root / "blobs" / "sha256" / digest.removeprefix("sha256:")


def tree(root: Path) -> list[Path]:
    return sorted(root.rglob("*"))


def damage(path: Path, data: bytes) -> None:
    path.chmod(0o644)
    path.write_bytes(data)
    path.chmod(0o444)


async def test_an_empty_registry_is_a_valid_layout(registry: Registry, root: Path) -> None:
    assert json.loads((root / "oci-layout").read_bytes()) == {"imageLayoutVersion": "1.0.0"}
    assert tags(root) == {}
    assert registry.models() == []


async def test_a_registered_version_is_loaded_back_byte_for_byte(
    registry: Registry, root: Path, files: Files, lineage: dict[str, Any], tmp_path: Path
) -> None:
    path = tmp_path / "model.txt"
    path.write_bytes(b"tree from a file")
    version = await registry.register("clf", files | {"model.txt": path}, lineage, BY)
    assert (version.reference, version.tag, version.state) == ("clf@1", "clf-v1", "ready")
    loaded = await registry.load("clf", 1)
    assert loaded.version == version
    assert loaded.files["model.onnx"] == files["model.onnx"]
    assert loaded.files["model.txt"] == b"tree from a file"
    assert loaded.lineage.params["num_threads"] == 2
    assert loaded.lineage == await registry.load_lineage("clf", 1)
    assert set(loaded.files) == {*files, "lineage.json"}
    assert tags(root) == {"clf-v1": version.digest}
    assert path.exists()


async def test_blobs_are_named_by_content_and_read_only(
    registry: Registry, root: Path, files: Files, lineage: dict[str, Any]
) -> None:
    await registry.register("clf", files, lineage, BY)
    blobs = list((root / "blobs" / "sha256").iterdir())
    assert len(blobs) == len(files) + 3  # lineage, config, manifest
    for path in blobs:
        assert sha256_digest(path.read_bytes()) == f"sha256:{path.name}"
        assert path.stat().st_mode & 0o777 == 0o444
    assert list((root / ".mlpd" / "tmp").iterdir()) == []


async def test_the_same_content_is_one_digest_and_one_version(
    registry: Registry, root: Path, files: Files, lineage: dict[str, Any]
) -> None:
    first = await registry.register("clf", files, lineage, BY)
    blobs = sorted((root / "blobs" / "sha256").iterdir())
    again = await registry.register("clf", dict(reversed(files.items())), lineage, BY)
    assert again == first
    assert sorted((root / "blobs" / "sha256").iterdir()) == blobs
    other = await registry.register("other", files, lineage, BY)
    assert other.number == 1
    manifests = [await registry.load_manifest(name, 1) for name in ("clf", "other")]
    assert manifests[0].files == manifests[1].files


async def test_another_lineage_is_another_version(
    registry: Registry, root: Path, files: Files, lineage: dict[str, Any]
) -> None:
    first = await registry.register("clf", files, lineage, BY)
    second = await registry.register("clf", files, lineage | {"seed": 8}, BY)
    assert second.number == 2
    assert tags(root) == {"clf-v1": first.digest, "clf-v2": second.digest}


async def test_references_lead_to_versions(
    registry: Registry, files: Files, lineage: dict[str, Any]
) -> None:
    first = await registry.register("clf", files, lineage, BY)
    second = await registry.register("clf", files, lineage | {"seed": 8}, BY)
    await registry.move_alias("clf", "champion", 1, BY, expected=None)
    await registry.move_alias("clf", "challenger", 2, BY, expected=None)
    assert registry.resolve("clf") == registry.resolve("clf@1") == registry.get("clf") == first
    assert registry.resolve("clf@challenger") == second
    summary = registry.models()[0]
    assert (summary.name, summary.version_count, summary.newest) == ("clf", 2, second)
    assert summary.aliases == {"champion": 1, "challenger": 2}
    assert [a.alias for a in registry.aliases("clf")] == ["challenger", "champion"]
    for reference, code in [
        ("nope", "unknown_model"),
        ("clf@9", "unknown_version"),
        ("clf@nobody", "unknown_alias"),
    ]:
        with pytest.raises(NotFoundError) as caught:
            registry.resolve(reference)
        assert caught.value.code == code


@pytest.mark.parametrize("name", ["../../etc/passwd", "", "A", "a/b", "a\0b", "x" * 200, ".hidden"])
async def test_names_never_become_paths(
    registry: Registry, root: Path, files: Files, lineage: dict[str, Any], name: str
) -> None:
    before = tree(root)
    calls = [
        lambda: registry.register(name, files, lineage, BY),
        lambda: registry.load(name, 1),
        lambda: registry.move_alias(name, "champion", 1, BY, expected="any"),
        lambda: registry.rollback(name, "champion", BY),
        lambda: registry.delete(name, 1, BY),
    ]
    for call in calls:
        with pytest.raises(ValidationError) as caught:
            await call()
        assert caught.value.code == "invalid_name"
    for read in (registry.get, registry.versions, registry.aliases, registry.history):
        with pytest.raises(ValidationError):
            read(name)
    with pytest.raises(ValidationError):
        registry.get("clf", name)
    assert tree(root) == before


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"../evil": b"x"}, "unknown_file"),
        ({"lineage.json": b"{}"}, "unknown_file"),
        ({"model.onnx": Path("/nonexistent/model.onnx")}, "missing_file"),
        ({"model.onnx": Path("/")}, "missing_file"),
    ],
)
async def test_wrong_files_are_refused_and_nothing_is_written(
    registry: Registry,
    root: Path,
    files: Files,
    lineage: dict[str, Any],
    change: Files,
    code: str,
) -> None:
    with pytest.raises(ValidationError) as caught:
        await registry.register("clf", files | change, lineage, BY)
    assert caught.value.code == code
    assert list((root / "blobs" / "sha256").iterdir()) == []
    assert registry.models() == []


async def test_a_version_without_a_model_or_a_wrong_lineage_or_state_is_refused(
    registry: Registry, root: Path, files: Files, lineage: dict[str, Any]
) -> None:
    refused: list[tuple[Files, dict[str, Any], VersionState, str]] = [
        ({"model.txt": b"x"}, lineage, VersionState.READY, "missing_file"),
        (files, lineage | {"rows": -1}, VersionState.READY, "invalid_lineage"),
        (files, lineage, VersionState.DELETED, "invalid_state"),
    ]
    for wrong_files, wrong_lineage, state, code in refused:
        with pytest.raises(ValidationError) as caught:
            await registry.register("clf", wrong_files, wrong_lineage, BY, state=state)
        assert caught.value.code == code
    assert list((root / "blobs" / "sha256").iterdir()) == []


async def test_a_deleted_version_leaves_a_tombstone(
    registry: Registry, root: Path, files: Files, lineage: dict[str, Any]
) -> None:
    await registry.register("clf", files, lineage, BY)
    deleted = await registry.delete("clf", 1, Cause("ada", "trained on leaked labels"))
    assert (deleted.is_deleted, deleted.reason) == (True, "trained on leaked labels")
    assert registry.versions("clf") == [deleted]
    assert tags(root) == {}
    for call in (lambda: registry.load("clf", 1), lambda: registry.delete("clf", 1, BY)):
        with pytest.raises(NotFoundError) as caught:
            await call()
        assert caught.value.code == "deleted_version"
    again = await registry.register("clf", files, lineage, BY)
    assert (again.number, again.digest) == (2, deleted.digest)


FILES = ["model.onnx", "lineage.json", "parity.json", "config", "manifest"]


@pytest.mark.parametrize("victim", FILES)
@pytest.mark.parametrize("how", ["flipped", "shorter", "longer", "empty", "missing"])
async def test_damage_quarantines_the_version_on_load(
    registry: Registry,
    env: Environment,
    root: Path,
    files: Files,
    lineage: dict[str, Any],
    victim: str,
    how: str,
) -> None:
    version = await registry.register("clf", files, lineage, BY)
    await registry.move_alias("clf", "champion", 1, BY, expected=None)
    manifest = await registry.load_manifest("clf")
    digests = {n: d.digest for n, d in manifest.files.items()}
    digests |= {"config": manifest.config.digest, "manifest": version.digest}
    path = blob_path(root, digests[victim])
    data = path.read_bytes()
    if how == "missing":
        path.unlink()
    else:
        flipped = data[:-1] + bytes([data[-1] ^ 1])
        ways = {"flipped": flipped, "shorter": data[:-1], "longer": data + b" ", "empty": b""}
        damage(path, ways[how])
    with pytest.raises(InternalError) as caught:
        await registry.load("clf")
    assert caught.value.code == "version_corrupt"
    assert registry.get("clf", 1).state is VersionState.QUARANTINED
    assert registry.history("clf")[0].cause.by == "mlpd"
    with pytest.raises(ConflictError) as again:
        await registry.load("clf")
    assert again.value.code == "version_quarantined"
    with pytest.raises(InternalError):
        await registry.set_state("clf", 1, VersionState.READY, BY)
    # Registering the same content mends the blobs; the old version may then come back.
    mended = await registry.register("clf", files, lineage, BY)
    assert (mended.number, mended.digest) == (2, version.digest)
    assert (await registry.load("clf", 2)).files["model.onnx"] == files["model.onnx"]
    assert (await registry.set_state("clf", 1, VersionState.READY, BY)).state == "ready"
    assert check(env, root).ok


async def test_one_file_is_loaded_verified(
    registry: Registry, root: Path, files: Files, lineage: dict[str, Any]
) -> None:
    await registry.register("clf", files, lineage, BY)
    assert await registry.load_file("clf", 1, "parity.json") == files["parity.json"]
    with pytest.raises(NotFoundError) as caught:
        await registry.load_file("clf", 1, "report.json")
    assert caught.value.code == "unknown_file"
    damage(blob_path(root, sha256_digest(b'{"bit_equal":10000}')), b'{"bit_equal":99999}')
    with pytest.raises(InternalError):
        await registry.load_file("clf", 1, "parity.json")
    assert registry.get("clf", 1).state is VersionState.QUARANTINED
    assert await registry.load_file("clf", 1, "model.txt") == files["model.txt"]


async def test_everything_is_there_after_opening_again(
    registry: Registry,
    env: Environment,
    writer: Writer,
    root: Path,
    files: Files,
    lineage: dict[str, Any],
) -> None:
    await registry.register("clf", files, lineage, BY)
    await registry.move_alias("clf", "champion", 1, BY, expected=None)
    before = [(root / name).read_bytes() for name in ("index.json", ".mlpd/journal")]
    again = Registry.open(env, writer, root)
    assert again.models() == registry.models()
    assert again.history("clf") == registry.history("clf")
    assert [(root / name).read_bytes() for name in ("index.json", ".mlpd/journal")] == before


async def test_what_a_crash_left_in_tmp_is_removed_at_open(
    env: Environment, writer: Writer, root: Path
) -> None:
    Registry.open(env, writer, root)
    (root / ".mlpd" / "tmp" / "blob-1-ab").write_bytes(b"half")
    Registry.open(env, writer, root)
    assert list((root / ".mlpd" / "tmp").iterdir()) == []


async def test_an_export_that_fails_leaves_the_change_made_and_is_caught_up(
    registry: Registry, env: Environment, root: Path, files: Files, lineage: dict[str, Any]
) -> None:
    await registry.register("clf", files, lineage, BY)
    journal = root / ".mlpd" / "journal"
    journal.rename(root / ".mlpd" / "kept")
    journal.mkdir()
    moved = await registry.move_alias("clf", "champion", 1, BY, expected=None)
    assert moved.version == 1
    assert registry.export_error
    with pytest.raises(OSError, match="journal"):
        await registry.export_index()
    journal.rmdir()
    (root / ".mlpd" / "kept").rename(journal)
    await registry.export_index()
    assert registry.export_error is None
    assert check(env, root).ok


async def test_a_disk_error_while_publishing_registers_nothing(
    registry: Registry, env: Environment, root: Path, files: Files, lineage: dict[str, Any]
) -> None:
    temporary = root / ".mlpd" / "tmp"
    temporary.rmdir()
    temporary.write_bytes(b"in the way")
    with pytest.raises(StorageFullError):
        await registry.register("clf", files, lineage, BY)
    assert registry.models() == []
    temporary.unlink()
    temporary.mkdir()
    assert (await registry.register("clf", files, lineage, BY)).number == 1
    assert check(env, root).ok


def test_sixteen_threads_register_and_all_versions_are_there(
    registry: Registry, env: Environment, root: Path, files: Files, lineage: dict[str, Any]
) -> None:
    barrier = threading.Barrier(16)
    numbers: list[int] = []

    def work(seed: int) -> None:
        barrier.wait()
        document = lineage | {"seed": seed}
        numbers.append(asyncio.run(registry.register("clf", files, document, BY)).number)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(numbers) == list(range(1, 17))
    assert tags(root).keys() == {f"clf-v{n}" for n in range(1, 17)}
    report = check(env, root)
    assert report.ok
    assert (report.versions, report.orphans) == (16, ())


async def test_of_concurrent_compare_and_sets_one_wins(
    registry: Registry, files: Files, lineage: dict[str, Any]
) -> None:
    for seed in range(8):
        await registry.register("clf", files, lineage | {"seed": seed}, BY)
    moves = [registry.move_alias("clf", "champion", n, BY, expected=None) for n in range(1, 9)]
    results = await asyncio.gather(*moves, return_exceptions=True)
    errors = [r for r in results if isinstance(r, MlpdError)]
    assert len(errors) == 7
    assert {e.code for e in errors} == {"alias_moved"}
    assert [e.kind for e in registry.history("clf", alias="champion")] == ["alias"]


async def test_alias_history_rollback_and_protection(
    registry: Registry, files: Files, lineage: dict[str, Any]
) -> None:
    for seed in (1, 2):
        await registry.register("clf", files, lineage | {"seed": seed}, BY)
    await registry.move_alias("clf", "champion", 1, BY, expected=None)
    report = {"auc": {"champion": 0.71, "challenger": 0.74, "low": 0.02}}
    await registry.move_alias("clf", "champion", 2, Cause("gate", "passed", report), expected=1)
    await registry.protect("clf", "champion", True, BY)
    with pytest.raises(ConflictError):
        await registry.move_alias("clf", "champion", 1, BY, expected=2)
    assert (await registry.rollback("clf", "champion", Cause("ada", "errors"))).version == 1
    history = registry.history("clf", alias="champion")
    assert [e.kind for e in history] == ["alias", "protection", "alias", "alias"]
    assert history[0].body == {"alias": "champion", "from": 2, "to": 1, "rollback": True}
    assert history[2].cause.report == report
    assert registry.history("clf", limit=1) == history[:1]
    with pytest.raises(ValidationError):
        await registry.move_alias("clf", "v7", 1, BY, expected=None)


async def test_tags_that_lagged_are_caught_up_by_the_next_change_of_any_kind(
    registry: Registry, env: Environment, root: Path, files: Files, lineage: dict[str, Any]
) -> None:
    in_the_way = root / ".index.json.tmp"
    in_the_way.mkdir()
    await registry.register("clf", files, lineage, BY)
    assert registry.export_error
    assert tags(root) == {}
    in_the_way.rmdir()
    await registry.move_alias("clf", "champion", 1, BY, expected=None)
    assert registry.export_error is None
    assert tags(root).keys() == {"clf-v1"}
    assert check(env, root).ok
