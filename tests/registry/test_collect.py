"""Collection: what no version needs goes after its grace, and nothing else ever does."""

import asyncio
import os
import threading
from pathlib import Path
from typing import Any

import pytest

from mlpd.core.errors import ConflictError, ValidationError
from mlpd.core.time import system_clock
from mlpd.registry.collect import TRAIL_KEPT, Collection, Policy
from mlpd.registry.fsck import check
from mlpd.registry.models import Registry
from mlpd.registry.records import Cause, VersionState
from mlpd.storage.environment import Environment

BY = Cause("tester", "because")
HOUR_US = 3_600_000_000
Files = dict[str, bytes | Path]


async def collect(registry: Registry, *, ahead_us: int = 0, **policy: Any) -> Collection:
    """Collect as it would be done `ahead_us` from now; a grace of an hour, and no dry run."""
    dry_run = policy.pop("dry_run", False)
    settings = {"now_us": system_clock() + ahead_us, "grace_us": HOUR_US, **policy}
    return await registry.collect(Policy(**settings), BY, dry_run=dry_run)


@pytest.fixture
async def three(registry: Registry, files: Files, lineage: dict[str, Any]) -> Registry:
    """`clf` with three versions that share all files but lineage, config and manifest."""
    for seed in (1, 2, 3):
        await registry.register("clf", files, lineage | {"seed": seed}, BY)
    return registry


def blobs(root: Path) -> set[str]:
    return {path.name for path in (root / "blobs" / "sha256").iterdir()}


def numbers(found: Collection) -> list[int]:
    return [version.number for version in found.versions]


async def test_only_what_the_deleted_version_alone_needed_goes(
    three: Registry, env: Environment, root: Path
) -> None:
    before = blobs(root)
    await three.delete("clf", 2, BY)
    found = await collect(three, ahead_us=2 * HOUR_US)
    assert len(found.blobs) == 3  # manifest, config, lineage
    assert blobs(root) == before - {blob.digest[7:] for blob in found.blobs}
    report = check(env, root)
    assert (report.problems, report.orphans, report.versions) == ((), (), 2)
    assert (await collect(three, ahead_us=2 * HOUR_US)).blobs == ()


async def test_a_dry_run_changes_nothing(three: Registry, env: Environment, root: Path) -> None:
    await three.delete("clf", 2, BY)
    before = blobs(root)
    found = await collect(three, ahead_us=2 * HOUR_US, keep=1, dry_run=True)
    assert numbers(found) == [1]
    assert len(found.blobs) == 3
    assert blobs(root) == before
    assert three.get("clf", 1).state is VersionState.READY
    assert check(env, root).ok


