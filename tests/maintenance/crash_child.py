"""Runs a backup or a restore in forked processes, each killed at another file operation.

    python crash_child.py backup|restore|fill SOURCE WORK STEP

For k = 1, 1 + STEP, ... a process works from SOURCE to WORK/k/target and is killed (kill -9) at
its k-th operation on a file below WORK/k.  One line of JSON per k tells how it ended; the last one
ended by itself.
"""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from mlpd.core.time import system_clock
from mlpd.daemon import backup_child
from mlpd.daemon.restore import restore

WATCHED = {"open", "os.rename", "os.remove", "os.link", "os.mkdir", "os.chmod", "os.rmdir"}
DONE = 7


class Killer:
    """Ends this process at the `at`-th operation below `root`."""

    def __init__(self, root: Path, at: int) -> None:
        self.root, self.at, self.count = str(root), at, 0
        self._fsync = os.fsync

    def install(self) -> None:
        os.fsync = self.fsync  # type: ignore[assignment]
        sys.addaudithook(self.audit)

    def audit(self, event: str, args: tuple[Any, ...]) -> None:
        if event in WATCHED and any(str(arg).startswith(self.root) for arg in args[:2]):
            self.step()

    def fsync(self, descriptor: int) -> None:
        self.step()
        self._fsync(descriptor)

    def step(self) -> None:
        self.count += 1
        if self.count == self.at:
            os.kill(os.getpid(), signal.SIGKILL)


def back_up(source: Path, target: Path) -> None:
    target.mkdir()
    request = {"directory": str(source), "destination": str(target), "link": True, "config": ""}
    backup_child.run(request, lambda _: None)


def bring_back(source: Path, target: Path) -> None:
    restore(source, target, system_clock)


def fill(source: Path, target: Path) -> None:
    target.mkdir()
    (target / "lost+found").mkdir()
    restore(source, target, system_clock)


ACTIONS = {"backup": back_up, "restore": bring_back, "fill": fill}


def main() -> None:
    action, source, work, step = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4])
    at, ended = 1, False
    while not ended:
        folder = work / str(at)
        folder.mkdir()
        pid = os.fork()
        if pid == 0:
            Killer(folder, at).install()
            ACTIONS[action](source, folder / "target")
            os._exit(DONE)
        _, status = os.waitpid(pid, 0)
        ended = os.WIFEXITED(status)
        code = os.waitstatus_to_exitcode(status)
        line = {"at": at, "killed": code == -signal.SIGKILL, "done": code == DONE}
        sys.stdout.write(json.dumps(line) + "\n")
        at += step


main()
