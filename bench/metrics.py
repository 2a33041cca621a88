"""Scenario metrics: an observation, and a scrape of 10,000 series, against prometheus_client."""

import time
from collections.abc import Callable, Mapping
from itertools import repeat
from typing import Any

from bench.options import Options, SkippedError
from bench.turns import Case, in_turns
from mlpd.monitoring.exposition import encode
from mlpd.monitoring.instruments import LATENCY_BUCKETS_S
from mlpd.monitoring.metrics import Registry

OBSERVATIONS = 100_000
COUNTERS, HISTOGRAMS = 5_000, 295
"""With 17 series of each histogram, 10,015 series."""

REPEATS = 5
"""A round is the fastest of so many, in the thread's own CPU time: others may use the box."""


def metrics(options: Options) -> dict[str, Case]:
    """Cost of an observation with its labels looked up before, and of a scrape, in CPU time.

    Against prometheus_client, whose children are looked up before, too.  An observation of ours is
    folded within the time that is measured.
    """
    try:
        import prometheus_client as theirs  # noqa: PLC0415 - of the extra `test`
    except ImportError:
        raise SkippedError("prometheus_client is missing: pip install -e '.[test]'") from None
    # Series that ours does without.
    theirs.disable_created_metrics()  # type: ignore[no-untyped-call]  # theirs has no types there
    ours, registry = Registry(max_series=20_000), theirs.CollectorRegistry()
    our_counters = ours.counter("mlpd_a_total", "A.", labels=("route", "code"))
    our_times = ours.histogram("mlpd_b_seconds", "B.", labels=("route",), unit="seconds")
    counters = theirs.Counter("a", "A.", ["route", "code"], registry=registry)
    times = theirs.Histogram("b", "B.", ["route"], registry=registry, buckets=LATENCY_BUCKETS_S)
    for i in range(COUNTERS):
        our_counters.labels(f"r{i}", "200").inc()
        counters.labels(f"r{i}", "200").inc()
    for i in range(HISTOGRAMS):
        our_times.labels(f"r{i}").observe(0.002)
        times.labels(f"r{i}").observe(0.002)
    observe, count = our_times.labels("r0").observe, our_counters.labels("r0", "200").inc
    return {
        "histogram": _observed(options, observe, times.labels("r0").observe),
        "counter": _observed(options, count, counters.labels("r0", "200").inc),
        "scrape": in_turns(
            lambda: _timed(lambda: encode(ours, "text"), "ms", 1e6),
            lambda: _timed(lambda: theirs.generate_latest(registry), "ms", 1e6),
            rounds=options.rounds,
            measure="ms",
            series=ours.series,
        ),
    }


def _observed(options: Options, ours: Callable[[float], None], other: Any) -> Case:
    def many(observe: Callable[[float], None]) -> Mapping[str, float]:
        def work() -> None:
            for value in repeat(0.002, OBSERVATIONS):
                observe(value)

        return _timed(work, "ns", float(OBSERVATIONS))

    return in_turns(lambda: many(ours), lambda: many(other), rounds=options.rounds, measure="ns")


def _timed(work: Callable[[], object], unit: str, divisor: float) -> Mapping[str, float]:
    taken = []
    for _ in range(REPEATS):
        started_ns = time.thread_time_ns()
        work()
        taken.append((time.thread_time_ns() - started_ns) / divisor)
    return {unit: min(taken)}
