"""Child entry `performance`: join a model's predictions with their labels, and judge them.

By version: each day as it was realized and as it was estimated, each slice, concept drift.
"""

import gc
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from msgpack import unpackb
from numpy.typing import NDArray

from mlpd.core.time import DAY_US, format_time
from mlpd.daemon.child import Send
from mlpd.daemon.predictions import prediction_key
from mlpd.daemon.served_rows import ServedPart, read_files, scan_served
from mlpd.daemon.slices import NULL, SliceReader
from mlpd.monitoring.calibration import Calibration, Task, losses_of
from mlpd.monitoring.estimate import estimate_performance
from mlpd.monitoring.loss_drift import DayLoss, LossDrift, judge_losses
from mlpd.monitoring.performance import MATURE_SHARE, is_mature
from mlpd.monitoring.scores import LabelledScores

SLICES_MAX = 50
"""Slices shown of a version, the largest ones; the other rows are gathered as one."""
OTHER = "(other)"
METRICS = ("auc", "log_loss", "brier", "precision", "recall", "calibration_error")

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

_UNLABELLED = (np.nan, 0, 0)
_CHOSEN = 13
"""Place of the chosen class in a row, of a model of several classes alone."""


@dataclass(frozen=True, slots=True)
class Rows:
    """Predictions of a version: int64 [n] times, float64 [n] scores and labels (NaN: none yet).

    `delays_us` of those with a label; `slices` names each row's slice, or is None.  Until files
    are read a slice is the row's key where it lies in one, and None where the row has none.
    """

    t_us: Ints
    scores: Floats
    labels: Floats
    delays_us: Ints
    slices: NDArray[Any] | None

    def take(self, picked: NDArray[Any]) -> "Rows":
        """Return some rows, by a mask or by numbers."""
        return Rows(
            self.t_us[picked],
            self.scores[picked],
            self.labels[picked],
            self.delays_us[picked],
            None if self.slices is None else self.slices[picked],
        )

    def named(self, names: Mapping[bytes, str]) -> "Rows":
        """Return the rows with a name for each slice that is a key; without any, if none has one.

        NULL stands where a row has no value of what others have.
        """
        if self.slices is None:
            return self
        found = [names.get(s) if isinstance(s, bytes) else s for s in self.slices.tolist()]
        if not any(name is not None for name in found):
            return replace(self, slices=None)
        return replace(self, slices=np.array([NULL if s is None else s for s in found]))

    @property
    def labelled(self) -> "Rows":
        """The rows with a label."""
        return self.take(~np.isnan(self.labels))


def run(request: dict[str, Any], send: Send) -> dict[str, Any]:
    """Return what predictions of `model` made in [start_us, end_us) became.

    `versions` maps numbers, as text, to `calibration` (or null) and `slice` (what SliceReader
    takes, or null).  Rows of other versions are counted alone.
    """
    gc.disable()  # rows by the million that hold no cycles: looking for some doubled the time
    versions = request["versions"]
    readers = {
        int(number): None if v["slice"] is None else SliceReader.from_dict(v["slice"])
        for number, v in versions.items()
    }
    found = _collect(scan_served(request), request["model"], readers, send)
    if any(reader is not None for reader in readers.values()):
        found = _look_up(found, readers, request)
    return {
        "versions": [
            _judge(
                number,
                rows,
                _calibration(versions.get(str(number), {}).get("calibration")),
                request["now_us"],
            )
            for number, rows in sorted(found.items())
        ]
    }


def _collect(
    parts: Iterator[ServedPart], model: str, readers: Mapping[int, SliceReader | None], send: Send
) -> dict[int, Rows]:
    """Return the rows of the model by version; 5 us each."""
    found: dict[int, list[Rows]] = {}
    seen = 0
    for part in parts:
        by_version: dict[int, list[int]] = {}
        rows = [unpackb(value) for value in part.values]
        for index in np.flatnonzero(part.inside).tolist():
            row = rows[index]
            if row[4] == model:
                by_version.setdefault(row[5], []).append(index)
        for version, picked in by_version.items():
            found.setdefault(version, []).append(_columns(part, rows, picked, readers.get(version)))
        seen += len(rows)
        send({"kind": "progress", "rows": seen})
    return {version: _concat(chunks) for version, chunks in found.items()}


