"""Scenario haproxy: what finding the shard of a key costs HAProxy, in its own CPU time."""

import asyncio
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

from bench.daemon import run_server
from bench.load import Target, run_round
from bench.options import Options, SkippedError
from bench.turns import Case, in_turns
from mlpd.cluster.haproxy.config import Front, parse_files, write_files
from mlpd.cluster.placement import first_map
from mlpd.core.shards import Shard

CONCURRENCY = 8
SHARDS = 3
START_S = 10.0

_PLAIN = """
defaults
    mode http
    timeout connect 1s
    timeout client 60s
    timeout server 60s

frontend plain
    bind {bind}
    {answer}
"""
_SHARD = "http-request return status 200 content-type text/plain string ok"
_PROXY = "default_backend shard\n\nbackend shard\n    server a 127.0.0.1:{port}"

KEYS = {
    "text key": {"x-mlpd-key": "carrier:B6"},
    "text key with a tag": {"x-mlpd-key": "%7Bcarrier:B6%7D.day"},
    "int64 key": {"x-mlpd-key-int": "1234567"},
    "key of bytes": {"x-mlpd-key-bytes": "c0I2AABpgAAAAAAAACo"},
    "no key": {},
}


def haproxy(options: Options) -> dict[str, Case]:
    """CPU time of HAProxy per request: with our slots, against plain proxying to one server.

    Both before the same shard, a third HAProxy that answers at once.
    """
    program = shutil.which("haproxy")
    if program is None:
        raise SkippedError("haproxy is missing: apt-get install haproxy")
    with tempfile.TemporaryDirectory(prefix="hap") as name:
        shard, front, plain = (free_port() for _ in range(3))
        configs = _write_configs(Path(name), shard, front, plain)
        with ExitStack() as stack:
            _, ours, theirs = (
                stack.enter_context(running(program, config, port))
                for config, port in zip(configs, (shard, front, plain), strict=True)
            )
            return {
                case: in_turns(
                    partial(_round, ours, front, headers, options.seconds),
                    partial(_round, theirs, plain, headers, options.seconds),
                    rounds=options.rounds,
                    measure="cpu_us",
                    concurrency=CONCURRENCY,
                )
                for case, headers in KEYS.items()
            }


def _write_configs(folder: Path, shard: int, front: int, plain: int) -> Sequence[Path]:
    """Return the configurations of the shard, of ours before it, and of the plain proxy."""
    shards = [Shard(f"s{i}", f"http://127.0.{i}.1:{shard}") for i in range(SHARDS)]
    files = parse_files(str(folder / "lb.cfg"), None)
    write_files(first_map("0f" * 16, shards), Front(f"127.0.0.1:{front}", 0), files)
    texts = {
        folder / "shard.cfg": _PLAIN.format(bind=f"0.0.0.0:{shard}", answer=_SHARD),
        folder / "plain.cfg": _PLAIN.format(
            bind=f"127.0.0.1:{plain}", answer=_PROXY.format(port=shard)
        ),
    }
    for path, text in texts.items():
        path.write_text(text)
    return folder / "shard.cfg", files.config, folder / "plain.cfg"


def _round(pid: int, port: int, headers: Mapping[str, str], seconds: float) -> dict[str, float]:
    """Return CPU microseconds of a process per request, under load, and requests per second."""
    target = Target(f"http://127.0.0.1:{port}/", [b"{}"], "application/json", headers)
    before = _cpu_ns(pid)
    found = asyncio.run(run_round(target, concurrency=CONCURRENCY, seconds=seconds))
    requests = found.requests_per_s * seconds
    return {
        "cpu_us": (_cpu_ns(pid) - before) / 1e3 / requests,
        "requests_per_s": found.requests_per_s,
    }


def _cpu_ns(pid: int) -> int:
    """Return the CPU time of all threads of a process."""
    threads = Path(f"/proc/{pid}/task").iterdir()
    return sum(int((thread / "schedstat").read_text().split()[0]) for thread in threads)


def free_port() -> int:
    """Return a port that nobody listens at now."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


@contextmanager
def running(program: str, config: Path, port: int) -> Iterator[int]:
    """Run haproxy until the block ends; yield its process id once it listens."""
    log = config.with_suffix(".log")
    command = [program, "-db", "-f", str(config)]
    with log.open("wb") as out, run_server(command, out.fileno()) as (process, started):
        while not _listens(port):
            if process.poll() is not None or time.perf_counter() - started > START_S:
                raise RuntimeError(f"haproxy did not start: {log.read_text()}")
            time.sleep(0.01)
        yield process.pid


def _listens(port: int) -> bool:
    with socket.socket() as connection:
        return connection.connect_ex(("127.0.0.1", port)) == 0
