"""What predictions and labels teach: performance and experiments, live and rebuilt after a start.

Both are sums over the prediction log and its labels.  After a start they are rebuilt from there
while serving goes on; what happens meanwhile waits and is taken in afterwards, so nothing counts
twice: predictions made since the start are skipped by the scan, and a label changed since is read
as it was before.
"""

import asyncio
from collections.abc import Iterable, Sequence

from mlpd.daemon.experiments import Experiments
from mlpd.daemon.feedback import LabelChange
from mlpd.daemon.predictions import Label, Prediction, PredictionIds, scan_predictions
from mlpd.monitoring.live import ServedKey
from mlpd.monitoring.performance import CohortKey, Outcome, PerformanceTable, cohort_of
from mlpd.storage.environment import Environment

_SLICE_ROWS = 100
"""Rows per turn of the loop while rebuilding: below 1 ms."""


class Outcomes:
    """Feeds performance and experiments; every method belongs to the loop."""

    def __init__(
        self, performance: PerformanceTable, experiments: Experiments, ids: PredictionIds
    ) -> None:
        self._performance = performance
        self._experiments = experiments
        self._ids = ids
        self._rebuilding = True
        self._later: list[Prediction | LabelChange] = []
        self._before: dict[str, Label | None] = {}

    @property
    def rebuilt(self) -> bool:
        """Whether the prediction log of before the start is taken in."""
        return not self._rebuilding

    def served(self, predictions: Sequence[Prediction]) -> None:
        """Take in predictions that were answered."""
        if self._rebuilding:
            self._later += predictions
            return
        self._experiments.exposed(predictions)
        for prediction in predictions:
            self._performance.add_predictions(cohort(prediction), 1)

    def labelled(self, changes: Iterable[LabelChange]) -> None:
        """Take in labels that took effect."""
        for change in changes:
            if self._rebuilding:
                self._before.setdefault(change.prediction.prediction_id, change.old)
                self._later.append(change)
            else:
                self._label(change)

    def joined(self, pairs: Iterable[tuple[Prediction, Label]]) -> None:
        """Take in labels that waited for the predictions that are stored now."""
        self.labelled(LabelChange(prediction, None, label) for prediction, label in pairs)

    async def rebuild(self, environment: Environment) -> int:
        """Take in the prediction log as it was at the start; returns its rows.  Once, at start."""
        scan = scan_predictions(environment)
        total = 0
        while (rows := await asyncio.to_thread(next, scan, None)) is not None:
            await self._experiments.prepare(p for p, _ in rows)
            for start in range(0, len(rows), _SLICE_ROWS):
                total += self._take(rows[start : start + _SLICE_ROWS])
                await asyncio.sleep(0)
        self._rebuilding = False
        later, self._later, self._before = self._later, [], {}
        for item in later:
            if isinstance(item, Prediction):
                self.served([item])
            else:
                self._label(item)
        return total

    def _take(self, rows: Sequence[tuple[Prediction, Label | None]]) -> int:
        old = [(p, label) for p, label in rows if not self._ids.made(p.prediction_id)]
        self._experiments.exposed(p for p, _ in old)
        for prediction, label in old:
            self._performance.add_predictions(cohort(prediction), 1)
            before = self._before.get(prediction.prediction_id, label)
            if before is not None:
                self._label(LabelChange(prediction, None, before))
        return len(old)

    def _label(self, change: LabelChange) -> None:
        prediction, old, new = change.prediction, change.old, change.new
        if old is None or old.label != new.label:
            self._experiments.labelled(prediction, None if old is None else old.label, new.label)
        before = None if old is None else _outcome(prediction, old)
        self._performance.record(
            cohort(prediction), prediction.score, before, _outcome(prediction, new)
        )


def _outcome(prediction: Prediction, label: Label) -> Outcome:
    return Outcome(prediction.target(label.label), label.time_us - prediction.t_us)


def cohort(prediction: Prediction) -> CohortKey:
    """Return the cohort that a prediction counts in: its version, route, arm and UTC day."""
    served = ServedKey(prediction.model, prediction.version, prediction.route, prediction.arm)
    return cohort_of(served, prediction.t_us)
