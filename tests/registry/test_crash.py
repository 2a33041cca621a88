"""A crash or disk error at any file operation of any change of the registry is survived."""

import asyncio
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import mlpd
from mlpd.core.time import system_clock
from mlpd.registry.collect import Policy
from mlpd.registry.fsck import check
from mlpd.registry.lineage import Lineage
from mlpd.registry.models import Registry
from mlpd.registry.records import Cause
from mlpd.registry.versions import VersionStore
from mlpd.storage.blobs import BlobStore
from mlpd.storage.environment import Environment
from mlpd.storage.writer import Writer

BY = Cause("tester")
FILES: dict[str, bytes | Path] = {"model.onnx": b"first model", "parity.json": b"{}"}
SIGKILLED = -9


@contextmanager
def opened(directory: Path) -> Iterator[tuple[Environment, Registry]]:
    with Environment.open(directory / "lmdb", clock=system_clock, map_bytes=64 << 20) as env:
        writer = Writer(env)
        try:
            yield env, Registry.open(env, writer, directory / "registry")
        finally:
            writer.close()


async def first(registry: Registry, lineage: dict[str, Any]) -> None:
    await registry.register("clf", FILES, lineage, BY)
    await registry.move_alias("clf", "champion", 1, BY, expected=None)


async def several(registry: Registry, lineage: dict[str, Any]) -> None:
    """Leave a champion, a deleted version, a surplus one and the newest."""
    await first(registry, lineage)
    for seed in (2, 3, 4):
        await registry.register("clf", FILES, lineage | {"seed": seed}, BY)
    await registry.delete("clf", 2, BY)


async def beside(registry: Registry, lineage: dict[str, Any]) -> None:
    """Leave a champion, and another version unpacked beside the registry."""
    await first(registry, lineage)
    base = registry._layout.root.parent
    blobs = BlobStore(base / "unpacked")
    pointer = VersionStore(blobs).publish("clf", FILES, Lineage.parse(lineage | {"seed": 2}))
    (base / "pointer").mkdir()
    (base / "pointer" / pointer.digest.removeprefix("sha256:")).touch()


def outcomes(
    mode: str, tmp_path: Path, lineage: dict[str, Any], scenario: str = "register"
) -> list[dict[str, Any]]:
    """Run the scenario with a fault at each operation; see crash_child.py."""
    prepare = {"register": first, "collect": several, "adopt": beside, "sign": first}[scenario]
    with opened(tmp_path / "base") as (_, registry):
        asyncio.run(prepare(registry, lineage))
    (tmp_path / "work").mkdir()
    script = Path(__file__).with_name("crash_child.py")
    done = subprocess.run(
        [sys.executable, script, mode, scenario, tmp_path / "base", tmp_path / "work"],
        input=json.dumps(lineage | {"seed": 2}).encode(),
        capture_output=True,
        env=os.environ | {"PYTHONPATH": str(Path(mlpd.__file__).parents[1])},
        timeout=50,
        check=False,
    )
    assert done.stderr.decode()[-2000:] == ""
    assert done.returncode == 0
    return [json.loads(line) for line in done.stdout.splitlines()]


def promises(outcome: dict[str, Any]) -> dict[str, Any]:
    return {key: value for fact in outcome["facts"] for key, value in fact.items()}


async def check_afterwards(
    directory: Path, promised: dict[str, Any], lineage: dict[str, Any]
) -> None:
    with opened(directory) as (env, registry):
        assert check(env, directory / "registry").problems == ()
        numbers = [version.number for version in registry.versions("clf")]
        assert numbers in ([1], [1, 2])
        champion = registry.get("clf").number
        assert champion in numbers
        if "version" in promised:
            assert numbers == [1, 2]
        if "champion" in promised:
            assert champion == 2
        if "signed" in promised:
            key, signature = promised["signed"]
            assert registry.signatures(registry.get("clf", 1))[key] == signature
        for number in numbers:
            assert (await registry.load("clf", number)).files["model.onnx"]
        following = await registry.register("clf", FILES, lineage | {"seed": 3}, BY)
        assert following.number == numbers[-1] + 1
        assert check(env, directory / "registry").problems == ()


