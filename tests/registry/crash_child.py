"""Runs changes of a registry in forked processes, one per file operation, each failing there.

    python crash_child.py MODE SCENARIO BASE WORK

BASE holds a registry.  For k = 1, 2, ... a copy of it goes to WORK/k, and a process runs SCENARIO,
one of the functions below, on it.  At its k-th operation on a file (open, rename, unlink, truncate,
fsync) it is killed (MODE kill), is killed after losing the end of the file that it was about to
fsync (tear), or gets ENOSPC (raise), and then goes on.  One line of JSON per k tells how the
process ended and what it had been promised.
"""

import asyncio
import errno
import json
import logging
import os
import shutil
import signal
import stat
import sys
import traceback
from functools import partial
from pathlib import Path
from typing import Any

from mlpd.core.errors import MlpdError
from mlpd.core.time import system_clock
from mlpd.registry.collect import Policy
from mlpd.registry.descriptors import Descriptor
from mlpd.registry.models import Registry
from mlpd.registry.records import Cause
from mlpd.registry.referrers import MANIFEST_TYPE
from mlpd.storage.blobs import BlobStore
from mlpd.storage.environment import Environment
from mlpd.storage.writer import Writer

WATCHED = {"open", "os.rename", "os.remove", "os.truncate", "os.mkdir", "os.chmod"}


class Fault:
    """Counts file operations below `root`; the `at`-th fails in the way of `mode`."""

    def __init__(self, mode: str, root: Path, at: int) -> None:
        self.mode, self.root, self.at, self.count = mode, str(root), at, 0
        self._fsync = os.fsync

    def install(self) -> None:
        os.fsync = self.fsync  # type: ignore[assignment]
        sys.addaudithook(self.audit)

    def audit(self, event: str, args: tuple[Any, ...]) -> None:
        if event in WATCHED and str(args[0]).startswith(self.root):
            self.step(None)

    def fsync(self, descriptor: int) -> None:
        self.step(descriptor)
        self._fsync(descriptor)

    def step(self, descriptor: int | None) -> None:
        self.count += 1
        if self.count != self.at:
            return
        if self.mode == "raise":
            raise OSError(errno.ENOSPC, "injected")
        if self.mode == "tear" and descriptor is not None:
            status = os.fstat(descriptor)
            if stat.S_ISREG(status.st_mode):
                os.ftruncate(descriptor, max(0, status.st_size - 37))
        os.kill(os.getpid(), signal.SIGKILL)


async def register(registry: Registry, lineage: dict[str, Any], promised: Any) -> None:
    """Register `clf@2` and make it champion."""
    files = {"model.onnx": b"second model" * 100}
    version = await registry.register("clf", files, lineage, Cause("tester"))
    promised({"version": version.number})
    await registry.move_alias("clf", "champion", version.number, Cause("tester"), expected="any")
    promised({"champion": version.number})


async def collect(registry: Registry, _: dict[str, Any], promised: Any) -> None:
    """Delete surplus versions and remove the files of those that were deleted before."""
    policy = Policy(now_us=system_clock() + 3_600_000_000, grace_us=0, keep=1)
    await registry.collect(policy, Cause("tester"), dry_run=False)
    promised({"collected": True})


async def adopt(registry: Registry, _: dict[str, Any], promised: Any) -> None:
    """Import the version whose blobs lie in BASE, beside the registry."""
    blobs = SOURCES[0]
    (digest,) = (path.name for path in (Path(sys.argv[3]) / "pointer").iterdir())
    pointer = Descriptor(MANIFEST_TYPE, f"sha256:{digest}", len(blobs.get(f"sha256:{digest}")))
    version = await registry.adopt(pointer, blobs, Cause("tester"))
    promised({"version": version.number})


SOURCES: list[BlobStore] = []
"""Where `adopt` imports from; opened before any fault."""


async def sign(registry: Registry, _: dict[str, Any], promised: Any) -> None:
    version = registry.get("clf", 1)
    for key, signature in (("11" * 32, "aa" * 64), ("22" * 32, "bb" * 64)):
        # What the check of a signature itself does is no operation on a file.
        await asyncio.to_thread(
            registry._change, "clf", Cause("tester"), partial(_attach, key=key, signature=signature)
        )
        assert registry.signatures(version)[key] == signature
        promised({"signed": [key, signature]})


def _attach(change: Any, *, key: str, signature: str) -> Any:
    return change.sign(1, key, signature)


SCENARIOS = {scenario.__name__: scenario for scenario in (register, collect, adopt, sign)}


def child(
    scenario: Any, mode: str, directory: Path, at: int, pipe: int, lineage: dict[str, Any]
) -> None:
    env = Environment.open(directory / "lmdb", clock=system_clock, map_bytes=64 << 20)
    writer = Writer(env)
    registry = Registry.open(env, writer, directory / "registry")
    fault = Fault(mode, directory / "registry", at)
    fault.install()

    def promised(fact: dict[str, Any]) -> None:
        os.write(pipe, json.dumps(fact).encode() + b"\n")

    try:
        asyncio.run(scenario(registry, lineage, promised))
    except MlpdError as error:
        promised({"error": error.code})
    promised({"finished": fault.count < at})
    if mode == "raise":
        fault.at = 0
        asyncio.run(scenario(registry, lineage, promised))
    writer.close()
    env.close()
    os._exit(0)


def run(
    scenario: Any, mode: str, base: Path, directory: Path, at: int, lineage: dict[str, Any]
) -> dict[str, Any]:
    shutil.copytree(base, directory)
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            child(scenario, mode, directory, at, write_end, lineage)
        except BaseException:
            traceback.print_exc()
            raise
        finally:
            os._exit(70)
    os.close(write_end)
    with os.fdopen(read_end, "rb") as pipe:
        facts = [json.loads(line) for line in pipe]
    _, status = os.waitpid(pid, 0)
    return {"at": at, "exit": os.waitstatus_to_exitcode(status), "facts": facts}


def main() -> None:
    mode, scenario = sys.argv[1], SCENARIOS[sys.argv[2]]
    base, work = Path(sys.argv[3]), Path(sys.argv[4])
    lineage = json.load(sys.stdin)
    SOURCES.append(BlobStore(base / "unpacked"))
    logging.disable()  # stderr is for what nobody expects
    at = 0
    while True:
        at += 1
        result = run(scenario, mode, base, work / str(at), at, lineage)
        sys.stdout.write(json.dumps(result) + "\n")
        if {"finished": True} in result["facts"] or result["exit"] == 70:
            return


if __name__ == "__main__":
    main()
