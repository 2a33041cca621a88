"""Fsck finds every kind of damage, and rebuild brings back what LMDB lost."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mlpd.core.errors import ConflictError
from mlpd.core.time import system_clock
from mlpd.registry.fsck import check
from mlpd.registry.models import Registry
from mlpd.registry.rebuild import rebuild
from mlpd.registry.records import Cause, VersionState, alias_key, event_key, model_key, version_key
from mlpd.registry.signing import create_key, sign
from mlpd.storage.environment import Environment, Table
from mlpd.storage.writer import Writer

BY = Cause("tester", "because")
Table_ = dict[bytes, bytes]


@pytest.fixture
async def filled(
    registry: Registry, files: dict[str, bytes | Path], lineage: dict[str, Any], root: Path
) -> Registry:
    """Four versions of two models: archived, deleted, pinned, signed, aliases rolled back."""
    for seed in (1, 2, 3):
        await registry.register("clf", files, lineage | {"seed": seed}, BY)
    await registry.register("other", files, lineage, BY, state=VersionState.PENDING)
    for number in (1, 2):
        await registry.move_alias("clf", "champion", number, BY, expected="any")
    await registry.rollback("clf", "champion", BY)
    await registry.protect("clf", "champion", True, BY)
    await registry.set_state("clf", 2, VersionState.ARCHIVED, BY)
    await registry.delete("clf", 3, BY)
    await registry.pin("clf", 1, True, BY)
    key = create_key(root.parent / "team.key")
    signature = sign(root.parent / "team.key", registry.get("clf", 2).digest)[1]
    await registry.sign("clf", 2, key, signature, BY)
    return registry


def table(env: Environment) -> Table_:
    with env.snapshot() as snapshot:
        return dict(snapshot.scan(Table.MODELS))


def mtimes(root: Path) -> dict[Path, int]:
    return {p: p.stat().st_mtime_ns for p in root.rglob("*")}


def kinds(env: Environment, root: Path) -> set[str]:
    return {problem.kind for problem in check(env, root).problems}


def blob(root: Path, digest: str) -> Path:
    return root / "blobs" / "sha256" / digest.removeprefix("sha256:")


def overwrite(path: Path, data: bytes) -> None:
    path.chmod(0o644)
    path.write_bytes(data)
    path.chmod(0o444)


async def test_a_sound_registry_has_no_problems(
    filled: Registry, env: Environment, root: Path
) -> None:
    report = check(env, root)
    assert report.problems == ()
    assert (report.ok, report.versions) == (True, 3)
    assert report.blob_bytes == sum(p.stat().st_size for p in blob(root, "").iterdir())
    deleted = filled.versions("clf")[2]
    assert deleted.digest in report.orphans
    assert len(report.orphans) == 3  # its manifest, its config, its lineage


async def test_check_changes_nothing(filled: Registry, env: Environment, root: Path) -> None:
    before = mtimes(root)
    rows_before = table(env)
    check(env, root)
    assert mtimes(root) == before
    assert table(env) == rows_before
    assert filled.models()


async def test_every_damaged_or_missing_blob_is_found(
    filled: Registry, env: Environment, root: Path
) -> None:
    loaded = await filled.load_manifest("clf", 1)
    digests = [filled.get("clf", 1).digest, *(d.digest for d in loaded.blobs)]
    for digest in digests:
        data = blob(root, digest).read_bytes()
        overwrite(blob(root, digest), data + b"x")
        report = check(env, root)
        assert {p.kind for p in report.problems} == {"blob_corrupt", "dangling_pointer"}
        assert ("blob_corrupt", digest) in {(p.kind, p.subject) for p in report.problems}
        blob(root, digest).unlink()
        assert kinds(env, root) == {"dangling_pointer"}
        overwrite_new(blob(root, digest), data)
        assert check(env, root).ok


def overwrite_new(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    path.chmod(0o444)


async def test_a_quarantined_version_may_lack_blobs(
    filled: Registry, env: Environment, root: Path
) -> None:
    await filled.move_alias("clf", "champion", None, Cause("t", force=True), expected=1)
    await filled.set_state("clf", 1, VersionState.QUARANTINED, BY)
    blob(root, filled.get("clf", 1).digest).unlink()
    assert check(env, root).ok


def set_mode(root: Path) -> None:
    next(blob(root, "").iterdir()).chmod(0o644)


def cut_journal(root: Path) -> None:
    path = root / ".mlpd" / "journal"
    path.write_bytes(path.read_bytes()[:-5])


def spoil_journal(root: Path) -> None:
    path = root / ".mlpd" / "journal"
    path.write_bytes(path.read_bytes().replace(b"tester", b"Tester", 1))


def drop_tag(root: Path) -> None:
    index = json.loads((root / "index.json").read_bytes())
    index["manifests"].pop()
    (root / "index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("harm", "kind"),
    [
        (set_mode, "blob_writable"),
        (cut_journal, "journal_differs"),
        (spoil_journal, "journal_differs"),
        (lambda root: (root / ".mlpd" / "journal").unlink(), "journal_differs"),
        (drop_tag, "index_differs"),
        (lambda root: (root / "index.json").unlink(), "index_differs"),
        (lambda root: (root / "oci-layout").unlink(), "layout"),
    ],
)
async def test_every_harmed_file_is_found_and_mended_at_open(
    filled: Registry,
    env: Environment,
    writer: Writer,
    root: Path,
    harm: Callable[[Path], object],
    kind: str,
) -> None:
    harm(root)
    assert kinds(env, root) == {kind}
    Registry.open(env, writer, root)
    assert check(env, root).ok is (kind != "blob_writable")
    assert filled.models()


def alias_to_nowhere(rows: Table_) -> None:
    key = alias_key("clf", "champion")
    rows[key] = rows[key].replace(b'"version":1', b'"version":9')


def lost_version(rows: Table_) -> None:
    del rows[version_key("clf", 2)]


def number_reuse(rows: Table_) -> None:
    rows[model_key("clf")] = bytes(7) + b"\x03"


def lost_event(rows: Table_) -> None:
    del rows[event_key(4)]


@pytest.mark.parametrize(
    ("harm", "kind"),
    [
        (alias_to_nowhere, "alias_not_ready"),
        (lost_version, "records_differ"),
        (number_reuse, "records_differ"),
        (lost_event, "records_differ"),
    ],
)
async def test_every_harmed_record_is_found(
    filled: Registry,
    env: Environment,
    writer: Writer,
    root: Path,
    harm: Callable[[Table_], None],
    kind: str,
) -> None:
    before = table(env)
    after = dict(before)
    harm(after)

    def write(txn: Any) -> None:
        for key in before:
            txn.delete(Table.MODELS, key)
        for key, value in after.items():
            txn.put(Table.MODELS, key, value)

    writer.write_blocking(write)
    assert kind in kinds(env, root)
    assert filled.export_error is None


class Lost:
    """A new, empty LMDB beside the old registry directory."""

    def __init__(self, directory: Path) -> None:
        self.env = Environment.open(directory / "new-lmdb", clock=system_clock, map_bytes=64 << 20)
        self.writer = Writer(self.env)

    def close(self) -> None:
        self.writer.close()
        self.env.close()


@pytest.fixture
def lost(tmp_path: Path) -> Any:
    lost = Lost(tmp_path)
    yield lost
    lost.close()


async def test_a_lost_lmdb_is_rebuilt_to_the_byte(
    filled: Registry, env: Environment, root: Path, lost: Lost
) -> None:
    with pytest.raises(ConflictError) as caught:
        Registry.open(lost.env, lost.writer, root)
    assert caught.value.code == "registry_behind_index"
    assert rebuild(lost.env, lost.writer, root) == len(filled.history("clf")) + 1
    assert table(lost.env) == table(env)
    assert check(lost.env, root).ok
    again = Registry.open(lost.env, lost.writer, root)
    assert again.models() == filled.models()
    assert (await again.load("clf")).version.number == 1


async def test_an_lmdb_from_an_older_backup_is_brought_up_to_date(
    filled: Registry, env: Environment, root: Path, lost: Lost
) -> None:
    whole = (root / ".mlpd" / "journal").read_bytes()
    (root / "index.json").unlink()
    (root / ".mlpd" / "journal").write_bytes(b"".join(whole.splitlines(keepends=True)[:6]))
    rebuild(lost.env, lost.writer, root)
    (root / ".mlpd" / "journal").write_bytes(whole)
    with pytest.raises(ConflictError) as caught:
        Registry.open(lost.env, lost.writer, root)
    assert caught.value.code == "registry_behind_journal"
    assert rebuild(lost.env, lost.writer, root) == whole.count(b"\n") - 6
    assert table(lost.env) == table(env)
    assert rebuild(lost.env, lost.writer, root) == 0
    assert filled.models()


async def test_without_the_journal_the_tags_bring_versions_back(
    filled: Registry, root: Path, lost: Lost
) -> None:
    (root / ".mlpd" / "journal").unlink()
    damaged = filled.get("clf", 2)
    overwrite(blob(root, damaged.digest), b"{}")
    assert rebuild(lost.env, lost.writer, root) == 3
    again = Registry.open(lost.env, lost.writer, root)
    found = {v.reference: v for name in ("clf", "other") for v in again.versions(name)}
    assert {reference: v.state for reference, v in found.items()} == {
        "clf@1": "ready",
        "clf@2": "quarantined",
        "other@1": "pending",
    }
    before = filled.get("clf", 1)
    after = found["clf@1"]
    assert (after.digest, after.created_us) == (before.digest, before.created_us)
    assert (await again.load("clf", 1)).files["model.onnx"]
    assert again.aliases("clf") == []


async def test_a_contradiction_is_refused_and_nothing_is_written(
    filled: Registry,
    root: Path,
    lost: Lost,
    tmp_path: Path,
    files: dict[str, bytes | Path],
    lineage: dict[str, Any],
) -> None:
    other = Registry.open(lost.env, lost.writer, tmp_path / "other")
    await other.register("clf", files, lineage | {"seed": 99}, BY)
    before = table(lost.env)
    for damage in (lambda: None, (root / ".mlpd" / "journal").unlink):
        damage()
        with pytest.raises(ConflictError) as caught:
            rebuild(lost.env, lost.writer, root)
        assert caught.value.code == "registry_diverged"
        assert table(lost.env) == before
    assert filled.models()


async def test_a_directory_of_another_layout_is_refused(
    filled: Registry, env: Environment, writer: Writer, root: Path
) -> None:
    (root / "oci-layout").write_bytes(b'{"imageLayoutVersion":"2.0.0"}')
    with pytest.raises(Exception, match="oci-layout"):
        Registry.open(env, writer, root)
    assert kinds(env, root) == {"layout"}
    assert filled.models()


async def test_a_copied_layout_is_as_good_as_the_first(
    filled: Registry, root: Path, lost: Lost, tmp_path: Path
) -> None:
    shutil.copytree(root, tmp_path / "copy")
    rebuild(lost.env, lost.writer, tmp_path / "copy")
    again = Registry.open(lost.env, lost.writer, tmp_path / "copy")
    assert (await again.load("clf")).files == (await filled.load("clf")).files
