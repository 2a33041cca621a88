"""What is known of a model's runs: the counters that the protocol reports, and the cost per row."""

import math
from dataclasses import dataclass, field
from typing import Any

BATCH_SIZES_MAX = 256
"""Batch sizes that are counted apart."""


@dataclass(slots=True)
class Duration:
    """How often something happened and how long it took in all, in nanoseconds."""

    count: int = 0
    ns: int = 0

    def add(self, ns: int, count: int = 1) -> None:
        """Add `count` happenings that took `ns` nanoseconds together."""
        self.count += count
        self.ns += ns

    def to_dict(self) -> dict[str, int]:
        """Return `{"count", "ns"}`."""
        return {"count": self.count, "ns": self.ns}


@dataclass(slots=True)
class BatchStatistics:
    """Executions of one batch size: their count, and time before, in and after the graph."""

    compute_input: Duration = field(default_factory=Duration)
    compute_infer: Duration = field(default_factory=Duration)
    compute_output: Duration = field(default_factory=Duration)


@dataclass(frozen=True, slots=True)
class Execution:
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
class ModelStatistics:
    """All counters of one loaded version since it was loaded; only the loop touches them.

    `queue` is the time between arrival and execution, `compute_input` merging requests into a
    batch, `compute_infer` the graph, `compute_output` splitting the batch and applying the link.
    `batches` is keyed by rows and holds the first BATCH_SIZES_MAX sizes seen.
    """

    inference_count: int = 0
    execution_count: int = 0
    last_inference_ms: int = 0
    success: Duration = field(default_factory=Duration)
    fail: Duration = field(default_factory=Duration)
    queue: Duration = field(default_factory=Duration)
    compute_input: Duration = field(default_factory=Duration)
    compute_infer: Duration = field(default_factory=Duration)
    compute_output: Duration = field(default_factory=Duration)
    batches: dict[int, BatchStatistics] = field(default_factory=dict)

    def record_execution(self, run: "Execution", *, requests: int, queue_ns: int) -> None:
        """Count one run of the graph for `requests` requests that waited `queue_ns` together."""
        self.inference_count += run.rows
        self.execution_count += 1
        self.queue.add(queue_ns, requests)
        self.compute_input.add(run.input_ns, requests)
        self.compute_infer.add(run.infer_ns, requests)
        self.compute_output.add(run.output_ns, requests)
        batch = self.batches.get(run.rows)
        if batch is None:
            if len(self.batches) == BATCH_SIZES_MAX:
                return
            batch = self.batches[run.rows] = BatchStatistics()
        batch.compute_input.add(run.input_ns)
        batch.compute_infer.add(run.infer_ns)
        batch.compute_output.add(run.output_ns)

    def record_success(self, *, total_ns: int, now_ms: int) -> None:
        """Count one answered request; `now_ms` is the wall clock in milliseconds since 1970."""
        self.success.add(total_ns)
        self.last_inference_ms = now_ms

    def record_failure(self, *, total_ns: int) -> None:
        """Count one request that ended in an error."""
        self.fail.add(total_ns)

    def to_dict(self) -> dict[str, Any]:
        """Return one element of the protocol's `model_stats`, without name and version."""
        nothing = Duration().to_dict()
        return {
            "last_inference": self.last_inference_ms,
            "inference_count": self.inference_count,
            "execution_count": self.execution_count,
            "inference_stats": {
                "success": self.success.to_dict(),
                "fail": self.fail.to_dict(),
                "queue": self.queue.to_dict(),
                "compute_input": self.compute_input.to_dict(),
                "compute_infer": self.compute_infer.to_dict(),
                "compute_output": self.compute_output.to_dict(),
                "cache_hit": nothing,
                "cache_miss": dict(nothing),
            },
            "batch_stats": [
                {
                    "batch_size": rows,
                    "compute_input": batch.compute_input.to_dict(),
                    "compute_infer": batch.compute_infer.to_dict(),
                    "compute_output": batch.compute_output.to_dict(),
                }
                for rows, batch in sorted(self.batches.items())
            ],
        }
