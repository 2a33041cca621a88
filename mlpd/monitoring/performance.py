"""Live performance: labels joined to what was served, by the day of the PREDICTION.

A cohort is one UTC day of predictions of one (model version, route, arm).  Its coverage says how
much of it has labels; a young cohort's metrics are those of the labels that came early, so it is
`mature`, and worth judging, only once it is older than 95 % of the label delays.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final, NamedTuple

import numpy as np

from mlpd.core.errors import ConfigurationError, ValidationError
from mlpd.core.time import DAY_US
from mlpd.monitoring.delays import Delays, merge_delays
from mlpd.monitoring.live import ServedKey
from mlpd.monitoring.scores import LabelledScores, Performance, merge_scores

COHORTS_MAX: Final = 4_000
"""Cohorts held at most; the oldest days go first.  400 days of ten (version, route, arm)."""

MATURE_SHARE: Final = 0.95

_UNIT: Final = 2.0**32
_CLASSES: Final = (0.0, 1.0)


class CohortKey(NamedTuple):
    """`day_us` is the start of the prediction's UTC day."""

    served: ServedKey
    day_us: int


class Outcome(NamedTuple):
    """A label, and how long after its prediction it is said to have been known."""

    label: float
    delay_us: int = 0


def cohort_of(served: ServedKey, prediction_time_us: int) -> CohortKey:
    """Return the cohort of a prediction."""
    return CohortKey(served, prediction_time_us - prediction_time_us % DAY_US)


@dataclass(frozen=True, slots=True)
class Errors:
    """Of the labels as numbers: None without any; `bias` is the mean of score - label."""

    rows: int
    rmse: float | None
    mae: float | None
    bias: float | None


@dataclass(frozen=True, slots=True)
class CohortReport:
    """Several cohorts together; `coverage` is labelled / predictions, None without predictions.

    `performance` is of labels that are classes (0 or 1) with scores that are probabilities,
    `unscored` counts the others; `errors` is of all.  Delays are right to 9 %, None without labels.
    """

    predictions: int
    labelled: int
    coverage: float | None
    revisions: int
    unscored: int
    delay_p50_s: float | None
    delay_p95_s: float | None
    performance: Performance
    errors: Errors

    def to_dict(self) -> dict[str, Any]:
        """Return JSON- and msgpack-able values."""
        return asdict(self)


class _Errors:
    """Sums of score - label in units of 2^-32: they can be taken back without residue."""

    __slots__ = ("absolute", "rows", "signed", "square")

    def __init__(self) -> None:
        self.rows = self.signed = self.absolute = self.square = 0

    def add(self, error: float, weight: int) -> None:
        """Note an error, or with weight -1 take it back; one whose square overflows is left out."""
        if not error * error < math.inf:
            return
        self.rows += weight
        self.signed += weight * round(error * _UNIT)
        self.absolute += weight * round(abs(error) * _UNIT)
        self.square += weight * round(error * error * _UNIT)


