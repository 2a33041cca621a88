"""Scenario counting: what noting and counting served rows costs, against numpy's histograms."""

import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.options import Options
from bench.turns import Case, alone, in_turns
from mlpd.core.kernels import load_kernels
from mlpd.monitoring.buckets import BUCKET_US
from mlpd.monitoring.counting import CountLayout, Counts
from mlpd.monitoring.live import PENDING_ROWS_MAX, LiveCounts
from mlpd.monitoring.reference import build_reference

ROWS, FEATURES, BINS = 100_000, 20, 10
BLOCKS = (1, 20)
REPEATS = 7
"""A round is the fastest of so many, in processor time: others on the machine don't count."""
KERNELS = "mlpd.monitoring.count_kernel"

Rows = NDArray[np.float64]


def counting(options: Options) -> dict[str, Case]:
    """Noting served rows on the request path, and counting them behind it with moments.

    `tap`: a block of rows is noted.  `kernel`: 20 features x 10 bins, with mean, M2, least and
    greatest value, against searchsorted and bincount of numpy without any of these.
    """
    rng = np.random.default_rng(1)
    rows = rng.normal(size=(ROWS, FEATURES))
    profile = build_reference(
        rng.normal(size=(ROWS, FEATURES)),
        names=[f"f{i}" for i in range(FEATURES)],
        kinds=["numeric"] * FEATURES,
    )
    layout, kernels = CountLayout(profile), _kernels()
    edges = [np.asarray(column.keys) for column in profile.features]

    def count() -> None:
        Counts(layout).add_rows(rows, kernels=kernels)

    def plain() -> None:
        for index, cuts in enumerate(edges):
            np.bincount(np.searchsorted(cuts, rows[:, index], side="right"), minlength=BINS)

    count()
    found = {
        f"tap, blocks of {size}": alone(
            partial(_tap, layout, kernels, rows, size),
            rounds=options.rounds,
            measure="us_per_row",
        )
        for size in BLOCKS
    }
    found["kernel"] = in_turns(
        lambda: {"ns_per_row": _fastest(count) / ROWS},
        lambda: {"ns_per_row": _fastest(plain) / ROWS},
        rounds=options.rounds,
        measure="ns_per_row",
        features=FEATURES,
        bins=BINS,
    )
    return found


def _kernels() -> Any:
    return load_kernels(KERNELS)


def _tap(layout: CountLayout, kernels: Any, rows: Rows, size: int) -> Mapping[str, float]:
    """Note as many blocks as may wait, the arrays made before, as predictions bring them."""
    blocks = [rows[at : at + size] for at in range(0, PENDING_ROWS_MAX - size + 1, size)]
    scores = np.zeros(size)

    def note() -> None:
        live = LiveCounts(layout, kernels)
        for block in blocks:
            live.append_block(block, scores, BUCKET_US)

    return {"us_per_row": _fastest(note) / 1e3 / (size * len(blocks))}


def _fastest(work: Callable[[], None]) -> float:
    taken = []
    for _ in range(REPEATS):
        started = time.process_time_ns()
        work()
        taken.append(time.process_time_ns() - started)
    return min(taken)
