"""Closed-loop load on one endpoint, and the comparison of two of them round by round."""

import asyncio
import os
import platform
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import aiohttp


@dataclass(frozen=True, slots=True)
class Target:
    """What is asked: the same headers for every request, `bodies` in turn."""

    url: str
    bodies: Sequence[bytes]
    content_type: str = "application/msgpack"


@dataclass(frozen=True, slots=True)
class Round:
    """One measured round of one target."""

    requests_per_s: float
    p50_ms: float
    p99_ms: float


async def run_round(target: Target, *, concurrency: int, seconds: float) -> Round:
    """Ask `target` with `concurrency` requests under way for `seconds`; all must be answered."""
    latencies: list[float] = []
    stop = time.perf_counter() + seconds
    headers = {"Content-Type": target.content_type, "Accept": target.content_type}

    async def worker(session: aiohttp.ClientSession, first: int) -> None:
        index = first
        while (started := time.perf_counter()) < stop:
            body = target.bodies[index % len(target.bodies)]
            async with session.post(target.url, data=body, headers=headers) as response:
                answer = await response.read()
                if response.status != 200:  # noqa: PLR2004 - OK
                    raise RuntimeError(f"{target.url}: {response.status} {answer[:300]!r}")
            latencies.append(time.perf_counter() - started)
            index += concurrency

    started = time.perf_counter()
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        await asyncio.gather(*(worker(session, i) for i in range(concurrency)))
    elapsed = time.perf_counter() - started
    latencies.sort()
    return Round(
        len(latencies) / elapsed,
        1e3 * latencies[len(latencies) // 2],
        1e3 * latencies[int(len(latencies) * 0.99)],
    )


def compare(
    ours: Target, bare: Target, *, concurrency: int, seconds: float, rounds: int
) -> dict[str, Any]:
    """Return both targets' figures and their ratio, measured in turns after a warm-up."""

    def one(target: Target, length: float) -> Round:
        return asyncio.run(run_round(target, concurrency=concurrency, seconds=length))

    for target in (ours, bare):
        one(target, seconds / 2)
    pairs = [(one(ours, seconds), one(bare, seconds)) for _ in range(rounds)]
    return {
        "concurrency": concurrency,
        "ratio": spread(a.requests_per_s / b.requests_per_s for a, b in pairs),
        "ours": _figures([a for a, _ in pairs]),
        "bare": _figures([b for _, b in pairs]),
    }


def spread(values: Iterator[float] | Sequence[float]) -> dict[str, float]:
    """Return the least, the median and the greatest of `values`."""
    found = sorted(values)
    return {
        "min": round(found[0], 3),
        "median": round(statistics.median(found), 3),
        "max": round(found[-1], 3),
    }


def _figures(rounds: Sequence[Round]) -> dict[str, Any]:
    return {
        "requests_per_s": spread([r.requests_per_s for r in rounds]),
        "p50_ms": spread([r.p50_ms for r in rounds]),
        "p99_ms": spread([r.p99_ms for r in rounds]),
    }


def machine() -> dict[str, Any]:
    """Return what the figures were measured on."""
    packages = ("aiohttp", "lmdb", "numpy", "onnxruntime", "lightgbm", "msgpack")
    return {
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "load_before": round(os.getloadavg()[0], 2),
        **{name: version(name) for name in packages},
    }
