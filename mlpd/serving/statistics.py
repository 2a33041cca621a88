"""What is known of a model's runs: the counters that the protocol reports, and the cost per row."""

import math
from dataclasses import dataclass, field
from typing import Any, NamedTuple

BATCH_SIZES_MAX = 256
"""Batch sizes that are counted apart; later ones are counted together, as size 0."""


class Execution(NamedTuple):
    """One run of a graph: its rows, and nanoseconds before, in and after it."""

    rows: int
    input_ns: int
    infer_ns: int
    output_ns: int

    def total_ns(self) -> int:
        """Return the nanoseconds of all three."""
        return self.input_ns + self.infer_ns + self.output_ns


@dataclass(slots=True)
class RunCost:
    """Moving average of the time that a graph takes per row; decides where it runs.

    Rows weigh equally, so batches tell more than single rows; half of the weight is in the last
    seven runs.  A sample counts at most four times the average: one preempted run of 10 ms must
    not drive a model of 10 us off the loop.
    """

    us_per_row: float = 0.0
    _us: float = 0.0
    _rows: float = 0.0

    def add(self, rows: int, us: float) -> None:
        """Learn from a run of `rows` rows that took `us` microseconds."""
        if self._rows:
            us = min(us, 4.0 * self.us_per_row * rows)
        self._us = 0.9 * self._us + us
        self._rows = 0.9 * self._rows + rows
        self.us_per_row = self._us / self._rows

    def estimate_us(self, rows: int) -> float:
        """Return what `rows` rows will cost, infinite while nothing is known."""
        return rows * self.us_per_row if self._rows else math.inf


@dataclass(slots=True)
class BatchStatistics:
    """Executions of one batch size and the requests in them; times in nanoseconds, summed."""

    rows: int = 0
    executions: int = 0
    requests: int = 0
    queue_ns: int = 0
    input_ns: int = 0
    infer_ns: int = 0
    output_ns: int = 0

    def add(self, run: Execution, requests: int, queue_ns: int) -> None:
        """Count one execution; about 0.4 us."""
        self.rows += run.rows
        self.executions += 1
        self.requests += requests
        self.queue_ns += queue_ns
        self.input_ns += run.input_ns
        self.infer_ns += run.infer_ns
        self.output_ns += run.output_ns


@dataclass(slots=True)
class ModelStatistics:
    """All counters of one loaded version since it was loaded; only the loop touches them.

    `batches` is keyed by the rows of an execution; everything about executions is derived from it.
    """

    last_inference_ms: int = 0
    success_count: int = 0
    success_ns: int = 0
    fail_count: int = 0
    fail_ns: int = 0
    batches: dict[int, BatchStatistics] = field(default_factory=dict)

    def record_execution(self, run: Execution, *, requests: int, queue_ns: int) -> None:
        """Count one run of the graph for `requests` requests that waited `queue_ns` together."""
        batch = self.batches.get(run.rows)
        if batch is None:
            size = run.rows if len(self.batches) < BATCH_SIZES_MAX else 0
            batch = self.batches.setdefault(size, BatchStatistics())
        batch.add(run, requests, queue_ns)

    def record_success(self, *, total_ns: int, now_ms: int) -> None:
        """Count one answered request; `now_ms` is the wall clock in milliseconds since 1970."""
        self.success_count += 1
        self.success_ns += total_ns
        self.last_inference_ms = now_ms

    def record_failure(self, *, total_ns: int) -> None:
        """Count one request that ended in an error."""
        self.fail_count += 1
        self.fail_ns += total_ns

    @property
    def inference_count(self) -> int:
        """Rows that went through the graph."""
        return sum(batch.rows for batch in self.batches.values())

    @property
    def execution_count(self) -> int:
        """Runs of the graph."""
        return sum(batch.executions for batch in self.batches.values())

    def to_dict(self) -> dict[str, Any]:
        """Return one element of the protocol's `model_stats`, without name and version.

        `queue` is the time between arrival and execution, `compute_input` merging requests into a
        batch, `compute_infer` the graph, `compute_output` the link; their counts are requests, in
        `batch_stats` executions.
        """
        batches = sorted(self.batches.items())
        return {
            "last_inference": self.last_inference_ms,
            "inference_count": self.inference_count,
            "execution_count": self.execution_count,
            "inference_stats": {
                "success": _duration(self.success_count, self.success_ns),
                "fail": _duration(self.fail_count, self.fail_ns),
                "queue": self._total("queue_ns"),
                "compute_input": self._total("input_ns"),
                "compute_infer": self._total("infer_ns"),
                "compute_output": self._total("output_ns"),
                "cache_hit": _duration(0, 0),
                "cache_miss": _duration(0, 0),
            },
            "batch_stats": [
                {
                    "batch_size": rows,
                    "compute_input": _duration(batch.executions, batch.input_ns),
                    "compute_infer": _duration(batch.executions, batch.infer_ns),
                    "compute_output": _duration(batch.executions, batch.output_ns),
                }
                for rows, batch in batches
            ],
        }

    def _total(self, name: str) -> dict[str, int]:
        batches = self.batches.values()
        return _duration(
            sum(batch.requests for batch in batches), sum(getattr(batch, name) for batch in batches)
        )


def _duration(count: int, ns: int) -> dict[str, int]:
    return {"count": count, "ns": ns}
