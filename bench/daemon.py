"""A daemon of its own for a scenario: `mlpd serve` on a free port, stopped with the block."""

import http.client
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from mlpd.storage.lock import read_holder

START_S = 300.0
"""The first start on a machine compiles kernels."""
STOP_S = 60.0
_POLL_S = 0.002
_OK = 200


@dataclass(frozen=True, slots=True)
class Served:
    """A daemon that is ready; `start_s` from exec to the first 200 of /readyz."""

    url: str
    pid: int
    start_s: float


@contextmanager
def serve(
    directory: Path,
    *,
    storage: Mapping[str, object] | None = None,
    limits: Mapping[str, object] | None = None,
    training: Mapping[str, object] | None = None,
    module: str = "mlpd",
    environment: Mapping[str, str] | None = None,
) -> Iterator[Served]:
    """Run a daemon on `directory`; `storage`, `limits`, `training`: settings that differ.

    `module` is what takes the command line: mlpd, or bench.watch around it.
    """
    directory.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", module, "serve", "--data-dir", str(directory), "--port", "0"]
    given = {"storage": storage or {}, "limits": limits or {}, "training": training or {}}
    if any(given.values()):
        config = directory.with_name(f"{directory.name}.toml")
        lines = []
        for section, settings in given.items():
            lines.append(f"[{section}]")  # of numbers, texts and truths JSON is TOML
            lines += [f"{name} = {json.dumps(value)}" for name, value in settings.items()]
        config.write_text("\n".join(lines), "utf-8")
        command += ["--config", str(config)]
    log = directory.with_name(f"{directory.name}.log")
    with (
        log.open("ab") as out,
        run_server(command, out.fileno(), environment) as (process, started),
    ):
        url = _wait_ready(directory / "daemon.lock", process, started, log)
        yield Served(url, process.pid, time.perf_counter() - started)


@contextmanager
def serve_router(log: Path, shards: Sequence[str], *options: str) -> Iterator[Served]:
    """Run `mlpd router` before `shards` with more `options`; it need not be ready yet."""
    command = [sys.executable, "-m", "mlpd", "router", "--port", "0", "--shards", ",".join(shards)]
    command += options
    with log.open("wb") as out, run_server(command, out.fileno()) as (process, started):
        while " is at " not in (text := log.read_text("utf-8", "replace")):
            if process.poll() is not None or time.perf_counter() - started > START_S:
                raise RuntimeError(f"the router did not start:\n{text}")
            time.sleep(_POLL_S)
        url = text.partition(" is at ")[2].split()[0]
        yield Served(url, process.pid, time.perf_counter() - started)


@contextmanager
def run_server(
    command: list[str], out: int, environment: Mapping[str, str] | None = None
) -> Iterator[tuple[subprocess.Popen[bytes], float]]:
    """Run a server until the block ends; yield its process and when it was started."""
    started = time.perf_counter()
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=out,
        stderr=out,
        env={**os.environ, **(environment or {})},
    )
    try:
        yield process, started
    finally:
        process.terminate()
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def is_ready(url: str) -> bool:
    """Tell whether /readyz answers 200."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=10.0)
    try:
        connection.request("GET", "/readyz")
        return connection.getresponse().status == _OK
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def memory_mb(pid: int, *, peak: bool = False) -> float:
    """Return the resident memory of a process in MB, now or at its largest.

    Not getrusage's peak: that begins with the memory of the process that forked this one.
    """
    field = "VmHWM:" if peak else "VmRSS:"
    lines = Path(f"/proc/{pid}/status").read_text("utf-8").splitlines()
    (kib,) = (int(line.split()[1]) for line in lines if line.startswith(field))
    return kib * 1024 / 1e6


def training_children(pid: int) -> list[int]:
    """Return the ids of the children of a daemon that train."""
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        with suppress(OSError):  # a thread, or a child, that has ended meanwhile
            for child in map(int, (task / "children").read_text().split()):
                if b"\0train\0" in Path(f"/proc/{child}/cmdline").read_bytes():
                    found.append(child)  # noqa: PERF401 - those before one that ended stay
    return found


def _wait_ready(lock: Path, process: "subprocess.Popen[bytes]", started: float, log: Path) -> str:
    while process.poll() is None and time.perf_counter() - started < START_S:
        holder = read_holder(lock)
        if holder and holder["pid"] == process.pid and holder["url"] and is_ready(holder["url"]):
            return str(holder["url"])
        time.sleep(_POLL_S)
    tail = "\n".join(log.read_text("utf-8", "replace").splitlines()[-12:])
    raise RuntimeError(f"the daemon did not start; its log ends with:\n{tail}")
