"""The daemon as the demo's child process: started in a session of its own, watched, stopped."""

import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from mlpd.core.errors import ConflictError, UnavailableError
from mlpd.storage.files import DataDirectory
from mlpd.storage.lock import read_holder

START_TIMEOUT_S: Final = 300.0
"""The first start on a machine compiles kernels: 15 s, a minute on a busy one."""
STOP_TIMEOUT_S: Final = 30.0
LOG_FILE: Final = "daemon.log"
_POLL_S: Final = 0.02
_LOG_LINES: Final = 12


class DaemonProcess:
    """A running `mlpd serve`; it outlives this process unless `stop` is called.

    `url`: where it listens on TCP.  `paths`: its data directory.
    """

    def __init__(self, directory: Path, port: int | None) -> None:
        self.paths = DataDirectory(directory.resolve())
        self._log = self.paths.root / LOG_FILE
        arguments = ["serve", "--data-dir", str(self.paths.root)]
        if port is not None:
            arguments += ["--port", str(port)]
        with self._log.open("ab") as log:
            self._child = subprocess.Popen(  # noqa: S603 - our own interpreter and arguments
                [sys.executable, "-m", "mlpd", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C reaches the demo alone, which then stops it
            )
        self.url = ""

    @property
    def address(self) -> str:
        """The unix socket, or the URL where the directory lies too deep for one."""
        socket = self.paths.socket
        return f"unix:{socket}" if socket.exists() else self.url

    @property
    def pid(self) -> int:
        """Process id of the daemon."""
        return self._child.pid

    def wait_listening(self) -> None:
        """Wait until the daemon says where it listens.

        Raises UnavailableError(code="daemon_failed") with the end of its log if it doesn't.
        """
        deadline_s = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline_s and self._child.poll() is None:
            holder = read_holder(self.paths.lock_file)
            if holder is not None and holder["pid"] == self.pid and holder["url"]:
                self.url = holder["url"]
                return
            time.sleep(_POLL_S)
        lines = self._log.read_text(encoding="utf-8", errors="replace").splitlines()
        tail = "\n".join(lines[-_LOG_LINES:])
        raise UnavailableError(
            f"the daemon did not start; its log ends with:\n{tail}",
            code="daemon_failed",
            hint="If the port is taken, choose another one with --port, or 0 for any.",
        )

    def stop(self) -> None:
        """End the daemon gracefully and wait for it; idempotent."""
        if self._child.poll() is None:
            self._child.send_signal(signal.SIGTERM)
            try:
                self._child.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self._child.kill()
                self._child.wait()

    def leave_running(self) -> None:
        """Let go of a daemon that goes on without us (and without a warning about that)."""
        self._child.returncode = 0


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
    try:
        yield daemon
    except BaseException:
        daemon.stop()
        raise


def claim_directory(directory: Path) -> None:
    """Make the data directory; raises ConflictError if there is anything in it already."""
    directory.mkdir(parents=True, exist_ok=True)
    if any(directory.iterdir()):
        raise _found(directory)


def _found(directory: Path) -> ConflictError:
    paths = DataDirectory(directory.resolve())
    holder = read_holder(paths.lock_file)
    if holder is not None:
        return ConflictError(
            f"a demo is already here: its daemon (pid {holder['pid']}) serves {paths.root} "
            f"at {holder['url']}",
            code="demo_exists",
            hint=f"Look at it with MLPD_URL={holder['url']} mlpd status, stop it with "
            f"kill {holder['pid']}; or run this one with another --data-dir and --port.",
            details={"data_dir": str(paths.root), **holder},
        )
    if paths.lmdb.is_dir():
        return ConflictError(
            f"{paths.root} holds the data of an earlier demo; no daemon is running on it",
            code="demo_exists",
            hint=f"Serve it again with mlpd serve --data-dir {directory}, remove it with "
            f"rm -r {directory}, or choose another --data-dir.",
            details={"data_dir": str(paths.root)},
        )
    return ConflictError(
        f"{paths.root} is not empty, and is no data directory of mlpd",
        code="directory_not_empty",
        hint="Choose another --data-dir.",
    )