async def test_the_grace_counts_from_the_deletion_however_old_the_files_are(
    three: Registry, root: Path
) -> None:
    for path in (root / "blobs" / "sha256").iterdir():
        os.utime(path, (0, 0))
    await three.delete("clf", 2, BY)
    before = blobs(root)
    found = await collect(three, ahead_us=HOUR_US // 2)
    assert (len(found.blobs), len(found.waiting)) == (0, 3)
    assert blobs(root) == before
    assert len((await collect(three, ahead_us=2 * HOUR_US)).blobs) == 3


async def test_a_blob_that_a_crash_left_goes_after_the_grace(three: Registry, root: Path) -> None:
    left = three._layout.blobs.put(b"the manifest never came")
    assert (await collect(three)).waiting[0].digest == left.digest
    assert [b.digest for b in (await collect(three, ahead_us=2 * HOUR_US)).blobs] == [left.digest]
    assert left.digest[7:] not in blobs(root)


async def test_deleted_content_that_is_registered_again_stays(
    three: Registry, env: Environment, root: Path, files: Files, lineage: dict[str, Any]
) -> None:
    await three.delete("clf", 2, BY)
    again = await three.register("clf", files, lineage | {"seed": 2}, BY)
    assert again.number == 4
    assert (await collect(three, ahead_us=2 * HOUR_US)).blobs == ()
    assert check(env, root).ok


async def test_surplus_versions_go_but_for_those_that_are_held(
    registry: Registry, env: Environment, root: Path, files: Files, lineage: dict[str, Any]
) -> None:
    for seed in range(8):
        await registry.register("clf", files, lineage | {"seed": seed}, BY)
    for number in (1, 2):  # leaves 1 in the trail
        await registry.move_alias("clf", "champion", number, BY, expected="any")
    await registry.pin("clf", 3, True, BY)
    await registry.set_state("clf", 4, VersionState.ARCHIVED, BY)
    young = await collect(registry, keep=2)
    assert numbers(young) == []
    done = await collect(registry, grace_us=0, keep=2, served=frozenset({"clf@5"}))
    assert numbers(done) == [4, 6]
    assert done.blobs == ()  # they were needed until just now
    states = {v.number: str(v.state) for v in registry.versions("clf")}
    assert [n for n, state in states.items() if state == "deleted"] == [4, 6]
    assert registry.history("clf")[0].cause == BY
    assert (await registry.rollback("clf", "champion", BY)).version == 1
    assert len((await collect(registry, ahead_us=2 * HOUR_US)).blobs) == 6
    assert check(env, root).ok


async def test_of_a_long_trail_the_last_are_kept(
    registry: Registry, files: Files, lineage: dict[str, Any]
) -> None:
    for seed in range(TRAIL_KEPT + 3):
        version = await registry.register("clf", files, lineage | {"seed": seed}, BY)
        await registry.move_alias("clf", "champion", version.number, BY, expected="any")
    assert numbers(await collect(registry, ahead_us=2 * HOUR_US, keep=1)) == [1, 2]


async def test_what_is_served_keeps_its_files_even_when_deleted(
    three: Registry, root: Path
) -> None:
    await three.delete("clf", 2, BY)
    before = blobs(root)
    served = frozenset({"clf@2"})
    assert (await collect(three, ahead_us=2 * HOUR_US, served=served)).blobs == ()
    assert blobs(root) == before


async def test_a_pinned_version_is_not_deleted_until_it_is_unpinned(three: Registry) -> None:
    await three.pin("clf", 2, True, BY)
    await three.pin("clf", 2, True, BY)
    assert three.pins("clf") == {2}
    with pytest.raises(ConflictError) as caught:
        await three.delete("clf", 2, BY)
    assert caught.value.code == "version_pinned"
    await three.pin("clf", 2, False, BY)
    await three.delete("clf", 2, BY)
    with pytest.raises(ConflictError) as caught:
        await three.pin("clf", 2, True, BY)
    assert caught.value.code == "deleted_version"
    kinds = [event.kind for event in three.history("clf")]
    assert kinds == ["state", "pin", "pin", "registered", "registered", "registered"]


async def test_nothing_goes_while_a_version_does_not_tell_what_it_needs(
    three: Registry, root: Path
) -> None:
    await three.delete("clf", 2, BY)
    manifest = root / "blobs" / "sha256" / three.get("clf", 3).digest[7:]
    manifest.chmod(0o644)
    manifest.write_bytes(b"{}")
    before = blobs(root)
    with pytest.raises(ConflictError) as caught:
        await collect(three, ahead_us=2 * HOUR_US)
    assert caught.value.code == "manifest_unreadable"
    assert blobs(root) == before
    await three.delete("clf", 3, BY)
    assert (await collect(three, ahead_us=2 * HOUR_US)).blobs


def test_registering_and_collecting_at_once_loses_nothing(
    registry: Registry, env: Environment, root: Path, files: Files, lineage: dict[str, Any]
) -> None:
    """Without the lock a collection takes blobs that a registration just found to be there."""
    stop = threading.Event()

    def sweep() -> None:
        while not stop.is_set():
            asyncio.run(collect(registry, ahead_us=HOUR_US, grace_us=0))

    sweeper = threading.Thread(target=sweep)
    sweeper.start()
    try:
        for _ in range(25):
            version = asyncio.run(registry.register("clf", files, lineage, BY))
            asyncio.run(registry.load("clf", version.number))
            asyncio.run(registry.delete("clf", version.number, BY))
        last = asyncio.run(registry.register("clf", files, lineage, BY))
    finally:
        stop.set()
        sweeper.join()
    assert asyncio.run(registry.load("clf", last.number)).files["model.onnx"] == files["model.onnx"]
    assert check(env, root).ok


@pytest.mark.parametrize("wrong", [{"grace_us": -1}, {"keep": 0}, {"keep": -3}])
def test_a_policy_that_makes_no_sense_is_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValidationError) as caught:
        Policy(**{"now_us": 0, "grace_us": 0, **wrong})
    assert caught.value.code == "invalid_policy"