@pytest.mark.parametrize("mode", ["kill", "tear"])
def test_death_at_any_file_operation_leaves_no_dangling_pointer(
    mode: str, tmp_path: Path, lineage: dict[str, Any]
) -> None:
    results = outcomes(mode, tmp_path, lineage)
    assert len(results) > 30
    assert [r["exit"] for r in results] == [SIGKILLED] * (len(results) - 1) + [0]
    # Faults fall before and after the first promise.
    assert {"version" in promises(r) for r in results[:-1]} == {False, True}
    for result in results:
        directory = tmp_path / "work" / str(result["at"])
        asyncio.run(check_afterwards(directory, promises(result), lineage))


def test_a_disk_error_at_any_file_operation_is_told_or_healed(
    tmp_path: Path, lineage: dict[str, Any]
) -> None:
    results = outcomes("raise", tmp_path, lineage)
    assert len(results) > 30
    assert {r["exit"] for r in results} == {0}
    assert {promises(r).get("error") for r in results} == {"storage_full", None}
    for result in results:
        promised = promises(result)
        assert promised["champion"] == 2
        directory = tmp_path / "work" / str(result["at"])
        asyncio.run(check_afterwards(directory, promised, lineage))


@pytest.mark.parametrize("mode", ["kill", "raise"])
def test_a_fault_at_any_file_operation_of_an_import_is_survived(
    mode: str, tmp_path: Path, lineage: dict[str, Any]
) -> None:
    results = outcomes(mode, tmp_path, lineage, "adopt")
    assert len(results) > 20
    if mode != "raise":
        assert [r["exit"] for r in results] == [SIGKILLED] * (len(results) - 1) + [0]
    for result in results:
        directory = tmp_path / "work" / str(result["at"])
        asyncio.run(check_afterwards(directory, promises(result), lineage))
        shutil.rmtree(directory)


@pytest.mark.parametrize("mode", ["kill", "tear", "raise"])
def test_a_fault_at_any_file_operation_of_a_signature_loses_none(
    mode: str, tmp_path: Path, lineage: dict[str, Any]
) -> None:
    results = outcomes(mode, tmp_path, lineage, "sign")
    assert len(results) > 20
    if mode != "raise":
        assert [r["exit"] for r in results] == [SIGKILLED] * (len(results) - 1) + [0]
        assert {"signed" in promises(r) for r in results[:-1]} == {False, True}
    for result in results:
        directory = tmp_path / "work" / str(result["at"])
        asyncio.run(check_afterwards(directory, promises(result), lineage))
        shutil.rmtree(directory)


async def check_collected(directory: Path, lineage: dict[str, Any], *, done: bool) -> None:
    with opened(directory) as (env, registry):
        report = check(env, directory / "registry")
        assert report.problems == ()
        states = {v.number: str(v.state) for v in registry.versions("clf")}
        assert [states[n] for n in (1, 2, 4)] == ["ready", "deleted", "ready"]
        if done:
            assert (states[3], report.orphans) == ("deleted", ())
        for number in (1, 4):
            assert (await registry.load("clf", number)).files["model.onnx"]
        policy = Policy(now_us=system_clock() + 3_600_000_000, grace_us=0, keep=1)
        await registry.collect(policy, BY, dry_run=False)
        assert (await registry.register("clf", FILES, lineage | {"seed": 2}, BY)).number == 5
        report = check(env, directory / "registry")
        assert (report.problems, report.orphans, report.versions) == ((), (), 3)


@pytest.mark.parametrize("mode", ["kill", "tear", "raise"])
def test_a_fault_at_any_file_operation_of_a_collection_harms_no_version(
    mode: str, tmp_path: Path, lineage: dict[str, Any]
) -> None:
    results = outcomes(mode, tmp_path, lineage, "collect")
    assert len(results) > 15
    if mode != "raise":
        assert [r["exit"] for r in results] == [SIGKILLED] * (len(results) - 1) + [0]
    for result in results:
        directory = tmp_path / "work" / str(result["at"])
        done = promises(result).get("collected", False)
        asyncio.run(check_collected(directory, lineage, done=done))
        shutil.rmtree(directory)
