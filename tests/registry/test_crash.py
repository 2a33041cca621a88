"""A crash or disk error at any file operation of register and alias move is survived."""

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import mlpd
from mlpd.core.time import system_clock
from mlpd.registry.fsck import check
from mlpd.registry.models import Registry
from mlpd.registry.records import Cause
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


def outcomes(mode: str, tmp_path: Path, lineage: dict[str, Any]) -> list[dict[str, Any]]:
    """Run the scenario with a fault at each operation; see crash_child.py."""
    with opened(tmp_path / "base") as (_, registry):
        asyncio.run(first(registry, lineage))
    (tmp_path / "work").mkdir()
    script = Path(__file__).with_name("crash_child.py")
    done = subprocess.run(
        [sys.executable, script, mode, tmp_path / "base", tmp_path / "work"],
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
