"""The demo's daemon, or its daemons and their router, on a new directory."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final, Protocol

from mlpd.cli.local_cluster import PLAN_FILE, ClusterPlan, LocalCluster
from mlpd.cli.processes import DaemonProcess
from mlpd.core.errors import ConflictError
from mlpd.storage.files import DataDirectory
from mlpd.storage.lock import read_holder

PIDS_FILE: Final = "pids"
"""Of what a demo on several shards started: a router holds no lock that would tell."""


class Running(Protocol):
    """What the demo talks to: a daemon, or a cluster by its router."""

    @property
    def address(self) -> str:
        """Where a client on this machine asks best."""
        ...

    @property
    def url(self) -> str:
        """Where it listens on TCP."""
        ...

    @property
    def root(self) -> Path:
        """The demo's directory."""
        ...

    @property
    def pids(self) -> list[int]:
        """Its processes."""
        ...

    def settle(self) -> None:
        """Wait until a change is everywhere."""
        ...

    def stop(self) -> None:
        """End it gracefully and wait for it; idempotent."""
        ...

    def leave_running(self) -> None:
        """Let go of what goes on without us."""
        ...


@contextmanager
def running_daemon(directory: Path, port: int | None) -> Iterator[DaemonProcess]:
    """Start a daemon on a new data directory; stop it if the block fails or is interrupted.

    One that doesn't even start leaves the directory empty, so that the next try may have it.
    """
    claim_directory(directory)
    daemon = DaemonProcess(directory, port)
    try:
        daemon.wait_listening()
    except BaseException:
        daemon.stop()
        shutil.rmtree(directory)
        raise
    with _stopped_at_failure(daemon):
        yield daemon


@contextmanager
def running_cluster(directory: Path, shards: int, port: int | None) -> Iterator[LocalCluster]:
    """Start shards and a router on a new directory; as `running_daemon`.

    What starts them again, `mlpd shard serve`, finds their ports in a file there.
    """
    claim_directory(directory)
    plan = ClusterPlan.of(shards) if port is None else ClusterPlan.of(shards, port)
    cluster = LocalCluster(directory, plan)
    try:
        cluster.start()
        (directory / PLAN_FILE).write_text(cluster.running_plan().to_toml(), encoding="utf-8")
        (directory / PIDS_FILE).write_text(" ".join(map(str, cluster.pids)), encoding="utf-8")
    except BaseException:
        cluster.stop()
        shutil.rmtree(directory)
        raise
    with _stopped_at_failure(cluster):
        yield cluster


@contextmanager
def _stopped_at_failure(running: Running) -> Iterator[None]:
    try:
        yield
    except BaseException:
        running.stop()
        raise


def claim_directory(directory: Path) -> None:
    """Make the data directory; raises ConflictError if there is anything in it already."""
    directory.mkdir(parents=True, exist_ok=True)
    if any(directory.iterdir()):
        raise _found(directory)


def _found(directory: Path) -> ConflictError:
    root = directory.resolve()
    folders = [DataDirectory(path) for path in (root, *sorted(root.iterdir())) if path.is_dir()]
    holders = [h for paths in folders if (h := read_holder(paths.lock_file)) is not None]
    if holders:
        first, pids = holders[0], " ".join(_pids(root, [str(h["pid"]) for h in holders]))
        return ConflictError(
            f"a demo is already here: its daemon (pid {pids}) serves {root} at {first['url']}",
            code="demo_exists",
            hint=f"Look at it with MLPD_URL={first['url']} mlpd status, stop it with "
            f"kill {pids}; or run this one with another --data-dir and --port.",
            details={"data_dir": str(root), **first},
        )
    if any(paths.lmdb.is_dir() for paths in folders):
        return ConflictError(
            f"{root} holds the data of an earlier demo; no daemon is running on it",
            code="demo_exists",
            hint=f"Serve it again with {start_again(directory)}, remove it with "
            f"rm -r {directory}, or choose another --data-dir.",
            details={"data_dir": str(root)},
        )
    return ConflictError(
        f"{root} is not empty, and is no data directory of mlpd",
        code="directory_not_empty",
        hint="Choose another --data-dir.",
    )


def _pids(root: Path, holders: list[str]) -> list[str]:
    """Return what runs on a demo's directory: daemons that hold it, and the router with them."""
    noted = root / PIDS_FILE
    started = noted.read_text(encoding="utf-8").split() if noted.exists() else []
    return started if {*holders} <= {*started} else holders


def start_again(directory: Path) -> str:
    """Return the command that serves what a demo left in its directory."""
    plan = directory / PLAN_FILE
    if plan.exists():
        return f"mlpd shard serve --config {plan} --data-dir {directory}"
    return f"mlpd serve --data-dir {directory}"
