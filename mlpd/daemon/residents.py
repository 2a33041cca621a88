"""What stays of reads: cells by layout, in step with the commits that a snapshot shows."""

import threading
from types import TracebackType
from typing import Self

from mlpd.daemon.part import Part
from mlpd.features.assemble import FrameLayout
from mlpd.features.resident import ResidentCells
from mlpd.storage.environment import Environment
from mlpd.storage.transactions import Snapshot

LAYOUTS_MAX = 8
"""Layouts whose cells are kept: of the services that were asked for last."""


class Residents:
    """The cells of the layouts read last; any thread, whoever comes meanwhile goes without."""

    def __init__(self, environment: Environment) -> None:
        self._touched = environment.touched
        self._lock = threading.Lock()
        self._cells: dict[FrameLayout, ResidentCells | None] = {}
        self._seen_id = 0
        self._part: Part | None = None

    def at(self, snapshot: Snapshot, part: Part | None) -> "ResidentsAt":
        """Return a context in which cells may be used that are right for a snapshot and a part."""
        return ResidentsAt(self, snapshot, part)

    def enter(self, snapshot: Snapshot, part: Part | None) -> bool:
        """Take the lock and forget what has changed; False if somebody has it, or is ahead."""
        if not self._lock.acquire(blocking=False):
            return False
        txn_id = snapshot.txn_id
        if txn_id < self._seen_id:
            self._lock.release()
            return False
        self._seen_id = txn_id
        touched = self._touched.take(txn_id)
        if part is not self._part:  # other entities are owned, and nobody checked them
            self._part, touched = part, None
        if touched is None or touched:
            for cells in self._cells.values():
                if cells is not None:
                    cells.forget(touched)
        return True

    def leave(self) -> None:
        """Give the lock back."""
        self._lock.release()

    def of(self, layout: FrameLayout) -> ResidentCells | None:
        """Return the cells of a layout, None if it keeps none; between `enter` and `leave`."""
        if layout not in self._cells:
            if len(self._cells) >= LAYOUTS_MAX:
                del self._cells[next(iter(self._cells))]
            self._cells[layout] = ResidentCells.of(layout)
        return self._cells[layout]


class ResidentsAt:
    """Context manager of `Residents.at`; `of` finds a layout's cells in it."""

    __slots__ = ("_is_in", "_part", "_residents", "_snapshot")

    def __init__(self, residents: Residents, snapshot: Snapshot, part: Part | None) -> None:
        self._residents, self._snapshot, self._part = residents, snapshot, part

    def __enter__(self) -> Self:
        self._is_in = self._residents.enter(self._snapshot, self._part)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._is_in:
            self._residents.leave()

    def of(self, layout: FrameLayout) -> ResidentCells | None:
        """Return the cells of a layout, None if they may not be used."""
        return self._residents.of(layout) if self._is_in else None
