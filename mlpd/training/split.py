"""Where rows in time order are cut: into train, valid and test, and into folds; pure.

What is judged always comes after what was trained on, groups are never cut in two, and a gap keeps
rows apart whose labels weren't known yet, or whose windows overlap.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mlpd.core.errors import ValidationError
from mlpd.core.specs import CrossValidationSpec


@dataclass(frozen=True, slots=True)
class Timeline:
    """Times int64 [n] in us, never going back: of each row, or of its group's first row.

    `starts`: row numbers at which a cut is allowed, ascending from 0.
    """

    t_us: NDArray[np.int64]
    starts: NDArray[np.int64]

    @classmethod
    def of(cls, t_us: NDArray[np.int64], sizes: NDArray[np.int64] | None = None) -> "Timeline":
        """Return the timeline of rows, or of groups of `sizes` rows one after the other."""
        if sizes is None:
            return cls(t_us, np.arange(len(t_us)))
        starts = np.cumsum(sizes) - sizes
        return cls(np.repeat(t_us[starts], sizes), starts)

    def __len__(self) -> int:
        return len(self.t_us)

    def cut(self, row: int) -> int:
        """Return the nearest allowed cut at or before `row`."""
        if row >= len(self):
            return len(self)
        return int(self.starts[np.searchsorted(self.starts, row, side="right") - 1])

    def before(self, row: int, gap_us: int) -> int:
        """Return the end of the rows before `row` that are `gap_us` older than it, or more."""
        if gap_us == 0 or row >= len(self):
            return row
        end = int(np.searchsorted(self.t_us, self.t_us[row] - gap_us, side="right"))
        return min(row, self.cut(end))


def split_rows(
    timeline: Timeline, *, valid_share: float, test_share: float, gap_us: int = 0
) -> dict[str, slice]:
    """Return the rows of train, valid and test: the last shares of the rows, in time order.

    Raises ValidationError (`empty_part`) where a part has no row.

    >>> split_rows(Timeline.of(np.arange(10)), valid_share=0.2, test_share=0.2)
    {'train': slice(0, 6, None), 'valid': slice(6, 8, None), 'test': slice(8, 10, None)}
    """
    n = len(timeline)
    test = timeline.cut(n - round(n * test_share))
    valid = timeline.cut(test - round(n * valid_share))
    parts = {
        "train": slice(0, timeline.before(valid, gap_us)),
        "valid": slice(valid, timeline.before(test, gap_us)),
        "test": slice(test, n),
    }
    for name, rows in parts.items():
        if rows.stop <= rows.start:
            raise _empty(f"the {name} part of {n} rows")
    return parts


def split_last(
    timeline: Timeline, rows: slice, *, share: float, gap_us: int = 0
) -> tuple[slice, slice]:
    """Return some rows without their last `share`, and that; raises as `split_rows`."""
    cut = max(rows.start, timeline.cut(rows.stop - round((rows.stop - rows.start) * share)))
    end = timeline.before(cut, gap_us)
    if end <= rows.start or cut >= rows.stop:
        raise _empty(f"a part of {rows.stop - rows.start} rows")
    return slice(rows.start, end), slice(cut, rows.stop)


def split_folds(
    timeline: Timeline, end: int, spec: CrossValidationSpec, gap_us: int = 0
) -> list[tuple[slice, slice]]:
    """Return for each fold what is trained on, and what comes next and is judged.

    The rows before `end` are cut into one block more than there are folds, of about equal numbers
    of rows.  Raises ValidationError (`empty_part`).

    >>> split_folds(Timeline.of(np.arange(6)), 6, CrossValidationSpec(2))
    [(slice(0, 2, None), slice(2, 4, None)), (slice(0, 4, None), slice(4, 6, None))]
    """
    blocks = spec.folds + 1
    cuts = [timeline.cut(round(end * i / blocks)) for i in range(blocks)] + [end]
    found = []
    for i in range(1, blocks):
        stop = timeline.before(cuts[i], gap_us)
        start = 0 if spec.window == "expanding" else timeline.cut(max(0, stop - cuts[1]))
        found.append((slice(start, stop), slice(cuts[i], cuts[i + 1])))
        if stop <= start or cuts[i + 1] <= cuts[i]:
            raise _empty(f"fold {i} of {spec.folds} over {end} rows")
    return found


def _empty(what: str) -> ValidationError:
    return ValidationError(
        f"{what} would be empty",
        code="empty_part",
        hint="Give the job more rows, fewer folds, other shares, or a shorter gap.",
    )
