"""Live performance: labels joined to what was served, by the day of the PREDICTION.

A cohort is one UTC day of predictions of one (model version, route, arm).  Its coverage says how
much of it has labels; a young cohort's metrics are those of the labels that came early.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from struct import Struct
from typing import Any, Final, NamedTuple

from mlpd.core.errors import ConfigurationError
from mlpd.core.time import DAY_US
from mlpd.monitoring.live import ServedKey
from mlpd.monitoring.scores import LabelledScores, Performance, merge_scores

COHORTS_MAX: Final = 4_000
"""Cohorts held at most; the oldest days go first.  400 days of ten (version, route, arm)."""

_HEADER: Final = Struct("<qqq")


class CohortKey(NamedTuple):
    """`day_us` is the start of the prediction's UTC day."""

    served: ServedKey
    day_us: int


def cohort_of(served: ServedKey, prediction_time_us: int) -> CohortKey:
    """Return the cohort of a prediction."""
    return CohortKey(served, prediction_time_us - prediction_time_us % DAY_US)


@dataclass(frozen=True, slots=True)
class CohortReport:
    """Several cohorts together; `coverage` is labelled / predictions, None without predictions."""

    predictions: int
    labelled: int
    coverage: float | None
    revisions: int
    unscored: int
    performance: Performance

    def to_dict(self) -> dict[str, Any]:
        """Return JSON- and msgpack-able values."""
        return asdict(self)


class _Cohort:
    """Counts of one cohort; `unscored` labels belong to scores that are no probabilities."""

    __slots__ = ("predictions", "revisions", "scores", "unscored")

    def __init__(self, scores: LabelledScores | None = None) -> None:
        self.predictions = 0
        self.revisions = 0
        self.unscored = 0
        self.scores = scores or LabelledScores()

    def to_bytes(self) -> bytes:
        header = _HEADER.pack(self.predictions, self.revisions, self.unscored)
        return header + self.scores.to_bytes()

    @classmethod
    def from_bytes(cls, data: bytes) -> "_Cohort":
        cohort = cls(LabelledScores.from_bytes(data[_HEADER.size :]))
        cohort.predictions, cohort.revisions, cohort.unscored = _HEADER.unpack_from(data)
        return cohort


@dataclass(frozen=True, slots=True)
class CohortChanges:
    """What storage must do, in the transaction that stores the labels."""

    put: dict[CohortKey, bytes]
    delete: tuple[CohortKey, ...]


class PerformanceTable:
    """All cohorts of a daemon.  One thread at a time."""

    def __init__(self, *, cohorts_max: int = COHORTS_MAX) -> None:
        if cohorts_max < 1:
            raise ConfigurationError(f"cohorts_max is {cohorts_max}, must be at least 1")
        self._cohorts_max = cohorts_max
        self._cohorts: dict[CohortKey, _Cohort] = {}
        self._dirty: set[CohortKey] = set()
        self._deleted: set[CohortKey] = set()

    def add_predictions(self, key: CohortKey, count: int) -> None:
        """Note that `count` more predictions belong to a cohort: what coverage is measured by."""
        self._open(key).predictions += count

    def record(
        self, key: CohortKey, score: float, old_label: int | None, new_label: int | None
    ) -> None:
        """Note a label (0 or 1) of one prediction of the cohort.

        The caller keeps labels by prediction id, last label_time wins, and hands over the one that
        this replaces (None for the first) and the new one (None to take it back).
        """
        cohort = self._open(key)
        if old_label == new_label:
            return
        if not cohort.scores.record(score, old_label, new_label):
            cohort.unscored += (new_label is not None) - (old_label is not None)
        if old_label is not None:
            cohort.revisions += 1

    def keys(self) -> list[CohortKey]:
        """Return the cohorts, oldest day first."""
        return sorted(self._cohorts, key=lambda key: (key.day_us, str(key.served)))

    def report(self, keys: Iterable[CohortKey]) -> CohortReport:
        """Return several cohorts as one; unknown keys count as empty.

        The AUC of the union is exact while each cohort's is, not a mean of days.
        """
        cohorts = [self._cohorts[key] for key in keys if key in self._cohorts]
        performance = merge_scores([cohort.scores for cohort in cohorts]).performance()
        predictions = sum(cohort.predictions for cohort in cohorts)
        unscored = sum(cohort.unscored for cohort in cohorts)
        labelled = performance.rows + unscored
        return CohortReport(
            predictions=predictions,
            labelled=labelled,
            coverage=labelled / predictions if predictions else None,
            revisions=sum(cohort.revisions for cohort in cohorts),
            unscored=unscored,
            performance=performance,
        )

    def restore(self, key: CohortKey, data: bytes) -> None:
        """Take back a stored cohort at start; raises ValidationError if it isn't one."""
        self._cohorts[key] = _Cohort.from_bytes(data)

    def take_changes(self) -> CohortChanges:
        """Return what changed since the last call, and forget that it did."""
        put = {key: self._cohorts[key].to_bytes() for key in self.keys() if key in self._dirty}
        changes = CohortChanges(put, tuple(self._deleted))
        self._dirty, self._deleted = set(), set()
        return changes

    def _open(self, key: CohortKey) -> _Cohort:
        self._dirty.add(key)
        cohort = self._cohorts.get(key)
        if cohort is None:
            cohort = self._cohorts[key] = _Cohort()
            self._deleted.discard(key)
            if len(self._cohorts) > self._cohorts_max:
                self._forget(self.keys()[0])
        return cohort

    def _forget(self, key: CohortKey) -> None:
        del self._cohorts[key]
        self._dirty.discard(key)
        self._deleted.add(key)
