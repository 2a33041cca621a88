"""Two sides measured in turns in one run: medians, spreads, and the ratio of the medians."""

import os
import platform
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

Side = Callable[[], Mapping[str, float]]
"""Runs one round; returns its figures by name, units last (`requests_per_s`, `p50_ms`)."""

Case = dict[str, Any]
"""`measure`, `ratio` (of `measure`, ours over the other's), `ours`, `against`, and `notes`."""

PACKAGES = ("aiohttp", "lmdb", "lightgbm", "msgpack", "numba", "numpy", "onnxruntime", "polars")


def in_turns(ours: Side, floor: Side, *, rounds: int, measure: str, **notes: Any) -> Case:
    """Return both sides' figures over `rounds` rounds of each.

    `ratio`: the median is that of the medians, min and max are of the rounds' own ratios.  Who
    begins changes from round to round, so that a machine that slows down favours nobody.  Warming
    up is the caller's.  `notes` is kept with the figures.
    """
    pairs: list[tuple[Mapping[str, float], Mapping[str, float]]] = []
    for number in range(rounds):
        if number % 2:
            second = floor()
            pairs.append((ours(), second))
        else:
            pairs.append((ours(), floor()))
    return compared(pairs, measure=measure, **notes)


def compared(
    pairs: Sequence[tuple[Mapping[str, float], Mapping[str, float]]], *, measure: str, **notes: Any
) -> Case:
    """Return both sides' figures over rounds that were measured; ratios as `in_turns`."""
    a, b = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    ratios = sorted(x[measure] / y[measure] for x, y in pairs)
    median = statistics.median(x[measure] for x in a) / statistics.median(y[measure] for y in b)
    return {
        "measure": measure,
        "ratio": {"median": _short(median), "min": _short(ratios[0]), "max": _short(ratios[-1])},
        "ours": spreads(a),
        "against": spreads(b),
        "rounds": len(pairs),
        **({"notes": notes} if notes else {}),
    }


def alone(ours: Side, *, rounds: int, measure: str, **notes: Any) -> Case:
    """Return figures of something that has no floor to compare with."""
    return build_case([ours() for _ in range(rounds)], measure=measure, **notes)


def build_case(rounds: Sequence[Mapping[str, float]], *, measure: str, **notes: Any) -> Case:
    """Return figures over rounds that were measured, of something without a floor."""
    kept = {"notes": notes} if notes else {}
    return {"measure": measure, "ours": spreads(rounds), "rounds": len(rounds), **kept}


def spread(values: Iterable[float]) -> dict[str, float]:
    """Return the median, the least and the greatest of `values`."""
    found = sorted(values)
    return {
        "median": _short(statistics.median(found)),
        "min": _short(found[0]),
        "max": _short(found[-1]),
    }


def spreads(rounds: Sequence[Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """Return the spread of each figure over rounds that all have the same ones."""
    return {name: spread(found[name] for found in rounds) for name in rounds[0]}


def machine(folder: Path | None = None) -> dict[str, Any]:
    """Return what the figures were measured on; `folder` is where the data lies."""
    return {
        "cores": os.cpu_count(),
        "processor": _processor(),
        "machine": platform.machine(),
        "system": platform.system(),
        "python": platform.python_version(),
        "load_before": round(os.getloadavg()[0], 2),
        **({} if folder is None else {"filesystem": filesystem(folder)}),
        **{name: version(name) for name in PACKAGES},
    }


def filesystem(folder: Path) -> str:
    """Return the type of the file system that `folder` lies on: fsync on tmpfs costs nothing."""
    mounts = [line.split() for line in Path("/proc/mounts").read_text("utf-8").splitlines()]
    held = [(len(m[1]), m[2]) for m in mounts if folder.resolve().is_relative_to(m[1])]
    return max(held)[1] if held else "unknown"


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    found = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return found[0] if found else "unknown"


def _short(value: float) -> float:
    """Return five digits: more than any of these figures is worth."""
    return float(f"{value:.5g}")
