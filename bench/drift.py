"""Scenario drift: a window of served rows against the reference profile of a training set."""

import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.options import Options
from bench.turns import Case, in_turns
from mlpd.core.kernels import load_kernels
from mlpd.monitoring.counting import CountLayout, Counts
from mlpd.monitoring.drift import report
from mlpd.monitoring.reference import ReferenceProfile, build_reference

ROWS, FEATURES, BINS = 100_000, 20, 10
KERNELS = "mlpd.monitoring.count_kernel"
REPEATS = 5
"""A round is the fastest of so many: a round of some 10 ms is one time slice of a busy box."""

Rows = NDArray[np.float64]


def drift(options: Options) -> dict[str, Case]:
    """Drift of 100,000 x 20 against 100,000 x 20, against histograms and PSI in plain numpy.

    `live rows`: the profile is there, as in a daemon; rows are counted and the report is made, as
    for /v1/drift.  `both sides`: the profile is built, too, as when a model is trained.
    """
    rng = np.random.default_rng(1)
    reference, live = rng.normal(size=(ROWS, FEATURES)), rng.normal(0.1, 1.1, (ROWS, FEATURES))
    kernels: Any = load_kernels(KERNELS)
    names = [f"f{i}" for i in range(FEATURES)]

    def build() -> ReferenceProfile:
        return build_reference(reference, names=names, kinds=["numeric"] * FEATURES)

    def judge(profile: ReferenceProfile) -> float:
        counts = Counts(CountLayout(profile))
        counts.add_rows(live, kernels=kernels)
        return report(profile, counts).features[0].psi

    profile = build()
    known = [_plain_profile(reference[:, i]) for i in range(FEATURES)]

    def plain(edges_and_shares: list[tuple[Rows, Rows]]) -> float:
        found = [_plain_psi(live[:, i], *at) for i, at in enumerate(edges_and_shares)]
        return found[0]

    def plain_both() -> float:
        return plain([_plain_profile(reference[:, i]) for i in range(FEATURES)])

    _check_same(judge(profile), plain(known))
    return {
        "live rows": _case(options, lambda: judge(profile), lambda: plain(known)),
        "both sides": _case(options, lambda: judge(build()), plain_both),
    }


def _case(options: Options, ours: Callable[[], float], floor: Callable[[], float]) -> Case:
    ours(), floor()
    return in_turns(
        lambda: timed(ours),
        lambda: timed(floor),
        rounds=options.rounds,
        measure="ms",
        rows=ROWS,
        features=FEATURES,
    )


def timed(work: Callable[[], float]) -> Mapping[str, float]:
    taken = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        work()
        taken.append(1e3 * (time.perf_counter() - started))
    return {"ms": min(taken)}


def _plain_profile(values: Rows) -> tuple[Rows, Rows]:
    """Return inner decile edges, and the share of the values in each bin."""
    edges = np.quantile(values, np.arange(1, BINS) / BINS, method="inverted_cdf")
    return edges, _shares(values, edges)


def _plain_psi(values: Rows, edges: Rows, expected: Rows) -> float:
    found = _shares(values, edges)
    return float(((found - expected) * np.log(found / expected)).sum())


def _shares(values: Rows, edges: Rows) -> Rows:
    counts = np.bincount(np.searchsorted(edges, values, side="right"), minlength=BINS)
    return np.asarray(counts + 0.5) / (len(values) + 0.5 * BINS)


def _check_same(ours: float, floor: float) -> None:
    """Both sides must have measured the same thing; smoothing differs in the fourth digit."""
    if not abs(ours - floor) < 0.01 * floor:
        raise RuntimeError(f"PSI is {ours} here and {floor} in plain numpy")
