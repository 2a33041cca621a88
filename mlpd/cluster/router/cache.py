"""Cache: rows of features that were read a short while ago; gone when a slot of theirs changes."""

import time
from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from mlpd.core.hashing import SLOTS

Stamp = tuple[int, ...]
"""How often what a row is made of had changed: all of it, then each of its slots."""


class Row(NamedTuple):
    """What a read answered for one row; `layout` names the values: of columns, of event times."""

    layout: tuple[tuple[str, ...], tuple[str, ...]]
    values: tuple[Any, ...]
    statuses: tuple[Any, ...]
    times: tuple[Any, ...]
    t_us: int
    sequence: Any


class _Kept(NamedTuple):
    row: Row
    slots: Sequence[int]
    stamp: Stamp
    until_s: float


class HotKeys:
    """Keeps at most `rows_max` rows for `max_age_s` each, 0 for none; on the loop alone.

    What is used moves to the end; the first goes when there are too many.  `now_s`: a clock in
    seconds that never goes back.
    """

    def __init__(
        self, max_age_s: float, rows_max: int, now_s: Callable[[], float] = time.monotonic
    ) -> None:
        self.max_age_s = self._age_s = max_age_s
        self.hits = self.misses = 0
        self._rows_max = rows_max
        self._now_s = now_s
        self._kept: OrderedDict[bytes, _Kept] = OrderedDict()
        self._all = 0
        self._by_slot = array("Q", bytes(8 * SLOTS))

    def __len__(self) -> int:
        return len(self._kept)

    def bound(self, freshness_s: float | None) -> None:
        """Let no row grow older than features promise to be; None where they promise nothing."""
        self._age_s = self.max_age_s if freshness_s is None else min(self.max_age_s, freshness_s)

    def forget(self, slots: Iterable[int] | None = None) -> None:
        """Let go of rows of some slots, None for all; also of those that are being read now."""
        if slots is None:
            self._all += 1
            self._kept.clear()
            return
        for slot in slots:
            self._by_slot[slot] += 1

    def stamp(self, slots: Sequence[int]) -> Stamp:
        """Return how often what rows of these slots are made of has changed, before a read."""
        return (self._all, *(self._by_slot[slot] for slot in slots))

    def find(self, key: bytes) -> Row | None:
        """Return a row that is as it was, None for another; 1 us."""
        found = self._kept.get(key)
        if found is None or self._now_s() >= found.until_s:
            self.misses += 1
            return None
        if found.stamp != self.stamp(found.slots):
            del self._kept[key]
            self.misses += 1
            return None
        self._kept.move_to_end(key)
        self.hits += 1
        return found.row

    def keep(self, key: bytes, slots: Sequence[int], stamp: Stamp, row: Row) -> None:
        """Keep a row that was read, unless a slot has changed since `stamp`."""
        if stamp != self.stamp(slots):
            return
        self._kept[key] = _Kept(row, slots, stamp, self._now_s() + self._age_s)
        self._kept.move_to_end(key)
        while len(self._kept) > self._rows_max:
            self._kept.popitem(last=False)


def split_answer(answer: Mapping[str, Any], rows: int) -> list[Row | None]:
    """Return the rows of an answer, None for those that failed."""
    groups = answer["columns"], answer["statuses"], answer["event_times"]
    layout = tuple(groups[0]), tuple(groups[2])
    failed = {error["index"] for error in answer.get("errors", ())}
    t_us, sequence = answer["t_us"], answer["sequence"]
    columns, statuses, times = (_by_row(group, rows) for group in groups)
    return [
        None if i in failed else Row(layout, columns[i], statuses[i], times[i], t_us, sequence)
        for i in range(rows)
    ]


def join_rows(rows: Sequence[Row | None], errors: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the answer that has these rows, at least one, and None where there is none.

    `t_us` and `sequence` are the oldest of them.
    """
    there = [row for row in rows if row is not None]
    columns, times = there[0].layout
    parts: dict[str, Any] = {}
    for part, names, field in (
        ("columns", columns, "values"),
        ("statuses", columns, "statuses"),
        ("event_times", times, "times"),
    ):
        values = [None if row is None else getattr(row, field) for row in rows]
        parts[part] = {
            n: [None if v is None else v[i] for v in values] for i, n in enumerate(names)
        }
    return {
        **parts,
        **({"errors": list(errors)} if errors else {}),
        "t_us": min(row.t_us for row in there),
        "sequence": _oldest([row.sequence for row in there]),
    }


def _by_row(columns: Mapping[str, Sequence[Any]], rows: int) -> list[tuple[Any, ...]]:
    return list(zip(*columns.values(), strict=True)) if columns else [()] * rows


def _oldest(sequences: Sequence[Any]) -> Any:
    """Return the smallest sequence; of those by shard, of each."""
    if not all(isinstance(sequence, Mapping) for sequence in sequences):
        return min(s for s in sequences if not isinstance(s, Mapping))
    found: dict[str, int] = {}
    for sequence in sequences:
        for shard, number in sequence.items():
            found[shard] = min(number, found.get(shard, number))
    return found