def _columns(
    part: ServedPart, rows: list[Any], picked: list[int], reader: SliceReader | None
) -> Rows:
    stored = [part.labels[i] for i in picked]
    known = [_UNLABELLED if text is None else unpackb(text) for text in stored]
    labels = np.array(
        [_target(rows[i], label[0]) for i, label in zip(picked, known, strict=True)], np.float64
    )
    known_us = np.array([label[1] for label in known], np.int64)
    t_us, names = part.t_us[picked], None
    if reader is not None:
        names = _names(reader, [rows[i] for i in picked], [part.keys[i] for i in picked])
    return Rows(
        t_us,
        np.array([rows[i][6] for i in picked], np.float64),
        labels,
        np.where(np.isnan(labels), 0, np.maximum(known_us - t_us, 0)),
        None if names is None else _objects(names),
    )


def _target(row: list[Any], label: float) -> float:
    """Return what the score should have been: of several classes whether the chosen one came."""
    chosen = row[_CHOSEN] if len(row) > _CHOSEN else None
    return label if chosen is None or label != label else float(label == chosen)  # noqa: PLR0124


def _names(
    reader: SliceReader, rows: list[Any], keys: list[bytes]
) -> list[str | bytes | None] | None:
    """Return the rows' slices; of a row whose vector and request lie in a file its key."""
    here = [i for i, row in enumerate(rows) if row[7] is not None]
    found = reader.read([rows[i][8] for i in here], [rows[i][7] for i in here]) if here else None
    if found is None and len(here) == len(rows):
        return None
    names: list[str | bytes | None] = [*keys]
    for place, i in enumerate(here):
        names[i] = None if found is None else found[place]
    return names


def _look_up(
    found: Mapping[int, Rows], readers: Mapping[int, SliceReader | None], request: Mapping[str, Any]
) -> dict[int, Rows]:
    """Return the rows with the slices of those that were keys: from the files, one at a time."""
    kept = [rows.slices for rows in found.values() if rows.slices is not None]
    wanted = {name for names in kept for name in names.tolist() if isinstance(name, bytes)}
    names: dict[bytes, str] = {}
    for predictions in read_files(request) if wanted else ():
        for version, reader in readers.items():
            mine = [p for p in predictions if (p.model, p.version) == (request["model"], version)]
            keys = [prediction_key(p.prediction_id) for p in mine]
            if reader is None or wanted.isdisjoint(keys):
                continue
            given, vectors = [p.given for p in mine], [p.vector.tobytes() for p in mine]
            read = reader.read(given, vectors)
            if read is not None:
                names |= dict(zip(keys, read, strict=True))
    return {version: rows.named(names) for version, rows in found.items()}


def _objects(names: Sequence[str | bytes | None]) -> NDArray[Any]:
    found = np.empty(len(names), object)
    found[:] = names
    return found


def _concat(chunks: list[Rows]) -> Rows:
    is_sliced = any(chunk.slices is not None for chunk in chunks)
    sliced: list[NDArray[Any]] = [
        np.full(len(chunk.t_us), None, object) if chunk.slices is None else chunk.slices
        for chunk in chunks
    ]
    return Rows(
        np.concatenate([chunk.t_us for chunk in chunks]),
        np.concatenate([chunk.scores for chunk in chunks]),
        np.concatenate([chunk.labels for chunk in chunks]),
        np.concatenate([chunk.delays_us for chunk in chunks]),
        np.concatenate(sliced) if is_sliced else None,
    )


def _calibration(document: Mapping[str, Any] | None) -> Calibration | None:
    return None if document is None else Calibration.from_dict(document)


def _judge(
    version: int, rows: Rows, calibration: Calibration | None, now_us: int
) -> dict[str, Any]:
    judge = _Judge(rows, calibration)
    maturity_s = judge.maturity_us / 1e6 if judge.maturity_us is not None else None
    days = [
        (int(day_us), is_mature(int(day_us), maturity_s, now_us), part)
        for day_us, part in _groups(rows, rows.t_us - rows.t_us % DAY_US)
    ]
    drift = judge.drift([(day_us, part) for day_us, mature, part in days if mature])
    return {
        "version": version,
        "predictions": len(rows.t_us),
        "labelled": len(rows.labelled.t_us),
        "task": judge.task,
        "calibrated": calibration is not None,
        "delay_p50_s": judge.delay_s(0.5),
        "delay_p95_s": judge.delay_s(MATURE_SHARE),
        "days": [
            {"day": format_time(day_us)[:10], "mature": mature, **judge.group(part)}
            for day_us, mature, part in days
        ],
        "slices": [{"value": value, **judge.group(part)} for value, part in _slices(rows)],
        "concept": _describe(drift),
    }


