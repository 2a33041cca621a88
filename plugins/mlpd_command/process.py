"""Runs the user's program: it dies with its parent, its output is bounded, its time is too."""

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

from mlpd.core.errors import DefinitionError, MlpdError
from mlpd.core.trainers import Tell

LOG_BYTES_MAX = 16 * 1024 * 1024
"""Of what the program prints; the rest is dropped, and the log says so."""
LINE_BYTES_MAX = 64 * 1024
TERMINATE_S = 10.0
TELL_EVERY_S = 1.0

_KEPT = ("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "TZ", "LD_LIBRARY_PATH")
"""Of the environment: the daemon's secrets and its PYTHONPATH are no business of a program."""

_LAUNCH = """
import ctypes, os, sys
ctypes.CDLL(None).prctl(1, 9)  # PR_SET_PDEATHSIG, SIGKILL: it survives the exec
os.getppid() == int(sys.argv[1]) or sys.exit(1)
try:
    os.execvp(sys.argv[2], sys.argv[2:])
except OSError as error:
    sys.exit(f"{sys.argv[2]} can't be started: {error.strerror}")
"""


def run_program(
    words: Sequence[str], folder: Path, *, threads: int, timeout_s: float | None, tell: Tell
) -> None:
    """Run `words` in `folder` to its end; what it prints goes to this process's log.

    It inherits priority and memory limit.  Each line that it prints is a sign of life; one that is
    a JSON object is told as progress.  Raises DefinitionError(code="command_failed") unless it ends
    with status 0, MlpdError(code="run_timeout") after `timeout_s`.
    """
    launch = (sys.executable, "-I", "-S", "-c", _LAUNCH, str(os.getpid()))
    with subprocess.Popen(  # noqa: S603 - words of the operator's configuration
        [*launch, *words],
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=_environment(threads),
    ) as program:
        try:
            _follow(program, _Lines(program), timeout_s, tell)
            status = program.wait()
        finally:
            _end(program)
    if status:
        raise DefinitionError(
            f"the command {words[0]!r} ended with status {status}",
            code="command_failed",
            hint="The run's log holds what it printed.",
        )


def _follow(
    program: "subprocess.Popen[bytes]", lines: "_Lines", timeout_s: float | None, tell: Tell
) -> None:
    """Pass on what the program tells until it has ended or its time is up."""
    ends_s = None if timeout_s is None else time.monotonic() + timeout_s
    while True:
        told = lines.next(0.1)
        if told is not None:
            tell(**told)
        elif program.poll() is not None:
            return
        if ends_s is not None and time.monotonic() > ends_s:
            raise MlpdError(
                f"the command took longer than {timeout_s:g} s and was stopped",
                code="run_timeout",
                hint="See `timeout` among the job's params.",
            )


def _end(program: "subprocess.Popen[bytes]") -> None:
    if program.poll() is None:
        program.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            program.wait(TERMINATE_S)
        program.kill()


def _environment(threads: int) -> dict[str, str]:
    kept = {name: os.environ[name] for name in _KEPT if name in os.environ}
    return {**kept, "OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"}


class _Lines:
    """Reads the program's output in a thread that ends with it; helpers may keep the pipe open."""

    def __init__(self, program: "subprocess.Popen[bytes]") -> None:
        self._told: SimpleQueue[dict[str, Any]] = SimpleQueue()
        self._log_bytes = 0
        self._told_s = 0.0
        threading.Thread(target=self._read, args=(program.stdout,), daemon=True).start()

    def next(self, timeout_s: float) -> dict[str, Any] | None:
        """Return what is to be told next, None if nothing came for so long."""
        try:
            return self._told.get(timeout=timeout_s)
        except Empty:
            return None

    def _read(self, pipe: Any) -> None:
        with contextlib.suppress(ValueError, OSError):  # closed under it when the program is ended
            while line := pipe.readline(LINE_BYTES_MAX):
                self._log(line)
                self._tell(_progress(line))

    def _tell(self, progress: Mapping[str, Any]) -> None:
        if progress or time.monotonic() - self._told_s > TELL_EVERY_S:
            self._told_s = time.monotonic()
            self._told.put(dict(progress))

    def _log(self, line: bytes) -> None:
        before = self._log_bytes
        self._log_bytes += len(line)
        if self._log_bytes <= LOG_BYTES_MAX:
            os.write(2, line)
        elif before <= LOG_BYTES_MAX:
            os.write(2, b"... more was printed and dropped\n")


def _progress(line: bytes) -> dict[str, Any]:
    """Return round, rounds and metrics of a line of JSON; nothing for any other line."""
    try:
        found = json.loads(line) if line.startswith(b"{") else {}
    except ValueError:
        return {}
    return {key: found[key] for key in ("round", "rounds", "metrics") if key in found}
