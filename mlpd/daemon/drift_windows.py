"""Windows of live counts: a version's routes and arms added, step by step, and what came before."""

from collections.abc import Iterable, Sequence

from mlpd.core.time import DAY_US, MAX_TIME_US
from mlpd.monitoring.buckets import BUCKET_US
from mlpd.monitoring.counting import Counts
from mlpd.monitoring.live import LiveCounts

WEEK_US = 7 * DAY_US


def windows_of(
    live: Sequence[LiveCounts], start_us: int, end_us: int, step_us: int
) -> list[tuple[int, Counts]]:
    """Return (start, counts) of each step in which anything was served, arms and routes added."""
    steps: dict[int, Counts] = {}
    for counts in live:
        for at, part in counts.series(start_us, end_us, max(1, step_us)):
            if at in steps:
                steps[at].add(part)
            else:
                steps[at] = part
    return sorted(steps.items())


def newest_us(live: Iterable[LiveCounts]) -> int:
    """Return the end of the newest bucket; 0 without any."""
    starts = [at for counts in live for at, _ in counts.series(0, MAX_TIME_US, BUCKET_US)]
    return max(starts, default=-BUCKET_US) + BUCKET_US


def before(live: Sequence[LiveCounts], start_us: int, end_us: int, count: int) -> Counts:
    """Return the sum of the `count` windows of the same width right before [start, end)."""
    return _within(live, [(start_us - count * (end_us - start_us), start_us)])


def same_hour(live: Sequence[LiveCounts], start_us: int, end_us: int, count: int) -> Counts:
    """Return the sum of [start, end) in each of the `count` weeks before."""
    weeks = range(1, count + 1)
    return _within(live, [(start_us - week * WEEK_US, end_us - week * WEEK_US) for week in weeks])


def _within(live: Sequence[LiveCounts], spans: Sequence[tuple[int, int]]) -> Counts:
    total = Counts(live[0].layout)
    for counts in live:
        for start_us, end_us in spans:
            total.add(counts.within(start_us, end_us))
    return total
