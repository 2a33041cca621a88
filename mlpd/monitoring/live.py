"""What one model version serves on one route and arm, counted behind the hot path.

The loop appends references to a bounded list (a tenth of a microsecond); a worker thread drains it
in blocks of 512 rows into the five-minute bucket of each row's time.
"""

import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mlpd.monitoring.buckets import BUCKET_US, BucketId, Buckets, Changes, Retention
from mlpd.monitoring.count_kernel import BLOCK_ROWS
from mlpd.monitoring.counting import CountKernels, CountLayout, Counts

PENDING_ROWS_MAX: Final = 16_384
"""Rows waiting at most: a second of 16,000 predictions/s, 4 MB of 30 features."""


@dataclass(frozen=True, slots=True)
class ServedKey:
    """Whose rows are counted together."""

    model: str
    version: int
    route: str
    arm: str


_Row = tuple[NDArray[np.float64], float, int, NDArray[np.uint8] | None]


class _Batch(NamedTuple):
    """Drained rows: `rows` float64 [n, width], `times_us` int64 [n], `flags` uint8 [n, width]."""

    rows: NDArray[np.float64]
    times_us: NDArray[np.int64]
    flags: NDArray[np.uint8] | None


class LiveCounts:
    """Counts of one ServedKey.  The loop appends and never waits; other threads drain and read."""

    def __init__(
        self,
        layout: CountLayout,
        kernels: CountKernels,
        *,
        retention: Retention | None = None,
        pending_max: int = PENDING_ROWS_MAX,
    ) -> None:
        self.layout: Final = layout
        self._kernels = kernels
        self._features = len(layout.profile.features)
        self._buckets = Buckets(layout, retention)
        self._pending_max = pending_max
        self._rows: list[_Row] = []
        self._blocks: deque[tuple[NDArray[np.float64], NDArray[np.float64], int]] = deque()
        self._blocks_in = 0  # written by the appender alone
        self._blocks_out = 0  # written by the drainer alone
        self._lock = threading.Lock()
        self.dropped_rows = 0
        """Rows that found the pending list full; they are in the prediction log, not here."""

    @property
    def pending_rows(self) -> int:
        """How many rows wait to be counted."""
        return len(self._rows) + self._blocks_in - self._blocks_out

    @property
    def expired_rows(self) -> int:
        """How many rows came with a time older than the retention and were not counted."""
        return self._buckets.expired_rows

    def append(
        self,
        vector: NDArray[np.float64],
        score: float,
        time_us: int,
        flags: NDArray[np.uint8] | None = None,
    ) -> None:
        """Note one served row; the loop's thread only, 0.2 us.  A full list drops and counts it.

        `vector` is float64 [F] and must not be changed afterwards; `flags` is uint8 [F] with bit 1
        for a stale and bit 2 for a defaulted value.
        """
        rows = self._rows
        if len(rows) >= self._pending_max:
            self.dropped_rows += 1
            return
        rows.append((vector, score, time_us, flags))

    def append_block(
        self, vectors: NDArray[np.float64], scores: NDArray[np.float64], time_us: int
    ) -> None:
        """Note float64 [n, F] rows served together; otherwise as `append`, at its cost for all."""
        if self._blocks_in - self._blocks_out + len(vectors) > self._pending_max:
            self.dropped_rows += len(vectors)
        elif len(vectors):
            self._blocks_in += len(vectors)
            self._blocks.append((vectors, scores, time_us))

    def drain(self) -> list[tuple[int, int]]:
        """Count everything that waits, off the loop; return (bucket start in us, rows) counted.

        0.4 us per row of Python and numpy that hold the GIL, and 0.07 us of kernel that don't.
        """
        with self._lock:
            counted: list[tuple[int, int]] = []
            rows = self._rows[:]
            del self._rows[: len(rows)]
            for start in range(0, len(rows), BLOCK_ROWS):
                counted += self._count(self._stack_rows(rows[start : start + BLOCK_ROWS]))
            for _ in range(len(self._blocks)):
                vectors, scores, time_us = self._blocks.popleft()
                self._blocks_out += len(vectors)
                counted += self._count(self._stack_block(vectors, scores, time_us))
            return counted

    def between(self, start_us: int, end_us: int) -> Counts:
        """Return the sum over buckets that begin in [start, end): exact to their width."""
        with self._lock:
            return self._buckets.between(start_us, end_us)

    def within(self, start_us: int, end_us: int) -> Counts:
        """Return the sum over buckets that lie in [start, end) as a whole."""
        with self._lock:
            return self._buckets.within(start_us, end_us)

    def series(self, start_us: int, end_us: int, step_us: int) -> list[tuple[int, Counts]]:
        """Return (start, sum) of each step of [start, end) that has rows, for pictures over time.

        A step narrower than the buckets of its age gets the whole bucket that begins in it.
        """
        with self._lock:
            return self._buckets.series(start_us, end_us, step_us)

    def restore(self, bucket: BucketId, data: bytes) -> None:
        """Take back a stored bucket at start; raises ValidationError if the profile is another."""
        with self._lock:
            self._buckets.restore(bucket, data)

    def take_changes(self) -> Changes:
        """Return what storage must put and delete since the last call."""
        with self._lock:
            return self._buckets.take_changes()

    def _stack_rows(self, rows: list[_Row]) -> _Batch:
        matrix = self._empty(len(rows))
        vectors, scores, times_us, flags = zip(*rows, strict=True)
        matrix[:, : self._features] = np.concatenate(vectors).reshape(len(rows), -1)
        matrix[:, self._features :] = np.array(scores, np.float64)[:, None]
        return _Batch(matrix, np.array(times_us, np.int64), self._stack_flags(flags))

    def _stack_flags(self, flags: Sequence[NDArray[np.uint8] | None]) -> NDArray[np.uint8] | None:
        if all(row is None for row in flags):
            return None
        matrix = np.zeros((len(flags), self.layout.width), np.uint8)
        for index, row in enumerate(flags):
            if row is not None:
                matrix[index, : self._features] = row
        return matrix

    def _stack_block(
        self, vectors: NDArray[np.float64], scores: NDArray[np.float64], time_us: int
    ) -> _Batch:
        matrix = self._empty(len(vectors))
        matrix[:, : self._features] = vectors
        matrix[:, self._features :] = scores[:, None]
        return _Batch(matrix, np.full(len(vectors), time_us, np.int64), None)

    def _empty(self, rows: int) -> NDArray[np.float64]:
        return np.empty((rows, self.layout.width), np.float64)

    def _count(self, batch: _Batch) -> list[tuple[int, int]]:
        """Count a batch into the buckets of its times, oldest first."""
        starts = batch.times_us - batch.times_us % BUCKET_US
        order = np.argsort(starts, kind="stable")
        ordered = starts[order]
        cuts = np.flatnonzero(np.diff(ordered)) + 1
        counted: list[tuple[int, int]] = []
        for group in np.split(order, cuts):
            start_us = int(starts[group[0]])
            counts = self._buckets.counts_at(start_us)
            if counts is None:
                self._buckets.expired_rows += len(group)
                continue
            flags = None if batch.flags is None else batch.flags[group]
            counts.add_rows(batch.rows[group], kernels=self._kernels, flags=flags)
            counted.append((start_us, len(group)))
        return counted