class _Judge:
    """Metrics of groups of one version's rows."""

    def __init__(self, rows: Rows, calibration: Calibration | None) -> None:
        labelled = rows.labelled
        self._calibration = calibration
        self._delays_us = np.sort(labelled.delays_us)
        self.task: Task = _task_of(labelled) if calibration is None else calibration.task
        self.maturity_us = self._delay_us(MATURE_SHARE)

    def delay_s(self, share: float) -> float | None:
        """Return the delay below which this share of the labels came."""
        delay_us = self._delay_us(share)
        return None if delay_us is None else delay_us / 1e6

    def group(self, rows: Rows) -> dict[str, Any]:
        """Return size and coverage, metrics of all labels and of those at maturity, estimates.

        `at_maturity` takes labels that came within the p95 delay alone: cohorts of any age can be
        compared by it.
        """
        labelled = rows.labelled
        return {
            "predictions": len(rows.t_us),
            "labelled": len(labelled.t_us),
            "coverage": len(labelled.t_us) / len(rows.t_us),
            "realized": self._metrics(labelled),
            "at_maturity": self._metrics(self._in_time(labelled)),
            "estimated": self._estimated(rows.scores),
        }

    def drift(self, days: list[tuple[int, Rows]]) -> LossDrift:
        """Return the sequence of losses over mature days, of labels at maturity."""
        parts = []
        for day_us, rows in days:
            in_time = self._in_time(rows.labelled)
            losses = losses_of(in_time.labels, in_time.scores, self.task)
            kept = losses[np.isfinite(losses)]
            sums = float(kept.sum()), float((kept**2).sum())
            parts.append(DayLoss(day_us, len(kept), *sums))
        return judge_losses(self._calibration, parts)

    def _delay_us(self, share: float) -> int | None:
        count = len(self._delays_us)
        return int(self._delays_us[int(np.ceil(share * count)) - 1]) if count else None

    def _in_time(self, labelled: Rows) -> Rows:
        limit_us = 0 if self.maturity_us is None else self.maturity_us
        return labelled.take(labelled.delays_us <= limit_us)

    def _metrics(self, labelled: Rows) -> dict[str, float | None]:
        if self.task == "regression":
            return _number_metrics(labelled.scores - labelled.labels)
        scores = LabelledScores(exact_max=max(1, len(labelled.t_us)))
        classes = np.isin(labelled.labels, (0.0, 1.0))
        scores.record_many(labelled.scores[classes], labelled.labels[classes].astype(np.int64))
        whole = scores.performance()
        counts = {"rows": whole.rows, "positives": whole.positives}
        return {**counts, **{name: getattr(whole, name) for name in METRICS}}

    def _estimated(self, scores: Floats) -> dict[str, Any] | None:
        if self._calibration is None or not self._calibration.scores:
            return None
        return asdict(estimate_performance(scores, self._calibration.chances_of(scores)))


def _task_of(labelled: Rows) -> Task:
    """Return what the labels look like, of a version that brings no calibration."""
    chances = (labelled.scores >= 0.0) & (labelled.scores <= 1.0)
    return "binary" if (chances & np.isin(labelled.labels, (0.0, 1.0))).all() else "regression"


def _number_metrics(errors: Floats) -> dict[str, float | None]:
    kept = errors[np.isfinite(errors**2)]
    if not len(kept):
        return {"rows": 0, "rmse": None, "mae": None, "bias": None}
    return {
        "rows": len(kept),
        "rmse": float(np.sqrt((kept**2).mean())),
        "mae": float(np.abs(kept).mean()),
        "bias": float(kept.mean()),
    }


def _groups(rows: Rows, keys: NDArray[Any]) -> Iterator[tuple[Any, Rows]]:
    """Yield each key with its rows, in order of the keys."""
    order = np.argsort(keys, kind="stable")
    distinct, first = np.unique(keys[order], return_index=True)
    for key, picked in zip(distinct.tolist(), np.split(order, first[1:]), strict=True):
        yield key, rows.take(picked)


def _slices(rows: Rows) -> Iterator[tuple[str, Rows]]:
    """Yield the largest slices with their rows, largest first, then all others as one."""
    if rows.slices is None:
        return
    groups = sorted(_groups(rows, rows.slices), key=lambda pair: -len(pair[1].t_us))
    yield from groups[:SLICES_MAX]
    if len(groups) > SLICES_MAX:
        names = [name for name, _ in groups[:SLICES_MAX]]
        yield OTHER, rows.take(~np.isin(rows.slices, names))


def _describe(drift: LossDrift) -> dict[str, Any]:
    return {
        "state": drift.state,
        "since": None if drift.since_us is None else format_time(drift.since_us)[:10],
        "reference_loss": drift.reference_loss,
        "sequence": [
            {
                "day": format_time(at.day_us)[:10],
                "rows": at.rows,
                "loss": at.loss,
                "difference": at.difference,
                "low": at.low,
                "high": at.high,
            }
            for at in drift.sequence
        ],
    }
