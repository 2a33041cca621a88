"""Daemons and routers as child processes: each in a session of its own, watched, stopped."""

import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from mlpd.core.errors import UnavailableError
from mlpd.storage.files import DataDirectory
from mlpd.storage.lock import read_holder

START_TIMEOUT_S: Final = 300.0
"""The first start on a machine compiles kernels: 15 s, a minute on a busy one."""
STOP_TIMEOUT_S: Final = 30.0
LOG_FILE: Final = "daemon.log"
_POLL_S: Final = 0.02
_LOG_LINES: Final = 12
_ROUTER_URL: Final = re.compile(rb"mlpd router is at (\S+) ")


class ServerProcess:
    """A running `mlpd ...` that outlives this process unless `stop` is called.

    `name`: what it is called in errors.  `url`: where it listens on TCP, once it does.
    """

    def __init__(self, name: str, arguments: Sequence[str], log: Path) -> None:
        self.name, self.url = name, ""
        self._log = log
        with log.open("ab") as file:
            self._log_start = file.tell()
            self._child = subprocess.Popen(  # noqa: S603 - our own interpreter and arguments
                [sys.executable, "-m", "mlpd", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                start_new_session=True,  # Ctrl-C reaches us alone, who then stop it
            )

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._child.pid

    @property
    def is_running(self) -> bool:
        """Whether it hasn't ended yet."""
        return self._child.poll() is None

    def wait_listening(self, check: Callable[[], None] = lambda: None) -> None:
        """Wait until it listens; `check` is called meanwhile and may raise.

        Raises UnavailableError(code="daemon_failed") with the end of its log if it ends before.
        """
        deadline_s = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline_s and self.is_running:
            self.url = self._find_url()
            if self.url:
                return
            check()
            time.sleep(_POLL_S)
        raise UnavailableError(
            f"{self.name} did not start; {self.describe_end()}",
            code="daemon_failed",
            hint="If the port is taken, choose another one, or 0 for any.",
        )

    def describe_end(self) -> str:
        """Return the last lines of its log as part of a sentence."""
        lines = self._logged().decode(errors="replace").splitlines()
        tail = "\n".join(lines[-_LOG_LINES:])
        return f"its log ends with:\n{tail}"

    def ask_to_stop(self) -> None:
        """Send SIGTERM if it is running, and don't wait."""
        if self.is_running:
            self._child.send_signal(signal.SIGTERM)

    def stop(self) -> None:
        """End it gracefully and wait for it; idempotent."""
        self.ask_to_stop()
        try:
            self._child.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()

    def leave_running(self) -> None:
        """Let go of a process that goes on without us (and without a warning about that)."""
        self._child.returncode = 0

    def _find_url(self) -> str:
        raise NotImplementedError

    def _logged(self) -> bytes:
        with self._log.open("rb") as file:
            file.seek(self._log_start)
            return file.read()


class DaemonProcess(ServerProcess):
    """A running `mlpd serve`; `paths`: its data directory, which is there already."""

    def __init__(
        self,
        directory: Path,
        port: int | None,
        *,
        name: str = "the daemon",
        config: Path | None = None,
    ) -> None:
        self.paths = DataDirectory(directory.resolve())
        arguments = ["serve", "--data-dir", str(self.paths.root)]
        if port is not None:
            arguments += ["--port", str(port)]
        if config is not None:
            arguments += ["--config", str(config)]
        super().__init__(name, arguments, self.paths.root / LOG_FILE)

    @property
    def root(self) -> Path:
        """Its data directory."""
        return self.paths.root

    @property
    def pids(self) -> list[int]:
        """Its process id alone."""
        return [self.pid]

    @property
    def address(self) -> str:
        """The unix socket, or the URL where the directory lies too deep for one."""
        socket = self.paths.socket
        return f"unix:{socket}" if socket.exists() else self.url

    def settle(self) -> None:
        """Return at once: what it has answered, it has."""

    def _find_url(self) -> str:
        holder = read_holder(self.paths.lock_file)
        is_ours = holder is not None and holder["pid"] == self.pid
        return str(holder["url"] or "") if holder is not None and is_ours else ""


class RouterProcess(ServerProcess):
    """A running `mlpd router`."""

    def __init__(self, urls: Sequence[str], port: int, log: Path) -> None:
        arguments = ["router", "--shards", ",".join(urls), "--port", str(port)]
        super().__init__("the router", arguments, log)

    def _find_url(self) -> str:
        found = _ROUTER_URL.search(self._logged())
        return "" if found is None else found[1].decode()
