"""Cuts the power: runs a child under the shim, then looks at the disks that it may leave."""

import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from mlpd.core.time import HOUR_US, system_clock
from tests.conftest import MEMORY
from tests.storage.powercut.choices import Everything
from tests.storage.powercut.disk import Disk
from tests.storage.powercut.shim import Shim, read_record

REPOSITORY = Path(__file__).parents[3]


Kills = Callable[[Shim], bool]
"""Tells the shim when to kill the next life; False if it may live to its end."""


@dataclass(frozen=True, slots=True)
class Recording:
    """What a child, and `deaths` others before it, wrote below `root`."""

    root: Path
    record: Path
    start_us: int
    deaths: int


@contextmanager
def scratch() -> Iterator[Path]:
    """Yield a folder in memory: thousands of states are built and opened there."""
    with tempfile.TemporaryDirectory(prefix="mlpd-power-", dir=MEMORY) as directory:
        yield Path(directory).resolve()


def run_module(
    name: str, *arguments: object, environment: dict[str, str]
) -> "subprocess.CompletedProcess[str]":
    """Run a child of these tests, in a process group of its own, to its end or its kill."""
    done = subprocess.run(
        [sys.executable, "-m", f"tests.storage.powercut.{name}", *map(str, arguments)],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        process_group=0,
    )
    assert done.returncode in (0, -signal.SIGKILL), done.stderr[-3000:]
    return done


def record(work: Path, fault: str = "none", *, kills: Kills | None = None) -> Recording:
    """Let a child live in a new data directory; nothing that it writes escapes the record.

    `kills` ends some lives before that, each where it says; the next one goes on.
    """
    root = work / "recorded"
    root.mkdir()
    start_us, life = system_clock() - HOUR_US, 0
    with Shim(root, work / "shim", recording=True) as shim:
        while True:
            mortal = kills is not None and kills(shim)
            arguments = (root, shim.told, start_us, fault, life)
            ended = run_module("record_child", *arguments, environment=shim.environment())
            if ended.returncode == 0:
                break
            assert mortal
            life += 1
        recorded = shim.record
    check_complete(root, recorded, work / "complete")
    return Recording(root, recorded, start_us, life)


def at_operations(numbers: Iterable[int]) -> Kills:
    """Kill a life before its n-th operation, for each of the numbers."""
    left = iter(numbers)

    def kills(shim: Shim) -> bool:
        number = next(left, 0)
        shim.kill_at(number)
        return number > 0

    return kills


def after_every_mkdir() -> Kills:
    """Kill after the mkdir of each folder, before its name is flushed, until there is no other."""
    seen: set[str] = set()
    passes = 0

    def kills(shim: Shim) -> bool:
        nonlocal passes
        made = [o.path for o in read_record(shim.record) if o.kind == "M"]
        passes = passes + 1 if made and made[-1] in seen else 0
        seen.update(made[-1:])
        shim.kill_after("M", passes)
        return True

    return kills


def check_complete(root: Path, recorded: Path, rebuilt: Path) -> None:
    """The record, applied in full, gives the folder as it is: no way to write was overlooked."""
    disk = Disk(root)
    for operation in read_record(recorded):
        if operation.kind != "A":
            disk.apply(operation)
    disk.build(rebuilt, Everything())
    names = {p.relative_to(root) for p in root.rglob("*")}
    assert names == {p.relative_to(rebuilt) for p in rebuilt.rglob("*")}
    mapped = {Path(p).relative_to(root) for p in disk.mapped_paths()}
    assert mapped == {Path("lmdb/lock.mdb")}, f"not recorded, since written through a map: {mapped}"
    for name in sorted(names - mapped):
        if (root / name).is_file():
            assert (root / name).read_bytes() == (rebuilt / name).read_bytes(), name
    shutil.rmtree(rebuilt)


def look(recording: Recording, work: Path, *, states: int, seed: int = 0) -> list[str]:
    """Return what is wrong with the disks that power cuts may leave, one line each."""
    lines: list[str] = []
    while len(lines) < states:
        lines += _look(recording, work, states, seed, len(lines))
    return [line for line in lines if not line.endswith(": ok")]


def _look(recording: Recording, work: Path, states: int, seed: int, done: int) -> list[str]:
    """Run one process until it ends, by itself or by a broken state."""
    numbers = (recording.start_us, seed, states, done)
    command = [sys.executable, "-m", "tests.storage.powercut.verify_child"]
    ended = subprocess.run(
        [*command, *map(str, (recording.root, recording.record, work / "state", *numbers))],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    lines = ended.stdout.splitlines()
    if ended.returncode != 0:
        assert ended.returncode < 0, ended.stderr[-3000:]  # a signal, not a bug of the child
        lines[-1] += f"killed the process with signal {-ended.returncode}"
    return lines
