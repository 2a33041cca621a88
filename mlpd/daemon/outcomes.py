"""What predictions and labels teach: performance and experiments, live and rebuilt after a start.

Both are sums over the prediction log and its labels.  After a start they are rebuilt from there
while serving goes on; what happens meanwhile waits and is taken in afterwards, so nothing counts
twice: predictions made since the start are skipped by the scan, and a label changed since is read
as it was before.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from functools import partial

from mlpd.daemon.experiments import Coming, Experiments
from mlpd.daemon.feedback import LabelChange
from mlpd.daemon.moved_rows import runs_of
from mlpd.daemon.predictions import Label, Prediction, scan_predictions, slot_in
from mlpd.monitoring.live import ServedKey
from mlpd.monitoring.performance import CohortKey, Outcome, PerformanceTable, cohort_of
from mlpd.storage.environment import Environment

_SLICE_ROWS = 100
"""Rows per turn of the loop while rebuilding: below 1 ms."""

Row = tuple[Prediction, Label | None]


class Outcomes:
    """Feeds performance and experiments; every method belongs to the loop.

    Counts are of the slots that this shard owns, all on a daemon without a map.
    """

    def __init__(self, performance: PerformanceTable, experiments: Experiments) -> None:
        self._performance = performance
        self._experiments = experiments
        self._flags: bytes | None = None
        self._counting = True
        self._lock = asyncio.Lock()
        self._later: list[Prediction | LabelChange] = []
        self._served: set[str] = set()
        self._before: dict[str, Label | None] = {}

    @property
    def rebuilt(self) -> bool:
        """Whether all of the prediction log is taken in."""
        return not self._counting

    def counts(self, flags: bytes | None) -> bool:
        """Tell whether just these slots are counted."""
        return not self._counting and self._flags == flags

    def served(self, predictions: Sequence[Prediction]) -> None:
        """Take in predictions that were answered."""
        if self._counting or self._flags is not None:
            later = [p for p in predictions if not self._is_counted(p)]
            self._later += later
            self._served.update(p.prediction_id for p in later)
            predictions = [p for p in predictions if self._is_counted(p)]
        self._experiments.exposed(predictions)
        for prediction in predictions:
            self._performance.add_predictions(cohort(prediction), 1)

    def labelled(self, changes: Iterable[LabelChange]) -> None:
        """Take in labels that took effect."""
        for change in changes:
            if self._is_counted(change.prediction):
                self._label(change)
            else:
                self._before.setdefault(change.prediction.prediction_id, change.old)
                self._later.append(change)

    def joined(self, pairs: Iterable[tuple[Prediction, Label]]) -> None:
        """Take in labels that waited for the predictions that are stored now."""
        self.labelled(LabelChange(prediction, None, label) for prediction, label in pairs)

    async def rebuild(self, environment: Environment, flags: bytes | None = None) -> int:
        """Take in the prediction log as it was at the start; returns its rows.  Once, at start.

        `flags`: per slot 1 if it is owned, None for all.  Units of others are those that arrive.
        """
        async with self._lock:
            self._flags = flags
            total = await self._take_in(scan_predictions(environment))
            self._catch_up()
        return total

    async def go_by(
        self,
        environment: Environment,
        flags: bytes | None,
        settle: Callable[[], Awaitable[None]],
    ) -> list[int]:
        """Count the slots that are owned now, and those no more that aren't; return the gained.

        `settle` stores what is still to be stored of predictions that were answered.  What is said
        of them meanwhile waits, as after a start.  20 us per prediction, in slices.
        """
        async with self._lock:
            if flags == self._flags:
                return []
            gained, lost = _differing(self._flags, flags), _differing(flags, self._flags)
            self._counting = True
            await settle()
            self._flags = flags
            if lost:
                await self._take_out(environment, lost)
            for scan in _scans(environment, gained):
                await self._take_in(scan)
            self._experiments.expect_none()
            self._catch_up()
        return gained

    def _is_counted(self, prediction: Prediction) -> bool:
        return not self._counting and self._owns(prediction)

    def _owns(self, prediction: Prediction) -> bool:
        return self._flags is None or bool(self._flags[slot_in(prediction.prediction_id)])

    def _catch_up(self) -> None:
        """Take in what came while all was counted."""
        self._counting = False
        later, self._later, self._before, self._served = self._later, [], {}, set()
        for item in later:
            if isinstance(item, Prediction):
                self.served([item])
            else:
                self.labelled([item])

    async def _take_in(self, scan: Iterator[list[Row]]) -> int:
        total = 0
        while (rows := await asyncio.to_thread(next, scan, None)) is not None:
            await self._experiments.prepare(p for p, _ in rows)
            for start in range(0, len(rows), _SLICE_ROWS):
                total += self._take(rows[start : start + _SLICE_ROWS])
                await asyncio.sleep(0)
        return total

    def _take(self, rows: Sequence[Row]) -> int:
        mine = [(p, self._before.get(p.prediction_id, label)) for p, label in rows if self._owns(p)]
        old = [(p, label) for p, label in mine if p.prediction_id not in self._served]
        self._experiments.exposed(p for p, _ in old)
        for prediction, label in old:
            self._performance.add_predictions(cohort(prediction), 1)
            if label is not None:
                self._label(LabelChange(prediction, None, label))
        self._experiments.expect(coming(p) for p, _ in rows if not self._owns(p))
        return len(old)

    async def _take_out(self, environment: Environment, lost: Sequence[int]) -> None:
        """Take slots out of performance; of experiments, units that have predictions in them.

        A unit that has others here is taken in anew by those.
        """
        gone: dict[str, set[str]] = {}
        for scan in _scans(environment, lost):
            while (rows := await asyncio.to_thread(next, scan, None)) is not None:
                for start in range(0, len(rows), _SLICE_ROWS):
                    self._remove(rows[start : start + _SLICE_ROWS], gone)
                    await asyncio.sleep(0)
        if not gone:
            return
        staying = await asyncio.to_thread(self._find_rows, environment, gone)
        await self._forget(gone)
        await self._experiments.prepare(p for p, _ in staying)
        for number, (prediction, label) in enumerate(staying, start=1):
            self._experiments.exposed([prediction])
            if label is not None:
                self._experiments.labelled(prediction, None, label.label)
            if number % _SLICE_ROWS == 0:
                await asyncio.sleep(0)

    async def _forget(self, gone: dict[str, set[str]]) -> None:
        for name, units in gone.items():
            for number, unit in enumerate(units, start=1):
                self._experiments.forget(name, unit)
                if number % _SLICE_ROWS == 0:
                    await asyncio.sleep(0)

    def _remove(self, rows: Sequence[Row], gone: dict[str, set[str]]) -> None:
        for prediction, known in rows:
            if prediction.prediction_id in self._served:
                continue
            label = self._before.get(prediction.prediction_id, known)
            outcome = None if label is None else _outcome(prediction, label)
            revisions = 0 if label is None else label.revisions
            self._performance.take_out(cohort(prediction), prediction.score, outcome, revisions)
            if prediction.experiment is not None and prediction.unit is not None:
                gone.setdefault(prediction.experiment, set()).add(prediction.unit)

    def _find_rows(self, environment: Environment, units: dict[str, set[str]]) -> list[Row]:
        """Return the rows of units that stay, as they were when this began; in a thread."""
        return [
            (p, self._before.get(p.prediction_id, label))
            for rows in scan_predictions(environment)
            for p, label in rows
            if p.unit in units.get(p.experiment or "", ())
            and self._owns(p)
            and p.prediction_id not in self._served
        ]

    def _label(self, change: LabelChange) -> None:
        prediction, old, new = change.prediction, change.old, change.new
        if old is None or old.label != new.label:
            self._experiments.labelled(prediction, None if old is None else old.label, new.label)
        key, before = cohort(prediction), None if old is None else _outcome(prediction, old)
        self._performance.record(key, prediction.score, before, _outcome(prediction, new))
        if old is None:
            self._performance.add_revisions(key, new.revisions)


def _differing(old: bytes | None, new: bytes | None) -> list[int]:
    """Return the slots that are in `new` and not in `old`, None having all."""
    if old is None:
        return []
    return [slot for slot, had in enumerate(old) if not had and (new is None or new[slot])]


def _scans(environment: Environment, slots: Sequence[int]) -> Iterator[Iterator[list[Row]]]:
    scan = partial(scan_predictions, environment)
    return (scan(start, stop) for start, stop in runs_of(slots))


def coming(prediction: Prediction) -> Coming:
    """Return what is to be known of a unit before it is here; of none, an empty name."""
    unit = prediction.unit or ""
    return Coming(prediction.experiment or "", unit, prediction.arm, prediction.phase)


def _outcome(prediction: Prediction, label: Label) -> Outcome:
    return Outcome(prediction.target(label.label), label.time_us - prediction.t_us)


def cohort(prediction: Prediction) -> CohortKey:
    """Return the cohort that a prediction counts in: its version, route, arm and UTC day."""
    served = ServedKey(prediction.model, prediction.version, prediction.route, prediction.arm)
    return cohort_of(served, prediction.t_us)
