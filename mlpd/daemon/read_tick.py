"""Small reads that come in one turn of the loop, as one read: a snapshot and a native call for all.

As the batcher does with predictions: whoever comes alone is served at once; while others come, all
wait for the next turn, and no longer.  There is no timer.
"""

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from mlpd.core.deadlines import check_deadline
from mlpd.core.errors import DeadlineExceededError
from mlpd.core.specs import Closure
from mlpd.daemon.read import Read, ReadResult, given_columns

ROWS_MAX: Final = 128
"""What one turn of the loop reads, in rows as `rows_worth` counts: as `OFF_LOOP_ROWS`."""


class ReadPart(NamedTuple):
    """A request's part of a read: the rows from `start` up to `stop`."""

    result: ReadResult
    start: int
    stop: int


@dataclass(slots=True, eq=False)
class _Asked:
    closure: Closure
    rows: Sequence[Mapping[str, Any]]
    worth: int
    min_sequence: int
    deadline_s: float | None
    future: "asyncio.Future[ReadPart]"


class ReadTick:
    """Reads features as of now, for requests of at most ROWS_MAX rows; belongs to one loop.

    What waits is bounded by the limit on requests under way.
    """

    def __init__(self, read: Read) -> None:
        self._read = read
        self._waiting: list[_Asked] = []
        self._is_scheduled = False
        self._is_crowded = False

    async def read(
        self,
        closure: Closure,
        rows: Sequence[Mapping[str, Any]],
        worth: int,
        min_sequence: int = 0,
        deadline_s: float | None = None,
    ) -> ReadPart:
        """Return the features of request rows; raises as `given_columns` and `Read.read` do.

        `worth`: as how many rows they count.

        The read may be shared with others of the same closure: what is wrong with their rows, or
        what they wait for, is never seen here.  DeadlineExceededError if its turn comes too late.
        """
        future: asyncio.Future[ReadPart] = asyncio.get_running_loop().create_future()
        asked = _Asked(closure, rows, worth, min_sequence, deadline_s, future)
        self._schedule()
        if not self._is_crowded and not self._waiting:
            # Whoever else comes in this turn of the loop waits for the tick that ends it.
            self._is_crowded = True
            check_deadline(deadline_s, "its turn came")
            return self._together([asked])[0]
        self._waiting.append(asked)
        return await future

    def _schedule(self) -> None:
        if not self._is_scheduled:
            self._is_scheduled = True
            asyncio.get_running_loop().call_soon(self._tick)

    def _tick(self) -> None:
        """Serve what came during the last turn of the loop, ROWS_MAX rows of it."""
        self._is_scheduled = False
        taken = self._take()
        for group in _by_closure(asked for asked in taken if _is_awaited(asked)):
            self._settle(group)
        # One alone means that the crowd has gone: the next request needn't wait for a tick.
        self._is_crowded = len(taken) > 1 or bool(self._waiting)
        if self._waiting:
            self._schedule()

    def _take(self) -> list[_Asked]:
        """Return the first who wait: one, and more while they fit into a turn."""
        worth, end = self._waiting[0].worth if self._waiting else 0, 1
        while end < len(self._waiting) and worth + self._waiting[end].worth <= ROWS_MAX:
            worth += self._waiting[end].worth
            end += 1
        taken = self._waiting[:end]
        del self._waiting[:end]
        return taken

    def _settle(self, group: list[_Asked]) -> None:
        try:
            parts = self._together(group)
        except Exception as error:  # noqa: BLE001 - it is for whom it concerns
            if len(group) == 1:
                group[0].future.set_exception(error)
                return
            for asked in group:  # only the culprit sees the error
                self._settle([asked])
            return
        for asked, part in zip(group, parts, strict=True):
            asked.future.set_result(part)

    def _together(self, group: Sequence[_Asked]) -> list[ReadPart]:
        closure, rows = group[0].closure, [row for asked in group for row in asked.rows]
        min_sequence = max(asked.min_sequence for asked in group)
        given = given_columns(closure, rows)
        result = self._read.read(closure, given, min_sequence=min_sequence)
        parts, start = [], 0
        for asked in group:
            parts.append(ReadPart(result, start, start + len(asked.rows)))
            start += len(asked.rows)
        return parts


def _is_awaited(asked: _Asked) -> bool:
    """Tell whether somebody still waits, in time; settle it otherwise."""
    if asked.future.done():  # cancelled
        return False
    try:
        check_deadline(asked.deadline_s, "its turn came")
    except DeadlineExceededError as error:
        asked.future.set_exception(error)
        return False
    return True


def _by_closure(waiting: Iterator[_Asked]) -> list[list[_Asked]]:
    groups: dict[str, list[_Asked]] = {}
    for asked in waiting:
        groups.setdefault(asked.closure.hash, []).append(asked)
    return list(groups.values())
