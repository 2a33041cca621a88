"""Runs register and alias moves in forked processes, one per file operation, each failing there.

    python crash_child.py MODE BASE WORK      MODE is kill, tear or raise

BASE holds a registry with `clf@1` as champion.  For k = 1, 2, ... a copy of it goes to WORK/k, and
a process registers `clf@2` there and makes it champion.  At its k-th operation on a file (open,
rename, unlink, truncate, fsync) it is killed (kill), is killed after losing the end of the file
that it was about to fsync (tear), or gets ENOSPC (raise), and then goes on.  One line of JSON per
k tells how the process ended and what it had been promised.
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
from pathlib import Path
from typing import Any

from mlpd.core.errors import MlpdError
from mlpd.core.time import system_clock
from mlpd.registry.models import Registry
from mlpd.registry.records import Cause
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


async def scenario(registry: Registry, lineage: dict[str, Any], promised: Any) -> None:
    files = {"model.onnx": b"second model" * 100}
    version = await registry.register("clf", files, lineage, Cause("tester"))
    promised({"version": version.number})
    await registry.move_alias("clf", "champion", version.number, Cause("tester"), expected="any")
    promised({"champion": version.number})


def child(mode: str, directory: Path, at: int, pipe: int, lineage: dict[str, Any]) -> None:
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


def run(mode: str, base: Path, directory: Path, at: int, lineage: dict[str, Any]) -> dict[str, Any]:
    shutil.copytree(base, directory)
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            child(mode, directory, at, write_end, lineage)
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
    mode, base, work = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    lineage = json.load(sys.stdin)
    logging.disable()  # stderr is for what nobody expects
    at = 0
    while True:
        at += 1
        result = run(mode, base, work / str(at), at, lineage)
        sys.stdout.write(json.dumps(result) + "\n")
        if {"finished": True} in result["facts"] or result["exit"] == 70:
            return


if __name__ == "__main__":
    main()