class _Cohort:
    """Counts of one cohort."""

    __slots__ = ("delays", "errors", "predictions", "revisions", "scores", "unscored")

    def __init__(self) -> None:
        self.predictions = self.revisions = self.unscored = 0
        self.scores = LabelledScores()
        self.errors = _Errors()
        self.delays = Delays()

    def note(self, score: float, outcome: Outcome, weight: int) -> None:
        """Add a label (weight 1), or take it back (-1)."""
        label = int(outcome.label) if outcome.label in _CLASSES else None
        change = (None, label) if weight > 0 else (label, None)
        if label is None or not self.scores.record(score, *change):
            self.unscored += weight
        self.errors.add(score - outcome.label, weight)
        self.delays.add(outcome.delay_us, weight)

    def pack(self) -> dict[str, Any]:
        """Return the counts as what msgpack takes; sums of squares may exceed its integers."""
        scores, errors = self.scores, self.errors
        scores.fold()
        sums = scores.log_loss_units, scores.square_units
        more = errors.rows, errors.signed, errors.absolute, errors.square
        return {
            "predictions": self.predictions,
            "revisions": self.revisions,
            "unscored": self.unscored,
            "is_exact": scores.is_exact,
            "arrays": [a.tobytes() for a in (scores.keys, scores.labels, scores.calibration)],
            "sums": [f"{number:x}" for number in (*sums, *more)],
            "delays": [[index, count] for index, count in self.delays.counts.items()],
        }

    @classmethod
    def unpack(cls, packed: Mapping[str, Any]) -> "_Cohort":
        """Return what `pack` packed."""
        cohort = cls()
        for name in ("predictions", "revisions", "unscored"):
            setattr(cohort, name, int(packed[name]))
        scores, errors = cohort.scores, cohort.errors
        keys, labels, calibration = packed["arrays"]
        scores.is_exact = packed["is_exact"]
        scores.keys = np.frombuffer(keys, np.float64)
        scores.labels = np.frombuffer(labels, np.int64).reshape(2, len(scores.keys))
        scores.calibration = np.frombuffer(calibration, np.int64).reshape(3, -1)
        sums = [int(text, 16) for text in packed["sums"]]
        scores.log_loss_units, scores.square_units = sums[:2]
        errors.rows, errors.signed, errors.absolute, errors.square = sums[2:]
        cohort.delays.counts.update(dict(packed["delays"]))
        return cohort

    @classmethod
    def sum_of(cls, parts: Sequence["_Cohort"]) -> "_Cohort":
        """Return the counts of all parts; in whole numbers, so in any order."""
        total = cls()
        for name in ("predictions", "revisions", "unscored"):
            setattr(total, name, sum(getattr(part, name) for part in parts))
        for name in _Errors.__slots__:
            setattr(total.errors, name, sum(getattr(part.errors, name) for part in parts))
        total.scores = merge_scores([part.scores for part in parts])
        total.delays = merge_delays(part.delays for part in parts)
        return total


