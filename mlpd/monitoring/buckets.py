"""Time buckets of counts: five minutes wide while young, then hours, then days, then gone.

Counts add exactly, so widening old buckets loses nothing but time resolution, and memory stays
bounded: at the default retention at most 576 + 336 + 400 buckets of about 6 KB for 30 features.
"""

import heapq
from dataclasses import dataclass, field
from typing import Final

from mlpd.core.errors import ConfigurationError
from mlpd.core.time import DAY_US, HOUR_US, MINUTE_US
from mlpd.monitoring.counting import CountLayout, Counts

BUCKET_US: Final = 5 * MINUTE_US
WIDTHS_US: Final = (BUCKET_US, HOUR_US, DAY_US)

BucketId = tuple[int, int]
"""(width_us, start_us): the bucket holds times in [start, start + width)."""


@dataclass(frozen=True, slots=True)
class Retention:
    """How long buckets stay five minutes wide, then an hour, then a day; ages from the newest."""

    fine_us: int = 2 * DAY_US
    hourly_us: int = 14 * DAY_US
    daily_us: int = 400 * DAY_US

    def __post_init__(self) -> None:
        """Raise ConfigurationError unless the three ages ascend."""
        if not 0 < self.fine_us <= self.hourly_us <= self.daily_us:
            raise ConfigurationError(
                f"monitoring retention {self.fine_us}, {self.hourly_us}, {self.daily_us} us"
                " must be positive and ascending: fine, hourly, daily"
            )


@dataclass(frozen=True, slots=True)
class Changes:
    """What storage must do, in one transaction, to hold what memory holds."""

    put: dict[BucketId, bytes] = field(default_factory=dict)
    delete: tuple[BucketId, ...] = ()


class Buckets:
    """The buckets of one (model version, route, arm).  One thread at a time."""

    def __init__(self, layout: CountLayout, retention: Retention | None = None) -> None:
        self._layout = layout
        self._retention = retention or Retention()
        self._buckets: dict[BucketId, Counts] = {}
        self._dirty: set[BucketId] = set()
        self._deleted: set[BucketId] = set()
        self._starts: dict[int, list[int]] = {width_us: [] for width_us in WIDTHS_US}  # heaps
        self._newest_us: int | None = None
        self.expired_rows = 0
        """Rows that came with a time older than the retention and were not counted."""

    def __len__(self) -> int:
        """Return how many buckets are held."""
        return len(self._buckets)

    def counts_at(self, time_us: int) -> Counts | None:
        """Return the counts that a row of this time adds to; None if it is past retention.

        The bucket counts as changed.  A time newer than all before ages the older buckets.
        """
        if self._newest_us is None or time_us >= self._newest_us + BUCKET_US:
            self._newest_us = time_us - time_us % BUCKET_US
            self._age()
        bucket = self._bucket_of(time_us)
        return None if bucket is None else self._open(bucket)

    def between(self, start_us: int, end_us: int) -> Counts:
        """Return the sum over buckets that begin in [start, end): exact to their width."""
        whole = self.series(start_us, end_us, max(1, end_us - start_us))
        return whole[0][1] if whole else Counts(self._layout)

    def within(self, start_us: int, end_us: int) -> Counts:
        """Return the sum over buckets that lie in [start, end) as a whole: what a reference takes.

        Where buckets are wider than the window by now there are none.
        """
        total = Counts(self._layout)
        for (width_us, begin_us), counts in self._buckets.items():
            if start_us <= begin_us and begin_us + width_us <= end_us:
                total.add(counts)
        return total

    def series(self, start_us: int, end_us: int, step_us: int) -> list[tuple[int, Counts]]:
        """Return (start, sum) of each step of [start, end) in which a bucket begins, in order."""
        steps: dict[int, Counts] = {}
        for (_, begin_us), counts in sorted(self._buckets.items(), key=lambda item: item[0][1]):
            if start_us <= begin_us < end_us:
                step = start_us + (begin_us - start_us) // step_us * step_us
                steps.setdefault(step, Counts(self._layout)).add(counts)
        return list(steps.items())

    def restore(self, bucket: BucketId, data: bytes) -> None:
        """Take back a stored bucket at start; raises ValidationError if the profile is another."""
        width_us, start_us = bucket
        self._insert(bucket, Counts.from_bytes(data, self._layout))
        newest_us = start_us + width_us - BUCKET_US
        self._newest_us = max(newest_us, self._newest_us or newest_us)

    def take_changes(self) -> Changes:
        """Return what changed since the last call, and forget that it did."""
        put = {bucket: self._buckets[bucket].to_bytes() for bucket in sorted(self._dirty)}
        changes = Changes(put, tuple(sorted(self._deleted)))
        self._dirty, self._deleted = set(), set()
        return changes

    def _open(self, bucket: BucketId) -> Counts:
        counts = self._buckets.get(bucket)
        if counts is None:
            counts = self._insert(bucket, Counts(self._layout))
        self._dirty.add(bucket)
        return counts

    def _insert(self, bucket: BucketId, counts: Counts) -> Counts:
        width_us, start_us = bucket
        if bucket not in self._buckets:
            heapq.heappush(self._starts[width_us], start_us)
        self._buckets[bucket] = counts
        self._deleted.discard(bucket)
        return counts

    def _bucket_of(self, time_us: int) -> BucketId | None:
        for width_us, cut_us in zip(WIDTHS_US, self._cuts(), strict=True):
            if time_us >= cut_us:
                return width_us, time_us - time_us % width_us
        return None

    def _cuts(self) -> tuple[int, int, int]:
        """Return where each width begins, on a boundary of the next: no hour is half widened."""
        newest_us, kept = self._newest_us or 0, self._retention
        fine_us = newest_us - kept.fine_us
        hourly_us = newest_us - kept.hourly_us
        daily_us = newest_us - kept.daily_us
        return (
            fine_us - fine_us % HOUR_US,
            hourly_us - hourly_us % DAY_US,
            daily_us - daily_us % DAY_US,
        )

    def _age(self) -> None:
        for width_us, cut_us in zip(WIDTHS_US, self._cuts(), strict=True):
            starts = self._starts[width_us]
            while starts and starts[0] < cut_us:
                self._widen((width_us, heapq.heappop(starts)))

    def _widen(self, bucket: BucketId) -> None:
        counts = self._buckets.pop(bucket)
        self._dirty.discard(bucket)
        self._deleted.add(bucket)
        target = self._bucket_of(bucket[1])
        if target is not None:
            self._open(target).add(counts)