class PerformanceTable:
    """All cohorts of a daemon, rebuilt from the prediction log at its start.  One thread."""

    def __init__(self, *, cohorts_max: int = COHORTS_MAX) -> None:
        if cohorts_max < 1:
            raise ConfigurationError(f"cohorts_max is {cohorts_max}, must be at least 1")
        self._cohorts_max = cohorts_max
        self._cohorts: dict[CohortKey, _Cohort] = {}

    def add_predictions(self, key: CohortKey, count: int) -> None:
        """Note that `count` more predictions belong to a cohort: what coverage is measured by."""
        self._open(key).predictions += count

    def take_out(
        self, key: CohortKey, score: float, outcome: Outcome | None, revisions: int
    ) -> None:
        """Forget one prediction of a cohort, with its label and how often that was revised.

        Nothing is left of a cohort without predictions; one that was dropped before stays so.
        """
        cohort = self._cohorts.get(key)
        if cohort is None:
            return
        if outcome is not None:
            cohort.note(score, outcome, -1)
        cohort.predictions -= 1
        cohort.revisions -= min(revisions, cohort.revisions)
        if cohort.predictions <= 0:
            del self._cohorts[key]

    def add_revisions(self, key: CohortKey, count: int) -> None:
        """Note that a label which is new here was revised so often before."""
        if count:
            self._open(key).revisions += count

    def record(
        self, key: CohortKey, score: float, old: Outcome | None, new: Outcome | None
    ) -> None:
        """Note the label of one prediction of the cohort.

        The caller keeps labels by prediction id, last label_time wins, and hands over the one that
        this replaces (None for the first) and the new one (None to take it back).
        """
        cohort = self._open(key)
        if old is not None:
            cohort.note(score, old, -1)
        if new is not None:
            cohort.note(score, new, 1)
        if old is not None and (new is None or old.label != new.label):
            cohort.revisions += 1

    def pack(self, model: str) -> list[list[Any]]:
        """Return the cohorts of a model as what msgpack takes, for `merge_packed`."""
        return [
            [key.served.version, key.served.route, key.served.arm, key.day_us, cohort.pack()]
            for key, cohort in self._cohorts.items()
            if key.served.model == model
        ]

    @classmethod
    def merge_packed(cls, model: str, parts: Iterable[Any]) -> "PerformanceTable":
        """Return the sum of what several tables packed of a model.

        Raises ValidationError(code="invalid_part").
        """
        found: dict[CohortKey, list[_Cohort]] = {}
        try:
            for version, route, arm, day_us, packed in (row for part in parts for row in part):
                key = CohortKey(ServedKey(model, version, route, arm), day_us)
                found.setdefault(key, []).append(_Cohort.unpack(packed))
        except (KeyError, TypeError, ValueError) as error:
            raise ValidationError(
                f"these are no cohorts: {error!r}"[:200], code="invalid_part"
            ) from None
        table = cls(cohorts_max=max(1, len(found)))
        table._cohorts = {key: _Cohort.sum_of(cohorts) for key, cohorts in found.items()}
        return table

    def keys(self) -> list[CohortKey]:
        """Return the cohorts, oldest day first."""
        return sorted(self._cohorts, key=lambda key: (key.day_us, str(key.served)))

    def keys_since(self, oldest_us: int) -> list[CohortKey]:
        """Return the cohorts of days after `oldest_us`, in no order; cheap, unlike `keys`."""
        return [key for key in self._cohorts if key.day_us > oldest_us]

    def labelled(self, keys: Iterable[CohortKey]) -> int:
        """Return how many labels several cohorts have; cheap, unlike `report`."""
        cohorts = [self._cohorts[key] for key in keys if key in self._cohorts]
        return sum(cohort.scores.rows + cohort.unscored for cohort in cohorts)

    def maturity_s(self, keys: Iterable[CohortKey]) -> float | None:
        """Return the seconds within which 95 % of the labels of several cohorts came.

        None without labels.  Labels still to come make it grow: it is that of what is known.
        """
        parts = [self._cohorts[key].delays for key in keys if key in self._cohorts]
        return merge_delays(parts).quantile_s(MATURE_SHARE)

    def report(self, keys: Iterable[CohortKey]) -> CohortReport:
        """Return several cohorts as one; unknown keys count as empty.

        The AUC of the union is exact while each cohort's is, not a mean of days.
        """
        cohorts = [self._cohorts[key] for key in keys if key in self._cohorts]
        performance = merge_scores([cohort.scores for cohort in cohorts]).performance()
        predictions = sum(cohort.predictions for cohort in cohorts)
        unscored = sum(cohort.unscored for cohort in cohorts)
        delays = merge_delays(cohort.delays for cohort in cohorts)
        labelled = performance.rows + unscored
        return CohortReport(
            predictions=predictions,
            labelled=labelled,
            coverage=labelled / predictions if predictions else None,
            revisions=sum(cohort.revisions for cohort in cohorts),
            unscored=unscored,
            delay_p50_s=delays.quantile_s(0.5),
            delay_p95_s=delays.quantile_s(MATURE_SHARE),
            performance=performance,
            errors=_sum_errors([cohort.errors for cohort in cohorts]),
        )

    def _open(self, key: CohortKey) -> _Cohort:
        cohort = self._cohorts.get(key)
        if cohort is None:
            cohort = self._cohorts[key] = _Cohort()
            if len(self._cohorts) > self._cohorts_max:
                del self._cohorts[self.keys()[0]]
        return cohort


def is_mature(day_us: int, maturity_s: float | None, now_us: int) -> bool:
    """Tell whether a day of predictions is older, as a whole, than labels take."""
    return maturity_s is not None and day_us + DAY_US + maturity_s * 1e6 <= now_us


def _sum_errors(parts: list[_Errors]) -> Errors:
    rows = sum(part.rows for part in parts)
    if not rows:
        return Errors(0, None, None, None)
    square, absolute, signed = (
        sum(getattr(part, name) for part in parts) / rows / _UNIT
        for name in ("square", "absolute", "signed")
    )
    return Errors(rows, math.sqrt(square), absolute, signed)
